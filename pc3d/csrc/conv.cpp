// Sparse convolution on the CPU: plans, the parallel loops around the micro-kernels, and the Python functions.
//
// Output rows are cut into tiles; one thread owns a tile (or some columns of it) and adds the products of every kernel
// offset to it in ascending order. The weight gradient has one owner per kernel offset and block of input channels, which
// adds the pairs in their order. No sum depends on the number of threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <bitset>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_kernels.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int Dimensions>
using StridedArray = nb::ndarray<T, nb::ndim<Dimensions>, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;         // float32 or bfloat16
using Result = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Channels = std::optional<Array<const float, 1>>;

constexpr int64_t kTileGranules = 4;    // 512 rows of a tile, if the caller does not choose, and
constexpr int64_t kTileColumns = 128;   // columns: 256 KiB of output, half of a small second-level cache
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kLeastRows = 24;      // of a weight gradient in one task, unless that is all of them

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a column of packed weights.
int64_t packed_depth(const ConvKernels &kernels, int64_t cin) { return ceil_div(cin, kernels.step) * (kernels.step / kernels.pair); }

const std::vector<const ConvKernels *> &usable(bool bf16) {
  static const auto kernels = usable_kernels(conv_kernels_avx512(), conv_kernels_avx2(), conv_kernels_generic());
  static const auto for_bf16 = [] {
    auto all = kernels;
    if (conv_kernels_avx512bf16() && has_avx512bf16()) all.insert(all.begin() + (fast_avx512bf16() ? 0 : 1), conv_kernels_avx512bf16());
    if (conv_kernels_amx() && has_amx()) all.insert(all.begin(), conv_kernels_amx());
    return all;
  }();
  return bf16 ? for_bf16 : kernels;
}

// Memory that one calling thread keeps between calls: fresh pages would cost as much as packing the weights.
float *workspace(int64_t floats) {
  struct Free {
    void operator()(float *p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float *>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
    size = floats;
  }
  return memory.get();
}

void require(bool condition, const char *message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class Any>
bool is_bf16(const Any &matrix) {
  const nb::dlpack::dtype type = matrix.dtype();
  const bool bf16 = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
  require(bf16 || type == nb::dtype<float>(), "features must be float32 or bfloat16");
  return bf16;
}

Features features(const Matrix &matrix) { return {matrix.data(), is_bf16(matrix)}; }

void check_offsets(const int64_t *offsets, int64_t kernel_volume, int64_t pairs) {
  bool valid = offsets[0] == 0 && offsets[kernel_volume] == pairs;
  for (int64_t k = 0; k < kernel_volume; ++k) valid = valid && offsets[k] <= offsets[k + 1];
  require(valid, "kernel map: offsets must ascend from 0 to the number of pairs");
}

// Counts the pairs of every (offset, granule of `scatter`) into `starts`, and tells whether the pairs are already grouped
// by granule. Throws when a row is out of range.
bool count_granules(const int32_t *gather, const int32_t *scatter, const int64_t *offsets, int64_t kernel_volume,
                    int64_t sources, int64_t rows, int64_t *starts) {
  const int64_t granules = ceil_div(rows, kGranule);
  std::atomic<bool> grouped{true}, valid{true};
  parallel_tasks(kernel_volume, [&](int64_t k) {
    int64_t *row = starts + k * (granules + 1);
    std::fill(row, row + granules + 1, 0);
    int64_t previous = 0;
    for (int64_t p = offsets[k]; p < offsets[k + 1]; ++p) {
      if (gather[p] < 0 || gather[p] >= sources || scatter[p] < 0 || scatter[p] >= rows) {
        valid = false;
        return;
      }
      const int64_t granule = scatter[p] / kGranule;
      if (granule < previous) grouped = false;
      previous = granule;
      ++row[granule];
    }
    int64_t start = offsets[k];
    for (int64_t granule = 0; granule <= granules; ++granule) {
      const int64_t count = row[granule];
      row[granule] = start;
      start += count;
    }
  });
  require(valid, "kernel map: a row number lies outside the voxels");
  return grouped;
}

// Stable: inside a granule pairs keep their order, which is ascending in the rows they gather.
void group_pairs(const int32_t *gather, const int32_t *scatter, const int64_t *offsets, int64_t kernel_volume,
                 int64_t granules, const int64_t *starts, int32_t *grouped_gather, int32_t *grouped_scatter) {
  parallel_tasks(kernel_volume, [&](int64_t k) {
    const int64_t *row = starts + k * (granules + 1);
    std::vector<int64_t> next(row, row + granules);
    for (int64_t p = offsets[k]; p < offsets[k + 1]; ++p) {
      const int64_t to = next[scatter[p] / kGranule]++;
      grouped_gather[to] = gather[p];
      grouped_scatter[to] = scatter[p];
    }
  });
}

// A register block adds to several rows at once, so a row may occur only once under an offset.
void check_unique(const int32_t *scatter, int64_t kernel_volume, int64_t granules, const int64_t *starts) {
  std::atomic<bool> unique{true};
  parallel_tasks(kernel_volume, [&](int64_t k) {
    const int64_t *row = starts + k * (granules + 1);
    for (int64_t granule = 0; granule < granules; ++granule) {
      std::bitset<kGranule> seen;
      for (int64_t p = row[granule]; p < row[granule + 1]; ++p) seen.set(scatter[p] % kGranule);
      if (static_cast<int64_t>(seen.count()) != row[granule + 1] - row[granule]) unique = false;
    }
  });
  require(unique, "kernel map: a row occurs twice under one kernel offset");
}

bool plan_starts(Array<const int32_t, 1> gather, Array<const int32_t, 1> scatter, Array<const int64_t, 1> offsets,
                 int64_t sources, int64_t rows, Array<int64_t, 2> starts) {
  require(gather.shape(0) == scatter.shape(0), "kernel map: in_rows and out_rows differ in length");
  require(offsets.shape(0) == starts.shape(0) + 1 && static_cast<int64_t>(starts.shape(1)) == ceil_div(rows, kGranule) + 1,
          "starts must be (K, granules + 1)");
  nb::gil_scoped_release release;
  const int64_t kernel_volume = starts.shape(0), granules = starts.shape(1) - 1;
  check_offsets(offsets.data(), kernel_volume, gather.shape(0));
  const bool grouped =
      count_granules(gather.data(), scatter.data(), offsets.data(), kernel_volume, sources, rows, starts.data());
  if (grouped) check_unique(scatter.data(), kernel_volume, granules, starts.data());
  return grouped;
}

void plan_pairs(Array<const int32_t, 1> gather, Array<const int32_t, 1> scatter, Array<const int64_t, 1> offsets,
                Array<const int64_t, 2> starts, Array<int32_t, 1> grouped_gather, Array<int32_t, 1> grouped_scatter) {
  require(grouped_gather.shape(0) == gather.shape(0) && grouped_scatter.shape(0) == gather.shape(0),
          "grouped rows must be as long as the pairs");
  nb::gil_scoped_release release;
  const int64_t kernel_volume = starts.shape(0), granules = starts.shape(1) - 1;
  group_pairs(gather.data(), scatter.data(), offsets.data(), kernel_volume, granules, starts.data(), grouped_gather.data(),
              grouped_scatter.data());
  check_unique(grouped_scatter.data(), kernel_volume, granules, starts.data());
}

void pack_weights(const ConvKernels &kernels, const StridedArray<const float, 3> &weight, const ConvProduct &p, float *packed) {
  const int64_t strips = ceil_div(p.cout, kernels.strip), size = packed_depth(kernels, p.cin) * kernels.strip;
  parallel_tasks(p.kernel_volume * strips, [&](int64_t i) {
    const int64_t k = i / strips;
    const int64_t *starts = p.starts + k * (p.granules + 1);
    if (starts[0] < starts[p.granules])
      kernels.pack(weight.data() + k * weight.stride(0), weight.stride(1), weight.stride(2), p.cin, p.cout, i % strips, packed + i * size);
  });
}

void run_tiles(const ConvKernels &kernels, const ConvProduct &p, int64_t tile) {
  const int64_t strips = ceil_div(p.cout, kernels.strip), wanted = num_threads() > 1 ? num_threads() * kTasksPerThread : 1;
  int64_t parts = ceil_div(p.cout, kTileColumns);
  while (tile > 1 && ceil_div(p.granules, tile) * parts < wanted) tile /= 2;
  const int64_t tiles = ceil_div(p.granules, tile);
  while (tiles * parts < wanted && parts * 2 <= strips) parts *= 2;
  const int64_t beside = p.x.bf16 ? tile * kGranule * ceil_div(strips, parts) * kernels.strip : 0;
  parallel_tasks(tiles * parts, [&](int64_t i) {
    const int64_t first = i / parts * tile, part = i % parts;
    thread_local std::vector<float> sums;  // the caller's workspace holds the packed weights
    if (static_cast<int64_t>(sums.size()) < beside) sums.resize(beside);
    kernels.tile(p, first, std::min(first + tile, p.granules), strips * part / parts, strips * (part + 1) / parts, sums.data());
  });
}

bool of_length(const Channels &values, int64_t length) { return !values || static_cast<int64_t>(values->shape(0)) == length; }
const float *pointer(const Channels &values) { return values ? values->data() : nullptr; }

void conv_forward(Matrix x, StridedArray<const float, 3> weight, Channels bias, Array<const int32_t, 1> gather,
                  Array<const int32_t, 1> scatter, Array<const int64_t, 2> starts, Result y, Channels scale, Channels shift,
                  std::optional<Matrix> residual, bool relu, const std::string &isa, int64_t tile_rows) {
  const ConvKernels &kernels = find_kernels(usable(is_bf16(x)), isa);
  ConvProduct p{};
  p.x = features(x), p.y = y.data(), p.bias = pointer(bias), p.scale = pointer(scale), p.shift = pointer(shift);
  p.residual = residual ? residual->data() : nullptr, p.relu = relu;
  p.gather = gather.data(), p.scatter = scatter.data(), p.starts = starts.data();
  p.kernel_volume = starts.shape(0), p.granules = starts.shape(1) - 1;
  p.rows = y.shape(0), p.cin = x.shape(1), p.cout = y.shape(1);
  require(static_cast<int64_t>(weight.shape(0)) == p.kernel_volume && static_cast<int64_t>(weight.shape(1)) == p.cin &&
              static_cast<int64_t>(weight.shape(2)) == p.cout && of_length(bias, p.cout),
          "weight or bias does not fit the features");
  require(is_bf16(y) == p.x.bf16, "features and result differ in type");
  require(scale.has_value() == shift.has_value() && of_length(scale, p.cout) && of_length(shift, p.cout), "scale and shift do not fit");
  require(!residual || (is_bf16(*residual) == p.x.bf16 && static_cast<int64_t>(residual->shape(0)) == p.rows &&
                        static_cast<int64_t>(residual->shape(1)) == p.cout),
          "the residual does not fit the result");
  require(p.granules == ceil_div(p.rows, kGranule) && gather.shape(0) == scatter.shape(0), "the plan is of another map");
  require(tile_rows >= 0, "tile_rows must not be negative");
  nb::gil_scoped_release release;
  if (p.rows == 0 || p.cout == 0) return;
  float *packed = workspace(p.kernel_volume * ceil_div(p.cout, kernels.strip) * kernels.strip * packed_depth(kernels, p.cin));
  pack_weights(kernels, weight, p, packed);
  p.weights = packed;
  run_tiles(kernels, p, tile_rows ? ceil_div(tile_rows, kGranule) : kTileGranules);
}

// Borders of runs of kernel offsets with about as many pairs each.
std::vector<int64_t> balanced_runs(const WeightGrad &p, int64_t kernel_volume, int64_t runs) {
  const auto pairs_before = [&](int64_t k) { return p.starts[k * (p.granules + 1)]; };
  const int64_t pairs = p.starts[kernel_volume * (p.granules + 1) - 1];
  std::vector<int64_t> borders{0};
  for (int64_t k = 1; k < kernel_volume; ++k)
    if (pairs_before(k) * runs >= pairs * static_cast<int64_t>(borders.size())) borders.push_back(k);
  borders.push_back(kernel_volume);
  return borders;
}

// Few tasks, of whole offsets where that is enough: the offsets of a task share the features in the cache.
void run_weight_grad(const ConvKernels &kernels, const WeightGrad &p, int64_t kernel_volume) {
  const int64_t wanted = num_threads() > 1 ? num_threads() * kTasksPerThread : 1;
  const std::vector<int64_t> borders = balanced_runs(p, kernel_volume, wanted);
  const int64_t runs = static_cast<int64_t>(borders.size()) - 1;
  const int64_t parts = std::max(ceil_div(p.cin, kernels.cin_block), std::min(ceil_div(wanted, runs), ceil_div(p.cin, kLeastRows)));
  parallel_tasks(runs * parts, [&](int64_t i) {
    const int64_t run = i / parts, part = i % parts;
    kernels.weight_grad(p, borders[run], borders[run + 1], p.cin * part / parts, p.cin * (part + 1) / parts);
  });
}

void conv_weight_grad(Matrix x, Matrix g, Array<const int32_t, 1> gather, Array<const int32_t, 1> scatter,
                      Array<const int64_t, 2> starts, Array<float, 3> out, const std::string &isa) {
  const Features left = features(x), right = features(g);
  const ConvKernels &kernels = find_kernels(usable(left.bf16 && right.bf16), isa);
  const int64_t kernel_volume = out.shape(0), cin = x.shape(1), cout = g.shape(1), granules = starts.shape(1) - 1;
  require(static_cast<int64_t>(starts.shape(0)) == kernel_volume && granules == ceil_div(g.shape(0), kGranule) &&
              gather.shape(0) == scatter.shape(0),
          "the plan is of another map");
  require(static_cast<int64_t>(out.shape(1)) == cin && static_cast<int64_t>(out.shape(2)) == cout, "the gradient does not fit the features");
  const WeightGrad p{left, right, gather.data(), scatter.data(), starts.data(), granules, cin, cout, out.data()};
  nb::gil_scoped_release release;
  if (granules == 0)
    std::fill(p.out, p.out + kernel_volume * p.cin * p.cout, 0.0f);
  else
    run_weight_grad(kernels, p, kernel_volume);
}

}  // namespace

void register_conv(nb::module_ &m) {
  m.attr("CONV_GRANULE") = kGranule;
  m.def("conv_isas", [](bool bf16) { return names_of(usable(bf16)); }, nb::arg("bf16") = false,
        "Instruction sets of the convolution kernels usable here, fastest first; `bf16`: for bfloat16 features.");
  m.def("conv_plan_starts", &plan_starts, nb::arg("gather"), nb::arg("scatter"), nb::arg("offsets"), nb::arg("sources"),
        nb::arg("rows"), nb::arg("starts"),
        "Fills `starts` (K, granules + 1) with the first pair of every granule of `scatter` rows and checks the map; False "
        "when the pairs still have to be grouped by conv_plan_pairs.");
  m.def("conv_plan_pairs", &plan_pairs, nb::arg("gather"), nb::arg("scatter"), nb::arg("offsets"), nb::arg("starts"),
        nb::arg("grouped_gather"), nb::arg("grouped_scatter"), "Groups the pairs of each offset by granule, stable.");
  m.def("conv_forward", &conv_forward, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("gather"),
        nb::arg("scatter"), nb::arg("starts"), nb::arg("y"), nb::arg("scale").none() = nb::none(),
        nb::arg("shift").none() = nb::none(), nb::arg("residual").none() = nb::none(), nb::arg("relu") = false,
        nb::arg("isa") = "", nb::arg("tile_rows") = 0,
        "y[scatter[p]] = relu((bias + sum of x[gather[p]] W_k) * scale + shift + residual) over a plan checked by "
        "conv_plan_starts; x, y and residual float32 or bfloat16, summed in float32.");
  m.def("conv_weight_grad", &conv_weight_grad, nb::arg("x"), nb::arg("g"), nb::arg("gather"), nb::arg("scatter"),
        nb::arg("starts"), nb::arg("out"), nb::arg("isa") = "",
        "out[k] = sum of x[gather[p]]^T g[scatter[p]] over the pairs of every offset of a plan; x and g float32 or bfloat16.");
}

}  // namespace pc3d
