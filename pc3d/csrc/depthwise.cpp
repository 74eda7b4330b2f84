// Depth-wise sparse convolution on the CPU: every channel has a filter of its own.
//
// One task owns a group of output rows and adds the kernel offsets to it in ascending order; the weight gradient is summed in
// double over fixed chunks of pairs, added in order. No sum depends on the number of threads.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "array.h"
#include "conv_kernels.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kChunk = 4096;  // pairs of one partial weight gradient

void require(bool condition, const char *message) {
  if (!condition) throw std::invalid_argument(message);
}

// y[scatter[p]] += x[gather[p]] * w for the pairs [begin, end) of one kernel offset.
PC3D_CLONES void add_products(const float *x, const float *w, const int32_t *gather, const int32_t *scatter, int64_t begin,
                              int64_t end, int64_t channels, float *y) {
  for (int64_t p = begin; p < end; ++p) {
    const float *from = x + gather[p] * channels;
    float *__restrict to = y + scatter[p] * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] += from[c] * w[c];
  }
}

PC3D_CLONES void sum_products(const float *x, const float *g, const int32_t *in_rows, const int32_t *out_rows, int64_t begin,
                              int64_t end, int64_t channels, double *__restrict sums) {
  for (int64_t p = begin; p < end; ++p) {
    const float *left = x + in_rows[p] * channels, *right = g + out_rows[p] * channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(left[c]) * right[c];
  }
}

void forward(Array<const float, 2> x, Array<const float, 2> weight, Array<const int32_t, 1> gather,
             Array<const int32_t, 1> scatter, Array<const int64_t, 2> starts, Array<float, 2> y) {
  const int64_t kernel_volume = starts.shape(0), granules = starts.shape(1) - 1, rows = y.shape(0), channels = y.shape(1);
  require(static_cast<int64_t>(weight.shape(0)) == kernel_volume && static_cast<int64_t>(weight.shape(1)) == channels &&
              static_cast<int64_t>(x.shape(1)) == channels,
          "weight does not fit the features");
  require(granules == (rows + kGranule - 1) / kGranule && gather.shape(0) == scatter.shape(0), "the plan is of another map");
  nb::gil_scoped_release release;
  parallel_tasks(granules, [&](int64_t granule) {
    std::fill(y.data() + granule * kGranule * channels, y.data() + std::min((granule + 1) * kGranule, rows) * channels, 0.0f);
    for (int64_t k = 0; k < kernel_volume; ++k) {
      const int64_t *first = starts.data() + k * (granules + 1) + granule;
      add_products(x.data(), weight.data() + k * channels, gather.data(), scatter.data(), first[0], first[1], channels, y.data());
    }
  });
}

void weight_grad(Array<const float, 2> x, Array<const float, 2> g, Array<const int32_t, 1> in_rows,
                 Array<const int32_t, 1> out_rows, Array<const int64_t, 1> offsets, Array<float, 2> out) {
  const int64_t kernel_volume = out.shape(0), channels = out.shape(1);
  require(static_cast<int64_t>(offsets.shape(0)) == kernel_volume + 1 && static_cast<int64_t>(x.shape(1)) == channels &&
              static_cast<int64_t>(g.shape(1)) == channels && in_rows.shape(0) == out_rows.shape(0) &&
              offsets.data()[kernel_volume] == static_cast<int64_t>(in_rows.shape(0)),
          "the gradient does not fit the features");
  nb::gil_scoped_release release;
  struct Chunk {
    int64_t kernel, begin, end;
  };
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < kernel_volume; ++k)
    for (int64_t begin = offsets.data()[k]; begin < offsets.data()[k + 1]; begin += kChunk)
      chunks.push_back({k, begin, std::min(begin + kChunk, offsets.data()[k + 1])});
  std::vector<double> partial(chunks.size() * channels), total(kernel_volume * channels);
  parallel_tasks(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    sum_products(x.data(), g.data(), in_rows.data(), out_rows.data(), chunks[i].begin, chunks[i].end, channels, partial.data() + i * channels);
  });
  for (size_t i = 0; i < chunks.size(); ++i)
    for (int64_t c = 0; c < channels; ++c) total[chunks[i].kernel * channels + c] += partial[i * channels + c];
  std::copy(total.begin(), total.end(), out.data());
}

}  // namespace

void register_depthwise(nb::module_ &m) {
  m.def("depthwise_forward", &forward, nb::arg("x"), nb::arg("weight"), nb::arg("gather"), nb::arg("scatter"),
        nb::arg("starts"), nb::arg("y"), "y[scatter[p]] = sum of x[gather[p]] * w_k over a plan checked by conv_plan_starts.");
  m.def("depthwise_weight_grad", &weight_grad, nb::arg("x"), nb::arg("g"), nb::arg("in_rows"), nb::arg("out_rows"),
        nb::arg("offsets"), nb::arg("out"), "out[k] = sum of x[in_rows[p]] * g[out_rows[p]] over the pairs of every offset.");
}

}  // namespace pc3d
