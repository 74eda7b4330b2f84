// Nearest neighbours and farthest point sampling on the CPU, exact; normals; edges between neighbours or of a mesh, and what
// normals say of them.
//
// The points of a cloud are sorted along a z curve and cut into leaves of a few points; leaves are gathered in nodes, and these
// in nodes, each with its bounding box. Distances are (dx*dx + dy*dy) + dz*dz in float32, and so are the bounds of boxes:
// rounding is monotone, so no point of a box is ever nearer than its bound, and pruning changes no result. Ties go to the
// smaller row.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "curve.h"
#include "isa.h"
#include "module.h"
#include "neighbours_kernels.h"
#include "parallel.h"
#include "rows.h"

namespace nb = nanobind;

namespace pc3d {

void sort_nearest(float *distances, int32_t *rows, int64_t n, int64_t k) {
  std::vector<uint64_t> keys(n);  // distances are not negative: their bits are in their order
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, distances + i, sizeof bits);
    keys[i] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(rows[i]);
  }
  std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = static_cast<uint32_t>(keys[i] >> 32);
    std::memcpy(distances + i, &bits, sizeof bits);
    rows[i] = static_cast<int32_t>(keys[i]);
  }
}

void sort_rows(int32_t *rows, int64_t n) { std::sort(rows, rows + n); }

static bool same(RowPair a, RowPair b) { return a.smaller == b.smaller && a.larger == b.larger; }

int64_t sort_pairs(RowPair *pairs, int64_t n) {
  std::sort(pairs, pairs + n, [](RowPair a, RowPair b) { return a.smaller != b.smaller ? a.smaller < b.smaller : a.larger < b.larger; });
  int64_t again = 0;
  for (int64_t i = 1; i < n; ++i) again += same(pairs[i - 1], pairs[i]);
  return again;
}

namespace {

constexpr int64_t kQueryBlock = 1024;      // queries of one task
constexpr int64_t kNormalBlock = 1024;     // points of one task
constexpr int64_t kPairBlock = 4096;       // points of one task
constexpr int64_t kEdgeBlock = 4096;       // edges of one task
constexpr int64_t kLeastCapacity = 2048;   // candidates that queries share
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const std::vector<const NeighbourKernels *> &usable() {
  static const auto kernels = usable_kernels(neighbour_kernels_avx512(), neighbour_kernels_avx2(), neighbour_kernels_generic());
  return kernels;
}

void check_offsets(const Array<const int64_t, 1> &offsets, int64_t rows) {
  const int64_t clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (clouds < 0 || offsets.data()[0] != 0 || offsets.data()[clouds] != rows || !std::is_sorted(offsets.data(), offsets.data() + clouds + 1))
    throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
  for (int64_t cloud = 0; cloud < clouds; ++cloud)
    if (offsets.data()[cloud + 1] - offsets.data()[cloud] >= kNobody) throw std::invalid_argument("a cloud must have less than 2^31 - 1 points");
}

// Arrays that are read and written side by side, in one block. Long ones do not begin alike in the last 12 bits of their
// addresses: a load would wait for any store that is alike there.
class Arrays {
 public:
  // Memory for `count` arrays of `size` numbers of 4 bytes.
  static int64_t bytes(int64_t count, int64_t size) { return count * (4 * size + (4 * size < kPage ? kLine : 2 * kPage)); }

  Arrays(std::byte *memory, int64_t bytes) : next_(reinterpret_cast<uintptr_t>(memory)), end_(next_ + bytes) {}
  template <class T>
  T *take(int64_t size) {
    static_assert(sizeof(T) == 4);
    const uintptr_t apart = 4 * size < kPage ? 0 : (++long_ * kShift) % kPage;
    const uintptr_t array = apart ? (next_ + kPage - 1) / kPage * kPage + apart : (next_ + kLine - 1) / kLine * kLine;
    next_ = array + 4 * size;
    if (next_ > end_) throw std::logic_error("an array has no room");
    return reinterpret_cast<T *>(array);
  }

 private:
  static constexpr int64_t kPage = 4096, kShift = 512, kLine = 64;
  uintptr_t next_, end_;
  int64_t long_ = 0;
};

// Picks one of 2 * Half numbers and puts it first.
template <int64_t Half, class T, class Pick>
inline __attribute__((always_inline)) void pick_one(T *values, Pick pick) {
  for (int64_t i = 0; i < Half; ++i) values[i] = pick(values[i], values[i + Half]);
  if constexpr (Half > 1) pick_one<Half / 2>(values, pick);
}
// Picks one number of each kFan, and of the rest that is left of `count`.
template <class T, class Pick>
inline __attribute__((always_inline)) void pick_each(const T *values, int64_t count, T *out, Pick pick) {
  const int64_t whole = count / kFan;
  for (int64_t node = 0; node < whole; ++node) {
    const T *own = values + node * kFan;
    T best[kFan / 2];
    for (int64_t i = 0; i < kFan / 2; ++i) best[i] = pick(own[i], own[i + kFan / 2]);
    pick_one<kFan / 4>(best, pick);
    out[node] = best[0];
  }
  if (whole * kFan == count) return;
  T best = values[whole * kFan];
  for (int64_t i = whole * kFan + 1; i < count; ++i) best = pick(best, values[i]);
  out[whole] = best;
}
PC3D_CLONES void find_least(const float *values, int64_t count, float *out) {
  pick_each(values, count, out, [](float a, float b) __attribute__((always_inline)) { return a < b ? a : b; });
}
PC3D_CLONES void find_greatest(const float *values, int64_t count, float *out) {
  pick_each(values, count, out, [](float a, float b) __attribute__((always_inline)) { return a > b ? a : b; });
}
PC3D_CLONES void find_least(const int32_t *values, int64_t count, int32_t *out) {
  pick_each(values, count, out, [](int32_t a, int32_t b) __attribute__((always_inline)) { return a < b ? a : b; });
}

// Owns the memory of a PointTree.
class Tree {
 public:
  Buffer<int32_t> order;  // rows of the points, as they lie in the leaves

  // `order` has to keep neighbours together; results are the same for any.
  Tree(const float *points, int64_t count, Buffer<int32_t> order) : order(std::move(order)) {
    const int64_t size = filled(count);
    int64_t bytes = Arrays::bytes(4, size);
    for (int64_t nodes = size / kFan;; nodes = filled(nodes) / kFan) {
      bytes += Arrays::bytes(7, filled(nodes));
      if (nodes <= kFan) break;
    }
    memory_ = Buffer<std::byte>(bytes);
    Arrays arrays(memory_.data(), bytes);
    float *coord[3];
    for (int axis = 0; axis < 3; ++axis) tree_.coord[axis] = coord[axis] = arrays.take<float>(size);
    int32_t *const rows = arrays.take<int32_t>(size);
    tree_.row = rows;
    tree_.points = count;
    for (int64_t i = 0; i < size; ++i) {
      const bool real = i < count;
      for (int axis = 0; axis < 3; ++axis) coord[axis][i] = real ? points[3 * static_cast<int64_t>(this->order[i]) + axis] : NAN;
      rows[i] = real ? this->order[i] : kNobody;
    }
    tree_.levels = 0;
    const float *const *lows = tree_.coord, *const *highs = tree_.coord;
    const int32_t *row = tree_.row;
    for (int64_t below = count; tree_.levels == 0 || below > kFan;) {
      TreeLevel &level = tree_.level[tree_.levels++];
      level = add_level(arrays, lows, highs, row, below);
      below = level.nodes, lows = level.low, highs = level.high, row = level.row;
    }
  }
  const PointTree &view() const { return tree_; }

 private:
  PointTree tree_;
  Buffer<std::byte> memory_;

  static int64_t filled(int64_t nodes) { return (nodes + kFan - 1) / kFan * kFan; }

  static TreeLevel add_level(Arrays &arrays, const float *const *lows, const float *const *highs, const int32_t *rows, int64_t below) {
    TreeLevel level;
    level.nodes = (below + kFan - 1) / kFan;
    const int64_t size = filled(level.nodes);
    for (int axis = 0; axis < 3; ++axis) {
      float *const low = arrays.take<float>(size), *const high = arrays.take<float>(size);
      std::fill(low + level.nodes, low + size, kInfinity);
      std::fill(high + level.nodes, high + size, -kInfinity);
      find_least(lows[axis], below, low);
      find_greatest(highs[axis], below, high);
      level.low[axis] = low, level.high[axis] = high;
    }
    int32_t *const row = arrays.take<int32_t>(size);
    std::fill(row + level.nodes, row + size, kNobody);
    find_least(rows, below, row);
    level.row = row;
    return level;
  }
};

// Memory of the searches of one thread, kept for the next.
const SearchSpace &search_space(int64_t k) {
  thread_local SearchSpace space{};
  thread_local Buffer<std::byte> memory;
  const int64_t capacity = std::max(kLeastCapacity, 16 * k), size = capacity + kSplit * (kMostWaiting + 1);
  if (space.capacity < capacity) {
    memory = Buffer<std::byte>(Arrays::bytes(10, size));
    Arrays arrays(memory.data(), memory.size());
    space.capacity = capacity;
    for (float *&axis : space.coord) axis = arrays.take<float>(size);
    space.distances = arrays.take<float>(size);
    space.rows = arrays.take<int32_t>(size), space.near_rows = arrays.take<int32_t>(size);
    for (int32_t *&nodes : space.nodes) nodes = arrays.take<int32_t>(size);
    space.found_distances = arrays.take<float>(size), space.found_rows = arrays.take<int32_t>(size);
  }
  return space;
}

// Results as in Queries, with those of all clouds one after the other.
void search_clouds(const NeighbourKernels &kernels, const Array<const float, 2> &query, const Array<const int64_t, 1> &query_offsets,
                   const Array<const float, 2> &coord, const Array<const int64_t, 1> &offsets, int64_t k, float limit, int64_t *rows,
                   float *distances, int32_t *short_rows, int64_t inner, bool along_curve) {
  const int64_t clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (query.shape(1) != 3 || coord.shape(1) != 3 || query_offsets.shape(0) != offsets.shape(0) || k < 1)
    throw std::invalid_argument("queries and points do not fit each other");
  check_offsets(query_offsets, query.shape(0));
  check_offsets(offsets, coord.shape(0));
  const bool alike = query.data() == coord.data() && std::equal(offsets.data(), offsets.data() + clouds + 1, query_offsets.data());
  nb::gil_scoped_release release;
  std::vector<std::unique_ptr<Tree>> trees;
  std::vector<Buffer<int32_t>> orders;
  std::vector<Queries> queries;
  struct Task {
    int64_t cloud, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t cloud = 0; cloud < clouds; ++cloud) {
    const int64_t first = offsets.data()[cloud], own = query_offsets.data()[cloud], count = query_offsets.data()[cloud + 1] - own;
    const int64_t points = offsets.data()[cloud + 1] - first;
    Buffer<int32_t> along(along_curve ? points : 0);
    std::iota(along.begin(), along.end(), 0);
    if (!along_curve) along = curve_order(coord.data() + 3 * first, points);
    trees.push_back(std::make_unique<Tree>(coord.data() + 3 * first, points, std::move(along)));
    orders.push_back(alike ? Buffer<int32_t>() : curve_order(query.data() + 3 * own, count));
    const int32_t *order = alike ? trees.back()->order.data() : orders.back().data();
    queries.push_back({query.data() + 3 * own, order, k, first, limit, rows ? rows + own * k : nullptr, rows ? distances + own * k : nullptr,
                       rows ? nullptr : short_rows + own * k, inner});
    for (int64_t begin = 0; begin < count; begin += kQueryBlock) tasks.push_back({cloud, begin, std::min(begin + kQueryBlock, count)});
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task &task = tasks[i];
    kernels.nearest(trees[task.cloud]->view(), queries[task.cloud], task.begin, task.end, search_space(k));
  });
}

void knn(Array<const float, 2> query, Array<const int64_t, 1> query_offsets, Array<const float, 2> coord,
         Array<const int64_t, 1> offsets, float limit, Array<int64_t, 2> rows, Array<float, 2> distances, const std::string &isa) {
  if (rows.shape(0) != query.shape(0) || distances.shape(0) != query.shape(0) || distances.shape(1) != rows.shape(1))
    throw std::invalid_argument("queries and results do not fit each other");
  search_clouds(find_kernels(usable(), isa), query, query_offsets, coord, offsets, rows.shape(1), limit, rows.data(), distances.data(), nullptr, 0,
                false);
}

nb::object near_rows(Array<const float, 2> coord, Array<const int64_t, 1> offsets, int64_t k, int64_t inner, bool along_curve,
                     const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  if (k < 1 || static_cast<int64_t>(coord.shape(0)) > kNobody || inner < 0 || inner > k)
    throw std::invalid_argument("points and results do not fit each other");
  Buffer<int32_t> rows(coord.shape(0) * k);
  search_clouds(kernels, coord, offsets, coord, offsets, k, kInfinity, nullptr, nullptr, rows.data(), inner, along_curve);
  return to_torch(std::move(rows), k);
}

// Points of 4 numbers, which one load takes.
Buffer<float> in_fours(const float *points, int64_t rows) {
  Buffer<float> fours(4 * rows);
  parallel_tasks((rows + kNormalBlock - 1) / kNormalBlock, [&](int64_t task) {
    for (int64_t i = task * kNormalBlock, end = std::min(i + kNormalBlock, rows); i < end; ++i) {
      for (int axis = 0; axis < 3; ++axis) fours[4 * i + axis] = points[3 * i + axis];
      fours[4 * i + 3] = 0;
    }
  });
  return fours;
}

void normals(Array<const float, 2> coord, Array<const int64_t, 1> offsets, Array<const int32_t, 2> neighbours,
             Array<const float, 2> centers, Array<float, 2> out, const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  const int64_t rows = coord.shape(0), k = neighbours.shape(1);
  check_offsets(offsets, rows);
  if (coord.shape(1) != 3 || out.shape(1) != 3 || static_cast<int64_t>(neighbours.shape(0)) != rows || static_cast<int64_t>(out.shape(0)) != rows ||
      centers.shape(0) + 1 != offsets.shape(0) || centers.shape(1) != 3)
    throw std::invalid_argument("points, neighbours, centres and results do not fit each other");
  std::atomic<bool> known = true;
  {
    nb::gil_scoped_release release;
    const Buffer<float> points = in_fours(coord.data(), rows);
    for (int64_t cloud = 0; cloud < static_cast<int64_t>(centers.shape(0)); ++cloud) {
      const int64_t first = offsets.data()[cloud], last = offsets.data()[cloud + 1];
      parallel_tasks((last - first + kNormalBlock - 1) / kNormalBlock, [&](int64_t task) {
        const int64_t begin = first + task * kNormalBlock, end = std::min(begin + kNormalBlock, last);
        if (inside_or_negative(neighbours.data() + begin * k, (end - begin) * k, rows))
          kernels.normals(points.data(), neighbours.data(), k, centers.data() + 3 * cloud, begin, end, out.data());
        else
          known = false;
      });
    }
  }
  if (!known) throw std::invalid_argument("a neighbour is a point that does not exist");
}

nb::object edge_weights(Array<const float, 2> coord, Array<const float, 2> normal, Array<const int32_t, 2> edges, const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  const int64_t rows = coord.shape(0), count = edges.shape(0);
  if (coord.shape(1) != 3 || normal.shape(1) != 3 || static_cast<int64_t>(normal.shape(0)) != rows || edges.shape(1) != 2)
    throw std::invalid_argument("points, normals and edges do not fit each other");
  std::atomic<bool> known = true;
  Buffer<float> weights(count);
  {
    nb::gil_scoped_release release;
    const Buffer<float> points = in_fours(coord.data(), rows), normals = in_fours(normal.data(), rows);
    parallel_tasks((count + kEdgeBlock - 1) / kEdgeBlock, [&](int64_t task) {
      const int64_t begin = task * kEdgeBlock, end = std::min(begin + kEdgeBlock, count);
      if (inside(edges.data() + 2 * begin, 2 * (end - begin), rows))
        kernels.edge_weights(points.data(), normals.data(), edges.data(), begin, end, weights.data());
      else
        known = false;
    });
  }
  if (!known) throw std::invalid_argument("an edge names a point outside 0.." + std::to_string(rows - 1));
  return to_torch(std::move(weights));
}

// Edges (smaller, larger) between different rows, each once and sorted; rows are numbered anew by `place`.
nb::object distinct_edges(Array<const int32_t, 2> edges, Array<const int32_t, 1> place, const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  const int64_t count = edges.shape(0), rows = place.shape(0);
  if (edges.shape(1) != 2) throw std::invalid_argument("edges must be (M, 2)");
  if (!inside(edges.data(), 2 * count, rows)) throw std::invalid_argument("an edge names a point outside 0.." + std::to_string(rows - 1));
  if (!inside(place.data(), rows, rows)) throw std::invalid_argument("a place is outside 0.." + std::to_string(rows - 1));
  Buffer<int32_t> ends;
  {
    nb::gil_scoped_release release;
    Buffer<RowPair> moved(count);
    std::vector<int64_t> starts(rows + 2);  // point i is at i + 2 while others are counted, at i + 1 until they are put
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int32_t a = place.data()[edges.data()[2 * e]], b = place.data()[edges.data()[2 * e + 1]];
      moved[kept] = {std::min(a, b), std::max(a, b)};
      kept += a != b;
      starts[std::min(a, b) + 2] += a != b;
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    Buffer<int32_t> larger(kept);
    for (int64_t e = 0; e < kept; ++e) larger[starts[moved[e].smaller + 1]++] = moved[e].larger;
    const int64_t blocks = (rows + kPairBlock - 1) / kPairBlock;
    std::vector<int64_t> found(blocks);
    ends = Buffer<int32_t>(2 * kept);
    RowPair *const pairs = reinterpret_cast<RowPair *>(ends.data());
    parallel_tasks(blocks, [&](int64_t b) {
      const int64_t begin = b * kPairBlock;
      found[b] = kernels.put_distinct(larger.data(), starts.data(), begin, std::min(begin + kPairBlock, rows), pairs + starts[begin]);
    });
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      std::memmove(pairs + total, pairs + starts[b * kPairBlock], found[b] * sizeof(RowPair));
      total += found[b];
    }
    ends.shrink(2 * total);
  }
  return to_torch(std::move(ends), 2);
}

// Each pair of a point and another in its list once, (smaller, larger), sorted. Empty, and false in `complete`, where a list
// does not fit RowLists.
//
// The pairs of a point are those with larger points in its list, and with larger points that it does not list but that list it.
Buffer<int32_t> distinct_pairs(const NeighbourKernels &kernels, const RowLists &lists, bool &complete) {
  const int64_t blocks = (lists.points + kPairBlock - 1) / kPairBlock;
  struct Block {
    std::vector<RowPair> one_way;
    int64_t first, count;
    bool complete, distinct;
  };
  std::vector<Block> found(blocks);
  const auto each = [&](auto &&run) {
    parallel_tasks(blocks, [&](int64_t b) { run(found[b], b * kPairBlock, std::min((b + 1) * kPairBlock, lists.points)); });
  };
  each([&](Block &block, int64_t begin, int64_t end) {
    Buffer<RowPair> pairs((end - begin) * lists.count);
    int64_t count = 0;
    block.complete = kernels.one_way(lists, begin, end, pairs.data(), &count, &block.count);
    block.one_way.assign(pairs.data(), pairs.data() + count);
  });
  complete = std::all_of(found.begin(), found.end(), [](const Block &block) { return block.complete; });
  if (!complete) return Buffer<int32_t>();
  std::vector<int64_t> starts(lists.points + 2);  // point i is at i + 2 while others are counted, at i + 1 until they are put
  for (const Block &block : found)
    for (const RowPair &pair : block.one_way) ++starts[pair.smaller + 2];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  Buffer<int32_t> others(starts.back() + 2);
  std::fill(others.end() - 2, others.end(), 0);  // read, whatever they are
  for (const Block &block : found)
    for (const RowPair &pair : block.one_way) others[starts[pair.smaller + 1]++] = pair.larger;
  int64_t total = 0;
  each([&](Block &block, int64_t begin, int64_t end) { block.count += starts[end] - starts[begin]; });
  for (Block &block : found) block.first = total, total += block.count;
  Buffer<int32_t> ends(2 * total);
  RowPair *const pairs = reinterpret_cast<RowPair *>(ends.data());
  const auto put = [&](bool distinct) {
    each([&](Block &block, int64_t begin, int64_t end) {
      RowPair *const out = pairs + block.first;
      block.distinct = kernels.pairs(lists, others.data(), starts.data(), begin, end, distinct, out, out + block.count);
    });
  };
  put(true);
  if (!std::all_of(found.begin(), found.end(), [](const Block &block) { return block.distinct; })) {
    put(false);
    ends.shrink(2 * (std::unique(pairs, pairs + total, same) - pairs));
  }
  return ends;
}

// Each undirected pair of a neighbour table once, (smaller, larger), sorted; at most `k` neighbours of a row count.
nb::object neighbour_edges(Array<const int32_t, 2> neighbours, int64_t k, const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  const int64_t rows = neighbours.shape(0), width = neighbours.shape(1);
  if (k < 1 || rows >= kNobody) throw std::invalid_argument("a graph needs k above 0 and less than 2^31 - 1 points");
  Buffer<int32_t> pairs;
  {
    nb::gil_scoped_release release;
    bool complete = false;
    if (k < width) pairs = distinct_pairs(kernels, {neighbours.data(), rows, width, k + 1, false}, complete);
    if (!complete) {
      const int64_t most = std::min(k, width);
      Buffer<int32_t> lists(rows * most);
      for (int64_t i = 0; i < rows; ++i) {
        const int32_t *other = neighbours.data() + i * width, *const end = other + width;
        int32_t *next = lists.data() + i * most, *const last = next + most;
        for (; other < end && next < last; ++other)
          if (*other >= 0 && *other < rows && *other != i) *next++ = *other;
        std::fill(next, last, static_cast<int32_t>(i));
      }
      pairs = distinct_pairs(kernels, {lists.data(), rows, most, most, true}, complete);
    }
  }
  return to_torch(std::move(pairs), 2);
}

void sample_cloud(const NeighbourKernels &kernels, const float *coord, int64_t points, int64_t count, int64_t start, int64_t *out) {
  const Tree tree(coord, points, curve_order(coord, points));
  SampleState state;
  std::vector<float> distances((points + kFan - 1) / kFan * kFan, kInfinity);
  std::fill(distances.begin() + points, distances.end(), -1.0f);  // the filling is never chosen
  state.distances = distances.data();
  std::vector<std::vector<float>> largest(tree.view().levels);
  std::vector<std::vector<int32_t>> rows(tree.view().levels);
  for (int at = 0; at < tree.view().levels; ++at) {
    const TreeLevel &level = tree.view().level[at];
    const int64_t size = (level.nodes + kFan - 1) / kFan * kFan;
    largest[at].assign(size, -1.0f);
    std::fill(largest[at].begin(), largest[at].begin() + level.nodes, kInfinity);
    rows[at].assign(level.row, level.row + size);
    state.largest[at] = largest[at].data(), state.row[at] = rows[at].data();
  }
  kernels.farthest(tree.view(), coord, count, start, state, out);
}

void farthest_points(Array<const float, 2> coord, Array<const int64_t, 1> offsets, Array<const int64_t, 1> sampled,
                     Array<const int64_t, 1> starts, Array<int64_t, 1> out, const std::string &isa) {
  const NeighbourKernels &kernels = find_kernels(usable(), isa);
  const int64_t clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (coord.shape(1) != 3 || sampled.shape(0) != offsets.shape(0) || static_cast<int64_t>(starts.shape(0)) != clouds)
    throw std::invalid_argument("points and samples do not fit each other");
  check_offsets(offsets, coord.shape(0));
  check_offsets(sampled, out.shape(0));
  for (int64_t cloud = 0; cloud < clouds; ++cloud) {
    const int64_t points = offsets.data()[cloud + 1] - offsets.data()[cloud], count = sampled.data()[cloud + 1] - sampled.data()[cloud];
    if (count > points || (count && (starts.data()[cloud] < 0 || starts.data()[cloud] >= points)))
      throw std::invalid_argument("a cloud has fewer points than are to be sampled, or no such start");
  }
  nb::gil_scoped_release release;
  parallel_tasks(clouds, [&](int64_t cloud) {
    const int64_t first = offsets.data()[cloud], begin = sampled.data()[cloud], end = sampled.data()[cloud + 1];
    if (begin == end) return;
    sample_cloud(kernels, coord.data() + 3 * first, offsets.data()[cloud + 1] - first, end - begin, starts.data()[cloud], out.data() + begin);
    for (int64_t i = begin; i < end; ++i) out.data()[i] += first;
  });
}

}  // namespace

void register_neighbours(nb::module_ &m) {
  m.def("neighbour_isas", [] { return names_of(usable()); }, "Instruction sets of the neighbour kernels usable here, fastest first.");
  m.def("knn", &knn, nb::arg("query"), nb::arg("query_offsets"), nb::arg("coord"), nb::arg("offsets"), nb::arg("limit"),
        nb::arg("rows"), nb::arg("distances"), nb::arg("isa") = "",
        "Rows of the k nearest points of the same cloud, ascending by squared distance (at most `limit`); -1 where there are fewer.");
  m.def("near_rows", &near_rows, nb::arg("coord"), nb::arg("offsets"), nb::arg("k"), nb::arg("inner") = 0, nb::arg("along_curve") = false,
        nb::arg("isa") = "",
        "Rows of the points nearest to each point, itself among them, as knn finds them; with `inner` above 0 in no order, but that as\n"
        "many nearest ones come first. `along_curve` says that the points of each cloud lie in an order that keeps neighbours together.");
  m.def("normals", &normals, nb::arg("coord"), nb::arg("offsets"), nb::arg("neighbours"), nb::arg("centers"), nb::arg("out"),
        nb::arg("isa") = "", "Unit normals: direction of least spread of the neighbours of each row (-1 ends them), towards its cloud's centre.");
  m.def("neighbour_edges", &neighbour_edges, nb::arg("neighbours"), nb::arg("k"), nb::arg("isa") = "",
        "Undirected edges (smaller, larger), sorted, of the first k neighbours of each row other than itself.");
  m.def("distinct_edges", &distinct_edges, nb::arg("edges"), nb::arg("place"), nb::arg("isa") = "",
        "Edges (smaller, larger) of place[edges], without loops, each once, sorted.");
  m.def("edge_weights", &edge_weights, nb::arg("coord"), nb::arg("normal"), nb::arg("edges"), nb::arg("isa") = "",
        "1 - cosine of the normals, squared where the edge is convex, at least 0.");
  m.def("farthest_points", &farthest_points, nb::arg("coord"), nb::arg("offsets"), nb::arg("sampled"), nb::arg("starts"),
        nb::arg("out"), nb::arg("isa") = "", "Farthest point sampling of every cloud: rows sampled[c]:sampled[c + 1] of `out`.");
}

}  // namespace pc3d
