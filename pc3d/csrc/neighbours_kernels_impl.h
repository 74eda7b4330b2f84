// Nearest neighbours, farthest points and normals, written once with vector extensions. A file that includes this defines PC3D_ISA (a
// namespace name) and PC3D_WIDTH first. Only headers without inline functions are included: the linker could otherwise keep a
// copy compiled for a CPU we are not on. Nothing may be compiled to fused multiply-adds: distances are defined to the bit.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "neighbours_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

#include "vectors.h"

static_assert(kFan % kWidth == 0, "a leaf is some registers");

constexpr int64_t kTogether = 16;     // queries that share their candidates, at most; one bounding box holds them,
constexpr float kApart = 16.0f;       // of a diagonal that is at most 4 search radii, all of these squared;
constexpr float kWide = 2.0f;         // candidates lie within this of the box, in radii of the query before,
constexpr float kNear = 1.5f;         // and within this of a query when first looked at
constexpr float kWider = 2.5f;        // or of that, where there are too few;
constexpr float kFarthest = 1e37f;    // beyond, squares could round to infinity
constexpr int64_t kStack = (kFan - 1) * kMostLevels + 1;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }

inline Int load(const int32_t *p) { return reinterpret_cast<Int>(load(reinterpret_cast<const float *>(p))); }
inline void store(int32_t *p, Int v) { store(reinterpret_cast<float *>(p), reinterpret_cast<Vec>(v)); }

// Lane i of the result is bit i.
inline uint32_t bits(Int mask) {
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < kWidth; ++lane) found |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return found;
#endif
}

#if PC3D_WIDTH == 8 && defined(__AVX2__)
struct PackingTable {
  uint8_t lanes[256][8];
  constexpr PackingTable() : lanes() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][n++] = static_cast<uint8_t>(lane);
  }
};
constexpr PackingTable kPackings;
#endif

// Moves the lanes whose bits are set to the front.
struct Packing {
  int64_t count;
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  __m256i lanes;
  explicit Packing(uint32_t set)
      : count(__builtin_popcount(set)),
        lanes(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kPackings.lanes[set])))) {}
  Vec operator()(Vec v) const { return _mm256_permutevar8x32_ps(v, lanes); }
#else
  int lanes[kWidth] = {};
  explicit Packing(uint32_t set) : count(0) {
    for (int lane = 0; lane < kWidth; ++lane)
      if (set >> lane & 1) lanes[count++] = lane;
  }
  Vec operator()(Vec v) const {
    Vec out{};
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = v[lanes[lane]];
    return out;
  }
#endif
  Int operator()(Int v) const { return reinterpret_cast<Int>((*this)(reinterpret_cast<Vec>(v))); }
};

struct Box {
  float low[3], high[3];
  explicit Box(const float *p) : low{p[0], p[1], p[2]}, high{p[0], p[1], p[2]} {}
  void add(const float *p) {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = low[axis] < p[axis] ? low[axis] : p[axis];
      high[axis] = high[axis] > p[axis] ? high[axis] : p[axis];
    }
  }
  float squared_diagonal() const {
    const float x = high[0] - low[0], y = high[1] - low[1], z = high[2] - low[2];
    return (x * x + y * y) + z * z;
  }
};

// A box in registers. Its squared distance to other boxes is rounded like those of points, and rounding is monotone: no
// point of one is nearer to a point of the other.
struct WideBox {
  Vec low[3], high[3];
  explicit WideBox(const Box &box) {
    for (int axis = 0; axis < 3; ++axis) low[axis] = splat(box.low[axis]), high[axis] = splat(box.high[axis]);
  }
  Vec distance(const float *const *lows, const float *const *highs, int64_t at) const {  // NaN stays
    Vec gap[3];
    for (int axis = 0; axis < 3; ++axis)
      gap[axis] = larger(Vec{}, larger(load(lows[axis] + at) - high[axis], low[axis] - load(highs[axis] + at)));
    return (gap[0] * gap[0] + gap[1] * gap[1]) + gap[2] * gap[2];
  }
};

// Copies the points within `bound` of a box, level by level in the order of the tree; how many, -1 where there is no room for them.
int64_t gather(const PointTree &tree, const Box &around, float bound, const SearchSpace &space) {
  const WideBox box(around);
  const Vec most = splat(bound);
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  int32_t *nodes = space.nodes[0], *inside = space.nodes[1];
  int64_t count = 1;
  nodes[0] = 0;
  for (int at = tree.levels - 1; at >= 0; --at) {
    const TreeLevel &level = tree.level[at];
    const Int end = Int{} + static_cast<int32_t>(level.nodes);
    int64_t found = 0;
    for (int64_t node = 0; node < count; ++node) {
      if (found + kFan > space.capacity) return -1;
      const int64_t first = kFan * nodes[node];
      for (int64_t i = first; i < first + kFan; i += kWidth) {
        const Int own = lane + static_cast<int32_t>(i);
        const Packing packing(bits((box.distance(level.low, level.high, i) <= most) & (own < end)));
        store(inside + found, packing(own));
        found += packing.count;
      }
    }
    int32_t *const other = nodes;
    nodes = inside, inside = other, count = found;
  }
  int64_t points = 0;
  for (int64_t node = 0; node < count; ++node) {
    if (points + kFan > space.capacity) return -1;
    const int64_t first = kFan * nodes[node];
    for (int64_t i = first; i < first + kFan; i += kWidth) {
      const Packing packing(bits(box.distance(tree.coord, tree.coord, i) <= most));
      for (int axis = 0; axis < 3; ++axis) store(space.coord[axis] + points, packing(load(tree.coord[axis] + i)));
      store(space.rows + points, packing(load(tree.row + i)));
      points += packing.count;
    }
  }
  for (int axis = 0; axis < 3; ++axis) store(space.coord[axis] + points, splat(NAN));  // never within a bound
  return points;
}

// Distances and rows of the first `count` candidates that lie within `bound` of p, and infinity in kSplit places after them.
inline int64_t candidates_within(const SearchSpace &space, int64_t count, const float *p, float bound) {
  const Vec x = splat(p[0]), y = splat(p[1]), z = splat(p[2]), most = splat(bound);
  const float *const xs = space.coord[0], *const ys = space.coord[1], *const zs = space.coord[2];
  float *const distances = space.distances;
  int32_t *const rows = space.near_rows;
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec dx = load(xs + i) - x, dy = load(ys + i) - y, dz = load(zs + i) - z;
    const Vec d = (dx * dx + dy * dy) + dz * dz;
    const Packing packing(bits(d <= most));
    store(distances + found, packing(d));
    store(rows + found, packing(load(space.rows + i)));
    found += packing.count;
  }
  for (int64_t i = 0; i < kSplit; i += kWidth) store(distances + found + i, splat(INFINITY));
  return found;
}

// How many of n distances are less than those of `Registers` registers from `first` on; with rows, or equal and of a smaller row.
// Returns the sum of these, of each at most `most`.
template <int Registers>
inline Int count_nearer(const float *d, const int32_t *rows, int64_t n, int64_t first, int32_t most, int32_t *rank) {
  Vec own[Registers];
  Int count[Registers] = {}, own_row[Registers], sum{};
  for (int r = 0; r < Registers; ++r) own[r] = load(d + first + r * kWidth);
  if (rows) {
    for (int r = 0; r < Registers; ++r) own_row[r] = load(rows + first + r * kWidth);
    for (int64_t j = 0; j < n; ++j) {
      const Vec other = splat(d[j]);
      const Int row = Int{} + rows[j];
      for (int r = 0; r < Registers; ++r) count[r] -= (other < own[r]) | ((other == own[r]) & (row < own_row[r]));
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const Vec other = splat(d[j]);
      for (int r = 0; r < Registers; ++r) count[r] -= other < own[r];
    }
  }
  for (int r = 0; r < Registers; ++r) {
    store(rank + first + r * kWidth, count[r]);
    sum += count[r] < most ? count[r] : Int{} + most;
  }
  return sum;
}

// Ranks of n distances, with infinity in the lanes after them; whether the first `most` differ.
inline bool rank_by_distance(const float *d, const int32_t *rows, int64_t n, int32_t most, int32_t *rank) {
  int64_t first = 0;
  Int sums{};
  for (; n - first > 3 * kWidth; first += 4 * kWidth) sums += count_nearer<4>(d, rows, n, first, most, rank);
  const int64_t registers = (n - first + kWidth - 1) / kWidth;
  if (registers == 3) sums += count_nearer<3>(d, rows, n, first, most, rank);
  if (registers == 2) sums += count_nearer<2>(d, rows, n, first, most, rank);
  if (registers == 1) sums += count_nearer<1>(d, rows, n, first, most, rank);
  int64_t sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];
  const int64_t lanes = first + registers * kWidth, ranked = smaller(n, most);
  return sum == ranked * (ranked - 1) / 2 + (lanes - ranked) * ranked;  // two of the same rank leave the next one out
}

// The result of one query.
struct Found {
  const Queries &queries;
  int64_t k, start;
  Found(const Queries &queries, int64_t query) : queries(queries), k(queries.k), start(query * queries.k) {}
  void put(const float *distances, const int32_t *rows, int64_t n) const {
    if (queries.short_rows) {
      int32_t *const out = queries.short_rows + start;
      const int32_t first = static_cast<int32_t>(queries.first);
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store(out + i, load(rows + i) + first);
      for (; i < n; ++i) out[i] = rows[i] + first;
      for (; i < k; ++i) out[i] = -1;
    } else {
      for (int64_t i = 0; i < n; ++i) queries.distances[start + i] = distances[i], queries.rows[start + i] = queries.first + rows[i];
      for (int64_t i = n; i < k; ++i) queries.distances[start + i] = INFINITY, queries.rows[start + i] = -1;
    }
  }
  void prefetch() const {
    for (int64_t i = start; i < start + k; i += 16) {  // half of them, or all, fill a cache line
      if (queries.short_rows)
        __builtin_prefetch(queries.short_rows + i, 1);
      else
        __builtin_prefetch(queries.distances + i, 1), __builtin_prefetch(queries.rows + i, 1), __builtin_prefetch(queries.rows + i + 8, 1);
    }
  }
};

// The k nearest of n candidates, k <= n <= kSplit: the `inner` nearest, then the others, in no order; nothing here depends on
// n. Returns the distance of the k-th; -1, and has put nothing, where equal distances lie on both sides of a border.
inline float put_apart(const SearchSpace &space, const Found &found) {
  constexpr int kRegisters = kSplit / kWidth;
  const int32_t inner = static_cast<int32_t>(found.queries.inner), k = static_cast<int32_t>(found.k);
  Vec own[kRegisters];
  Int nearer[kRegisters] = {};
  for (int r = 0; r < kRegisters; ++r) own[r] = load(space.distances + r * kWidth);
  for (int64_t j = 0; j < kSplit; ++j) {
    const Vec other = splat(space.distances[j]);
    for (int r = 0; r < kRegisters; ++r) nearer[r] -= other < own[r];
  }
  int32_t rows[kSplit + kWidth];
  int64_t count = 0;
  for (int r = 0; r < kRegisters; ++r) {
    const Packing packing(bits(nearer[r] < Int{} + inner));
    store(rows + count, packing(load(space.near_rows + r * kWidth)));
    count += packing.count;
  }
  if (count != inner) return -1;
  Vec radius{};
  for (int r = 0; r < kRegisters; ++r) {
    const Int near = nearer[r] < Int{} + k;
    const Packing packing(bits(near & (nearer[r] >= Int{} + inner)));
    store(rows + count, packing(load(space.near_rows + r * kWidth)));
    count += packing.count;
    radius = larger(radius, reinterpret_cast<Vec>(reinterpret_cast<Int>(own[r]) & near));
  }
  if (count != k) return -1;
  found.put(nullptr, rows, k);
  return largest(radius);
}

// The nearest of n candidates, at most k. Like `search`, it returns the distance of the k-th, or infinity.
inline float put_in_order(const SearchSpace &space, int64_t n, const Found &found) {
  if (found.queries.inner && found.k <= n && n <= kSplit) {
    const float radius = put_apart(space, found);
    if (radius >= 0) return radius;
  }
  const int64_t kept = smaller(n, found.k);
  const float *distances = space.distances;
  const int32_t *rows = space.near_rows;
  constexpr int64_t most = kMostRanked + 4 * kWidth;
  float sorted_distances[most];
  int32_t sorted_rows[most], rank[most];
  if (n > kMostRanked) {
    sort_nearest(space.distances, space.near_rows, n, kept);
  } else {
    const int32_t k = static_cast<int32_t>(found.k);
    if (!rank_by_distance(distances, nullptr, n, k, rank)) rank_by_distance(distances, rows, n, k, rank);
    for (int64_t i = 0; i < n; ++i) sorted_distances[rank[i]] = distances[i], sorted_rows[rank[i]] = rows[i];
    distances = sorted_distances, rows = sorted_rows;
  }
  found.put(distances, rows, kept);
  return kept == found.k ? distances[kept - 1] : INFINITY;
}

// The k nearest so far, ascending by distance, then row.
struct Nearest {
  int64_t k;
  float *distance;
  int32_t *row;

  bool better(float d, int32_t r, int64_t i) const { return d < distance[i] || (d == distance[i] && r < row[i]); }
  void offer(float d, int32_t r) {
    if (!better(d, r, k - 1)) return;
    int64_t i = k - 1;
    for (; i > 0 && better(d, r, i - 1); --i) distance[i] = distance[i - 1], row[i] = row[i - 1];
    distance[i] = d, row[i] = r;
  }
};

// One query, nearest nodes first.
float search(const PointTree &tree, const float *p, float limit, const SearchSpace &space, const Found &found) {
  Nearest nearest{found.k, space.found_distances, space.found_rows};
  for (int64_t i = 0; i < found.k; ++i) nearest.distance[i] = INFINITY, nearest.row[i] = kNobody;
  const WideBox box{Box(p)};
  struct Visit {
    int level;
    int64_t node;
    float bound;
    int32_t row;
  } stack[kStack];
  int depth = 0;
  float bound[kFan];
  const auto distances = [&](const float *const *lows, const float *const *highs, int64_t first) {
    uint32_t within = 0;
    const Vec most = splat(smaller(limit, nearest.distance[found.k - 1]));
    for (int64_t i = 0; i < kFan; i += kWidth) {
      const Vec d = box.distance(lows, highs, first + i);
      store(bound + i, d);
      within |= bits(d <= most) << i;
    }
    return within;
  };
  const auto push_nodes = [&](int at, int64_t first) {
    const TreeLevel &level = tree.level[at];
    const int bottom = depth;
    const uint32_t real = (1u << smaller(kFan, level.nodes - first)) - 1;
    for (uint32_t set = distances(level.low, level.high, first) & real; set; set &= set - 1) {
      const int i = __builtin_ctz(set);
      const Visit visit{at, first + i, bound[i], level.row[first + i]};
      int to = depth++;
      for (; to > bottom && (stack[to - 1].bound < visit.bound || (stack[to - 1].bound == visit.bound && stack[to - 1].row < visit.row)); --to)
        stack[to] = stack[to - 1];
      stack[to] = visit;
    }
  };
  push_nodes(tree.levels - 1, 0);
  while (depth) {
    const Visit visit = stack[--depth];
    if (!nearest.better(visit.bound, visit.row, found.k - 1)) continue;
    const int64_t below = kFan * visit.node;
    if (visit.level) {
      push_nodes(visit.level - 1, below);
      continue;
    }
    for (uint32_t set = distances(tree.coord, tree.coord, below); set; set &= set - 1)
      nearest.offer(bound[__builtin_ctz(set)], tree.row[below + __builtin_ctz(set)]);
  }
  int64_t count = 0;
  while (count < found.k && nearest.row[count] != kNobody) ++count;
  found.put(nearest.distance, nearest.row, count);
  return count == found.k ? nearest.distance[count - 1] : INFINITY;
}

// Consecutive queries share their candidates: all points near the box of these queries, as near as the k-th neighbour of the
// query before suggests. A query with k of them within what was searched has its neighbours; others are searched alone.
void nearest(const PointTree &tree, const Queries &queries, int64_t begin, int64_t end, const SearchSpace &space) {
  const int64_t k = queries.k;
  const float limit = queries.limit;
  const bool few = tree.points <= (k > kMostRanked ? k : kMostRanked);
  const auto point = [&](int64_t j) { return queries.coord + 3 * static_cast<int64_t>(queries.order[j]); };
  float radius = limit;  // squared, to the k-th neighbour of the query before
  const float *before = nullptr;
  for (int64_t j = begin; j < end;) {
    Box box(point(j));
    int64_t last = j + 1;
    for (; last < end && last - j < kTogether; ++last) {
      Box wider = box;
      wider.add(point(last));
      if (!few && !(wider.squared_diagonal() <= kApart * radius)) break;
      box = wider;
    }
    float wide = few ? limit : smaller(kWide * radius, limit);
    int64_t count = few || (last - j > 2 && wide < kFarthest) ? gather(tree, box, wide, space) : -1;
    if (count < 0) last = j + 1;
    for (bool wider = false; j < last; ++j) {
      const float *p = point(j);
      int64_t n = -1;
      if (count >= 0) {
        const float near = smaller(kNear * radius, wide);
        n = candidates_within(space, count, p, near);
        if (n < k && near < wide) n = candidates_within(space, count, p, wide);
        if (n < k && !wider && wide < limit && last - j > 2) {  // the points got sparser: once more, for all that are left
          wider = true, wide = smaller(kWider * wide, limit);
          count = gather(tree, box, wide, space);
          n = count < 0 ? count : candidates_within(space, count, p, wide);
        }
      }
      if (j + 1 < last) Found(queries, queries.order[j + 1]).prefetch();
      const Found found(queries, queries.order[j]);
      if (n >= k || (count >= 0 && wide == limit)) {
        radius = smaller(put_in_order(space, n, found), limit);
      } else {  // the neighbours of the query before are within its radius and the way from it
        double reach = INFINITY;
        if (before) {
          const double x = static_cast<double>(p[0]) - before[0], y = static_cast<double>(p[1]) - before[1], z = static_cast<double>(p[2]) - before[2];
          reach = sqrt(static_cast<double>(radius)) + sqrt(x * x + y * y + z * z);
        }
        const float bound = static_cast<float>(reach * reach * 1.0001) + 1e-37f;  // rounding included
        radius = smaller(search(tree, p, smaller(limit, bound), space, found), limit);
        last = j + 1;  // the others are likely to need more candidates too
      }
      before = p;
    }
  }
}

// The largest of kFan distances, and the smallest row that has it.
inline void take_largest(const float *distances, const int32_t *rows, float *largest, int32_t *row) {
  float most = distances[0];
  int32_t who = rows[0];
  for (int64_t i = 1; i < kFan; ++i) {
    const bool more = distances[i] > most || (distances[i] == most && rows[i] < who);
    most = more ? distances[i] : most;
    who = more ? rows[i] : who;
  }
  *largest = most, *row = who;
}

// Distances below nodes [first, first + kFan) of a level, now that the box (a point) is sampled. Nodes whose largest distance
// is not more than that to their box stay as they are.
void shrink(const PointTree &tree, const WideBox &box, const SampleState &state, int at, int64_t first) {
  const TreeLevel &level = tree.level[at];
  uint32_t set = 0;
  for (int64_t i = 0; i < kFan; i += kWidth)
    set |= bits(box.distance(level.low, level.high, first + i) < load(state.largest[at] + first + i)) << i;
  for (set &= (1u << smaller(kFan, level.nodes - first)) - 1; set; set &= set - 1) {
    const int64_t node = first + __builtin_ctz(set), below = kFan * node;
    if (at) {
      shrink(tree, box, state, at - 1, below);
      take_largest(state.largest[at - 1] + below, state.row[at - 1] + below, state.largest[at] + node, state.row[at] + node);
      continue;
    }
    for (int64_t i = below; i < below + kFan; i += kWidth) {
      const Vec d = box.distance(tree.coord, tree.coord, i), old = load(state.distances + i);
      store(state.distances + i, d < old ? d : old);
    }
    take_largest(state.distances + below, tree.row + below, state.largest[0] + node, state.row[0] + node);
  }
}

void farthest(const PointTree &tree, const float *coord, int64_t count, int64_t start, const SampleState &state, int64_t *out) {
  int32_t chosen = static_cast<int32_t>(start);
  float largest;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = chosen;
    shrink(tree, WideBox(Box(coord + 3 * static_cast<int64_t>(chosen))), state, tree.levels - 1, 0);
    take_largest(state.largest[tree.levels - 1], state.row[tree.levels - 1], &largest, &chosen);
  }
}

constexpr int64_t kLanes = kWidth / 2;  // points whose normals are found together

typedef double Real __attribute__((vector_size(kLanes * sizeof(double))));
typedef int64_t Choice __attribute__((vector_size(kLanes * sizeof(double))));
typedef float Half __attribute__((vector_size(kLanes * sizeof(float))));

inline Real root(Real v) {
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  return _mm256_sqrt_pd(v);
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) v[lane] = sqrt(v[lane]);
  return v;
#endif
}

// Across the longest of the rows of (3, 3) m: across the line that all of them lie on; z where they are zero.
void across_line(const double m[3][3], double *v) {
  const double *along = m[0];
  double longest = -1;
  for (int row = 0; row < 3; ++row) {
    const double size = m[row][0] * m[row][0] + m[row][1] * m[row][1] + m[row][2] * m[row][2];
    if (size > longest) longest = size, along = m[row];
  }
  const int axis = fabs(along[0]) <= fabs(along[1]) ? (fabs(along[0]) <= fabs(along[2]) ? 0 : 2)
                                                    : (fabs(along[1]) <= fabs(along[2]) ? 1 : 2);
  const int b = (axis + 1) % 3, c = (axis + 2) % 3;
  const double size = sqrt(along[b] * along[b] + along[c] * along[c]);
  v[0] = v[1] = 0, v[2] = 1;
  if (longest > 0) v[axis] = 0, v[b] = -along[c] / size, v[c] = along[b] / size;
}

// Unit eigenvectors of the smallest eigenvalues of symmetric matrices [xx xy xz yy yz zz].
//
// Without its mean, a matrix has the eigenvalues p t of t^3 - 3 t = det / p^3; the smallest t is -1 - s, where s in [0, 1] is
// the root of s^3 + 3 s^2 = 2 - det / p^3. Newton's method, from nearby, has all digits after three steps. The eigenvector is
// across two rows of the matrix less its eigenvalue: of those that are the least parallel.
void smallest_eigenvectors(const Real *m, Real *v) {
  const Real mean = (m[0] + m[3] + m[5]) / 3.0, xx = m[0] - mean, yy = m[3] - mean, zz = m[5] - mean;
  const Real square = (xx * xx + yy * yy + zz * zz + 2.0 * (m[1] * m[1] + m[2] * m[2] + m[4] * m[4])) / 6.0, p = root(square);
  const Real det = xx * (yy * zz - m[4] * m[4]) - m[1] * (m[1] * zz - m[4] * m[2]) + m[2] * (m[1] * m[4] - yy * m[2]);
  Real right = 2.0 - det / (p * square);
  right = right > 0.0 ? right : Real{};  // NaN, too
  right = right < 4.0 ? right : Real{} + 4.0;
  Real s = root(right / (3.0 + 0.5 * root(right)));
  for (int step = 0; step < 3; ++step) s -= (s * s * (s + 3.0) - right) / (3.0 * s * (s + 2.0) + 1e-300);
  const Real lowest = -p * (1.0 + s);
  const Real rows[3][3] = {{xx - lowest, m[1], m[2]}, {m[1], yy - lowest, m[4]}, {m[2], m[4], zz - lowest}};
  Real best = {};
  for (int axis = 0; axis < 3; ++axis) v[axis] = Real{};
  for (int row = 0; row < 3; ++row) {
    const Real *a = rows[row], *b = rows[(row + 1) % 3];
    const Real x = a[1] * b[2] - a[2] * b[1], y = a[2] * b[0] - a[0] * b[2], z = a[0] * b[1] - a[1] * b[0];
    const Real size = x * x + y * y + z * z;
    const Choice more = size > best;
    best = more ? size : best, v[0] = more ? x : v[0], v[1] = more ? y : v[1], v[2] = more ? z : v[2];
  }
  const Choice parallel = !(best > 1e-20 * square * square);
  const Real length = root(best);
  for (int axis = 0; axis < 3; ++axis) v[axis] /= length;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (!parallel[lane]) continue;
    double alone[3][3], found[3];
    for (int i = 0; i < 9; ++i) alone[i / 3][i % 3] = rows[i / 3][i % 3][lane];
    across_line(alone, found);
    for (int axis = 0; axis < 3; ++axis) v[axis][lane] = found[axis];
  }
}

// Coordinates of kLanes points, by axis.
inline void load_points(const float *const *points, Half *axes) {
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  const auto two = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(points[i])); };
  const auto pair = [&](int i) { return _mm_castsi128_ps(_mm_unpacklo_epi64(two(i), two(i + 1))); };  // x and y of two points
  const __m128 front = pair(0), back = pair(2);
  axes[0] = _mm_shuffle_ps(front, back, 0x88);
  axes[1] = _mm_shuffle_ps(front, back, 0xDD);
  axes[2] = _mm_setr_ps(points[0][2], points[1][2], points[2][2], points[3][2]);
#else
  for (int axis = 0; axis < 3; ++axis)
    for (int64_t lane = 0; lane < kLanes; ++lane) axes[axis][lane] = points[lane][axis];
#endif
}
inline void load_points(const float *const *points, Real *axes) {
  Half narrow[3];
  load_points(points, narrow);
  for (int axis = 0; axis < 3; ++axis) axes[axis] = __builtin_convertvector(narrow[axis], Real);
}

void edge_weights(const float *coord, const float *normal, const int32_t *edges, int64_t begin, int64_t end, float *out) {
  for (int64_t e = begin; e < end; e += kLanes) {
    const float *at[4][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int32_t *edge = edges + 2 * smaller(e + lane, end - 1);
      const int64_t i = 3 * static_cast<int64_t>(edge[0]), j = 3 * static_cast<int64_t>(edge[1]);
      at[0][lane] = coord + i, at[1][lane] = coord + j, at[2][lane] = normal + i, at[3][lane] = normal + j;
    }
    Half x[3], y[3], n[3], m[3];
    load_points(at[0], x), load_points(at[1], y), load_points(at[2], n), load_points(at[3], m);
    const Half apart = 1.0f - ((n[0] * m[0] + n[1] * m[1]) + n[2] * m[2]);
    const Half along = (m[0] * (y[0] - x[0]) + m[1] * (y[1] - x[1])) + m[2] * (y[2] - x[2]);
    const Half weight = along > 0 ? apart * apart : apart, least = weight < 0 ? Half{} : weight;
    memcpy(out + e, &least, smaller(kLanes, end - e) * sizeof(float));
  }
}

void normals(const float *coord, const int32_t *neighbours, int64_t k, const float *center, int64_t begin, int64_t end, float *out) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const float *own[kLanes], *near[kLanes];
    const int32_t *found[kLanes];
    int64_t counts[kLanes], least = k, most = 0;
    Real count{}, here[3], there[3];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t point = smaller(i + lane, end - 1);
      own[lane] = coord + 3 * point, found[lane] = neighbours + point * k;
      for (counts[lane] = k; counts[lane] > 0 && found[lane][counts[lane] - 1] < 0;) --counts[lane];
      count[lane] = static_cast<double>(counts[lane] ? counts[lane] : 1);
      least = smaller(least, counts[lane]);
      most = counts[lane] > most ? counts[lane] : most;
    }
    load_points(own, here);
    Real sx{}, sy{}, sz{}, xx{}, xy{}, xz{}, yy{}, yz{}, zz{};
    for (int64_t j = 0; j < most; ++j) {
      for (int64_t lane = 0; lane < kLanes; ++lane)  // a point itself adds nothing
        near[lane] = j < least || j < counts[lane] ? coord + 3 * static_cast<int64_t>(found[lane][j]) : own[lane];
      load_points(near, there);
      const Real x = there[0] - here[0], y = there[1] - here[1], z = there[2] - here[2];
      sx += x, sy += y, sz += z;
      xx += x * x, xy += x * y, xz += x * z, yy += y * y, yz += y * z, zz += z * z;
    }
    const Real m[6] = {xx - sx * sx / count, xy - sx * sy / count, xz - sx * sz / count,
                       yy - sy * sy / count, yz - sy * sz / count, zz - sz * sz / count};
    Real v[3], toward{};
    smallest_eigenvectors(m, v);
    for (int axis = 0; axis < 3; ++axis) toward += v[axis] * (static_cast<double>(center[axis]) - here[axis]);
    for (int64_t lane = 0; lane < smaller(kLanes, end - i); ++lane)
      for (int axis = 0; axis < 3; ++axis)
        out[3 * (i + lane) + axis] = static_cast<float>(toward[lane] < 0 ? -v[axis][lane] : v[axis][lane]);
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
