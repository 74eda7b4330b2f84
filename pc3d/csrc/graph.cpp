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
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kBlock = 1 << 12;  // rows of one task
constexpr int64_t kAhead = 8;        // edges prefetched ahead of the merge

template <class Row>
void parallel_rows(int64_t rows, Row &&row) {
  parallel_tasks((rows + kBlock - 1) / kBlock, [&](int64_t task) {
    for (int64_t i = task * kBlock, end = std::min(i + kBlock, rows); i < end; ++i) row(i);
  });
}

struct Edge {
  int32_t a, b;
};

const Edge *as_edges(const Array<const int32_t, 2> &edges, int64_t rows) {
  if (edges.shape(1) != 2) throw std::invalid_argument("edges must be (M, 2)");
  const int32_t *at = edges.data(), *end = at + edges.size();
  bool inside = true;
  for (; at < end; ++at) inside &= *at >= 0 && *at < rows;
  if (!inside) throw std::invalid_argument("an edge names a point outside 0.." + std::to_string(rows - 1));
  return reinterpret_cast<const Edge *>(edges.data());
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
    // What a row is named by, ascending, and place for the larger rows it names itself.
    Buffer<int64_t> starts(rows + 1), next(rows);
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < rows; ++i) each(i, [&](int32_t other) { ++starts[std::min<int64_t>(i, other) + 1]; });
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::copy(starts.data(), starts.data() + rows, next.begin());
    Buffer<int32_t> larger(starts[rows]);
    for (int64_t i = 0; i < rows; ++i)
      each(i, [&](int32_t other) {
        if (other < i) larger[next[other]++] = static_cast<int32_t>(i);
      });
    Buffer<int64_t> counts(rows + 1);
    counts[0] = 0;
    parallel_rows(rows, [&](int64_t i) {
      int32_t *const first = larger.data() + starts[i];
      int32_t *end = larger.data() + next[i];
      each(i, [&](int32_t other) {
        if (other < i) return;
        int32_t *at = end;
        for (; at > first && at[-1] > other; --at) {}
        if (at > first && at[-1] == other) return;
        std::copy_backward(at, end, end + 1);
        *at = other, ++end;
      });
      counts[i + 1] = end - first;
    });
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
  parallel_rows(edges.shape(0), [&](int64_t e) {
    const int64_t i = edge[e].a, j = edge[e].b;
    const float *x = coord.data() + 3 * i, *y = coord.data() + 3 * j, *n = normal.data() + 3 * i, *m = normal.data() + 3 * j;
    const float w = 1.0f - ((n[0] * m[0] + n[1] * m[1]) + n[2] * m[2]);
    const float along = (m[0] * (y[0] - x[0]) + m[1] * (y[1] - x[1])) + m[2] * (y[2] - x[2]);
    const float weight = w * (along > 0 ? w : 1.0f);  // squared where convex; no branch
    out.data()[e] = weight < 0 ? 0.0f : weight;
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

// Rows of each cloud by x, y, z; equal points keep their order.
void sorted_rows(Array<const float, 2> coord, Array<const int64_t, 1> offsets, Array<int64_t, 1> order) {
  const int64_t rows = coord.shape(0), clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (coord.shape(1) != 3 || static_cast<int64_t>(order.shape(0)) != rows || clouds < 0 || offsets.data()[0] != 0 ||
      offsets.data()[clouds] != rows || !std::is_sorted(offsets.data(), offsets.data() + clouds + 1))
    throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
  nb::gil_scoped_release release;
  for (int64_t cloud = 0; cloud < clouds; ++cloud) {
    const int64_t first = offsets.data()[cloud], count = offsets.data()[cloud + 1] - first;
    const int row_bits = bit_length(static_cast<uint64_t>(count));
    Buffer<PackedRow> items(count);
    for (int64_t i = 0; i < count; ++i) items[i] = PackedRow::make(ascending_key(coord.data()[3 * (first + i)]), i, row_bits);
    radix_sort(items, 32, row_bits);
    int64_t *out = order.data() + first;
    for (int64_t i = 0; i < count; ++i) out[i] = first + items[i].row(row_bits);
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      while (end < count && items[end].key(row_bits) == items[begin].key(row_bits)) ++end;
      if (end - begin > 1) std::stable_sort(out + begin, out + end, [&](int64_t a, int64_t b) {
        const float *p = coord.data() + 3 * a, *q = coord.data() + 3 * b;
        return p[1] < q[1] || (p[1] == q[1] && p[2] < q[2]);
      });
    }
  }
}

// Edges in ascending order of their weights, equal ones in their own order.
Buffer<PackedRow> ascending_edges(const float *weights, int64_t count, int row_bits) {
  constexpr int kLow = 10;  // bits of a key that seldom decide
  Buffer<PackedRow> items(count);
  for (int64_t e = 0; e < count; ++e) items[e] = PackedRow::make(ascending_key(weights[e]), e, row_bits);
  radix_sort(items, 32 - kLow, row_bits + kLow);
  const auto less = [](PackedRow p, PackedRow q) { return p.word < q.word; };
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    bool sorted = true;
    for (end = begin + 1; end < count && items[end].key(row_bits + kLow) == items[begin].key(row_bits + kLow); ++end)
      sorted &= items[end - 1].word < items[end].word;
    if (!sorted) std::sort(items.begin() + begin, items.begin() + end, less);
  }
  return items;
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
  const Buffer<PackedRow> items = ascending_edges(weights.data(), count, row_bits);

  struct Component {  // of a root
    double threshold;
    int64_t size;
  };
  Buffer<int32_t> parent(rows);
  Buffer<Component> parts(rows);
  for (int64_t i = 0; i < rows; ++i) parent[i] = static_cast<int32_t>(i), parts[i] = {k, 1};
  const auto root = [&](int32_t at) {
    while (parent[at] != at) at = parent[at] = parent[parent[at]];
    return at;
  };
  const auto join = [&](int32_t a, int32_t b) {
    if (parts[a].size < parts[b].size) std::swap(a, b);
    parent[b] = a;
    parts[a].size += parts[b].size;
    return a;
  };
  std::vector<Edge> apart;  // ends of edges that were not joined and may be for their size, in their order
  const auto ends = [&](int64_t at) { return edge + items[at].row(row_bits); };
  for (int64_t at = 0; at < count; ++at) {
    if (at + 2 * kAhead < count) __builtin_prefetch(ends(at + 2 * kAhead)), __builtin_prefetch(weights.data() + items[at + 2 * kAhead].row(row_bits));
    if (at + kAhead < count) __builtin_prefetch(&parent[ends(at + kAhead)->a]), __builtin_prefetch(&parent[ends(at + kAhead)->b]);
    const int32_t a = root(ends(at)->a), b = root(ends(at)->b);
    if (a == b) continue;
    const double w = weights.data()[items[at].row(row_bits)];
    if (w > parts[a].threshold || w > parts[b].threshold) {
      if (parts[a].size < min_size || parts[b].size < min_size) apart.push_back({a, b});
      continue;
    }
    const int32_t joined = join(a, b);
    parts[joined].threshold = w + k / static_cast<double>(parts[joined].size);
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
  m.def("graph_sorted_rows", &sorted_rows, nb::arg("coord"), nb::arg("offsets"), nb::arg("order"),
        "Rows of each cloud sorted by x, y, z, stable.");
  m.def("graph_merge", &merge, nb::arg("edges"), nb::arg("weights"), nb::arg("k"), nb::arg("min_size"), nb::arg("labels"),
        nb::arg("place") = nb::none(), "Felzenszwalb-Huttenlocher merge; labels of places (default: all), numbered by first occurrence.");
}

}  // namespace pc3d
