// Graph segmentation on the CPU: normals, edges of a neighbour graph, edge weights, and the merge of Felzenszwalb and
// Huttenlocher ("Efficient graph-based image segmentation", IJCV 2004). The merge is serial; everything else writes each
// result from one place, so nothing depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
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

// Unit eigenvector of the smallest eigenvalue of a symmetric matrix [xx xy xz yy yz zz]; z where all directions are alike.
void smallest_eigenvector(const double *m, double *v) {
  const double mean = (m[0] + m[3] + m[5]) / 3;
  const double xx = m[0] - mean, yy = m[3] - mean, zz = m[5] - mean;
  const double p = std::sqrt((xx * xx + yy * yy + zz * zz + 2 * (m[1] * m[1] + m[2] * m[2] + m[4] * m[4])) / 6);
  v[0] = v[1] = 0, v[2] = 1;
  if (!(p > 0)) return;
  const double det = xx * (yy * zz - m[4] * m[4]) - m[1] * (m[1] * zz - m[4] * m[2]) + m[2] * (m[1] * m[4] - yy * m[2]);
  const double angle = std::acos(std::clamp(det / (2 * p * p * p), -1.0, 1.0)) / 3;
  const double lowest = 2 * p * std::cos(angle + 2.0943951023931953);
  const double rows[3][3] = {{xx - lowest, m[1], m[2]}, {m[1], yy - lowest, m[4]}, {m[2], m[4], zz - lowest}};
  double best = 0;
  for (int a = 0; a < 3; ++a) {
    const double *r = rows[a], *s = rows[(a + 1) % 3];
    const double c[3] = {r[1] * s[2] - r[2] * s[1], r[2] * s[0] - r[0] * s[2], r[0] * s[1] - r[1] * s[0]};
    const double size = c[0] * c[0] + c[1] * c[1] + c[2] * c[2];
    if (size > best) best = size, std::copy(c, c + 3, v);
  }
  if (best > 1e-20 * p * p * p * p) {
    for (int axis = 0; axis < 3; ++axis) v[axis] /= std::sqrt(best);
    return;
  }
  // The points lie on a line: any direction across it.
  const double *along = rows[0];
  double longest = -1;
  for (const auto &row : rows) {
    const double size = row[0] * row[0] + row[1] * row[1] + row[2] * row[2];
    if (size > longest) longest = size, along = row;
  }
  const int axis = std::fabs(along[0]) <= std::fabs(along[1]) ? (std::fabs(along[0]) <= std::fabs(along[2]) ? 0 : 2)
                                                              : (std::fabs(along[1]) <= std::fabs(along[2]) ? 1 : 2);
  const int b = (axis + 1) % 3, c = (axis + 2) % 3;
  const double size = std::sqrt(along[b] * along[b] + along[c] * along[c]);
  v[axis] = 0, v[b] = size > 0 ? -along[c] / size : 1, v[c] = size > 0 ? along[b] / size : 0;
}

void normals(Array<const float, 2> coord, Array<const int64_t, 2> neighbours, Array<const float, 2> center,
             Array<float, 2> out) {
  const int64_t rows = coord.shape(0), k = neighbours.shape(1);
  nb::gil_scoped_release release;
  parallel_rows(rows, [&](int64_t i) {
    const int64_t *found = neighbours.data() + i * k;
    const int64_t count = std::find(found, found + k, -1) - found;
    const float *own = coord.data() + 3 * i;
    double sum[3] = {}, m[6] = {};
    for (int64_t j = 0; j < count; ++j) {
      const float *q = coord.data() + 3 * found[j];
      const double d[3] = {static_cast<double>(q[0]) - own[0], static_cast<double>(q[1]) - own[1], static_cast<double>(q[2]) - own[2]};
      for (int axis = 0; axis < 3; ++axis) sum[axis] += d[axis];
      m[0] += d[0] * d[0], m[1] += d[0] * d[1], m[2] += d[0] * d[2], m[3] += d[1] * d[1], m[4] += d[1] * d[2], m[5] += d[2] * d[2];
    }
    for (int a = 0, at = 0; a < 3 && count; ++a)
      for (int b = a; b < 3; ++b, ++at) m[at] -= sum[a] * sum[b] / static_cast<double>(count);
    double v[3], toward = 0;
    smallest_eigenvector(m, v);
    for (int axis = 0; axis < 3; ++axis) toward += v[axis] * (static_cast<double>(center.data()[3 * i + axis]) - own[axis]);
    for (int axis = 0; axis < 3; ++axis) out.data()[3 * i + axis] = static_cast<float>(toward < 0 ? -v[axis] : v[axis]);
  });
}

// Each undirected pair of a neighbour table once, (smaller, larger), sorted; at most `k` neighbours of a row count.
nb::object neighbour_edges(Array<const int64_t, 2> neighbours, int64_t k) {
  const int64_t rows = neighbours.shape(0), width = neighbours.shape(1);
  Buffer<int64_t> edges;
  {
    nb::gil_scoped_release release;
    Buffer<int64_t> own(rows * k), starts(rows + 1);
    Buffer<int32_t> counts(rows);
    parallel_rows(rows, [&](int64_t i) {
      int64_t n = 0;
      for (int64_t j = 0; j < width && n < k; ++j) {
        const int64_t other = neighbours.data()[i * width + j];
        if (other >= 0 && other != i) own[i * k + n++] = other;
      }
      counts[i] = static_cast<int32_t>(n);
    });
    const auto names = [&](int64_t i, int64_t other) {
      const int64_t *first = own.data() + i * k;
      return std::find(first, first + counts[i], other) != first + counts[i];
    };
    std::fill(starts.begin(), starts.end(), 0);
    const auto each = [&](auto &&take) {  // pair by pair: those a row names, the larger row's only where the smaller is silent
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < counts[i]; ++j) {
          const int64_t other = own[i * k + j];
          if (i < other)
            take(i, other);
          else if (!names(other, i))
            take(other, i);
        }
    };
    each([&](int64_t a, int64_t) { ++starts[a + 1]; });
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    edges = Buffer<int64_t>(2 * starts[rows]);
    Buffer<int64_t> next(rows);
    std::copy(starts.data(), starts.data() + rows, next.begin());
    Buffer<int64_t> seconds(starts[rows]);
    each([&](int64_t a, int64_t b) { seconds[next[a]++] = b; });
    parallel_rows(rows, [&](int64_t i) {
      std::sort(seconds.data() + starts[i], seconds.data() + starts[i + 1]);
      for (int64_t e = starts[i]; e < starts[i + 1]; ++e) edges[2 * e] = i, edges[2 * e + 1] = seconds[e];
    });
  }
  return to_torch(std::move(edges), 2);
}

void edge_weights(Array<const float, 2> coord, Array<const float, 2> normal, Array<const int64_t, 2> edges, Array<float, 1> out) {
  nb::gil_scoped_release release;
  parallel_rows(edges.shape(0), [&](int64_t e) {
    const int64_t i = edges.data()[2 * e], j = edges.data()[2 * e + 1];
    const float *x = coord.data() + 3 * i, *y = coord.data() + 3 * j, *n = normal.data() + 3 * i, *m = normal.data() + 3 * j;
    const float w = 1.0f - ((n[0] * m[0] + n[1] * m[1]) + n[2] * m[2]);
    const bool convex = (m[0] * (y[0] - x[0]) + m[1] * (y[1] - x[1])) + m[2] * (y[2] - x[2]) > 0;
    out.data()[e] = std::max(convex ? w * w : w, 0.0f);
  });
}

uint64_t ascending_key(float value) {
  uint32_t bits;
  value += 0.0f;  // -0 and 0 are alike
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Edges (smaller, larger) between different rows, each once and sorted; rows are numbered anew by `place`.
nb::object distinct_edges(Array<const int64_t, 2> edges, Array<const int64_t, 1> place) {
  const int64_t count = edges.shape(0), rows = place.shape(0);
  const int row_bits = bit_length(static_cast<uint64_t>(rows));
  if (edges.shape(1) != 2 || row_bits > 31) throw std::invalid_argument("edges must be (M, 2), of less than 2^31 points");
  for (int64_t e = 0; e < 2 * count; ++e)
    if (edges.data()[e] < 0 || edges.data()[e] >= rows) throw std::invalid_argument("an edge names a point that does not exist");
  Buffer<int64_t> found;
  {
    nb::gil_scoped_release release;
    Buffer<PackedRow> items(count);
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t a = place.data()[edges.data()[2 * e]], b = place.data()[edges.data()[2 * e + 1]];
      items[kept] = PackedRow::make(static_cast<uint64_t>(std::min(a, b)), std::max(a, b), row_bits);
      kept += a != b;
    }
    Buffer<PackedRow> sorted(kept);
    std::copy(items.begin(), items.begin() + kept, sorted.begin());
    radix_sort(sorted, 2 * row_bits, 0);
    PackedRow *end = std::unique(sorted.begin(), sorted.end(), [](PackedRow a, PackedRow b) { return a.word == b.word; });
    found = Buffer<int64_t>(2 * (end - sorted.begin()));
    for (int64_t e = 0; e < found.size() / 2; ++e)
      found[2 * e] = static_cast<int64_t>(sorted[e].key(row_bits)), found[2 * e + 1] = sorted[e].row(row_bits);
  }
  return to_torch(std::move(found), 2);
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

void merge(Array<const int64_t, 2> edges, Array<const float, 1> weights, double k, int64_t min_size, Array<int64_t, 1> labels) {
  const int64_t rows = labels.shape(0), count = edges.shape(0);
  if (static_cast<int64_t>(weights.shape(0)) != count || edges.shape(1) != 2) throw std::invalid_argument("edges and weights do not fit");
  for (int64_t e = 0; e < 2 * count; ++e)
    if (edges.data()[e] < 0 || edges.data()[e] >= rows) throw std::invalid_argument("an edge names a point that does not exist");
  nb::gil_scoped_release release;
  const int row_bits = bit_length(static_cast<uint64_t>(count));
  Buffer<PackedRow> items(count);
  for (int64_t e = 0; e < count; ++e) items[e] = PackedRow::make(ascending_key(weights.data()[e]), e, row_bits);
  radix_sort(items, 32, row_bits);

  struct Component {
    int32_t parent, size;
    double threshold;
  };
  Buffer<Component> parts(rows);
  for (int64_t i = 0; i < rows; ++i) parts[i] = {static_cast<int32_t>(i), 1, k};
  const auto root = [&](int64_t i) {
    int32_t at = static_cast<int32_t>(i);
    while (parts[at].parent != at) at = parts[at].parent = parts[parts[at].parent].parent;
    return at;
  };
  const auto join = [&](int32_t a, int32_t b) {
    if (parts[a].size < parts[b].size) std::swap(a, b);
    parts[b].parent = a;
    parts[a].size += parts[b].size;
    return a;
  };
  struct Pair {
    int32_t a, b;
  };
  std::vector<Pair> apart;  // of edges whose ends were not joined, in their order
  const auto ends = [&](int64_t at) { return edges.data() + 2 * items[at].row(row_bits); };
  for (int64_t at = 0; at < count; ++at) {
    if (at + 2 * kAhead < count) __builtin_prefetch(ends(at + 2 * kAhead));
    if (at + kAhead < count) __builtin_prefetch(&parts[ends(at + kAhead)[0]]), __builtin_prefetch(&parts[ends(at + kAhead)[1]]);
    const double w = weights.data()[items[at].row(row_bits)];
    const int32_t a = root(ends(at)[0]), b = root(ends(at)[1]);
    if (a == b) continue;
    if (w > parts[a].threshold || w > parts[b].threshold) {
      apart.push_back({a, b});
      continue;
    }
    const int32_t joined = join(a, b);
    parts[joined].threshold = w + k / parts[joined].size;
  }
  for (const Pair &pair : apart) {
    const int32_t a = root(pair.a), b = root(pair.b);
    if (a != b && (parts[a].size < min_size || parts[b].size < min_size)) join(a, b);
  }
  std::vector<int64_t> number(rows, -1);
  int64_t next = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t &label = number[root(i)];
    if (label < 0) label = next++;
    labels.data()[i] = label;
  }
}

}  // namespace

void register_graph(nb::module_ &m) {
  m.def("graph_normals", &normals, nb::arg("coord"), nb::arg("neighbours"), nb::arg("center"), nb::arg("out"),
        "Unit normals: direction of least spread of the neighbours of each row (-1 ends them), towards `center`.");
  m.def("graph_edges", &neighbour_edges, nb::arg("neighbours"), nb::arg("k"),
        "Undirected edges (smaller, larger), sorted, of the first k neighbours of each row other than itself.");
  m.def("graph_weights", &edge_weights, nb::arg("coord"), nb::arg("normal"), nb::arg("edges"), nb::arg("out"),
        "1 - cosine of the normals, squared where the edge is convex, at least 0.");
  m.def("graph_distinct_edges", &distinct_edges, nb::arg("edges"), nb::arg("place"),
        "Edges (smaller, larger) of place[edges], without loops, each once, sorted.");
  m.def("graph_sorted_rows", &sorted_rows, nb::arg("coord"), nb::arg("offsets"), nb::arg("order"),
        "Rows of each cloud sorted by x, y, z, stable.");
  m.def("graph_merge", &merge, nb::arg("edges"), nb::arg("weights"), nb::arg("k"), nb::arg("min_size"), nb::arg("labels"),
        "Felzenszwalb-Huttenlocher merge; labels numbered by first occurrence.");
}

}  // namespace pc3d
