#include "curve.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "isa.h"
#include "radix_sort.h"

namespace pc3d {
namespace {

constexpr int kMostAxisBits = 14;
constexpr int kCoarseBits = 33;  // three passes of a sort; what they leave together is seldom more than a few points

inline uint64_t spread(uint64_t v) {  // the low 16 bits, two zeros between each
  v = (v | v << 16) & 0x0000FF0000FF;
  v = (v | v << 8) & 0x00F00F00F00F;
  v = (v | v << 4) & 0x0C30C30C30C3;
  return (v | v << 2) & 0x249249249249;
}

PC3D_CLONES void find_box(const float *coord, int64_t rows, float *low, float *high) {
  constexpr int kLanes = 24;  // whole points, and whole registers
  float least[kLanes], most[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) least[lane] = low[lane % 3], most[lane] = high[lane % 3];
  int64_t i = 0;
  for (; i + kLanes <= 3 * rows; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      least[lane] = std::min(least[lane], coord[i + lane]);
      most[lane] = std::max(most[lane], coord[i + lane]);
    }
  for (int lane = 0; i + lane < 3 * rows; ++lane) {
    least[lane] = std::min(least[lane], coord[i + lane]);
    most[lane] = std::max(most[lane], coord[i + lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane % 3] = std::min(low[lane % 3], least[lane]);
    high[lane % 3] = std::max(high[lane % 3], most[lane]);
  }
}

// The place of each point along the curve, and its row in the low `row_bits`.
PC3D_CLONES void find_places(const float *coord, int64_t rows, const float *low, double scale, int row_bits, uint64_t *out) {
  const auto cell = [&](int64_t i, int axis) {
    return spread(static_cast<uint32_t>(static_cast<int32_t>((static_cast<double>(coord[3 * i + axis]) - low[axis]) * scale)));
  };
  for (int64_t i = 0; i < rows; ++i)
    out[i] = (cell(i, 0) << 2 | cell(i, 1) << 1 | cell(i, 2)) << row_bits | static_cast<uint64_t>(i);
}

}  // namespace

Buffer<int32_t> curve_order(const float *coord, int64_t rows) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};
  find_box(coord, rows, low, high);
  double extent = 0;
  for (int axis = 0; axis < 3; ++axis) extent = std::max(extent, static_cast<double>(high[axis]) - low[axis]);
  const int row_bits = bit_length(static_cast<uint64_t>(rows)), axis_bits = std::min((64 - row_bits) / 3, kMostAxisBits);
  const double scale = extent > 0 ? ((1 << axis_bits) - 1) / extent : 0.0;
  const auto before = [&](int64_t a, int64_t b) {
    const float *p = coord + 3 * a, *q = coord + 3 * b;
    return std::lexicographical_compare(p, p + 3, q, q + 3);
  };
  Buffer<PackedRow> items(rows);
  find_places(coord, rows, low, scale, row_bits, &items.data()->word);
  bool sorted = true;
  for (int64_t i = 1; i < rows && sorted; ++i)
    sorted = items[i - 1].word < items[i].word && !(items[i - 1].key(row_bits) == items[i].key(row_bits) && before(i, i - 1));
  Buffer<int32_t> order(rows);
  if (sorted) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  const int fine_bits = std::max(3 * axis_bits - kCoarseBits, 0);
  radix_sort(items, 3 * axis_bits - fine_bits, row_bits + fine_bits);
  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    while (end < rows && items[end].key(row_bits + fine_bits) == items[begin].key(row_bits + fine_bits)) ++end;
    if (end - begin > 1) std::sort(items.data() + begin, items.data() + end, [](PackedRow a, PackedRow b) { return a.word < b.word; });
  }
  for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(items[i].row(row_bits));
  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    while (end < rows && items[end].key(row_bits) == items[begin].key(row_bits)) ++end;
    if (end - begin > 1) std::stable_sort(order.data() + begin, order.data() + end, before);
  }
  return order;
}

}  // namespace pc3d
