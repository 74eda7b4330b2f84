// Grid sampling on the CPU: coordinates to cells, cells to distinct voxels by one radix sort of packed keys.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
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

template <class T>
struct Range {
  T low[3], high[3];

  static Range none() {
    Range range;
    std::fill(range.low, range.low + 3, std::numeric_limits<T>::max());
    std::fill(range.high, range.high + 3, std::numeric_limits<T>::lowest());
    return range;
  }
  void add(const Range &other) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], other.low[axis]);
      high[axis] = std::max(high[axis], other.high[axis]);
    }
  }
};

template <class T>
Range<T> range_of(const T *rows, int64_t count) {
  Range<T> range = Range<T>::none();
  for (const T *row = rows, *end = rows + 3 * count; row < end; row += 3)
    for (int axis = 0; axis < 3; ++axis) {
      range.low[axis] = std::min(range.low[axis], row[axis]);
      range.high[axis] = std::max(range.high[axis], row[axis]);
    }
  return range;
}

template <class T>
bool all_finite(const T *values, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::abs(values[i]) <= std::numeric_limits<T>::max();
  return finite;
}

template <class T>
[[gnu::always_inline]] inline void write_cells_of(const T *coord, int64_t rows, double size, const double *low, int32_t *out) {
  const double x0 = low[0], y0 = low[1], z0 = low[2];
  for (int64_t i = 0; i < 3 * rows; i += 3) {
    out[i] = static_cast<int32_t>(std::floor(coord[i] / size) - x0);
    out[i + 1] = static_cast<int32_t>(std::floor(coord[i + 1] / size) - y0);
    out[i + 2] = static_cast<int32_t>(std::floor(coord[i + 2] / size) - z0);
  }
}
PC3D_CLONES void write_cells(const float *coord, int64_t rows, double size, const double *low, int32_t *out) {
  write_cells_of(coord, rows, size, low, out);
}
PC3D_CLONES void write_cells(const double *coord, int64_t rows, double size, const double *low, int32_t *out) {
  write_cells_of(coord, rows, size, low, out);
}

// The cells, or None where a coordinate is not finite or a cloud wider than max_cells: the caller words the error.
template <class T>
nb::object grid_coords(Array<const T, 2> coord, Array<const int64_t, 1> offsets, double size, int64_t max_cells) {
  const int64_t rows = static_cast<int64_t>(coord.shape(0));
  if (coord.shape(1) != 3) throw std::invalid_argument("coord must be (N, 3)");
  const std::vector<Rows> blocks = make_blocks(offsets, rows);
  const T *points = coord.data();
  Buffer<int32_t> grid(3 * rows);
  bool fits = true;
  {
    nb::gil_scoped_release release;
    std::vector<Range<T>> ranges(blocks.size());
    std::vector<char> finite(blocks.size());
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const T *first = points + 3 * blocks[i].begin;
      const int64_t count = blocks[i].end - blocks[i].begin;
      finite[i] = all_finite(first, 3 * count);
      ranges[i] = range_of(first, count);
    });
    std::vector<Range<T>> clouds(offsets.shape(0), Range<T>::none());
    for (size_t i = 0; i < blocks.size(); ++i) clouds[blocks[i].cloud].add(ranges[i]);
    fits = std::all_of(finite.begin(), finite.end(), [](char f) { return f; });
    // Division and floor are monotonic, so the lowest coordinate lies in the lowest cell.
    const auto cell = [&](T value) { return std::floor(value / size); };
    for (size_t i = 0; i < blocks.size() && fits; ++i) {
      const Range<T> &range = clouds[blocks[i].cloud];
      for (int axis = 0; axis < 3; ++axis)
        fits &= cell(range.high[axis]) - cell(range.low[axis]) < static_cast<double>(max_cells);
    }
    if (fits)
      parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
        const Range<T> &range = clouds[blocks[i].cloud];
        const double low[3] = {cell(range.low[0]), cell(range.low[1]), cell(range.low[2])};
        const int64_t first = 3 * blocks[i].begin;
        write_cells(points + first, blocks[i].end - blocks[i].begin, size, low, grid.data() + first);
      });
  }
  return fits ? to_torch(std::move(grid), 3) : nb::none();
}

// Bits of a packed key: the cloud above x above y above z.
struct KeyLayout {
  int64_t low[3];
  int bits[3], total;

  KeyLayout(const Range<int32_t> &range, int64_t clouds) : total(clouds > 1 ? bit_length(clouds - 1) : 0) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = range.low[axis];
      bits[axis] = bit_length(static_cast<uint64_t>(int64_t{range.high[axis]} - low[axis]));
      total += bits[axis];
    }
  }
  uint64_t key(int64_t cloud, const int32_t *cell) const {
    uint64_t key = static_cast<uint64_t>(cloud);
    for (int axis = 0; axis < 3; ++axis) key = key << bits[axis] | static_cast<uint64_t>(cell[axis] - low[axis]);
    return key;
  }
};

struct UniqueVoxels {
  Buffer<int64_t> first, inverse, counts, order_rows, voxel_offsets;
};

template <class Item>
Buffer<Item> sorted_rows(const int32_t *grid, int64_t rows, const std::vector<Rows> &blocks, const KeyLayout &layout,
                         int row_bits) {
  Buffer<Item> items(rows);
  std::vector<char> rising(blocks.size());
  parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    uint64_t last = 0;
    bool ordered = true;
    for (int64_t row = blocks[i].begin; row < blocks[i].end; ++row) {
      const uint64_t key = layout.key(blocks[i].cloud, grid + 3 * row);
      ordered &= last <= key;
      last = key;
      items[row] = Item::make(key, row, row_bits);
    }
    rising[i] = ordered;
  });
  bool ordered = std::all_of(rising.begin(), rising.end(), [](char r) { return r; });
  for (size_t i = 1; i < blocks.size() && ordered; ++i)
    ordered = items[blocks[i].begin - 1].key(row_bits) <= items[blocks[i].begin].key(row_bits);
  if (!ordered) radix_sort(items, layout.total, row_bits);
  return items;
}

template <class Item>
UniqueVoxels collect(const Buffer<Item> &items, const Array<const int64_t, 1> &offsets, int row_bits) {
  const int64_t rows = items.size(), chunks = (rows + kBlock - 1) / kBlock;
  const auto is_first = [&](int64_t i) { return i == 0 || items[i].key(row_bits) != items[i - 1].key(row_bits); };
  std::vector<int64_t> start(chunks + 1, 0);
  parallel_tasks(chunks, [&](int64_t chunk) {
    int64_t count = 0;
    for (int64_t i = chunk * kBlock, end = std::min(i + kBlock, rows); i < end; ++i) count += is_first(i);
    start[chunk + 1] = count;
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) start[chunk + 1] += start[chunk];
  const int64_t voxels = start[chunks], clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  UniqueVoxels out{Buffer<int64_t>(voxels), Buffer<int64_t>(rows), Buffer<int64_t>(voxels), Buffer<int64_t>(rows),
                   Buffer<int64_t>(clouds + 1)};
  Buffer<int64_t> &begin = out.counts;  // where each voxel begins, until all are known
  parallel_tasks(chunks, [&](int64_t chunk) {
    int64_t voxel = start[chunk] - 1;
    for (int64_t i = chunk * kBlock, end = std::min(i + kBlock, rows); i < end; ++i) {
      const int64_t row = items[i].row(row_bits);
      if (is_first(i)) {
        begin[++voxel] = i;
        out.first[voxel] = row;
      }
      out.order_rows[i] = row;
      out.inverse[row] = voxel;
    }
  });
  for (int64_t voxel = 0; voxel < voxels; ++voxel)
    out.counts[voxel] = (voxel + 1 < voxels ? begin[voxel + 1] : rows) - begin[voxel];
  for (int64_t cloud = 0; cloud <= clouds; ++cloud) {  // sorted or not, a cloud fills the same range of rows
    const int64_t row = offsets.data()[cloud];
    out.voxel_offsets[cloud] = row < rows ? out.inverse[out.order_rows[row]] : voxels;
  }
  return out;
}

// (first, inverse, counts, order_rows, voxel_offsets), or None where keys need more than 63 bits.
nb::object unique_voxels(Array<const int32_t, 2> grid, Array<const int64_t, 1> offsets) {
  const int64_t rows = static_cast<int64_t>(grid.shape(0));
  if (grid.shape(1) != 3) throw std::invalid_argument("grid must be (N, 3)");
  const std::vector<Rows> blocks = make_blocks(offsets, rows);
  bool fits = true;
  UniqueVoxels out;
  {
    nb::gil_scoped_release release;
    std::vector<Range<int32_t>> ranges(blocks.size());
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      ranges[i] = range_of(grid.data() + 3 * blocks[i].begin, blocks[i].end - blocks[i].begin);
    });
    Range<int32_t> whole = rows ? ranges[0] : Range<int32_t>{};
    for (const Range<int32_t> &range : ranges) whole.add(range);
    const KeyLayout layout(whole, static_cast<int64_t>(offsets.shape(0)) - 1);
    const int row_bits = bit_length(rows);
    fits = layout.total < 64;
    if (fits && layout.total + row_bits <= 64)
      out = collect(sorted_rows<PackedRow>(grid.data(), rows, blocks, layout, row_bits), offsets, row_bits);
    else if (fits)
      out = collect(sorted_rows<KeyedRow>(grid.data(), rows, blocks, layout, row_bits), offsets, row_bits);
  }
  if (!fits) return nb::none();
  return nb::make_tuple(to_torch(std::move(out.first)), to_torch(std::move(out.inverse)), to_torch(std::move(out.counts)),
                        to_torch(std::move(out.order_rows)), to_torch(std::move(out.voxel_offsets)));
}

}  // namespace

void register_voxelize(nb::module_ &m) {
  const char *doc = "floor(coord / size) minus the lowest cell of each cloud, (N, 3) int32; None where it does not fit.";
  m.def("grid_coords", &grid_coords<float>, nb::arg("coord"), nb::arg("offsets"), nb::arg("size"), nb::arg("max_cells"), doc);
  m.def("grid_coords", &grid_coords<double>, nb::arg("coord"), nb::arg("offsets"), nb::arg("size"), nb::arg("max_cells"),
        doc);
  m.def("unique_voxels", &unique_voxels, nb::arg("grid"), nb::arg("offsets"),
        "(first, inverse, counts, order_rows, voxel_offsets) in raster order; None where keys need more than 63 bits.");
}

}  // namespace pc3d
