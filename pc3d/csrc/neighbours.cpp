// Nearest neighbours and farthest point sampling on the CPU, exact.
//
// The points of a cloud are sorted along a z curve and cut into leaves of a few points with their bounding boxes. Distances
// are (dx*dx + dy*dy) + dz*dz in float32, and so are the bounds of boxes: rounding is monotone, so no point of a box is ever
// nearer than its bound, and pruning changes no result. Ties go to the smaller row.
#include <algorithm>
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
constexpr int kAxisBits = 10;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

struct Box {
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};

  void add(const Box &other) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], other.low[axis]);
      high[axis] = std::max(high[axis], other.high[axis]);
    }
  }
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
    rows.assign(size, std::numeric_limits<int64_t>::max());
    boxes.resize(count);
    for (int64_t i = 0; i < points; ++i) {
      const float *p = coord + 3 * order[i];
      x[i] = p[0], y[i] = p[1], z[i] = p[2], rows[i] = order[i];
      Box point;
      for (int axis = 0; axis < 3; ++axis) point.low[axis] = point.high[axis] = p[axis];
      boxes[i / kLeaf].add(point);
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

double square_distance(const float *p, const float *q) {
  double sum = 0;
  for (int axis = 0; axis < 3; ++axis) sum += (static_cast<double>(p[axis]) - q[axis]) * (static_cast<double>(p[axis]) - q[axis]);
  return sum;
}

void knn(Array<const float, 2> query, Array<const int64_t, 1> query_offsets, Array<const float, 2> coord,
         Array<const int64_t, 1> offsets, float limit, Array<int64_t, 2> rows, Array<float, 2> distances) {
  const int64_t k = rows.shape(1), clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (query.shape(1) != 3 || coord.shape(1) != 3 || query_offsets.shape(0) != offsets.shape(0) || k < 1 ||
      rows.shape(0) != query.shape(0) || distances.shape(0) != query.shape(0) || distances.shape(1) != rows.shape(1))
    throw std::invalid_argument("queries, points and results do not fit each other");
  check_offsets(query_offsets, query.shape(0));
  check_offsets(offsets, coord.shape(0));
  nb::gil_scoped_release release;
  std::fill(rows.data(), rows.data() + rows.size(), std::numeric_limits<int64_t>::max());
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
    if (trees[task.cloud]->leaves.count == 0) return;
    const int64_t first = offsets.data()[task.cloud];
    double bound = kInfinity;  // the k neighbours of the query before lie within this distance of it
    const float *before = nullptr;
    for (int64_t j = task.begin; j < task.end; ++j) {
      const int64_t q = query_offsets.data()[task.cloud] + orders[task.cloud][j];
      const float *p = query.data() + 3 * q;
      int64_t *found = rows.data() + q * k;
      if (before) bound = (bound + std::sqrt(square_distance(p, before))) * 1.0001;
      const float reach = static_cast<float>(bound * bound) + std::numeric_limits<float>::min();
      search(*trees[task.cloud], p, std::min(limit, reach), {k, distances.data() + q * k, found});
      bound = std::sqrt(static_cast<double>(distances.data()[q * k + k - 1]));
      before = p;
      for (int64_t n = 0; n < k; ++n)
        if (found[n] != std::numeric_limits<int64_t>::max()) found[n] += first;
    }
  });
  for (int64_t *row = rows.data(), *end = row + rows.size(); row != end; ++row)
    if (*row == std::numeric_limits<int64_t>::max()) *row = -1;
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
