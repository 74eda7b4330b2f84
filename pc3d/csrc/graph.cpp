// Graph segmentation on the CPU: points along a curve, and the merge of Felzenszwalb and Huttenlocher ("Efficient graph-based
// image segmentation", IJCV 2004), which is serial. The edges of the graph come from neighbours.cpp.
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
#include "isa.h"
#include "module.h"
#include "parallel.h"
#include "radix_sort.h"
#include "rows.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kBlock = 1 << 12;  // rows of one task

struct Edge {
  int32_t a, b;
};

template <class Row>
void parallel_rows(int64_t rows, Row &&row) {
  parallel_tasks((rows + kBlock - 1) / kBlock, [&](int64_t task) {
    for (int64_t i = task * kBlock, end = std::min(i + kBlock, rows); i < end; ++i) row(i);
  });
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

// Ascending as the values are; -0 and 0 are alike.
inline uint32_t ascending_key(float value) {
  uint32_t bits;
  value += 0.0f;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The largest key of some values, and how many of them are NaN.
struct Keys {
  uint32_t largest, missing;
};
PC3D_CLONES Keys survey(const float *values, int64_t count) {
  uint32_t largest = 0, missing = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = ascending_key(values[i]);
    largest = key > largest ? key : largest;
    missing += values[i] != values[i];
  }
  return {largest, missing};
}

PC3D_CLONES void find_buckets(const float *values, int64_t count, int shift, uint32_t first, uint16_t *buckets) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t at = ascending_key(values[i]) >> shift;
    buckets[i] = static_cast<uint16_t>(at > first ? at - first : 0);
  }
}

constexpr int64_t kRankedTogether = 32;

// Of each key, how many are less. Whole blocks of kRankedTogether keys are read, and of ranks written.
PC3D_CLONES void find_ranks(const int32_t *keys, int64_t count, int32_t *ranks) {
  typedef int32_t Lanes __attribute__((vector_size(kRankedTogether / 2 * sizeof(int32_t)), aligned(4)));
  for (int64_t i = 0; i < count; i += kRankedTogether) {
    const Lanes *own = reinterpret_cast<const Lanes *>(keys + i);
    const Lanes low = own[0], high = own[1];
    Lanes low_rank{}, high_rank{};
    for (int64_t j = 0; j < count; ++j) {
      const Lanes other = Lanes{} + keys[j];
      low_rank = other < low ? low_rank + 1 : low_rank, high_rank = other < high ? high_rank + 1 : high_rank;
    }
    Lanes *rank = reinterpret_cast<Lanes *>(ranks + i);
    rank[0] = low_rank, rank[1] = high_rank;
  }
}

// Components of points, joined by size.
class Components {
 public:
  struct Part {
    double threshold;
    int32_t size;
  };

  Components(int64_t points, double threshold) : parents_(points), parts_(points) {
    std::iota(parents_.begin(), parents_.end(), 0);
    std::fill(parts_.begin(), parts_.end(), Part{threshold, 1});
  }
  int32_t root(int32_t point) {
    int32_t *const parents = parents_.data();
    int32_t at = parents[parents[point]];
    while (__builtin_expect(parents[at] != at, 0)) at = parents[at] = parents[parents[at]];
    return parents[point] = at;
  }
  void prefetch(int32_t root) const { __builtin_prefetch(parts_.data() + root); }
  Part &operator[](int32_t root) { return parts_[root]; }
  int32_t join(int32_t a, int32_t b) {
    if (parts_[a].size < parts_[b].size) std::swap(a, b);
    parents_[b] = a;
    parts_[a].size += parts_[b].size;
    return a;
  }

 private:
  Buffer<int32_t> parents_;
  Buffer<Part> parts_;
};

// Edges in ascending weight, ties in the order given, without a sort of them all: they are put into buckets, a bucket is sorted
// when its turn comes, and by then most of its edges lie inside a component.
class EdgeQueue {
 public:
  static constexpr int64_t kBuckets = 1024;

  // Edges between `rows` points. A block of them is read while it is in the cache.
  EdgeQueue(const int32_t *edges, const float *weights, int64_t count, int64_t rows) : items_(count), starts_(kBuckets + 1) {
    const auto blocks = [&](auto &&run) {
      for (int64_t begin = 0; begin < count; begin += kBlock) run(begin, std::min(begin + kBlock, count));
    };
    const Keys keys = survey(weights, count);
    if (keys.missing) throw std::invalid_argument(std::to_string(keys.missing) + " edge weights are NaN");
    const uint32_t last = keys.largest >> kShift;
    first_ = last < kBuckets ? 0 : last - (kBuckets - 1);
    Buffer<uint16_t> buckets(count);
    std::fill(starts_.begin(), starts_.end(), 0);
    Buffer<int64_t> next(kBuckets);  // every other edge is counted here
    std::fill(next.begin(), next.end(), 0);
    blocks([&](int64_t begin, int64_t end) {
      find_buckets(weights + begin, end - begin, kShift, first_, buckets.data() + begin);
      for (int64_t e = begin; e + 1 < end; e += 2) ++starts_[buckets[e] + 1], ++next[buckets[e + 1]];
      if ((end - begin) % 2) ++starts_[buckets[end - 1] + 1];
    });
    for (int64_t i = 0; i < kBuckets; ++i) {
      const int64_t other = next[i];
      next[i] = starts_[i];
      starts_[i + 1] += starts_[i] + other;
    }
    blocks([&](int64_t begin, int64_t end) {
      if (!inside(edges + 2 * begin, 2 * (end - begin), rows))
        throw std::invalid_argument("an edge names a point outside 0.." + std::to_string(rows - 1));
      for (int64_t e = begin; e < end; ++e) {
        Item *const item = items_.data() + next[buckets[e]]++;
        __builtin_prefetch(item + kAhead, 1);  // or the store would wait for memory
        *item = {weights[e], {edges[2 * e], edges[2 * e + 1]}};
      }
    });
  }
  // No edge of the bucket, nor of those after it, weighs less.
  float least(int64_t bucket) const {
    return bucket ? value_of((first_ + static_cast<uint32_t>(bucket)) << kShift) : -std::numeric_limits<float>::infinity();
  }
  // take(a, b, weight) for the edges of a bucket, from root to root; those inside a component, or whose points wanted(a, b) does
  // not want, are left out.
  template <class Wanted, class Take>
  void each(int64_t bucket, Components &components, Wanted &&wanted, Take &&take) {
    Item *const first = items_.data() + starts_[bucket], *last = first;
    for (const Item *item = first, *end = items_.data() + starts_[bucket + 1]; item < end; ++item) {
      if (!wanted(item->edge.a, item->edge.b)) continue;
      const Edge ends{components.root(item->edge.a), components.root(item->edge.b)};
      *last = {item->weight, ends};
      last += ends.a != ends.b;
    }
    const auto take_one = [&](const Item &item) {
      const int32_t a = components.root(item.edge.a), b = components.root(item.edge.b);
      if (a != b) take(a, b, item.weight);
    };
    const int64_t count = last - first;
    if (bucket && count <= kMostRanked) {
      const uint32_t low = (first_ + static_cast<uint32_t>(bucket)) << kShift;
      int32_t keys[kMostRanked + kRankedTogether], ranks[kMostRanked + kRankedTogether], order[kMostRanked];
      for (int64_t i = 0; i < count; ++i) keys[i] = static_cast<int32_t>((ascending_key(first[i].weight) - low) * kMostRanked + i);
      find_ranks(keys, count, ranks);
      for (int64_t i = 0; i < count; ++i) {
        order[ranks[i]] = static_cast<int32_t>(i);
        components.prefetch(first[i].edge.a), components.prefetch(first[i].edge.b);
      }
      for (int64_t i = 0; i < count; ++i) take_one(first[order[i]]);
      return;
    }
    uint32_t low = std::numeric_limits<uint32_t>::max(), high = 0;
    for (const Item *item = first; item < last; ++item) {
      const uint32_t key = ascending_key(item->weight);
      low = std::min(low, key), high = std::max(high, key);
    }
    const int row_bits = bit_length(static_cast<uint64_t>(count));
    Buffer<PackedRow> order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = PackedRow::make(ascending_key(first[i].weight) - low, i, row_bits);
    if (count > 1) radix_sort(order, bit_length(high - low), row_bits);
    for (const PackedRow &at : order) take_one(first[at.row(row_bits)]);
  }

 private:
  static constexpr int64_t kAhead = 8;
  static constexpr int kShift = 18;  // 32 buckets for each power of two; less than 2^-31 of the largest shares the first
  static constexpr int64_t kMostRanked = 256;  // beside the last bits of a key, a place has room in 31 bits
  static_assert((int64_t{1} << kShift) * kMostRanked <= int64_t{1} << 31);
  struct Item {
    float weight;
    Edge edge;
  };
  Buffer<Item> items_;
  Buffer<int64_t> starts_;
  uint32_t first_;
};

void merge(Array<const int32_t, 2> edges, Array<const float, 1> weights, double k, int64_t min_size, Array<int64_t, 1> labels,
           std::optional<Array<const int32_t, 1>> place) {
  const int64_t rows = labels.shape(0), count = edges.shape(0);
  if (edges.shape(1) != 2) throw std::invalid_argument("edges must be (M, 2)");
  if (static_cast<int64_t>(weights.shape(0)) != count) throw std::invalid_argument("edges and weights do not fit each other");
  if (place && static_cast<int64_t>(place->shape(0)) != rows) throw std::invalid_argument("places and labels do not fit each other");
  if (place && rows && !inside(place->data(), rows, rows)) throw std::invalid_argument("a place is outside 0.." + std::to_string(rows - 1));
  if (rows > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("a graph must have less than 2^31 points");
  if (count > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("a graph must have less than 2^32 edges");
  nb::gil_scoped_release release;
  EdgeQueue queue(edges.data(), weights.data(), count, rows);
  Components components(rows, k);
  std::vector<Edge> apart;  // edges that were not joined and may be for their size, in their order
  const auto small = [&](int32_t a, int32_t b) { return components[a].size < min_size || components[b].size < min_size; };
  const auto join_small = [&](int32_t a, int32_t b) {
    if (small(a, b)) components.join(a, b);
  };
  const auto all = [](int32_t, int32_t) { return true; };
  double highest = k;  // of all thresholds so far
  int64_t bucket = 0;
  for (; bucket < EdgeQueue::kBuckets && !(queue.least(bucket) > highest); ++bucket) {
    queue.each(bucket, components, all, [&](int32_t a, int32_t b, double weight) {
      if (weight > components[a].threshold || weight > components[b].threshold) {
        if (small(a, b)) apart.push_back({a, b});
        return;
      }
      Components::Part &part = components[components.join(a, b)];
      part.threshold = weight + k / part.size;
      highest = std::max(highest, part.threshold);
    });
  }
  for (const Edge &pair : apart) {
    const int32_t a = components.root(pair.a), b = components.root(pair.b);
    if (a != b) join_small(a, b);
  }
  Buffer<uint8_t> in_small(rows);  // others are in a large component for good
  for (int64_t i = 0; i < rows; ++i) in_small[i] = components[components.root(static_cast<int32_t>(i))].size < min_size;
  const auto joinable = [&](int32_t a, int32_t b) { return in_small[a] | in_small[b]; };
  for (; bucket < EdgeQueue::kBuckets; ++bucket)  // too heavy for every threshold
    queue.each(bucket, components, joinable, [&](int32_t a, int32_t b, double) { join_small(a, b); });
  std::vector<int32_t> number(rows, -1);
  int32_t next = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int32_t &label = number[components.root(place ? place->data()[i] : static_cast<int32_t>(i))];
    if (label < 0) label = next++;
    labels.data()[i] = label;
  }
}

}  // namespace

void register_graph(nb::module_ &m) {
  m.def("graph_sorted_rows", &sorted_rows, nb::arg("coord"), nb::arg("offsets"), nb::arg("order"), nb::arg("place"),
        nb::arg("sorted"), "Rows of each cloud along its z curve; the inverse of this order, and the points in it.");
  m.def("graph_merge", &merge, nb::arg("edges"), nb::arg("weights"), nb::arg("k"), nb::arg("min_size"), nb::arg("labels"),
        nb::arg("place") = nb::none(), "Felzenszwalb-Huttenlocher merge; labels of places (default: all), numbered by first occurrence.");
}

}  // namespace pc3d
