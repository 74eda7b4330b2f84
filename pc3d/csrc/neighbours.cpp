// Nearest neighbours and farthest point sampling on the CPU, exact.
//
// The points of a cloud are sorted along a z curve and cut into leaves of a few points with their bounding boxes. Distances
// are (dx*dx + dy*dy) + dz*dz in float32, and so are the bounds of boxes: rounding is monotone, so no point of a box is ever
// nearer than its bound, and pruning changes no result. Ties go to the smaller row.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "array.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kLeaf = 16, kQueryBlock = 256, kGroup = 16;
constexpr int64_t kTogether = 16;      // queries that share their candidates, at most,
constexpr double kApart = 2.0;         // half the diagonal of their box at most, in search radii,
constexpr double kMargin = 1.25;       // and the radius searched around each, in that of the query before
constexpr float kFarthest = 1e37f;     // squared; beyond, a bound could round to infinity
constexpr int64_t kMostRanked = 96;    // candidates selected by counting; more are sorted in one by one
constexpr int kAxisBits = 10;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNobody = std::numeric_limits<int64_t>::max();  // a neighbour not found yet

void check_offsets(const Array<const int64_t, 1> &offsets, int64_t rows) {
  const int64_t clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (clouds < 0 || offsets.data()[0] != 0 || offsets.data()[clouds] != rows || !std::is_sorted(offsets.data(), offsets.data() + clouds + 1))
    throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
}

uint64_t spread(uint64_t v) {
  v = (v | v << 16) & 0x030000FF;
  v = (v | v << 8) & 0x0300F00F;
  v = (v | v << 4) & 0x030C30C3;
  return (v | v << 2) & 0x09249249;
}

// Rows [0, rows) of a cloud along a z curve through its bounding box.
std::vector<int64_t> curve_order(const float *coord, int64_t rows) {
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < rows; ++i)
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], coord[3 * i + axis]);
      high[axis] = std::max(high[axis], coord[3 * i + axis]);
    }
  double extent = 0;
  for (int axis = 0; axis < 3; ++axis) extent = std::max(extent, static_cast<double>(high[axis]) - low[axis]);
  const double scale = extent > 0 ? ((1 << kAxisBits) - 1) / extent : 0.0;
  Buffer<KeyedRow> items(rows);
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t key = 0;
    for (int axis = 0; axis < 3; ++axis)
      key |= spread(static_cast<uint64_t>((static_cast<double>(coord[3 * i + axis]) - low[axis]) * scale)) << (2 - axis);
    items[i] = KeyedRow::make(key, i, 0);
  }
  radix_sort(items, 3 * kAxisBits, 0);
  std::vector<int64_t> order(rows);
  for (int64_t i = 0; i < rows; ++i) order[i] = items[i].row(0);
  return order;
}

double distance(const float *p, const float *q) {
  double sum = 0;
  for (int axis = 0; axis < 3; ++axis) sum += (static_cast<double>(p[axis]) - q[axis]) * (static_cast<double>(p[axis]) - q[axis]);
  return std::sqrt(sum);
}

struct Box {
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};

  void add(const Box &other) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], other.low[axis]);
      high[axis] = std::max(high[axis], other.high[axis]);
    }
  }
  void add(const float *p) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], p[axis]);
      high[axis] = std::max(high[axis], p[axis]);
    }
  }
  std::array<float, 3> center() const {
    return {low[0] + (high[0] - low[0]) / 2, low[1] + (high[1] - low[1]) / 2, low[2] + (high[2] - low[2]) / 2};
  }
  double diagonal() const { return pc3d::distance(low, high); }
  float distance(const float *p) const {
    float gap[3];
    for (int axis = 0; axis < 3; ++axis) gap[axis] = std::max(std::max(low[axis] - p[axis], p[axis] - high[axis]), 0.0f);
    return (gap[0] * gap[0] + gap[1] * gap[1]) + gap[2] * gap[2];
  }
};

// The points of a cloud in leaves, coordinates by axis; the last leaf is filled up with points at infinity.
struct Leaves {
  int64_t count;
  std::vector<float> x, y, z;
  std::vector<int64_t> rows;  // of the cloud
  std::vector<Box> boxes;

  Leaves(const float *coord, int64_t points) : count((points + kLeaf - 1) / kLeaf) {
    const std::vector<int64_t> order = curve_order(coord, points);
    const int64_t size = count * kLeaf;
    x.assign(size, kInfinity), y.assign(size, kInfinity), z.assign(size, kInfinity);
    rows.assign(size, kNobody);
    boxes.resize(count);
    for (int64_t i = 0; i < points; ++i) {
      const float *p = coord + 3 * order[i];
      x[i] = p[0], y[i] = p[1], z[i] = p[2], rows[i] = order[i];
      boxes[i / kLeaf].add(p);
    }
  }
};

// A binary tree over the leaves: node i has children 2 i and 2 i + 1, leaf l is node `first_leaf` + l.
struct Tree {
  Leaves leaves;
  int64_t first_leaf = 1;
  std::vector<Box> nodes;

  Tree(const float *coord, int64_t points) : leaves(coord, points) {
    while (first_leaf < leaves.count) first_leaf *= 2;
    nodes.resize(2 * first_leaf);
    std::copy(leaves.boxes.begin(), leaves.boxes.end(), nodes.begin() + first_leaf);
    for (int64_t i = first_leaf - 1; i > 0; --i) {
      nodes[i].add(nodes[2 * i]);
      nodes[i].add(nodes[2 * i + 1]);
    }
  }
};

PC3D_CLONES void leaf_distances(const float *x, const float *y, const float *z, const float *p, float *out) {
  for (int64_t i = 0; i < kLeaf; ++i) {
    const float dx = x[i] - p[0], dy = y[i] - p[1], dz = z[i] - p[2];
    out[i] = (dx * dx + dy * dy) + dz * dz;
  }
}

// The k nearest so far, ascending by distance, then row.
struct Nearest {
  int64_t k;
  float *distance;
  int64_t *row;

  bool better(float d, int64_t r, int64_t i) const { return d < distance[i] || (d == distance[i] && r < row[i]); }
  void offer(float d, int64_t r) {
    if (!better(d, r, k - 1)) return;
    int64_t i = k - 1;
    for (; i > 0 && d < distance[i - 1]; --i) {
      distance[i] = distance[i - 1];
      row[i] = row[i - 1];
    }
    for (; i > 0 && better(d, r, i - 1); --i) {
      distance[i] = distance[i - 1];
      row[i] = row[i - 1];
    }
    distance[i] = d;
    row[i] = r;
  }
};

void search(const Tree &tree, const float *p, float limit, Nearest nearest) {
  struct Visit {
    int64_t node;
    float bound;
  } stack[64];
  int depth = 0;
  float distances[kLeaf];
  stack[depth++] = {1, tree.nodes[1].distance(p)};
  while (depth) {
    const Visit visit = stack[--depth];
    if (visit.bound > nearest.distance[nearest.k - 1] || visit.bound > limit) continue;
    if (visit.node < tree.first_leaf) {
      Visit near{2 * visit.node, tree.nodes[2 * visit.node].distance(p)}, far{near.node + 1, tree.nodes[near.node + 1].distance(p)};
      if (far.bound < near.bound) std::swap(near, far);
      if (far.bound < kInfinity) stack[depth++] = far;
      if (near.bound < kInfinity) stack[depth++] = near;
      continue;
    }
    const int64_t first = (visit.node - tree.first_leaf) * kLeaf;
    leaf_distances(tree.leaves.x.data() + first, tree.leaves.y.data() + first, tree.leaves.z.data() + first, p, distances);
    for (int64_t i = 0; i < kLeaf; ++i)
      if (distances[i] <= limit && distances[i] <= nearest.distance[nearest.k - 1])
        nearest.offer(distances[i], tree.leaves.rows[first + i]);
  }
}

// A bound of squared float32 distances that are at most `radius`, rounding included.
float squared_bound(double radius) { return static_cast<float>(radius * radius * 1.0001) + std::numeric_limits<float>::min(); }

PC3D_CLONES void distances_to(const float *x, const float *y, const float *z, int64_t n, const float *p, float *out) {
  for (int64_t i = 0; i < n; ++i) {
    const float dx = x[i] - p[0], dy = y[i] - p[1], dz = z[i] - p[2];
    out[i] = (dx * dx + dy * dy) + dz * dz;
  }
}

// within[i]: whether d[i] is at most `bound`, for n a multiple of 8.
PC3D_CLONES void compare(const float *d, int64_t n, float bound, uint8_t *within) {
  for (int64_t i = 0; i < n; ++i) within[i] = d[i] <= bound;
}

// How many of the distances are less than each; with `rows`, or equal and of a smaller row.
PC3D_CLONES void count_nearer(const float *d, const int32_t *rows, int64_t n, int32_t *rank) {
  for (int64_t i = 0; i < n; ++i) {
    const float own = d[i];
    int32_t count = 0;
    if (rows) {
      const int32_t row = rows[i];
      for (int64_t j = 0; j < n; ++j) count += (d[j] < own) | ((d[j] == own) & (rows[j] < row));
    } else {
      for (int64_t j = 0; j < n; ++j) count += d[j] < own;
    }
    rank[i] = count;
  }
}

// The points of a ball, and the nearest of them to queries inside it.
class Candidates {
 public:
  void gather(const Tree &tree, const float *center, float bound) {
    int64_t count = 0;
    stack_.assign(1, 1);
    while (!stack_.empty()) {
      const int64_t node = stack_.back();
      stack_.pop_back();
      if (!(tree.nodes[node].distance(center) <= bound)) continue;
      if (node < tree.first_leaf) {
        stack_.push_back(2 * node + 1);
        stack_.push_back(2 * node);
        continue;
      }
      const int64_t first = (node - tree.first_leaf) * kLeaf;
      reserve(count + kLeaf);
      float near[kLeaf];
      leaf_distances(tree.leaves.x.data() + first, tree.leaves.y.data() + first, tree.leaves.z.data() + first, center, near);
      for (int64_t i = 0; i < kLeaf; ++i) {
        x_[count] = tree.leaves.x[first + i];
        y_[count] = tree.leaves.y[first + i];
        z_[count] = tree.leaves.z[first + i];
        rows_[count] = static_cast<int32_t>(tree.leaves.rows[first + i]);
        count += near[i] <= bound;
      }
    }
    size_ = (count + 7) / 8 * 8;
    reserve(size_);
    std::fill(x_.begin() + count, x_.begin() + size_, kInfinity);  // never within a bound
  }

  // The k nearest of the candidates within `bound` of p; false, and nothing found, where there are fewer.
  bool nearest(const float *p, float bound, Nearest found) {
    distances_to(x_.data(), y_.data(), z_.data(), size_, p, distances_.data());
    compare(distances_.data(), size_, bound, within_.data());
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; i += 8) {
      if (kept + 8 > kMostRanked) return offer_all(bound, found);
      uint64_t bytes = 0;
      for (int64_t j = 0; j < 8; ++j) bytes |= static_cast<uint64_t>(within_[i + j]) << 8 * j;
      for (; bytes; bytes &= bytes - 1) kept_[kept++] = static_cast<int32_t>(i + __builtin_ctzll(bytes) / 8);
    }
    if (kept < found.k) return false;
    float d[kMostRanked];
    int32_t rows[kMostRanked], rank[kMostRanked];
    for (int64_t i = 0; i < kept; ++i) d[i] = distances_[kept_[i]], rows[i] = rows_[kept_[i]];
    count_nearer(d, nullptr, kept, rank);
    if (!place(d, rows, rank, kept, found)) {
      count_nearer(d, rows, kept, rank);
      place(d, rows, rank, kept, found);
    }
    return true;
  }

 private:
  int64_t size_ = 0;
  std::vector<float> x_, y_, z_, distances_;
  std::vector<uint8_t> within_;
  std::vector<int32_t> rows_;
  std::vector<int64_t> stack_;
  int32_t kept_[kMostRanked];

  void reserve(int64_t size) {
    if (static_cast<int64_t>(x_.size()) >= size) return;
    for (auto *values : {&x_, &y_, &z_, &distances_}) values->resize(2 * size);
    rows_.resize(2 * size);
    within_.resize(2 * size);
  }

  bool offer_all(float bound, Nearest found) const {
    int64_t offered = 0;
    for (int64_t i = 0; i < size_; ++i)
      if (distances_[i] <= bound) ++offered, found.offer(distances_[i], rows_[i]);
    if (offered >= found.k) return true;
    std::fill(found.row, found.row + found.k, kNobody);
    std::fill(found.distance, found.distance + found.k, kInfinity);
    return false;
  }

  // False where two have the same rank.
  static bool place(const float *d, const int32_t *rows, const int32_t *rank, int64_t n, Nearest found) {
    int32_t owner[kMostRanked];
    std::fill(owner, owner + found.k, -1);
    int64_t chosen = 0;
    for (int64_t i = 0; i < n; ++i) owner[rank[i]] = static_cast<int32_t>(i), chosen += rank[i] < found.k;
    if (chosen > found.k) return false;
    for (int64_t at = 0; at < found.k; ++at) {
      if (owner[at] < 0) return false;
      found.distance[at] = d[owner[at]];
      found.row[at] = rows[owner[at]];
    }
    return true;
  }
};

void knn(Array<const float, 2> query, Array<const int64_t, 1> query_offsets, Array<const float, 2> coord,
         Array<const int64_t, 1> offsets, float limit, Array<int64_t, 2> rows, Array<float, 2> distances) {
  const int64_t k = rows.shape(1), clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (query.shape(1) != 3 || coord.shape(1) != 3 || query_offsets.shape(0) != offsets.shape(0) || k < 1 ||
      rows.shape(0) != query.shape(0) || distances.shape(0) != query.shape(0) || distances.shape(1) != rows.shape(1))
    throw std::invalid_argument("queries, points and results do not fit each other");
  check_offsets(query_offsets, query.shape(0));
  check_offsets(offsets, coord.shape(0));
  nb::gil_scoped_release release;
  std::fill(rows.data(), rows.data() + rows.size(), kNobody);
  std::fill(distances.data(), distances.data() + distances.size(), kInfinity);
  std::vector<std::unique_ptr<Tree>> trees(clouds);
  std::vector<std::vector<int64_t>> orders(clouds);
  const auto build = [&](int64_t cloud) {
    const int64_t first = offsets.data()[cloud], queries = query_offsets.data()[cloud];
    trees[cloud] = std::make_unique<Tree>(coord.data() + 3 * first, offsets.data()[cloud + 1] - first);
    orders[cloud] = curve_order(query.data() + 3 * queries, query_offsets.data()[cloud + 1] - queries);
  };
  for (int64_t cloud = 0; cloud < clouds; ++cloud) build(cloud);
  struct Task {
    int64_t cloud, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t cloud = 0; cloud < clouds; ++cloud)
    for (int64_t begin = 0, end = static_cast<int64_t>(orders[cloud].size()); begin < end; begin += kQueryBlock)
      tasks.push_back({cloud, begin, std::min(begin + kQueryBlock, end)});
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task &task = tasks[i];
    const Tree &tree = *trees[task.cloud];
    if (tree.leaves.count == 0) return;
    const int64_t *order = orders[task.cloud].data(), first = query_offsets.data()[task.cloud];
    const auto point = [&](int64_t j) { return query.data() + 3 * (first + order[j]); };
    const auto result = [&](int64_t j) {
      const int64_t q = first + order[j];
      return Nearest{k, distances.data() + q * k, rows.data() + q * k};
    };
    thread_local Candidates kept;
    Candidates &candidates = kept;
    double radius = kInfinity;  // of the k neighbours of the query before
    const float *before = nullptr;
    const auto alone = [&](int64_t j) {  // they lie within its radius and the way from it
      const double reach = before ? radius + distance(point(j), before) : static_cast<double>(kInfinity);
      search(tree, point(j), std::min(limit, squared_bound(reach)), result(j));
    };
    for (int64_t j = task.begin; j < task.end;) {
      Box box;
      int64_t last = j;
      for (; last < task.end && last - j < kTogether; ++last) {
        Box wider = box;
        wider.add(point(last));
        if (!(wider.diagonal() <= 2 * kApart * radius)) break;
        box = wider;
      }
      const std::array<float, 3> center = box.center();  // rounded, so it may lie nearer to one corner
      const double guess = kMargin * radius;
      const double ball = guess + std::max(distance(center.data(), box.low), distance(center.data(), box.high));
      const bool together = last - j > 2 && ball * ball < std::min(limit, kFarthest);
      if (together) candidates.gather(tree, center.data(), squared_bound(ball));
      for (const int64_t end = together ? last : j + 1; j < end; ++j) {
        const auto within = [&](double bound) { return candidates.nearest(point(j), static_cast<float>(bound * bound), result(j)); };
        if (!together || !(within(guess) || within(ball - distance(point(j), center.data())))) alone(j);
        before = point(j);
        radius = std::sqrt(static_cast<double>(result(j).distance[k - 1]));
      }
    }
    for (int64_t j = task.begin; j < task.end; ++j) {
      int64_t *found = result(j).row;
      for (int64_t n = 0; n < k; ++n)
        if (found[n] != kNobody) found[n] += offsets.data()[task.cloud];
    }
  });
  for (int64_t *row = rows.data(), *end = row + rows.size(); row != end; ++row)
    if (*row == kNobody) *row = -1;
}

// distance <- min(distance, to p) for one leaf; the largest of the result.
PC3D_CLONES float shrink_leaf(const float *x, const float *y, const float *z, const float *p, float *distance) {
  float largest = -1.0f;
  for (int64_t i = 0; i < kLeaf; ++i) {
    const float dx = x[i] - p[0], dy = y[i] - p[1], dz = z[i] - p[2];
    const float d = (dx * dx + dy * dy) + dz * dz;
    distance[i] = d < distance[i] ? d : distance[i];
    largest = distance[i] > largest ? distance[i] : largest;
  }
  return largest;
}

// `count` rows of one cloud, each the farthest from those before it. Leaves that a new point cannot change are skipped.
void sample_cloud(const float *coord, int64_t points, int64_t count, int64_t start, int64_t *out) {
  const Leaves leaves(coord, points);
  const int64_t groups = (leaves.count + kGroup - 1) / kGroup;
  std::vector<float> distance(leaves.count * kLeaf, kInfinity), largest(leaves.count, kInfinity), group_largest(groups, kInfinity);
  std::vector<Box> group_boxes(groups);
  for (int64_t leaf = 0; leaf < leaves.count; ++leaf) group_boxes[leaf / kGroup].add(leaves.boxes[leaf]);
  std::fill(distance.begin() + points, distance.end(), -1.0f);  // the filling is never chosen
  int64_t chosen = start;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = chosen;
    const float *p = coord + 3 * chosen;
    float farthest = -1.0f;
    for (int64_t group = 0; group < groups; ++group) {
      if (group_boxes[group].distance(p) < group_largest[group]) {
        group_largest[group] = -1.0f;
        for (int64_t leaf = group * kGroup, end = std::min(leaf + kGroup, leaves.count); leaf < end; ++leaf) {
          if (leaves.boxes[leaf].distance(p) < largest[leaf]) {
            const int64_t at = leaf * kLeaf;
            largest[leaf] = shrink_leaf(leaves.x.data() + at, leaves.y.data() + at, leaves.z.data() + at, p, distance.data() + at);
          }
          group_largest[group] = std::max(group_largest[group], largest[leaf]);
        }
      }
      farthest = std::max(farthest, group_largest[group]);
    }
    chosen = std::numeric_limits<int64_t>::max();
    for (int64_t group = 0; group < groups; ++group) {
      if (group_largest[group] != farthest) continue;
      for (int64_t leaf = group * kGroup, end = std::min(leaf + kGroup, leaves.count); leaf < end; ++leaf) {
        if (largest[leaf] != farthest) continue;
        for (int64_t j = leaf * kLeaf; j < (leaf + 1) * kLeaf; ++j)
          if (distance[j] == farthest) chosen = std::min(chosen, leaves.rows[j]);
      }
    }
  }
}

void farthest_points(Array<const float, 2> coord, Array<const int64_t, 1> offsets, Array<const int64_t, 1> sampled,
                     Array<const int64_t, 1> starts, Array<int64_t, 1> out) {
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
    sample_cloud(coord.data() + 3 * first, offsets.data()[cloud + 1] - first, end - begin, starts.data()[cloud], out.data() + begin);
    for (int64_t i = begin; i < end; ++i) out.data()[i] += first;
  });
}

}  // namespace

void register_neighbours(nb::module_ &m) {
  m.def("knn", &knn, nb::arg("query"), nb::arg("query_offsets"), nb::arg("coord"), nb::arg("offsets"), nb::arg("limit"),
        nb::arg("rows"), nb::arg("distances"),
        "Rows of the k nearest points of the same cloud, ascending by squared distance (at most `limit`); -1 where there are fewer.");
  m.def("farthest_points", &farthest_points, nb::arg("coord"), nb::arg("offsets"), nb::arg("sampled"), nb::arg("starts"),
        nb::arg("out"), "Farthest point sampling of every cloud: rows sampled[c]:sampled[c + 1] of `out`.");
}

}  // namespace pc3d
