// Searches in a tree of points for one instruction set; see neighbours.cpp for what builds the tree.
#pragma once

#include <stdint.h>

namespace pc3d {

constexpr int64_t kFan = 16;          // children of a node, points of a leaf
constexpr int kMostLevels = 8;        // 16^8 leaves hold 2^31 points and more
constexpr int64_t kMostRanked = 128;  // candidates put in order by counting; more are sorted
constexpr int64_t kSplit = 32;        // candidates that are only split, into the nearest and others; a multiple of kFan
constexpr int64_t kMostWaiting = 32;  // queries whose candidates are split together
constexpr int32_t kNobody = INT32_MAX;

// Bounding boxes of nodes, with memory for a multiple of kFan of them.
struct TreeLevel {
  int64_t nodes;
  const float *low[3], *high[3];
  const int32_t *row;  // the smallest in the node
};

// Level 0 has the leaves, the last one at most kFan nodes; node i has the children kFan * i and on of the level below.
struct PointTree {
  int64_t points;
  const float *coord[3];  // by axis; what the last leaf has no points for is NaN
  const int32_t *row;     // of the cloud; kNobody there
  int levels;
  TreeLevel level[kMostLevels];
};

// The queries of one cloud; all rows count from its first.
struct Queries {
  const float *coord;
  const int32_t *order;  // in which they are taken
  int64_t k, first;      // `first` is added to rows found
  float limit;           // squared
  int64_t *rows;         // (queries, k)
  float *distances;
  int32_t *short_rows;   // in place of both, or null
  int64_t inner;         // where above 0, the `inner` nearest come first in short_rows, then others, in no other order
};

// Memory of one thread: `capacity` candidates, and those of kMostWaiting queries more; as many nodes.
struct SearchSpace {
  int64_t capacity;
  float *coord[3], *distances;
  int32_t *rows, *near_rows, *nodes[2];
  float *found_distances;  // k
  int32_t *found_rows;
};

// Distance of every point to those sampled; of each node the largest, and the smallest row that has it.
struct SampleState {
  float *distances, *largest[kMostLevels];
  int32_t *row[kMostLevels];
};

// Of each point a list of points, the first `count` of `stride` numbers. It holds the point itself once; any number of times where
// lists are `filled` with it.
struct RowLists {
  const int32_t *rows;
  int64_t points, stride, count;
  bool filled;
};
struct RowPair {
  int32_t smaller, larger;
};

// Puts them in ascending order; how many are there again.
int64_t sort_pairs(RowPair *pairs, int64_t n);
// Puts them in ascending order.
void sort_rows(int32_t *rows, int64_t n);
// Puts the k nearest of n first, ascending by distance, then row.
void sort_nearest(float *distances, int32_t *rows, int64_t n, int64_t k);

struct NeighbourKernels {
  const char *name;
  // Queries order[begin:end].
  void (*nearest)(const PointTree &tree, const Queries &queries, int64_t begin, int64_t end, const SearchSpace &space);
  // `count` rows, each the farthest from those before it.
  void (*farthest)(const PointTree &tree, const float *coord, int64_t count, int64_t start, const SampleState &state, int64_t *out);
  // Points, and their normals, have 4 numbers here, aligned to as much, of which the last is anything.
  // Of points [begin, end): the direction in which their k neighbours spread least, -1 after the last, towards one `center`.
  void (*normals)(const float *coord, const int32_t *neighbours, int64_t k, const float *center, int64_t begin, int64_t end, float *out);
  // Of edges [begin, end), pairs of rows: 1 - cosine of the normals, squared where the edge is convex, at least 0.
  void (*edge_weights)(const float *coord, const float *normal, const int32_t *edges, int64_t begin, int64_t end, float *out);
  // Of the lists of points [begin, end): the pairs with smaller ones that do not list them, ascending by the larger, and how
  // many larger ones they list. False, and anything, where a list does not fit RowLists.
  bool (*one_way)(const RowLists &lists, int64_t begin, int64_t end, RowPair *out, int64_t *count, int64_t *larger);
  // Pairs of points [begin, end) with the larger ones that they list and with `others`, which point i has from starts[i] on (and
  // two numbers are after the last): sorted, to the places from `out` to `out_end`. False, and anything, if `distinct` does not
  // hold: no pair is there twice.
  bool (*pairs)(const RowLists &lists, const int32_t *others, const int64_t *starts, int64_t begin, int64_t end, bool distinct, RowPair *out,
                const RowPair *out_end);
  // Pairs of points [begin, end) with their values, which point i has from starts[i] on, each once and ascending; how many.
  int64_t (*put_distinct)(int32_t *values, const int64_t *starts, int64_t begin, int64_t end, RowPair *out);
};

const NeighbourKernels *neighbour_kernels_generic();
const NeighbourKernels *neighbour_kernels_avx2();    // null when not compiled
const NeighbourKernels *neighbour_kernels_avx512();  // likewise

}  // namespace pc3d
