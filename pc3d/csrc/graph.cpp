// Graph segmentation on the CPU: edges of a neighbour graph, edge weights, and the merge of Felzenszwalb and
// Huttenlocher ("Efficient graph-based image segmentation", IJCV 2004). The merge is serial; everything else writes each
// result from one place, so nothing depends on the number of threads.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "curve.h"
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kBlock = 1 << 12;  // rows of one task
constexpr int64_t kAhead = 8;        // edges prefetched ahead of the merge

struct Edge {
  int32_t a, b;
};

template <class Row>
void parallel_rows(int64_t rows, Row &&row) {
  parallel_tasks((rows + kBlock - 1) / kBlock, [&](int64_t task) {
    for (int64_t i = task * kBlock, end = std::min(i + kBlock, rows); i < end; ++i) row(i);
  });
}

const Edge *as_edges(const Array<const int32_t, 2> &edges, int64_t rows) {
  if (edges.shape(1) != 2) throw std::invalid_argument("edges must be (M, 2)");
  const int32_t *at = edges.data(), *end = at + edges.size();
  bool inside = true;
  for (; at < end; ++at) inside &= *at >= 0 && *at < rows;
  if (!inside) throw std::invalid_argument("an edge names a point outside 0.." + std::to_string(rows - 1));
  return reinterpret_cast<const Edge *>(edges.data());
}

// Sorts n numbers and drops those that come again; the number left. `out` has room for kFew.
constexpr int64_t kFew = 32;
int64_t sort_few(const int32_t *values, int64_t n, int32_t *out) {
  typedef int32_t Four __attribute__((vector_size(16)));
  constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
  alignas(16) int32_t own[kFew], rank[kFew], at_rank[kFew];
  const int64_t size = (n + 7) / 8 * 8;
  for (int64_t i = 0; i < size; ++i) own[i] = i < n ? values[i] : kNone, at_rank[i] = kNone;
  for (int64_t i = 0; i < size; i += 8) {  // how many are less: equal ones share the place of the first
    const Four low = *reinterpret_cast<Four *>(own + i), high = *reinterpret_cast<Four *>(own + i + 4);
    Four less_low{}, less_high{};
    for (int64_t j = 0; j < n; ++j) {
      const Four other = Four{} + own[j];
      less_low -= other < low, less_high -= other < high;
    }
    *reinterpret_cast<Four *>(rank + i) = less_low, *reinterpret_cast<Four *>(rank + i + 4) = less_high;
  }
  for (int64_t i = 0; i < n; ++i) at_rank[rank[i]] = own[i];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) out[kept] = at_rank[i], kept += at_rank[i] != kNone;
  return kept;
}

int64_t sort_distinct(int32_t *values, int64_t n) {
  if (n > kFew) {
    std::sort(values, values + n);
    return std::unique(values, values + n) - values;
  }
  int32_t sorted[kFew];
  const int64_t kept = sort_few(values, n, sorted);
  std::copy(sorted, sorted + kept, values);
  return kept;
}

// Each undirected pair of a neighbour table once, (smaller, larger), sorted; at most `k` neighbours of a row count.
nb::object neighbour_edges(Array<const int32_t, 2> neighbours, int64_t k) {
  const int64_t rows = neighbours.shape(0), width = neighbours.shape(1);
  if (k < 1 || rows > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("a graph needs k above 0 and less than 2^31 points");
  Buffer<int32_t> ends;
  {
    nb::gil_scoped_release release;
    const auto each = [&](int64_t i, auto &&take) {
      const int32_t *other = neighbours.data() + i * width, *end = other + width;
      for (int64_t n = 0; other < end && n < k; ++other)
        if (*other >= 0 && *other < rows && *other != i) take(*other), ++n;
    };
    // A pair belongs to its smaller row, whichever row names it.
    Buffer<int64_t> starts(rows + 1), next(rows), counts(rows + 1);
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < rows; ++i) each(i, [&](int32_t other) { ++starts[std::min<int64_t>(i, other) + 1]; });
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::copy(starts.data(), starts.data() + rows, next.begin());
    Buffer<int32_t> larger(starts[rows]);
    for (int64_t i = 0; i < rows; ++i)
      each(i, [&](int32_t other) { larger[next[std::min<int64_t>(i, other)]++] = static_cast<int32_t>(std::max<int64_t>(i, other)); });
    counts[0] = 0;
    parallel_rows(rows, [&](int64_t i) { counts[i + 1] = sort_distinct(larger.data() + starts[i], starts[i + 1] - starts[i]); });
    std::partial_sum(counts.begin(), counts.end(), counts.begin());
    ends = Buffer<int32_t>(2 * counts[rows]);
    parallel_rows(rows, [&](int64_t i) {
      int32_t *to = ends.data() + 2 * counts[i];
      for (int64_t e = 0; e < counts[i + 1] - counts[i]; ++e) *to++ = static_cast<int32_t>(i), *to++ = larger[starts[i] + e];
    });
  }
  return to_torch(std::move(ends), 2);
}

void edge_weights(Array<const float, 2> coord, Array<const float, 2> normal, Array<const int32_t, 2> edges, Array<float, 1> out) {
  if (coord.shape(1) != 3 || normal.shape(1) != 3 || normal.shape(0) != coord.shape(0) || out.shape(0) != edges.shape(0))
    throw std::invalid_argument("points, normals, edges and weights do not fit each other");
  const Edge *edge = as_edges(edges, coord.shape(0));
  nb::gil_scoped_release release;
  const int64_t count = edges.shape(0);
  parallel_tasks((count + kBlock - 1) / kBlock, [&](int64_t task) {
    float apart[kBlock], along[kBlock];
    const int64_t first = task * kBlock, size = std::min(kBlock, count - first);
    for (int64_t e = 0; e < size; ++e) {
      const int64_t i = edge[first + e].a, j = edge[first + e].b;
      const float *x = coord.data() + 3 * i, *y = coord.data() + 3 * j, *n = normal.data() + 3 * i, *m = normal.data() + 3 * j;
      apart[e] = 1.0f - ((n[0] * m[0] + n[1] * m[1]) + n[2] * m[2]);
      along[e] = (m[0] * (y[0] - x[0]) + m[1] * (y[1] - x[1])) + m[2] * (y[2] - x[2]);
    }
    for (int64_t e = 0; e < size; ++e) {  // on its own: half of the edges are convex, which no branch predicts
      const float w = along[e] > 0 ? apart[e] * apart[e] : apart[e];
      out.data()[first + e] = w < 0 ? 0.0f : w;
    }
  });
}

uint64_t ascending_key(float value) {
  uint32_t bits;
  value += 0.0f;  // -0 and 0 are alike
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Edges (smaller, larger) between different rows, each once and sorted; rows are numbered anew by `place`.
nb::object distinct_edges(Array<const int32_t, 2> edges, Array<const int32_t, 1> place) {
  const int64_t count = edges.shape(0), rows = place.shape(0);
  const Edge *edge = as_edges(edges, rows);
  const int row_bits = bit_length(static_cast<uint64_t>(rows));
  Buffer<int32_t> ends;
  {
    nb::gil_scoped_release release;
    Buffer<PackedRow> items(count);
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t a = place.data()[edge[e].a], b = place.data()[edge[e].b];
      items[kept] = PackedRow::make(static_cast<uint64_t>(std::min(a, b)), std::max(a, b), row_bits);
      kept += a != b;
    }
    items.shrink(kept);
    radix_sort(items, 2 * row_bits, 0);
    PackedRow *end = std::unique(items.begin(), items.end(), [](PackedRow a, PackedRow b) { return a.word == b.word; });
    ends = Buffer<int32_t>(2 * (end - items.begin()));
    for (int64_t e = 0; e < ends.size() / 2; ++e)
      ends[2 * e] = static_cast<int32_t>(items[e].key(row_bits)), ends[2 * e + 1] = static_cast<int32_t>(items[e].row(row_bits));
  }
  return to_torch(std::move(ends), 2);
}

// Rows of each cloud along its z curve; the place of each row in that order, and its points.
void sorted_rows(Array<const float, 2> coord, Array<const int64_t, 1> offsets, Array<int64_t, 1> order, Array<int32_t, 1> place,
                 Array<float, 2> sorted) {
  const int64_t rows = coord.shape(0), clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (coord.shape(1) != 3 || static_cast<int64_t>(order.shape(0)) != rows || place.shape(0) != order.shape(0) ||
      sorted.shape(0) != coord.shape(0) || sorted.shape(1) != 3 || rows > std::numeric_limits<int32_t>::max() || clouds < 0 || offsets.data()[0] != 0 ||
      offsets.data()[clouds] != rows || !std::is_sorted(offsets.data(), offsets.data() + clouds + 1))
    throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
  nb::gil_scoped_release release;
  for (int64_t cloud = 0; cloud < clouds; ++cloud) {
    const int64_t first = offsets.data()[cloud], count = offsets.data()[cloud + 1] - first;
    const Buffer<int32_t> found = curve_order(coord.data() + 3 * first, count);
    for (int64_t i = 0; i < count; ++i) order.data()[first + i] = first + found[i];
  }
  parallel_rows(rows, [&](int64_t i) {
    const int64_t from = order.data()[i];
    place.data()[from] = static_cast<int32_t>(i);
    for (int axis = 0; axis < 3; ++axis) sorted.data()[3 * i + axis] = coord.data()[3 * from + axis];
  });
}

void merge(Array<const int32_t, 2> edges, Array<const float, 1> weights, double k, int64_t min_size, Array<int64_t, 1> labels,
           std::optional<Array<const int32_t, 1>> place) {
  const int64_t rows = labels.shape(0), count = edges.shape(0);
  if (static_cast<int64_t>(weights.shape(0)) != count) throw std::invalid_argument("edges and weights do not fit each other");
  if (place && static_cast<int64_t>(place->shape(0)) != rows) throw std::invalid_argument("places and labels do not fit each other");
  if (rows > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("a graph must have less than 2^31 points");
  const Edge *edge = as_edges(edges, rows);
  const int row_bits = bit_length(static_cast<uint64_t>(count));
  if (row_bits > 32) throw std::invalid_argument("a graph must have less than 2^32 edges");
  const int64_t missing = std::count_if(weights.data(), weights.data() + count, [](float w) { return w != w; });
  if (missing) throw std::invalid_argument(std::to_string(missing) + " edge weights are NaN");
  nb::gil_scoped_release release;
  Buffer<PackedRow> items(count);
  for (int64_t e = 0; e < count; ++e) items[e] = PackedRow::make(ascending_key(weights.data()[e]), e, row_bits);
  radix_sort(items, 32, row_bits);

  struct Component {
    int32_t parent, size;
    double threshold;
  };
  Buffer<Component> parts(rows);
  for (int64_t i = 0; i < rows; ++i) parts[i] = {static_cast<int32_t>(i), 1, k};
  const auto root = [&](int32_t at) {
    while (parts[at].parent != at) at = parts[at].parent = parts[parts[at].parent].parent;
    return at;
  };
  const auto join = [&](int32_t a, int32_t b) {
    if (parts[a].size < parts[b].size) std::swap(a, b);
    parts[b].parent = a;
    parts[a].size += parts[b].size;
    return a;
  };
  std::vector<Edge> apart;  // ends of edges that were not joined and may be for their size, in their order
  const auto ends = [&](int64_t at) { return edge + items[at].row(row_bits); };
  for (int64_t at = 0; at < count; ++at) {
    if (at + 2 * kAhead < count) __builtin_prefetch(ends(at + 2 * kAhead)), __builtin_prefetch(weights.data() + items[at + 2 * kAhead].row(row_bits));
    if (at + kAhead < count) __builtin_prefetch(&parts[ends(at + kAhead)->a]), __builtin_prefetch(&parts[ends(at + kAhead)->b]);
    const int32_t a = root(ends(at)->a), b = root(ends(at)->b);
    if (a == b) continue;
    const double w = weights.data()[items[at].row(row_bits)];
    if (w > parts[a].threshold || w > parts[b].threshold) {
      if (parts[a].size < min_size || parts[b].size < min_size) apart.push_back({a, b});
      continue;
    }
    const int32_t joined = join(a, b);
    parts[joined].threshold = w + k / parts[joined].size;
  }
  for (const Edge &pair : apart) {
    const int32_t a = root(pair.a), b = root(pair.b);
    if (a != b && (parts[a].size < min_size || parts[b].size < min_size)) join(a, b);
  }
  std::vector<int64_t> number(rows, -1);
  int64_t next = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t &label = number[root(place ? place->data()[i] : static_cast<int32_t>(i))];
    if (label < 0) label = next++;
    labels.data()[i] = label;
  }
}

}  // namespace

void register_graph(nb::module_ &m) {
  m.def("graph_edges", &neighbour_edges, nb::arg("neighbours"), nb::arg("k"),
        "Undirected edges (smaller, larger), sorted, of the first k neighbours of each row other than itself.");
  m.def("graph_weights", &edge_weights, nb::arg("coord"), nb::arg("normal"), nb::arg("edges"), nb::arg("out"),
        "1 - cosine of the normals, squared where the edge is convex, at least 0.");
  m.def("graph_distinct_edges", &distinct_edges, nb::arg("edges"), nb::arg("place"),
        "Edges (smaller, larger) of place[edges], without loops, each once, sorted.");
  m.def("graph_sorted_rows", &sorted_rows, nb::arg("coord"), nb::arg("offsets"), nb::arg("order"), nb::arg("place"),
        nb::arg("sorted"), "Rows of each cloud along its z curve; the inverse of this order, and the points in it.");
  m.def("graph_merge", &merge, nb::arg("edges"), nb::arg("weights"), nb::arg("k"), nb::arg("min_size"), nb::arg("labels"),
        nb::arg("place") = nb::none(), "Felzenszwalb-Huttenlocher merge; labels of places (default: all), numbered by first occurrence.");
}

}  // namespace pc3d
