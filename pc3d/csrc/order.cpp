// The SOAR order of voxels, and the cache misses an order causes.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "array.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

using Rows = Array<const int32_t, 1>;
using Borders = Array<const int64_t, 1>;

constexpr int64_t kBlock = 4096;  // outputs whose neighbour lists are written together, to stay in the cache

// The inputs of every output, by ascending kernel offset: inputs[starts[v]:starts[v + 1]].
struct Lists {
  Buffer<int64_t> starts;
  Buffer<int32_t> inputs;
};

// `omitted`: a kernel offset to leave out, or -1.
Lists lists_by_output(const Rows &in_rows, const Rows &out_rows, const Borders &offsets, int64_t outputs, int64_t omitted) {
  const int64_t volume = static_cast<int64_t>(offsets.shape(0)) - 1;
  Lists lists{Buffer<int64_t>(outputs + 1), Buffer<int32_t>(static_cast<int64_t>(in_rows.shape(0)))};
  std::vector<int64_t> cursor(offsets.data(), offsets.data() + volume), end(volume), next(kBlock);
  int64_t total = 0;
  for (int64_t begin = 0; begin < outputs; begin += kBlock) {
    const int64_t stop = std::min(begin + kBlock, outputs);
    std::fill(next.begin(), next.end(), 0);
    for (int64_t k = 0; k < volume; ++k) {
      end[k] = cursor[k];
      while (end[k] < offsets.data()[k + 1] && out_rows.data()[end[k]] < stop) {
        next[out_rows.data()[end[k]] - begin] += k != omitted;
        ++end[k];
      }
    }
    for (int64_t v = begin; v < stop; ++v) {
      lists.starts[v] = total;
      total += std::exchange(next[v - begin], total);
    }
    for (int64_t k = 0; k < volume; ++k) {
      if (k != omitted)
        for (int64_t p = cursor[k]; p < end[k]; ++p) lists.inputs[next[out_rows.data()[p] - begin]++] = in_rows.data()[p];
      cursor[k] = end[k];
    }
  }
  lists.starts[outputs] = total;
  return lists;
}

void check_pairs(const Rows &in_rows, const Rows &out_rows, const Borders &offsets, int64_t inputs, int64_t outputs) {
  const int64_t pairs = static_cast<int64_t>(in_rows.shape(0)), volume = static_cast<int64_t>(offsets.shape(0)) - 1;
  const auto rows_within = [](const Rows &rows, int64_t count) {
    return std::all_of(rows.data(), rows.data() + rows.shape(0), [&](int32_t row) { return row >= 0 && row < count; });
  };
  if (static_cast<int64_t>(out_rows.shape(0)) != pairs || !rows_within(in_rows, inputs) || !rows_within(out_rows, outputs))
    throw std::invalid_argument("kernel map: rows out of range");
  if (volume < 0 || offsets.data()[0] != 0 || offsets.data()[volume] != pairs ||
      !std::is_sorted(offsets.data(), offsets.data() + volume + 1))
    throw std::invalid_argument("kernel map: bad offsets");
  for (int64_t k = 0; k < volume; ++k)
    if (!std::is_sorted(out_rows.data() + offsets.data()[k], out_rows.data() + offsets.data()[k + 1]))
      throw std::invalid_argument("kernel map: out_rows must ascend");
}

// The neighbours that lie in the voxel's own group; `order[borders[g]:borders[g + 1]]` is group g.
void cut(Lists &graph, const std::vector<int32_t> &order, const std::vector<int64_t> &borders) {
  std::vector<int32_t> group(order.size());
  for (size_t g = 0; g + 1 < borders.size(); ++g)
    for (int64_t i = borders[g]; i < borders[g + 1]; ++i) group[order[i]] = static_cast<int32_t>(g);
  int64_t kept = 0;
  for (size_t v = 0; v < order.size(); ++v) {
    const int64_t begin = std::exchange(graph.starts[v], kept);
    for (int64_t i = begin; i < graph.starts[v + 1]; ++i) {
      const int32_t neighbour = graph.inputs[i];
      graph.inputs[kept] = neighbour;
      kept += group[neighbour] == group[v];
    }
  }
  graph.starts[order.size()] = kept;
}

// What the growth of chunks knows of each voxel. Groups share no voxel, so they may grow side by side.
struct Growth {
  static constexpr int32_t kPlaced = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> mark;     // number of the last chunk whose queue it entered, or kPlaced
  std::vector<int32_t> open;     // neighbours not placed yet
  std::vector<uint8_t> waiting;  // was on the rim of a chunk once

  explicit Growth(const Lists &graph) : mark(graph.starts.size() - 1), open(mark.size()), waiting(mark.size()) {
    for (size_t v = 0; v < mark.size(); ++v) open[v] = static_cast<int32_t>(graph.starts[v + 1] - graph.starts[v]);
  }
};

// SOAR of one group: chunks grown breadth first, each from the rim of the one before, else from the oldest rim that was left
// behind, else from the next of `starts`. The first chunk has `first` voxels, the others `chunk`, the last what remains.
void grow(const Lists &graph, Growth &growth, const int32_t *starts, int64_t count, int64_t first, int64_t chunk,
          int32_t *order) {
  std::vector<int32_t> queue, rim, left_behind;
  size_t oldest = 0;
  int64_t fresh = 0, placed = 0;
  const auto is_placed = [&](int32_t v) { return growth.mark[v] == Growth::kPlaced; };
  const auto next_start = [&] {
    int32_t best = -1;
    for (int32_t v : rim)
      if (!is_placed(v) && (best < 0 || growth.open[v] < growth.open[best])) best = v;
    if (best >= 0) return best;
    rim.clear();
    while (oldest < left_behind.size() && is_placed(left_behind[oldest])) ++oldest;
    if (oldest < left_behind.size()) return left_behind[oldest];
    while (is_placed(starts[fresh])) ++fresh;
    return starts[fresh];
  };
  for (int32_t number = 1; placed < count; ++number) {
    const int64_t end = std::min(count, placed == 0 ? first : placed + chunk);
    size_t head = 0;
    queue.clear();
    while (placed < end) {
      if (head == queue.size()) queue.push_back(next_start());
      const int32_t v = queue[head++];
      order[placed++] = v;
      growth.mark[v] = Growth::kPlaced;
      for (int64_t i = graph.starts[v]; i < graph.starts[v + 1]; ++i) {
        const int32_t w = graph.inputs[i];
        --growth.open[w];
        if (growth.mark[w] >= number) continue;
        growth.mark[w] = number;
        queue.push_back(w);
      }
    }
    rim.assign(queue.begin() + static_cast<int64_t>(head), queue.end());
    for (int32_t v : rim)
      if (!std::exchange(growth.waiting[v], 1)) left_behind.push_back(v);
  }
}

// Each group stably sorted by the number of neighbours.
std::vector<int32_t> fewest_neighbours_first(const Lists &graph, const std::vector<int32_t> &rows,
                                             const std::vector<int64_t> &borders, int64_t volume) {
  std::vector<int32_t> sorted(rows.size());
  std::vector<int64_t> next(volume + 1);
  const auto degree = [&](int32_t v) { return graph.starts[v + 1] - graph.starts[v]; };
  for (size_t g = 0; g + 1 < borders.size(); ++g) {
    std::fill(next.begin(), next.end(), 0);
    for (int64_t i = borders[g]; i < borders[g + 1]; ++i) ++next[degree(rows[i])];
    int64_t total = borders[g];
    for (int64_t &start : next) total += std::exchange(start, total);
    for (int64_t i = borders[g]; i < borders[g + 1]; ++i) sorted[next[degree(rows[i])]++] = rows[i];
  }
  return sorted;
}

std::vector<int64_t> borders_of(const Borders &borders, int64_t count) {
  std::vector<int64_t> values(borders.data(), borders.data() + borders.shape(0));
  if (values.empty() || values.front() != 0 || values.back() != count || !std::is_sorted(values.begin(), values.end()))
    throw std::invalid_argument("borders must ascend from 0 to the number of rows");
  return values;
}

std::vector<int32_t> permutation_of(const Borders &rows) {
  const int64_t count = static_cast<int64_t>(rows.shape(0));
  std::vector<int32_t> values(count);
  std::vector<uint8_t> seen(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows.data()[i];
    if (row < 0 || row >= count || std::exchange(seen[row], 1)) throw std::invalid_argument("rows must be a permutation");
    values[i] = static_cast<int32_t>(row);
  }
  return values;
}

// For each group border, the start of its cloud: chunks are counted from there.
std::vector<int64_t> cloud_starts(const std::vector<int64_t> &groups, const std::vector<int64_t> &clouds) {
  std::vector<int64_t> starts(groups.size());
  for (size_t g = 0; g < groups.size(); ++g)
    starts[g] = *(std::upper_bound(clouds.begin(), clouds.end(), groups[g]) - 1);
  return starts;
}

// The groups divided where a chunk ends.
std::vector<int64_t> split(const std::vector<int64_t> &groups, const std::vector<int64_t> &clouds, int64_t chunk) {
  const std::vector<int64_t> origin = cloud_starts(groups, clouds);
  std::vector<int64_t> pieces;
  for (size_t g = 0; g + 1 < groups.size(); ++g)
    for (int64_t begin = groups[g]; begin < groups[g + 1]; begin += chunk - (begin - origin[g]) % chunk)
      pieces.push_back(begin);
  pieces.push_back(groups.back());
  return pieces;
}

nb::object soar_order(Rows in_rows, Rows out_rows, Borders offsets, Borders rows, Borders clouds, Borders groups,
                      const std::vector<int64_t> &chunks, bool fewest_first) {
  const int64_t count = static_cast<int64_t>(rows.shape(0)), volume = static_cast<int64_t>(offsets.shape(0)) - 1;
  check_pairs(in_rows, out_rows, offsets, count, count);
  if (std::any_of(chunks.begin(), chunks.end(), [](int64_t chunk) { return chunk < 1; }))
    throw std::invalid_argument("chunks must be positive");
  std::vector<int32_t> order = permutation_of(rows);
  const std::vector<int64_t> cloud_borders = borders_of(clouds, count);
  std::vector<int64_t> borders = borders_of(groups, count);
  Buffer<int64_t> result(count);
  {
    nb::gil_scoped_release release;
    Lists graph = lists_by_output(in_rows, out_rows, offsets, count, volume / 2);
    if (borders != cloud_borders) cut(graph, order, borders);
    if (fewest_first) order = fewest_neighbours_first(graph, order, borders, volume);
    std::vector<int32_t> grown(count);
    for (size_t level = 0; level < chunks.size(); ++level) {
      if (level > 0) {
        borders = split(borders, cloud_borders, chunks[level - 1]);
        cut(graph, order, borders);
      }
      Growth growth(graph);
      const std::vector<int64_t> origin = cloud_starts(borders, cloud_borders);
      parallel_tasks(static_cast<int64_t>(borders.size()) - 1, [&](int64_t g) {
        const int64_t begin = borders[g], first = chunks[level] - (begin - origin[g]) % chunks[level];
        grow(graph, growth, order.data() + begin, borders[g + 1] - begin, first, chunks[level], grown.data() + begin);
      });
      order.swap(grown);
    }
    std::copy(order.begin(), order.end(), result.begin());
  }
  return to_torch(std::move(result));
}

// Rows in the cache, a ring from the most to the least recently used.
class LeastRecentlyUsed {
 public:
  LeastRecentlyUsed(int64_t rows, int64_t capacity) : before_(rows + 1, kAbsent), after_(rows + 1), room_(capacity) {
    before_[rows] = after_[rows] = head_ = static_cast<int32_t>(rows);
  }
  // Whether the row had to be fetched.
  bool use(int32_t row) {
    const bool missed = before_[row] == kAbsent;
    if (!missed) {
      unlink(row);
    } else if (room_ > 0) {
      --room_;
    } else {
      const int32_t oldest = before_[head_];
      unlink(oldest);
      before_[oldest] = kAbsent;
    }
    after_[row] = after_[head_];
    before_[row] = head_;
    before_[after_[row]] = row;
    after_[head_] = row;
    return missed;
  }

 private:
  static constexpr int32_t kAbsent = -1;
  void unlink(int32_t row) {
    after_[before_[row]] = after_[row];
    before_[after_[row]] = before_[row];
  }
  std::vector<int32_t> before_, after_;
  int64_t room_;
  int32_t head_;
};

// Misses for each capacity (in rows), outputs in order and kernel offsets ascending.
std::vector<int64_t> lru_misses(Rows in_rows, Rows out_rows, Borders offsets, int64_t inputs, int64_t outputs,
                                const std::vector<int64_t> &capacities) {
  check_pairs(in_rows, out_rows, offsets, inputs, outputs);
  if (std::any_of(capacities.begin(), capacities.end(), [](int64_t capacity) { return capacity < 1; }))
    throw std::invalid_argument("capacities must be positive");
  nb::gil_scoped_release release;
  const Lists lists = lists_by_output(in_rows, out_rows, offsets, outputs, -1);
  std::vector<int64_t> misses(capacities.size(), 0);
  parallel_tasks(static_cast<int64_t>(capacities.size()), [&](int64_t c) {
    LeastRecentlyUsed cache(inputs, capacities[c]);
    for (int64_t p = 0; p < lists.inputs.size(); ++p) misses[c] += cache.use(lists.inputs[p]);
  });
  return misses;
}

}  // namespace

void register_order(nb::module_ &m) {
  m.def("soar_order", &soar_order, nb::arg("in_rows"), nb::arg("out_rows"), nb::arg("offsets"), nb::arg("rows"),
        nb::arg("clouds"), nb::arg("groups"), nb::arg("chunks"), nb::arg("fewest_first"),
        "Rows in SOAR order. `rows`: fresh starts, group after group; `clouds`, `groups`: their borders in `rows`.");
  m.def("lru_misses", &lru_misses, nb::arg("in_rows"), nb::arg("out_rows"), nb::arg("offsets"), nb::arg("num_in"),
        nb::arg("num_out"), nb::arg("capacities"), "Row fetches through a least-recently-used cache, per capacity.");
}

}  // namespace pc3d
