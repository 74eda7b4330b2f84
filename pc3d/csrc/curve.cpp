#include "curve.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "radix_sort.h"

namespace pc3d {
namespace {

constexpr int kMostAxisBits = 14;

uint64_t spread(uint64_t v) {  // the low 16 bits, two zeros between each
  v = (v | v << 16) & 0x0000FF0000FF;
  v = (v | v << 8) & 0x00F00F00F00F;
  v = (v | v << 4) & 0x0C30C30C30C3;
  return (v | v << 2) & 0x249249249249;
}

}  // namespace

Buffer<int32_t> curve_order(const float *coord, int64_t rows) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < rows; ++i)
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], coord[3 * i + axis]);
      high[axis] = std::max(high[axis], coord[3 * i + axis]);
    }
  double extent = 0;
  for (int axis = 0; axis < 3; ++axis) extent = std::max(extent, static_cast<double>(high[axis]) - low[axis]);
  const int row_bits = bit_length(static_cast<uint64_t>(rows)), axis_bits = std::min((64 - row_bits) / 3, kMostAxisBits);
  const double scale = extent > 0 ? ((1 << axis_bits) - 1) / extent : 0.0;
  const auto key = [&](int64_t i) {
    uint64_t cell = 0;
    for (int axis = 0; axis < 3; ++axis)
      cell |= spread(static_cast<uint64_t>((static_cast<double>(coord[3 * i + axis]) - low[axis]) * scale)) << (2 - axis);
    return cell;
  };
  const auto before = [&](int64_t a, int64_t b) {
    const float *p = coord + 3 * a, *q = coord + 3 * b;
    return std::lexicographical_compare(p, p + 3, q, q + 3);
  };
  Buffer<PackedRow> items(rows);
  bool sorted = true;
  for (int64_t i = 0; i < rows; ++i) {
    items[i] = PackedRow::make(key(i), i, row_bits);
    if (i) sorted &= items[i - 1].word < items[i].word && !(items[i - 1].key(row_bits) == items[i].key(row_bits) && before(i, i - 1));
  }
  Buffer<int32_t> order(rows);
  if (sorted) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  radix_sort(items, 3 * axis_bits, row_bits);
  for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(items[i].row(row_bits));
  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    while (end < rows && items[end].key(row_bits) == items[begin].key(row_bits)) ++end;
    if (end - begin > 1) std::stable_sort(order.data() + begin, order.data() + end, before);
  }
  return order;
}

}  // namespace pc3d
