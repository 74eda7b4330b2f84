// Space-filling curves on the CPU: cells to codes along a curve, and codes to an order by a stable radix sort.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "array.h"
#include "blocks.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

// A step of a curve's table covers 3 levels: 9 bits of a z code in, 9 bits of the curve's code out.
constexpr int kStepBits = 9;
constexpr uint64_t kStepMask = (1 << kStepBits) - 1;

// Bit i of 16 goes to bit 3 i.
[[gnu::always_inline]] inline uint64_t spread(uint64_t v) {
  v = (v | v << 16) & 0xFF0000FF;
  v = (v | v << 8) & 0x00F00F00F00F;
  v = (v | v << 4) & 0x0C30C30C30C3;
  return (v | v << 2) & 0x249249249249;
}

[[gnu::always_inline]] inline uint64_t z_code(uint32_t first, uint32_t second, uint32_t third) {
  return spread(first & 0xFFFF) << 2 | spread(second & 0xFFFF) << 1 | spread(third & 0xFFFF);
}

// Codes along the z curve whose most significant axis is `first`.
PC3D_CLONES void write_z_codes(const int32_t *grid, int64_t rows, int first, uint64_t high, int64_t *codes) {
  const int second = 1 - first;
  for (int64_t i = 0; i < rows; ++i)
    codes[i] = static_cast<int64_t>(high | z_code(grid[3 * i + first], grid[3 * i + second], grid[3 * i + 2]));
}

struct Curve {
  const int16_t *table;  // [state][9 bits of the z code] -> next state << 9 | 9 bits of the code
  uint64_t start;
  int steps;
};

void follow(const Curve &curve, int64_t *codes, int64_t rows, uint64_t high) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t z = static_cast<uint64_t>(codes[i]);
    uint64_t state = curve.start << kStepBits, code = 0;
    for (int shift = kStepBits * (curve.steps - 1); shift >= 0; shift -= kStepBits) {
      const uint64_t entry = static_cast<uint64_t>(curve.table[state | (z >> shift & kStepMask)]);
      code = code << kStepBits | (entry & kStepMask);
      state = entry & ~kStepMask;
    }
    codes[i] = static_cast<int64_t>(high | code);
  }
}

void check_table(const Array<const int16_t, 2> &table, int64_t start) {
  const int64_t states = static_cast<int64_t>(table.shape(0));
  const int16_t *begin = table.data(), *end = begin + table.size();
  if (table.shape(1) != kStepMask + 1 || start < 0 || start >= states ||
      !std::all_of(begin, end, [&](int16_t entry) { return entry >= 0 && entry >> kStepBits < states; }))
    throw std::invalid_argument("not a table of a curve");
}

// Codes of the cells along the z curve, or along the curve of `table` (its walk begins in state `start`).
nb::object curve_codes(Array<const int32_t, 2> grid, Array<const int64_t, 1> offsets, int depth, bool transposed,
                       std::optional<Array<const int16_t, 2>> table, int64_t start) {
  const int64_t rows = static_cast<int64_t>(grid.shape(0));
  if (grid.shape(1) != 3) throw std::invalid_argument("grid must be (N, 3)");
  if (depth < 0 || depth > 16) throw std::invalid_argument("depth must be 0 to 16");
  if (table) check_table(*table, start);
  const std::vector<Rows> blocks = make_blocks(offsets, rows);
  Buffer<int64_t> codes(rows);
  {
    nb::gil_scoped_release release;
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const int64_t count = blocks[i].end - blocks[i].begin;
      int64_t *out = codes.data() + blocks[i].begin;
      const uint64_t cloud = static_cast<uint64_t>(blocks[i].cloud) << 3 * depth;
      write_z_codes(grid.data() + 3 * blocks[i].begin, count, transposed, table ? 0 : cloud, out);
      if (table) follow({table->data(), static_cast<uint64_t>(start), (depth + 2) / 3}, out, count, cloud);
    });
  }
  return to_torch(std::move(codes));
}

// Row at each position of the order, and position of each row, in the `word`s: the memory of the sort is theirs, because
// fresh pages cost as much as a pass over them.
struct Order {
  Buffer<PackedRow> rows, positions;
};

nb::object words_to_torch(Buffer<PackedRow> buffer) {
  const size_t shape[1] = {static_cast<size_t>(buffer.size())};
  PackedRow *memory = buffer.release();
  nb::capsule owner(memory, [](void *p) noexcept { deallocate(p); });
  return nb::cast(nb::ndarray<nb::pytorch, int64_t>(memory, 1, shape, owner));
}

// Runs work(begin, end) over chunks of [0, rows).
template <class Work>
void over_chunks(int64_t rows, Work &&work) {
  parallel_tasks((rows + kBlock - 1) / kBlock,
                 [&](int64_t chunk) { work(chunk * kBlock, std::min((chunk + 1) * kBlock, rows)); });
}

// A key and its row share one word, which halves the traffic of the sort; low bits of the codes that find no room beside
// the row are sorted first, on their own.
Order order_of(const int64_t *codes, int64_t rows, int code_bits) {
  const int row_bits = bit_length(rows), low_bits = std::max(0, code_bits + row_bits - 64);
  const auto bits = [&](int64_t row, int from, int to) {
    return (static_cast<uint64_t>(codes[row]) & ((uint64_t{1} << to) - 1)) >> from;
  };
  Buffer<PackedRow> items(rows), other(rows);
  over_chunks(rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      items[i] = PackedRow::make(low_bits ? bits(i, 0, low_bits) : bits(i, 0, code_bits), i, row_bits);
  });
  if (low_bits) {
    radix_sort(items, other, low_bits, row_bits);
    over_chunks(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = items[i].row(row_bits);
        items[i] = PackedRow::make(bits(row, low_bits, code_bits), row, row_bits);
      }
    });
  }
  radix_sort(items, other, code_bits - low_bits, row_bits);
  over_chunks(rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      items[i].word = items[i].row(row_bits);
      other[items[i].word].word = i;
    }
  });
  return {std::move(items), std::move(other)};
}

// (order, inverse) of codes >= 0.
nb::object sort_codes(Array<const int64_t, 1> array) {
  const int64_t rows = static_cast<int64_t>(array.shape(0));
  const int64_t *codes = array.data();
  Order order;
  int64_t all = 0, differing = 0;
  {
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < rows; ++i) all |= codes[i], differing |= codes[i] ^ codes[0];
    if (all >= 0) order = order_of(codes, rows, std::is_sorted(codes, codes + rows) ? 0 : bit_length(differing));
  }
  if (all < 0) throw std::invalid_argument("codes must not be negative");
  return nb::make_tuple(words_to_torch(std::move(order.rows)), words_to_torch(std::move(order.positions)));
}

}  // namespace

void register_serialize(nb::module_ &m) {
  m.def("curve_codes", &curve_codes, nb::arg("grid"), nb::arg("offsets"), nb::arg("depth"), nb::arg("transposed"),
        nb::arg("table").none(), nb::arg("start"),
        "(N,) int64 codes of cells within 0 .. 2^depth - 1 along the z curve, or the curve of a table.");
  m.def("sort_codes", &sort_codes, nb::arg("codes"), "(order, inverse) of a stable sort of codes >= 0.");
}

}  // namespace pc3d
