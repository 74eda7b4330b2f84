// Kernel maps on the CPU, without a hash table: keys in raster order keep their order under any shift, so the neighbours of
// all voxels under one kernel offset come from one merge of the key list with itself.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "array.h"
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

using Triple = std::array<int64_t, 3>;
using Coord = Array<const int32_t, 2>;

constexpr int64_t kChunk = 4096;  // voxels of one task
constexpr int64_t kLeastCoord = std::numeric_limits<int32_t>::min(), kMostCoord = std::numeric_limits<int32_t>::max();
constexpr int kMostKeyBits = 62;  // keys stay positive, below the sentinel, under any shift

int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && a < 0); }

// Coordinates as one word in raster order: batch, x, y, z from the highest bits down.
struct Layout {
  std::array<int64_t, 4> low{};
  std::array<int, 4> bits{};
  int total = 0;

  Layout() = default;
  Layout(const std::array<int64_t, 4> &low, const std::array<int64_t, 4> &high) : low(low) {
    for (int axis = 0; axis < 4; ++axis) {
      bits[axis] = bit_length(static_cast<uint64_t>(high[axis] - low[axis]));
      total += bits[axis];
    }
  }
  template <class T>
  int64_t key(const T *cell) const {
    uint64_t key = 0;
    for (int axis = 0; axis < 4; ++axis) key = key << bits[axis] | static_cast<uint64_t>(cell[axis] - low[axis]);
    return static_cast<int64_t>(key);
  }
  void cell(int64_t key, int32_t *cell) const {
    for (int axis = 3; axis >= 0; --axis) {
      cell[axis] = static_cast<int32_t>((key & ((int64_t{1} << bits[axis]) - 1)) + low[axis]);
      key >>= bits[axis];
    }
  }
  // key(c + delta) - key(c), while no axis leaves its range.
  int64_t shift(const Triple &delta) const {
    return ((delta[0] * (int64_t{1} << bits[2])) + delta[1]) * (int64_t{1} << bits[3]) + delta[2];
  }
};

struct Extent {
  std::array<int64_t, 4> low, high;
};

Extent extent_of(const Coord &coord) {
  const int64_t rows = static_cast<int64_t>(coord.shape(0)), chunks = chunks_of(rows);
  std::vector<std::array<int32_t, 4>> low(chunks), high(chunks);
  parallel_tasks(chunks, [&](int64_t chunk) {
    const int32_t *row = coord.data() + 4 * chunk * kChunk;
    const int32_t *end = coord.data() + 4 * std::min((chunk + 1) * kChunk, rows);
    std::array<int32_t, 4> least, most;
    least.fill(static_cast<int32_t>(kMostCoord));
    most.fill(static_cast<int32_t>(kLeastCoord));
    for (; row < end; row += 4)
      for (int axis = 0; axis < 4; ++axis) {
        least[axis] = std::min(least[axis], row[axis]);
        most[axis] = std::max(most[axis], row[axis]);
      }
    low[chunk] = least;
    high[chunk] = most;
  });
  Extent extent;
  for (int axis = 0; axis < 4; ++axis) {
    extent.low[axis] = low[0][axis];
    extent.high[axis] = high[0][axis];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      extent.low[axis] = std::min<int64_t>(extent.low[axis], low[chunk][axis]);
      extent.high[axis] = std::max<int64_t>(extent.high[axis], high[chunk][axis]);
    }
  }
  return extent;
}

// The voxels in raster order.
struct SortedVoxels {
  Buffer<int64_t> keys;  // one more than there are voxels: the last is above every key
  Buffer<int32_t> rows;  // row of each sorted voxel; empty when the voxels came in order
  bool repeated = false;

  int64_t size() const { return keys.size() - 1; }
  bool in_order() const { return rows.size() == 0; }
  int32_t row(int64_t i) const { return in_order() ? static_cast<int32_t>(i) : rows[i]; }
};

template <class Item>
void sort_keys(SortedVoxels &voxels, int key_bits, int row_bits) {
  const int64_t count = voxels.size();
  Buffer<Item> items(count);
  for (int64_t i = 0; i < count; ++i) items[i] = Item::make(static_cast<uint64_t>(voxels.keys[i]), i, row_bits);
  radix_sort(items, key_bits, row_bits);
  voxels.rows = Buffer<int32_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    voxels.keys[i] = static_cast<int64_t>(items[i].key(row_bits));
    voxels.rows[i] = static_cast<int32_t>(items[i].row(row_bits));
  }
}

SortedVoxels sort_voxels(const Coord &coord, const Layout &layout) {
  const int64_t count = static_cast<int64_t>(coord.shape(0));
  SortedVoxels voxels;
  voxels.keys = Buffer<int64_t>(count + 1);
  parallel_tasks(chunks_of(count), [&](int64_t chunk) {
    for (int64_t i = chunk * kChunk, end = std::min(i + kChunk, count); i < end; ++i)
      voxels.keys[i] = layout.key(coord.data() + 4 * i);
  });
  voxels.keys[count] = std::numeric_limits<int64_t>::max();
  if (!std::is_sorted(voxels.keys.begin(), voxels.keys.end())) {
    const int row_bits = bit_length(count);
    if (layout.total + row_bits <= 64) sort_keys<PackedRow>(voxels, layout.total, row_bits);
    else sort_keys<KeyedRow>(voxels, layout.total, row_bits);
  }
  voxels.repeated = std::adjacent_find(voxels.keys.begin(), voxels.keys.end()) != voxels.keys.end();
  return voxels;
}

struct Pairs {
  Buffer<int32_t> in_rows, out_rows;
  Buffer<int64_t> offsets;
};

// Pairs of one kernel offset brought to ascending output rows, through a table of one input row per output row.
void write_ascending(const int32_t *in_rows, const int32_t *out_rows, int64_t count, std::vector<int32_t> &table,
                     int32_t *in, int32_t *out) {
  std::fill(table.begin(), table.end(), -1);
  for (int64_t p = 0; p < count; ++p) table[out_rows[p]] = in_rows[p];
  const int32_t rows = static_cast<int32_t>(table.size());
  for (int32_t row = 0, p = 0; row < rows && p < count; ++row) {
    out[p] = row;
    in[p] = table[row];
    p += table[row] >= 0;
  }
}

// Neighbours found by one task: for each of its kernel offsets the positions (in raster order) of voxel and neighbour.
struct Matches {
  std::vector<int64_t> starts;  // where each kernel offset begins, and the end
  Buffer<int32_t> voxel, neighbour;
};

// A column of the kernel: the offsets `first_k ... first_k + count - 1`, which differ in z only.
struct Column {
  int64_t first_k, count, shift;
};

// Merges the keys of voxels [begin, end) with the keys `column.shift + t * step` above them.
Matches match(const Buffer<int64_t> &keys, int64_t begin, int64_t end, const Column &column, int64_t step) {
  const int64_t rows = end - begin;
  Buffer<int32_t> voxel(column.count * rows), neighbour(column.count * rows);
  std::vector<int64_t> found(column.count, 0);
  const int64_t *key = keys.data();
  int64_t next = std::lower_bound(key, key + keys.size() - 1, key[begin] + column.shift) - key;
  for (int64_t i = begin; i < end; ++i) {
    int64_t wanted = key[i] + column.shift;
    while (key[next] < wanted) ++next;
    int64_t at = next;
    for (int64_t t = 0; t < column.count; ++t, wanted += step) {
      while (key[at] < wanted) ++at;
      const int64_t slot = t * rows + found[t];
      voxel[slot] = static_cast<int32_t>(i);
      neighbour[slot] = static_cast<int32_t>(at);
      const bool hit = key[at] == wanted;
      found[t] += hit;
      at += hit;
    }
  }
  Matches matches;
  matches.starts.assign(column.count + 1, 0);
  std::partial_sum(found.begin(), found.end(), matches.starts.begin() + 1);
  matches.voxel = Buffer<int32_t>(matches.starts.back());
  matches.neighbour = Buffer<int32_t>(matches.starts.back());
  for (int64_t t = 0; t < column.count; ++t) {
    std::copy_n(voxel.data() + t * rows, found[t], matches.voxel.data() + matches.starts[t]);
    std::copy_n(neighbour.data() + t * rows, found[t], matches.neighbour.data() + matches.starts[t]);
  }
  return matches;
}

// The kernel columns to search. An odd kernel is symmetric: (in, out, k) is a pair iff (out, in, K - 1 - k) is, so the offsets
// before the centre suffice.
std::vector<Column> make_columns(const Layout &layout, const Triple &kernel, const Triple &dilation, bool symmetric) {
  const int64_t searched = symmetric ? kernel[0] * kernel[1] * kernel[2] / 2 : kernel[0] * kernel[1] * kernel[2];
  std::vector<Column> columns;
  for (int64_t first = 0; first < searched; first += kernel[2]) {
    const int64_t x = first / (kernel[1] * kernel[2]), y = first / kernel[2] % kernel[1];
    const Triple delta{(x - kernel[0] / 2) * dilation[0], (y - kernel[1] / 2) * dilation[1], -(kernel[2] / 2) * dilation[2]};
    columns.push_back({first, std::min(kernel[2], searched - first), layout.shift(delta)});
  }
  return columns;
}

Pairs match_all(const SortedVoxels &voxels, const Layout &layout, const Triple &kernel, const Triple &dilation) {
  const int64_t volume = kernel[0] * kernel[1] * kernel[2], count = voxels.size(), chunks = chunks_of(count);
  const bool symmetric = kernel[0] % 2 && kernel[1] % 2 && kernel[2] % 2;
  const std::vector<Column> columns = make_columns(layout, kernel, dilation, symmetric);
  std::vector<Matches> matches(columns.size() * chunks);
  parallel_tasks(static_cast<int64_t>(matches.size()), [&](int64_t task) {
    const int64_t begin = task % chunks * kChunk;
    matches[task] = match(voxels.keys, begin, std::min(begin + kChunk, count), columns[task / chunks], dilation[2]);
  });

  std::vector<int64_t> pairs(volume, symmetric ? count : 0);  // the centre of a symmetric kernel: every voxel with itself
  for (size_t c = 0; c < columns.size(); ++c)
    for (int64_t t = 0; t < columns[c].count; ++t) {
      const int64_t k = columns[c].first_k + t;
      pairs[k] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::vector<int64_t> &starts = matches[c * chunks + chunk].starts;
        pairs[k] += starts[t + 1] - starts[t];
      }
      if (symmetric) pairs[volume - 1 - k] = pairs[k];
    }
  Pairs out;
  out.offsets = Buffer<int64_t>(volume + 1);
  out.offsets[0] = 0;
  std::partial_sum(pairs.begin(), pairs.end(), out.offsets.begin() + 1);
  out.in_rows = Buffer<int32_t>(out.offsets[volume]);
  out.out_rows = Buffer<int32_t>(out.offsets[volume]);

  parallel_tasks(volume, [&](int64_t k) {
    const bool mirrored = symmetric && k > volume / 2;
    const int64_t searched = mirrored ? volume - 1 - k : k;
    int32_t *in = out.in_rows.data() + out.offsets[k], *to = out.out_rows.data() + out.offsets[k];
    if (symmetric && k == volume / 2) {
      std::iota(in, in + count, 0);
      std::iota(to, to + count, 0);
      return;
    }
    const int64_t c = searched / kernel[2], t = searched % kernel[2];
    int64_t done = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Matches &found = matches[c * chunks + chunk];
      const int64_t start = found.starts[t], size = found.starts[t + 1] - start;
      std::copy_n((mirrored ? found.voxel : found.neighbour).data() + start, size, in + done);
      std::copy_n((mirrored ? found.neighbour : found.voxel).data() + start, size, to + done);
      done += size;
    }
    if (voxels.in_order()) return;
    std::vector<int32_t> table(count), sorted_in(in, in + done), sorted_to(to, to + done);
    for (int64_t p = 0; p < done; ++p) {
      sorted_in[p] = voxels.rows[sorted_in[p]];
      sorted_to[p] = voxels.rows[sorted_to[p]];
    }
    write_ascending(sorted_in.data(), sorted_to.data(), done, table, in, to);
  });
  return out;
}

void check_coord(const Coord &coord) {
  if (coord.shape(1) != 4) throw std::invalid_argument("coord must be (M, 4)");
}

// The kernels leave to the reference path what they cannot do (no voxels, more rows than int32 counts, too wide a grid) and
// what is wrong (repeated voxels, a negative batch number): it words the error.
bool can_serve(const Coord &coord) {
  return coord.shape(0) > 0 && static_cast<int64_t>(coord.shape(0)) < kMostCoord;
}

std::optional<Pairs> find_submanifold(const Coord &coord, const Triple &kernel, const Triple &dilation) {
  Extent extent = extent_of(coord);
  for (int axis = 1; axis < 4; ++axis) {
    const int64_t reach = kernel[axis - 1] / 2 * dilation[axis - 1];
    extent.low[axis] -= reach;
    extent.high[axis] += reach;
    if (extent.low[axis] < kLeastCoord || extent.high[axis] > kMostCoord) return std::nullopt;
  }
  const Layout layout(extent.low, extent.high);
  if (extent.low[0] < 0 || layout.total > kMostKeyBits) return std::nullopt;
  const SortedVoxels voxels = sort_voxels(coord, layout);
  if (voxels.repeated) return std::nullopt;
  return match_all(voxels, layout, kernel, dilation);
}

nb::object submanifold_map(Coord coord, const Triple &kernel, const Triple &dilation) {
  check_coord(coord);
  std::optional<Pairs> pairs;
  {
    nb::gil_scoped_release release;
    if (can_serve(coord)) pairs = find_submanifold(coord, kernel, dilation);
  }
  if (!pairs) return nb::none();
  return nb::make_tuple(to_torch(std::move(pairs->in_rows)), to_torch(std::move(pairs->out_rows)),
                        to_torch(std::move(pairs->offsets)));
}

// Along one axis, the outputs an input coordinate c reaches: base(c) + shift for each kernel index, listed by the remainder of
// c. A strided convolution has `out * stride = c + padding - k * dilation`, its transpose `out = c * stride - padding + k * dilation`.
class Axis {
 public:
  struct Reach {
    int64_t k, shift;
  };
  struct Reaches {
    const std::vector<Reach> *list;
    int64_t base;
  };

  Axis(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool transposed)
      : stride_(stride), padding_(padding), transposed_(transposed), lists_(transposed ? 1 : stride) {
    for (int64_t remainder = 0; remainder < static_cast<int64_t>(lists_.size()); ++remainder)
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t rest = remainder - k * dilation;
        if (transposed) lists_[0].push_back({k, k * dilation});
        else if (rest % stride == 0) lists_[remainder].push_back({k, rest / stride});
      }
    lowest_ = transposed ? 0 : floor_div(-(kernel - 1) * dilation, stride);
    highest_ = transposed ? (kernel - 1) * dilation : 0;
  }
  Reaches of(int64_t c) const {
    if (transposed_) return {lists_.data(), c * stride_ - padding_};
    const int64_t base = floor_div(c + padding_, stride_);
    return {&lists_[c + padding_ - base * stride_], base};
  }
  int64_t lowest(int64_t c) const { return of(c).base + lowest_; }
  int64_t most_outputs() const {
    size_t most = 0;
    for (const std::vector<Reach> &list : lists_) most = std::max(most, list.size());
    return static_cast<int64_t>(most);
  }
  int64_t highest(int64_t c) const { return of(c).base + highest_; }

 private:
  int64_t stride_, padding_;
  bool transposed_;
  std::vector<std::vector<Reach>> lists_;
  int64_t lowest_, highest_;
};

// The outputs that each input reaches, within bounds.
struct Stencil {
  std::array<Axis, 3> axes;
  Triple kernel, low, high;  // outputs with low <= out <= high

  int64_t volume() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t most_outputs() const { return axes[0].most_outputs() * axes[1].most_outputs() * axes[2].most_outputs(); }
};

// A pair before the outputs have numbers.
struct Candidate {
  int64_t key;
  int32_t in_row, k;
};

// Appends the candidates of sorted voxels [begin, end).
void reach(const Coord &coord, const SortedVoxels &voxels, const Stencil &stencil, const Layout &layout, int64_t begin,
           int64_t end, std::vector<Candidate> &found) {
  const auto inside = [&](int axis, int64_t out) { return out >= stencil.low[axis] && out <= stencil.high[axis]; };
  Axis::Reaches x{}, y{};
  const int32_t *last = nullptr;
  found.reserve((end - begin) * stencil.most_outputs());
  for (int64_t i = begin; i < end; ++i) {
    const int32_t row = voxels.row(i), *cell = coord.data() + 4 * int64_t{row};
    if (!last || last[1] != cell[1]) x = stencil.axes[0].of(cell[1]);  // sorted: x and y seldom change
    if (!last || last[2] != cell[2]) y = stencil.axes[1].of(cell[2]);
    last = cell;
    const Axis::Reaches z = stencil.axes[2].of(cell[3]);
    for (const Axis::Reach &rx : *x.list)
      for (const Axis::Reach &ry : *y.list)
        for (const Axis::Reach &rz : *z.list) {
          const int64_t out[4] = {cell[0], x.base + rx.shift, y.base + ry.shift, z.base + rz.shift};
          if (!inside(0, out[1]) || !inside(1, out[2]) || !inside(2, out[3])) continue;
          const int64_t k = (rx.k * stencil.kernel[1] + ry.k) * stencil.kernel[2] + rz.k;
          found.push_back({layout.key(out), row, static_cast<int32_t>(k)});
        }
  }
}

struct Candidates {
  Buffer<int64_t> keys;    // output key of each pair, kernel offset after kernel offset, inputs in raster order
  Buffer<int32_t> in_rows;
  Buffer<int64_t> offsets;
};

Candidates list_candidates(const Coord &coord, const SortedVoxels &voxels, const Stencil &stencil, const Layout &layout) {
  const int64_t volume = stencil.volume(), count = voxels.size(), chunks = chunks_of(count);
  std::vector<int64_t> next(chunks * volume, 0);
  std::vector<std::vector<Candidate>> found(chunks);
  parallel_tasks(chunks, [&](int64_t chunk) {
    reach(coord, voxels, stencil, layout, chunk * kChunk, std::min((chunk + 1) * kChunk, count), found[chunk]);
    for (const Candidate &candidate : found[chunk]) ++next[chunk * volume + candidate.k];
  });
  Candidates all;
  all.offsets = Buffer<int64_t>(volume + 1);
  int64_t total = 0;
  for (int64_t k = 0; k < volume; ++k) {
    all.offsets[k] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += std::exchange(next[chunk * volume + k], total);
  }
  all.offsets[volume] = total;
  all.keys = Buffer<int64_t>(total);
  all.in_rows = Buffer<int32_t>(total);
  parallel_tasks(chunks, [&](int64_t chunk) {
    for (const Candidate &candidate : found[chunk]) {
      const int64_t slot = next[chunk * volume + candidate.k]++;
      all.keys[slot] = candidate.key;
      all.in_rows[slot] = candidate.in_row;
    }
  });
  return all;
}

struct StridedMap {
  Buffer<int32_t> coord;
  Pairs pairs;
};

// Numbers the distinct outputs in raster order. Under one kernel offset, inputs in raster order have outputs in raster order,
// so the pairs are in their final order already.
template <class Item>
StridedMap number_outputs(Candidates candidates, const Layout &layout, int row_bits) {
  const int64_t count = candidates.keys.size();
  Buffer<Item> items(count);
  for (int64_t i = 0; i < count; ++i) items[i] = Item::make(static_cast<uint64_t>(candidates.keys[i]), i, row_bits);
  radix_sort(items, layout.total, row_bits);
  Buffer<int64_t> distinct(count);
  Buffer<int32_t> out_rows(count);
  int64_t outputs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t key = static_cast<int64_t>(items[i].key(row_bits));
    if (outputs == 0 || distinct[outputs - 1] != key) distinct[outputs++] = key;
    out_rows[items[i].row(row_bits)] = static_cast<int32_t>(outputs - 1);
  }
  StridedMap map{Buffer<int32_t>(4 * outputs),
                 {std::move(candidates.in_rows), std::move(out_rows), std::move(candidates.offsets)}};
  for (int64_t i = 0; i < outputs; ++i) layout.cell(distinct[i], map.coord.data() + 4 * i);
  return map;
}

std::optional<StridedMap> find_strided(const Coord &coord, Stencil stencil, const std::optional<Triple> &bound) {
  const Extent extent = extent_of(coord);
  Extent reach{{extent.low[0]}, {extent.high[0]}};
  for (int axis = 0; axis < 3; ++axis) {
    int64_t &low = stencil.low[axis], &high = stencil.high[axis];
    low = stencil.axes[axis].lowest(extent.low[axis + 1]);
    high = stencil.axes[axis].highest(extent.high[axis + 1]);
    if (bound) {
      low = std::max<int64_t>(low, 0);
      high = std::min((*bound)[axis] - 1, high);
    }
    if (low < kLeastCoord || high > kMostCoord || low > high) return std::nullopt;
    reach.low[axis + 1] = low;
    reach.high[axis + 1] = high;
  }
  const Layout in_layout(extent.low, extent.high), layout(reach.low, reach.high);
  if (extent.low[0] < 0 || in_layout.total > kMostKeyBits || layout.total > kMostKeyBits) return std::nullopt;
  const SortedVoxels voxels = sort_voxels(coord, in_layout);
  if (voxels.repeated) return std::nullopt;
  Candidates candidates = list_candidates(coord, voxels, stencil, layout);
  if (candidates.keys.size() > kMostCoord) return std::nullopt;
  const int row_bits = bit_length(candidates.keys.size());
  if (layout.total + row_bits <= 64) return number_outputs<PackedRow>(std::move(candidates), layout, row_bits);
  return number_outputs<KeyedRow>(std::move(candidates), layout, row_bits);
}

nb::object strided_map(Coord coord, const Triple &kernel, const Triple &stride, const Triple &padding, const Triple &dilation,
                       const std::optional<Triple> &bound, bool transposed) {
  check_coord(coord);
  std::optional<StridedMap> map;
  {
    nb::gil_scoped_release release;
    const auto axis = [&](int a) { return Axis(kernel[a], stride[a], padding[a], dilation[a], transposed); };
    if (can_serve(coord)) map = find_strided(coord, {{axis(0), axis(1), axis(2)}, kernel, {}, {}}, bound);
  }
  if (!map) return nb::none();
  return nb::make_tuple(to_torch(std::move(map->coord), 4), to_torch(std::move(map->pairs.in_rows)),
                        to_torch(std::move(map->pairs.out_rows)), to_torch(std::move(map->pairs.offsets)));
}

// The pairs of each kernel offset with their two rows exchanged, by ascending new output row.
nb::tuple inverse_map(Array<const int32_t, 1> in_rows, Array<const int32_t, 1> out_rows, Array<const int64_t, 1> offsets,
                      int64_t num_in) {
  const int64_t count = static_cast<int64_t>(in_rows.shape(0));
  const auto outside = [&](int32_t row) { return row < 0 || row >= num_in; };
  if (std::any_of(in_rows.data(), in_rows.data() + count, outside)) throw std::invalid_argument("in_rows beyond num_in");
  Buffer<int32_t> in(count), out(count);
  {
    nb::gil_scoped_release release;
    parallel_tasks(static_cast<int64_t>(offsets.shape(0)) - 1, [&](int64_t k) {
      const int64_t begin = offsets.data()[k], size = offsets.data()[k + 1] - begin;
      std::vector<int32_t> table(num_in);
      write_ascending(out_rows.data() + begin, in_rows.data() + begin, size, table, in.data() + begin, out.data() + begin);
    });
  }
  return nb::make_tuple(to_torch(std::move(in)), to_torch(std::move(out)));
}

}  // namespace

void register_kernel_map(nb::module_ &m) {
  m.def("submanifold_map", &submanifold_map, nb::arg("coord"), nb::arg("kernel_size"), nb::arg("dilation"),
        "(in_rows, out_rows, offsets) by kernel offset and ascending output row, or None: the reference must decide.");
  m.def("strided_map", &strided_map, nb::arg("coord"), nb::arg("kernel_size"), nb::arg("stride"), nb::arg("padding"),
        nb::arg("dilation"), nb::arg("bound").none(), nb::arg("transposed"),
        "(out_coord, in_rows, out_rows, offsets), or None: the reference must decide. `bound`: extent of the output grid.");
  m.def("inverse_map", &inverse_map, nb::arg("in_rows"), nb::arg("out_rows"), nb::arg("offsets"), nb::arg("num_in"),
        "(in_rows, out_rows) of the map from outputs to inputs.");
}

}  // namespace pc3d
