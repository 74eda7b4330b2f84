// Nearest neighbours, farthest points and normals, written once with vector extensions. A file that includes this defines PC3D_ISA (a
// namespace name) and PC3D_WIDTH first. Only headers without inline functions are included: the linker could otherwise keep a
// copy compiled for a CPU we are not on. Nothing may be compiled to fused multiply-adds: distances are defined to the bit.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
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

// Sets of lanes: lane i is bit i.
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
inline uint32_t at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline uint32_t less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline uint32_t less(Int a, Int b) { return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)); }
inline uint32_t equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)); }
#else
inline uint32_t bits(Int mask) {
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < kWidth; ++lane) found |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return found;
#endif
}
inline uint32_t at_most(Vec a, Vec b) { return bits(a <= b); }
inline uint32_t less(Vec a, Vec b) { return bits(a < b); }
inline uint32_t less(Int a, Int b) { return bits(a < b); }
inline uint32_t equal(Int a, Int b) { return bits(a == b); }
#endif

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

// The first `count` lanes, or all.
inline uint32_t first_lanes(int64_t count) { return (1u << smaller(count, kWidth)) - 1; }

// Moves the lanes of a set to the front.
struct Packing {
  int64_t count;
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  __mmask16 set;
  explicit Packing(uint32_t set) : count(__builtin_popcount(set)), set(static_cast<__mmask16>(set)) {}
  Vec operator()(Vec v) const { return _mm512_maskz_compress_ps(set, v); }
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
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

// Numbers below 2^15, in registers of twice as many lanes.
typedef int16_t Short __attribute__((vector_size(kWidth * sizeof(float))));
#if PC3D_WIDTH == 16 && defined(__AVX512BW__)
inline Short narrow(Int a, Int b) {
  return reinterpret_cast<Short>(_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(a))),
                                                    _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(b)), 1));
}
inline uint32_t less(Short a, Short b) { return _mm512_cmplt_epi16_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)); }
inline Int whole(Vec v) { return reinterpret_cast<Int>(_mm512_cvttps_epi32(v)); }
#else
inline Short narrow(Int a, Int b) {
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  const __m256i mixed = _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<Short>(_mm256_permute4x64_epi64(mixed, 0xD8));
#else
  Short out;
  for (int lane = 0; lane < kWidth; ++lane) out[lane] = static_cast<int16_t>(a[lane]), out[kWidth + lane] = static_cast<int16_t>(b[lane]);
  return out;
#endif
}
inline uint32_t less(Short a, Short b) {
  const Short mask = a < b;
#if PC3D_WIDTH == 8 && defined(__AVX2__)
  const __m256i halves = reinterpret_cast<__m256i>(mask);
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1))));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < 2 * kWidth; ++lane) found |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return found;
#endif
}
inline Int whole(Vec v) { return __builtin_convertvector(v, Int); }
#endif

constexpr int64_t kLists = 2 * kWidth;       // lists of kSplit numbers that are sorted together
constexpr int64_t kParts = kSplit / kLists;  // registers of a list
static_assert(kSplit % kLists == 0 && kLists <= kMostWaiting, "whole registers");

#if (PC3D_WIDTH == 16 && defined(__AVX512BW__)) || (PC3D_WIDTH == 8 && defined(__AVX2__))
// Of eight registers, lane by lane of each eighth of the lanes: register i gets lane i of all.
inline void turn_eights(Short *v) {
  for (int step = 0; step < 3; ++step) {
    Short next[8];
    for (int i = 0; i < 4; ++i) {
#if PC3D_WIDTH == 16
      const __m512i a = reinterpret_cast<__m512i>(v[i]), b = reinterpret_cast<__m512i>(v[i + 4]);
      next[2 * i] = reinterpret_cast<Short>(_mm512_unpacklo_epi16(a, b)), next[2 * i + 1] = reinterpret_cast<Short>(_mm512_unpackhi_epi16(a, b));
#else
      const __m256i a = reinterpret_cast<__m256i>(v[i]), b = reinterpret_cast<__m256i>(v[i + 4]);
      next[2 * i] = reinterpret_cast<Short>(_mm256_unpacklo_epi16(a, b)), next[2 * i + 1] = reinterpret_cast<Short>(_mm256_unpackhi_epi16(a, b));
#endif
    }
    for (int i = 0; i < 8; ++i) v[i] = next[i];
  }
}
#endif

// List i becomes lane i of kSplit registers; which number is in which of these does not matter.
inline void lists_to_lanes(const Short (*lists)[kParts], Short *lanes) {
#if PC3D_WIDTH == 16 && defined(__AVX512BW__)
  for (int i = 0; i < kLists; ++i) lanes[i] = lists[i][0];
  for (int i = 0; i < kLists; i += 8) turn_eights(lanes + i);
  for (int i = 0; i < 8; ++i) {
    const auto number = [&](int eight) { return reinterpret_cast<__m512i>(lanes[8 * eight + i]); };
    const __m512i even[2] = {_mm512_shuffle_i32x4(number(0), number(1), 0x88), _mm512_shuffle_i32x4(number(2), number(3), 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(number(0), number(1), 0xDD), _mm512_shuffle_i32x4(number(2), number(3), 0xDD)};
    lanes[i] = reinterpret_cast<Short>(_mm512_shuffle_i32x4(even[0], even[1], 0x88));
    lanes[8 + i] = reinterpret_cast<Short>(_mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
    lanes[16 + i] = reinterpret_cast<Short>(_mm512_shuffle_i32x4(even[0], even[1], 0xDD));
    lanes[24 + i] = reinterpret_cast<Short>(_mm512_shuffle_i32x4(odd[0], odd[1], 0xDD));
  }
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
  for (int part = 0; part < kParts; ++part) {
    Short *const own = lanes + part * kLists;
    for (int i = 0; i < kLists; ++i) own[i] = lists[i][part];
    for (int i = 0; i < kLists; i += 8) turn_eights(own + i);
    for (int i = 0; i < 8; ++i) {
      const __m256i a = reinterpret_cast<__m256i>(own[i]), b = reinterpret_cast<__m256i>(own[8 + i]);
      own[i] = reinterpret_cast<Short>(_mm256_permute2x128_si256(a, b, 0x20));
      own[8 + i] = reinterpret_cast<Short>(_mm256_permute2x128_si256(a, b, 0x31));
    }
  }
#else
  int16_t turned[kSplit][kLists];
  for (int i = 0; i < kLists; ++i)
    for (int j = 0; j < kSplit; ++j) turned[j][i] = lists[i][j / kLists][j % kLists];
  memcpy(lanes, turned, sizeof turned);
#endif
}

// Batcher's odd-even merge sort: which pairs to put in order, one after the other.
struct SortingNetwork {
  int pairs = 0, a[256] = {}, b[256] = {};
  constexpr SortingNetwork() {
    for (int sorted = 1; sorted < kSplit; sorted *= 2)
      for (int apart = sorted; apart > 0; apart /= 2)
        for (int first = apart % sorted; first + apart < kSplit; first += 2 * apart)
          for (int i = first; i < first + apart && i + apart < kSplit; ++i)
            if (i / (2 * sorted) == (i + apart) / (2 * sorted)) a[pairs] = i, b[pairs++] = i + apart;
  }
};
constexpr SortingNetwork kNetwork;

// Sorts the lanes of kSplit registers, each for itself.
template <int Pair = 0>
inline __attribute__((always_inline)) void sort_lanes(Short *v) {
  if constexpr (Pair < kNetwork.pairs) {
    Short &a = v[kNetwork.a[Pair]], &b = v[kNetwork.b[Pair]];
    const Short low = a < b ? a : b, high = a < b ? b : a;
    a = low, b = high;
    sort_lanes<Pair + 1>(v);
  }
}

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
    const TreeLevel level = tree.level[at];
    const Int end = Int{} + static_cast<int32_t>(level.nodes);
    int64_t found = 0;
    for (int64_t node = 0; node < count; ++node) {
      if (found + kFan > space.capacity) return -1;
      const int64_t first = kFan * nodes[node];
      for (int64_t i = first; i < first + kFan; i += kWidth) {
        const Int own = lane + static_cast<int32_t>(i);
        const Packing packing(at_most(box.distance(level.low, level.high, i), most) & less(own, end));
        store(inside + found, packing(own));
        found += packing.count;
      }
    }
    int32_t *const other = nodes;
    nodes = inside, inside = other, count = found;
  }
  const float *const from[3] = {tree.coord[0], tree.coord[1], tree.coord[2]};
  float *const to[3] = {space.coord[0], space.coord[1], space.coord[2]};
  const int32_t *const row = tree.row;
  int32_t *const rows = space.rows;
  const int64_t capacity = space.capacity;
  int64_t points = 0;
  for (int64_t node = 0; node < count; ++node) {
    if (points + kFan > capacity) return -1;
    const int64_t first = kFan * nodes[node];
    for (int64_t i = first; i < first + kFan; i += kWidth) {
      const Packing packing(at_most(box.distance(from, from, i), most));
      for (int axis = 0; axis < 3; ++axis) store(to[axis] + points, packing(load(from[axis] + i)));
      store(rows + points, packing(load(row + i)));
      points += packing.count;
    }
  }
  for (int axis = 0; axis < 3; ++axis) store(to[axis] + points, splat(NAN));  // never within a bound
  return points;
}

// Candidates of one query.
struct Candidates {
  float *distances;
  int32_t *rows;
};

// Those of the first `count` that lie within `bound` of p, and infinity in kSplit places after them; how many.
inline int64_t candidates_within(const SearchSpace &space, int64_t count, const float *p, float bound, const Candidates &near) {
  const Vec x = splat(p[0]), y = splat(p[1]), z = splat(p[2]), most = splat(bound);
  const float *const xs = space.coord[0], *const ys = space.coord[1], *const zs = space.coord[2];
  const int32_t *const from = space.rows;
  float *const distances = near.distances;
  int32_t *const rows = near.rows;
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec dx = load(xs + i) - x, dy = load(ys + i) - y, dz = load(zs + i) - z;
    const Vec d = (dx * dx + dy * dy) + dz * dz;
    const Packing packing(at_most(d, most));
    store(distances + found, packing(d));
    store(rows + found, packing(load(from + i)));
    found += packing.count;
  }
  for (int64_t i = 0; i < kSplit; i += kWidth) store(distances + found + i, splat(INFINITY));
  return found;
}

// Leaves out the farthest of n candidates, more than kSplit, to have at least k and at most kSplit, all of those within a bound
// that becomes smaller; how many are left. All, where such a bound is not found.
inline int64_t leave_out(const Candidates &near, int64_t n, int64_t k, float &bound) {
  float low = 0, high = bound, middle = bound * (0.5f * static_cast<float>(k + kSplit) / static_cast<float>(n));
  for (int attempt = 0; attempt < 8; ++attempt, middle = 0.5f * (low + high)) {
    const Vec most = splat(middle);
    int64_t within = 0;
    for (int64_t i = 0; i < n; i += kWidth) within += __builtin_popcount(at_most(load(near.distances + i), most));
    if (within < k) {
      low = middle;
    } else if (within > kSplit) {
      high = middle;
    } else {
      int64_t kept = 0;
      for (int64_t i = 0; i < n; i += kWidth) {
        const Vec d = load(near.distances + i);
        const Packing packing(at_most(d, most));
        const Int rows = load(near.rows + i);
        store(near.distances + kept, packing(d));
        store(near.rows + kept, packing(rows));
        kept += packing.count;
      }
      for (int64_t i = 0; i < kSplit; i += kWidth) store(near.distances + kept + i, splat(INFINITY));
      bound = middle;
      return kept;
    }
  }
  return n;
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

// The nearest of n candidates, at most k. Like `search`, it returns the distance of the k-th, or infinity.
inline float put_in_order(const Candidates &near, int64_t n, const Found &found) {
  const int64_t kept = smaller(n, found.k);
  const float *distances = near.distances;
  const int32_t *rows = near.rows;
  constexpr int64_t most = kMostRanked + 4 * kWidth;
  float sorted_distances[most];
  int32_t sorted_rows[most], rank[most];
  if (n > kMostRanked) {
    sort_nearest(near.distances, near.rows, n, kept);
  } else {
    const int32_t k = static_cast<int32_t>(found.k);
    if (!rank_by_distance(distances, nullptr, n, k, rank)) rank_by_distance(distances, rows, n, k, rank);
    for (int64_t i = 0; i < n; ++i) sorted_distances[rank[i]] = distances[i], sorted_rows[rank[i]] = rows[i];
    distances = sorted_distances, rows = sorted_rows;
  }
  found.put(distances, rows, kept);
  return kept == found.k ? distances[kept - 1] : INFINITY;
}

// Puts the short rows of a query, some lanes of a register at a time.
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
class RowWriter {
 public:
  explicit RowWriter(const Found &found) : next_(found.queries.short_rows + found.start), first_(Int{} + static_cast<int32_t>(found.queries.first)) {}
  void add(uint32_t lanes, Int rows) {
    const Packing packing(lanes);
    _mm512_mask_storeu_epi32(next_, static_cast<__mmask16>(first_lanes(packing.count)), reinterpret_cast<__m512i>(packing(rows) + first_));
    next_ += packing.count;
  }
  void finish() const {}

 private:
  int32_t *next_;
  Int first_;
};
#else
class RowWriter {
 public:
  explicit RowWriter(const Found &found) : found_(found) {}
  void add(uint32_t lanes, Int rows) {
    const Packing packing(lanes);
    store(rows_ + count_, packing(rows));
    count_ += packing.count;
  }
  void finish() const { found_.put(nullptr, rows_, count_); }

 private:
  const Found &found_;
  int64_t count_ = 0;
  int32_t rows_[kSplit + kWidth];
};
#endif

// Queries with candidates of which only the nearest are to be told from the others, many at once.
struct Waiting {
  const Queries &queries;
  const SearchSpace &space;
  int64_t count = 0;
  int32_t query[kLists], candidates[kLists];
  float bound[kLists];

  Waiting(const Queries &queries, const SearchSpace &space) : queries(queries), space(space) {}
  // Those of the next query.
  Candidates next() const { return of(count); }
  Candidates of(int64_t i) const { return {space.distances + i * kSplit, space.near_rows + i * kSplit}; }
  // It has at least k and at most kSplit candidates, all within `within`.
  void add(int32_t row, int64_t n, float within) {
    query[count] = row, candidates[count] = static_cast<int32_t>(n), bound[count] = within;
    if (++count == kLists) put();
  }

  // The `inner` nearest of each query, then the others of the k nearest, in no order; nothing here depends on how many candidates
  // there are. They are told apart by levels, 2^15 of them up to the bound; where those of one level lie on both sides of a border,
  // they are put in order.
  void put() {
    if (!count) return;
    constexpr float kLast = 32767;
    const int64_t inner = queries.inner, k = queries.k;
    Short levels[kLists][kParts], sorted[kSplit + 1];
    for (int64_t i = 0; i < count; ++i) {
      const Vec scale = splat((kLast - 1) / bound[i]), last = splat(kLast);
      const float *const distances = of(i).distances;
      const auto level = [&](int64_t j) { return whole(smaller(load(distances + j) * scale, last)); };  // the last if NaN
      for (int64_t part = 0; part < kParts; ++part) levels[i][part] = narrow(level(part * kLists), level(part * kLists + kWidth));
    }
    for (int64_t i = count; i < kLists; ++i)
      for (Short &part : levels[i]) part = Short{};
    lists_to_lanes(levels, sorted);
    sort_lanes(sorted);
    sorted[kSplit] = Short{} + static_cast<int16_t>(kLast);
    int16_t innermost[kLists], nearest[kLists];
    memcpy(innermost, sorted + inner - 1, sizeof innermost);
    memcpy(nearest, sorted + k - 1, sizeof nearest);
    const uint32_t apart = less(sorted[inner - 1], sorted[inner]) & less(sorted[k - 1], sorted[k]);
    for (int64_t i = 0; i < count; ++i) {
      const Found found(queries, query[i]);
      if (apart >> i & 1)
        split(levels[i], Short{} + innermost[i], Short{} + nearest[i], of(i).rows, found);
      else
        put_in_order(of(i), candidates[i], found);
    }
    count = 0;
  }

 private:
  static void split(const Short *levels, Short innermost, Short nearest, const int32_t *candidates, const Found &found) {
    uint64_t beyond_inner = 0, beyond = 0;
    for (int64_t part = 0; part < kParts; ++part) {
      beyond_inner |= static_cast<uint64_t>(less(innermost, levels[part])) << part * kLists;
      beyond |= static_cast<uint64_t>(less(nearest, levels[part])) << part * kLists;
    }
    RowWriter writer(found);
    const uint64_t sets[2] = {~beyond_inner, beyond_inner & ~beyond};
    for (const uint64_t set : sets)
      for (int64_t i = 0; i < kSplit; i += kWidth) writer.add(static_cast<uint32_t>(set >> i) & ((1u << kWidth) - 1), load(candidates + i));
    writer.finish();
  }
};

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
      within |= at_most(d, most) << i;
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
// query before suggests. A query with k of them within what was searched has its neighbours; another one gets candidates of its
// own, as far as its neighbours can be, or is searched alone.
void nearest(const PointTree &tree, const Queries &queries, int64_t begin, int64_t end, const SearchSpace &space) {
  const int64_t k = queries.k;
  const float limit = queries.limit;
  const bool few = tree.points <= (k > kMostRanked ? k : kMostRanked);
  const auto point = [&](int64_t j) { return queries.coord + 3 * static_cast<int64_t>(queries.order[j]); };
  float radius = limit;  // squared, about that to the k-th neighbour of the query before,
  float most = limit;    // which is at most this
  const float *before = nullptr;
  Waiting waiting(queries, space);
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
      const Candidates near = waiting.next();
      int64_t n = -1;
      float bound = limit;
      if (count >= 0) {
        bound = smaller(kNear * radius, wide);
        n = candidates_within(space, count, p, bound, near);
        if (n < k && bound < wide) bound = wide, n = candidates_within(space, count, p, bound, near);
        if (n < k && !wider && wide < limit && last - j > 2) {  // the points got sparser: once more, for all that are left
          wider = true, bound = wide = smaller(kWider * wide, limit);
          count = gather(tree, box, wide, space);
          n = count < 0 ? count : candidates_within(space, count, p, bound, near);
        }
      }
      float reached = limit;
      if (n < k && wide < limit && before) {  // the neighbours of the query before are within its radius and the way from it
        const double x = static_cast<double>(p[0]) - before[0], y = static_cast<double>(p[1]) - before[1], z = static_cast<double>(p[2]) - before[2];
        const double reach = sqrt(static_cast<double>(most)) + sqrt(x * x + y * y + z * z);
        reached = smaller(static_cast<float>(reach * reach * 1.0001) + 1e-37f, limit);  // rounding included
        last = j + 1;  // the others are likely to need more candidates too
        bound = wide = reached;
        count = reached < kFarthest ? gather(tree, Box(p), wide, space) : -1;
        n = count < 0 ? count : candidates_within(space, count, p, bound, near);
      }
      if (j + 1 < last) Found(queries, queries.order[j + 1]).prefetch();
      const Found found(queries, queries.order[j]);
      if (queries.inner && n > kSplit) n = leave_out(near, n, k, bound);
      if (queries.inner && n >= k && n <= kSplit) {
        waiting.add(queries.order[j], n, bound);
        most = bound, radius = bound * static_cast<float>(k) / static_cast<float>(n);
      } else if (n >= k || (count >= 0 && wide == limit)) {
        radius = most = smaller(put_in_order(near, n, found), limit);
      } else {
        radius = most = smaller(search(tree, p, reached, space, found), limit);
        last = j + 1;
      }
      before = p;
    }
  }
  waiting.put();
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
    set |= less(box.distance(level.low, level.high, first + i), load(state.largest[at] + first + i)) << i;
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

#if PC3D_WIDTH == 8 && defined(__AVX2__)
constexpr int32_t kFirstLanes[2 * kWidth] = {-1, -1, -1, -1, -1, -1, -1, -1};
#endif

// The first numbers at p, at most kWidth of them; other lanes are 0.
inline Int load_first(const int32_t *p, int64_t count) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return reinterpret_cast<Int>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(count)), p));
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
  if (count >= kWidth) return load(p);
  return reinterpret_cast<Int>(_mm256_maskload_epi32(p, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(kFirstLanes + kWidth - count))));
#else
  Int v{};
  for (int64_t lane = 0; lane < smaller(count, kWidth); ++lane) v[lane] = p[lane];
  return v;
#endif
}

// `Registers` hold a list, or any number where that is 0.
template <int Registers>
bool one_way(const RowLists &lists, int64_t begin, int64_t end, RowPair *out, int64_t *count, int64_t *larger) {
  constexpr int64_t kWaiting = 512;  // pairs whose smaller row has still to be asked
  const int64_t registers = Registers ? Registers : (lists.count + kWidth - 1) / kWidth;
  const Int points = Int{} + static_cast<int32_t>(lists.points);
  int32_t smaller_row[kWaiting + 2 * kWidth], larger_row[kWaiting + 2 * kWidth];
  int64_t waiting = 0, found = 0, beyond = 0;
  const auto ask = [&] {
    for (int64_t j = 0; j < waiting; ++j) {
      const int32_t *list = lists.rows + smaller_row[j] * lists.stride;
      uint32_t named = 0;
      for (int64_t r = 0; r < registers; ++r) {
        const int64_t left = lists.count - r * kWidth;
        named |= equal(load_first(list + r * kWidth, left), Int{} + larger_row[j]) & first_lanes(left);
      }
      out[found] = {smaller_row[j], larger_row[j]};
      found += !named;
    }
    waiting = 0;
  };
  for (int64_t i = begin; i < end; ++i) {
    const int32_t *own = lists.rows + i * lists.stride;
    const Int row = Int{} + static_cast<int32_t>(i);
    int64_t same = 0;
    for (int64_t r = 0; r < registers; ++r) {
      const int64_t left = lists.count - r * kWidth;
      const uint32_t real = first_lanes(left);
      const Int others = load_first(own + r * kWidth, left);
      if ((less(others, Int{}) | ~less(others, points)) & real) return false;
      same += __builtin_popcount(equal(others, row) & real);
      beyond += __builtin_popcount(less(row, others) & real);
      const Packing fewer(less(others, row) & real);
      store(smaller_row + waiting, fewer(others));
      store(larger_row + waiting, row);
      waiting += fewer.count;
      if (waiting > kWaiting) ask();
    }
    if (same != 1 && !lists.filled) return false;
  }
  ask();
  *count = found, *larger = beyond;
  return true;
}

bool one_way(const RowLists &lists, int64_t begin, int64_t end, RowPair *out, int64_t *count, int64_t *larger) {
  if (lists.count <= kWidth) return one_way<1>(lists, begin, end, out, count, larger);
  if (lists.count <= 2 * kWidth) return one_way<2>(lists, begin, end, out, count, larger);
  return one_way<0>(lists, begin, end, out, count, larger);
}

typedef int32_t Eight __attribute__((vector_size(32)));
typedef int32_t LooseEight __attribute__((vector_size(32), aligned(4), may_alias));

// Puts (row, value) of at most 8 * Registers values, filled up with INT32_MAX, in ascending order, and anything in one place more.
// Adds the ranks to `sum`.
template <int Registers>
inline void put_ascending(const int32_t *values, int64_t row, RowPair *out, Eight &sum) {
  Eight own[Registers], rank[Registers] = {};
  int32_t ranks[8 * Registers];
  for (int r = 0; r < Registers; ++r) own[r] = *reinterpret_cast<const LooseEight *>(values + 8 * r);
  for (int j = 0; j < 8 * Registers; ++j) {
    const Eight other = Eight{} + values[j];
    for (int r = 0; r < Registers; ++r) rank[r] -= other < own[r];
  }
  for (int r = 0; r < Registers; ++r) *reinterpret_cast<LooseEight *>(ranks + 8 * r) = rank[r], sum += rank[r];
  asm volatile("" : : "r"(ranks), "r"(values) : "memory");  // as numbers they are better read than taken out of registers
  for (int j = 0; j < 8 * Registers; ++j) out[ranks[j]] = {static_cast<int32_t>(row), values[j]};
}

#if PC3D_WIDTH == 16 && defined(__AVX512F__)
// Puts (row, value) of the first n values, each once and ascending; how many. INT32_MAX in the lanes after them.
inline int64_t put_sixteen(Int values, int64_t n, int64_t row, RowPair *out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i v = reinterpret_cast<__m512i>(values);
  const auto order = [&](int across, uint32_t upper) {  // each lane with lane ^ across; the upper of them gets the larger
    const __m512i other = _mm512_permutexvar_epi32(_mm512_xor_si512(lane, _mm512_set1_epi32(across)), v);
    v = _mm512_mask_max_epi32(_mm512_min_epi32(v, other), static_cast<__mmask16>(upper), v, other);
  };
  order(1, 0xAAAA);
  order(3, 0xCCCC), order(1, 0xAAAA);
  order(7, 0xF0F0), order(2, 0xCCCC), order(1, 0xAAAA);
  if (n > 8) order(15, 0xFF00), order(4, 0xF0F0), order(2, 0xCCCC), order(1, 0xAAAA);
  const __m512i before = _mm512_permutexvar_epi32(_mm512_sub_epi32(lane, _mm512_set1_epi32(1)), v);
  const uint32_t distinct = (_mm512_cmpneq_epi32_mask(v, before) | 1) & first_lanes(n);
  const int64_t count = __builtin_popcount(distinct);
  if (count < n) v = _mm512_maskz_compress_epi32(static_cast<__mmask16>(distinct), v);
  const __m512i rows = _mm512_set1_epi64(row);
  const auto put = [&](__m256i larger, int64_t first) {
    _mm512_mask_storeu_epi64(out + first, static_cast<__mmask8>(first_lanes(count - first)), _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepi32_epi64(larger), 32), rows));
  };
  put(_mm512_castsi512_si256(v), 0);
  if (count > 8) put(_mm512_extracti64x4_epi64(v, 1), 8);
  return count;
}
#endif

// The larger rows in the list of row i, and those in [other, last); how many. INT32_MAX in the
// places after them, up to a multiple of 16.
inline int64_t collect(const RowLists &lists, int64_t i, const int32_t *other, const int32_t *last, int32_t *values) {
  const int32_t *own = lists.rows + i * lists.stride;
  const Int row = Int{} + static_cast<int32_t>(i), none = Int{} + INT32_MAX;
  const int64_t more = last - other;
  if (lists.count + 2 <= kWidth && more <= 2) {  // one store, which loads need not wait for
    const Int found = load_first(own, lists.count);
    const Packing packing(less(row, found) & first_lanes(lists.count));
    Int place;
    for (int lane = 0; lane < kWidth; ++lane) place[lane] = lane;
    place -= static_cast<int32_t>(packing.count);
    const int32_t first = other[0], second = other[1];
    Int all = place < 0 ? packing(found) : none;
    all = place == 0 ? Int{} + (more > 0 ? first : INT32_MAX) : all;
    all = place == 1 ? Int{} + (more > 1 ? second : INT32_MAX) : all;
    store(values, all);
    return packing.count + more;
  }
  int64_t n = 0;
  for (int64_t r = 0; r < lists.count; r += kWidth) {
    const Int found = load_first(own + r, lists.count - r);
    const Packing packing(less(row, found) & first_lanes(lists.count - r));
    store(values + n, packing(found));
    n += packing.count;
  }
  values[n] = other[0], values[n + 1] = other[1];  // seldom more
  n += smaller(more, 2);
  for (other += 2; other < last; ++other) values[n++] = *other;
  for (int64_t j = n; j < n + 15; j += kWidth) store(values + j, none);
  return n;
}

bool pairs(const RowLists &lists, const int32_t *others, const int64_t *starts, int64_t begin, int64_t end, bool distinct, RowPair *out,
           const RowPair *out_end) {
  constexpr int64_t kMost = 32;
  int32_t values[kMost + 16 + kWidth];
  RowPair spare[kMost + 1];
  Eight ranks{};
  int64_t expected = 0;
  bool repeated = false;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t *other = others + starts[i], *const last = others + starts[i + 1];
    int64_t n = 0;
    if (distinct && lists.count + (last - other) <= kMost) {
      n = collect(lists, i, other, last, values);
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
      if (n <= kWidth) {
        repeated |= put_sixteen(load(values), n, i, out) < n;
        out += n;
        continue;
      }
#endif
      RowPair *const to = out + n < out_end ? out : spare;
      const int64_t lanes = n <= 8 ? 8 : n <= 16 ? 16 : kMost;
      if (lanes == 8) put_ascending<1>(values, i, to, ranks);
      if (lanes == 16) put_ascending<2>(values, i, to, ranks);
      if (lanes == kMost) put_ascending<4>(values, i, to, ranks);
      expected += n * (n - 1) / 2 + n * (lanes - n);
      if (to == spare)
        for (int64_t j = 0; j < n; ++j) out[j] = spare[j];
    } else {
      const int32_t *own = lists.rows + i * lists.stride;
      for (int64_t j = 0; j < lists.count; ++j)
        if (own[j] > i) out[n++] = {static_cast<int32_t>(i), own[j]};
      for (; other < last; ++other) out[n++] = {static_cast<int32_t>(i), *other};
      expected += sort_pairs(out, n);
    }
    out += n;
  }
  for (int lane = 0; lane < 8; ++lane) expected -= ranks[lane];
  return expected == 0 && !repeated;
}

int64_t put_distinct(int32_t *values, const int64_t *starts, int64_t begin, int64_t end, RowPair *out) {
  constexpr int64_t kFew = 32;
  const RowPair *const first = out;
  for (int64_t i = begin; i < end; ++i) {
    int32_t *const own = values + starts[i];
    const int64_t n = starts[i + 1] - starts[i];
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
    if (n <= kWidth) {
      out += put_sixteen(reinterpret_cast<Int>(_mm512_mask_loadu_epi32(_mm512_set1_epi32(INT32_MAX), first_lanes(n), own)), n, i, out);
      continue;
    }
#endif
    if (n > kFew) {
      sort_rows(own, n);
    } else {
      for (int64_t j = 1; j < n; ++j) {
        const int32_t value = own[j];
        int64_t to = j;
        for (; to > 0 && own[to - 1] > value; --to) own[to] = own[to - 1];
        own[to] = value;
      }
    }
    for (int64_t j = 0; j < n; ++j)
      if (j == 0 || own[j] != own[j - 1]) *out++ = {static_cast<int32_t>(i), own[j]};
  }
  return out - first;
}

constexpr int64_t kLanes = kWidth / 2;  // points whose normals are found together

typedef double Real __attribute__((vector_size(kLanes * sizeof(double))));
typedef int64_t Choice __attribute__((vector_size(kLanes * sizeof(double))));
typedef float Half __attribute__((vector_size(kLanes * sizeof(float))));

inline Real wide(Half v) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_cvtps_pd(v);
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, Real);
#endif
}

inline Half narrow(Real v) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_cvtpd_ps(v);
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
  return _mm256_cvtpd_ps(v);
#else
  return __builtin_convertvector(v, Half);
#endif
}

inline Real root(Real v) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_sqrt_pd(v);
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
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
// the root of s^3 + 3 s^2 = 2 - det / p^3. A polynomial in the root of the right side is within 2e-6 of s, and Halley's method has
// all digits after one step from there. The eigenvector is across two rows of the matrix less its eigenvalue: of those that are
// the least parallel.
void smallest_eigenvectors(const Real *m, Real *v) {
  constexpr double kStart[6] = {0.5773493858212736, -0.05552181748893188, 0.013150113804338876,
                                -0.003591892197881382, 0.0007934144150605665, -8.957391385874319e-05};
  const Real mean = (m[0] + m[3] + m[5]) * (1 / 3.0), xx = m[0] - mean, yy = m[3] - mean, zz = m[5] - mean;
  const Real square = (xx * xx + yy * yy + zz * zz + 2.0 * (m[1] * m[1] + m[2] * m[2] + m[4] * m[4])) * (1 / 6.0), p = root(square);
  const Real det = xx * (yy * zz - m[4] * m[4]) - m[1] * (m[1] * zz - m[4] * m[2]) + m[2] * (m[1] * m[4] - yy * m[2]);
  Real right = 2.0 - det / (p * square);
  right = right > 0.0 ? right : Real{};  // NaN, too
  right = right < 4.0 ? right : Real{} + 4.0;
  const Real q = root(right);
  Real s = Real{} + kStart[5];
  for (int power = 4; power >= 0; --power) s = s * q + kStart[power];
  s *= q;
  const Real error = s * s * (s + 3.0) - right, slope = 3.0 * s * (s + 2.0);
  s -= error * slope / (slope * slope - error * (3.0 * s + 3.0) + 1e-300);
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
  const Real scale = 1.0 / root(best);
  for (int axis = 0; axis < 3; ++axis) v[axis] *= scale;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (!parallel[lane]) continue;
    double alone[3][3], found[3];
    for (int i = 0; i < 9; ++i) alone[i / 3][i % 3] = rows[i / 3][i % 3][lane];
    across_line(alone, found);
    for (int axis = 0; axis < 3; ++axis) v[axis][lane] = found[axis];
  }
}

// The axes of kLanes points of 4 numbers.
inline void load_points(const float *const *points, Half *axes) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  const auto one = [&](int i) { return _mm_load_ps(points[i]); };
  const auto two = [&](int i) { return _mm256_insertf128_ps(_mm256_castps128_ps256(one(i)), one(i + 1), 1); };
  const auto four = [&](int i) { return _mm512_insertf32x8(_mm512_castps256_ps512(two(i)), two(i + 2), 1); };
  const __m512 front = four(0), back = four(4);
  for (int axis = 0; axis < 3; ++axis) {
    const __m512i lanes = _mm512_setr_epi32(axis, axis + 4, axis + 8, axis + 12, axis + 16, axis + 20, axis + 24, axis + 28, 0, 0, 0, 0, 0, 0, 0, 0);
    axes[axis] = _mm512_castps512_ps256(_mm512_permutex2var_ps(front, lanes, back));
  }
#elif PC3D_WIDTH == 8 && defined(__AVX2__)
  const auto one = [&](int i) { return _mm_load_ps(points[i]); };
  const __m128 front = _mm_unpacklo_ps(one(0), one(1)), back = _mm_unpacklo_ps(one(2), one(3));  // x x y y
  axes[0] = _mm_movelh_ps(front, back);
  axes[1] = _mm_movehl_ps(back, front);
  axes[2] = _mm_movelh_ps(_mm_unpackhi_ps(one(0), one(1)), _mm_unpackhi_ps(one(2), one(3)));
#else
  for (int axis = 0; axis < 3; ++axis)
    for (int64_t lane = 0; lane < kLanes; ++lane) axes[axis][lane] = points[lane][axis];
#endif
}
inline void load_points(const float *const *points, Real *axes) {
  Half narrow[3];
  load_points(points, narrow);
  for (int axis = 0; axis < 3; ++axis) axes[axis] = wide(narrow[axis]);
}

void edge_weights(const float *coord, const float *normal, const int32_t *edges, int64_t begin, int64_t end, float *out) {
  for (int64_t e = begin; e < end; e += kLanes) {
    const float *at[4][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int32_t *edge = edges + 2 * smaller(e + lane, end - 1);
      const int64_t i = 4 * static_cast<int64_t>(edge[0]), j = 4 * static_cast<int64_t>(edge[1]);
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

// Of points [i, end), at most kLanes of them, or as many if `Whole`. `Count` is k, or 0.
template <int64_t Count, bool Whole>
inline void normals_together(const float *coord, const int32_t *neighbours, int64_t k, const float *center, int64_t i, int64_t end, float *out) {
  const auto point = [&](int64_t lane) { return Whole ? i + lane : smaller(i + lane, end - 1); };
  const auto list = [&](int64_t lane) { return neighbours + point(lane) * (Count ? Count : k); };
  const float *own[kLanes], *near[kLanes];
  int64_t counts[kLanes], least = k, most = 0;
  Real count{}, here[3], there[3];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    own[lane] = coord + 4 * point(lane);
    for (counts[lane] = k; counts[lane] > 0 && list(lane)[counts[lane] - 1] < 0;) --counts[lane];
    count[lane] = static_cast<double>(counts[lane] ? counts[lane] : 1);
    least = smaller(least, counts[lane]);
    most = counts[lane] > most ? counts[lane] : most;
  }
  load_points(own, here);
  Real sx{}, sy{}, sz{}, xx{}, xy{}, xz{}, yy{}, yz{}, zz{};
  const auto add_near = [&] {
    load_points(near, there);
    const Real x = there[0] - here[0], y = there[1] - here[1], z = there[2] - here[2];
    sx += x, sy += y, sz += z;
    xx += x * x, xy += x * y, xz += x * z, yy += y * y, yz += y * z, zz += z * z;
  };
  for (int64_t j = 0; j < least; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane) near[lane] = coord + 4 * static_cast<int64_t>(list(lane)[j]);
    add_near();
  }
  for (int64_t j = least; j < most; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane)  // a point itself adds nothing
      near[lane] = j < counts[lane] ? coord + 4 * static_cast<int64_t>(list(lane)[j]) : own[lane];
    add_near();
  }
  const Real share = 1.0 / count, mx = sx * share, my = sy * share, mz = sz * share;
  const Real m[6] = {xx - sx * mx, xy - sx * my, xz - sx * mz, yy - sy * my, yz - sy * mz, zz - sz * mz};
  Real v[3], toward{};
  smallest_eigenvectors(m, v);
  for (int axis = 0; axis < 3; ++axis) toward += v[axis] * (static_cast<double>(center[axis]) - here[axis]);
  Half axes[3];
  for (int axis = 0; axis < 3; ++axis) axes[axis] = narrow(toward < 0.0 ? -v[axis] : v[axis]);
  float found[3][kLanes];
  memcpy(found, axes, sizeof found);
  for (int64_t lane = 0; lane < kLanes && i + lane < end; ++lane)
    for (int axis = 0; axis < 3; ++axis) out[3 * (i + lane) + axis] = found[axis][lane];
}

template <int64_t Count>
void normals_of(const float *coord, const int32_t *neighbours, int64_t k, const float *center, int64_t begin, int64_t end, float *out) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) normals_together<Count, true>(coord, neighbours, k, center, i, end, out);
  if (i < end) normals_together<Count, false>(coord, neighbours, k, center, i, end, out);
}

void normals(const float *coord, const int32_t *neighbours, int64_t k, const float *center, int64_t begin, int64_t end, float *out) {
  if (k == 16) return normals_of<16>(coord, neighbours, k, center, begin, end, out);
  normals_of<0>(coord, neighbours, k, center, begin, end, out);
}

}  // namespace PC3D_ISA
}  // namespace pc3d
