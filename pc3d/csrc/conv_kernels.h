// The inner products of sparse convolution, compiled once per instruction set and picked at run time.
#pragma once

#include <stdint.h>

namespace pc3d {

// Rows of the finest destination group: a plan can start a tile at any multiple of it.
constexpr int64_t kGranule = 128;

// Features in memory: float32 or bfloat16; sums are always float32.
struct Features {
  const void *data;
  bool bf16;
};

// y[scatter[p]] += x[gather[p]] W_k over the pairs p of every kernel offset k, then y <- y * scale + shift + residual and
// ReLU, as far as asked for. `starts` holds, for each offset, the first pair of every granule of destination rows:
// (offsets, granules + 1). x, y and the residual have the same type.
struct ConvProduct {
  Features x;            // (source rows, cin)
  void *y;               // (rows, cout)
  const float *weights;  // packed per offset: strips of `strip` columns, (strips, cin in pairs, strip), zero-padded
  const float *bias;     // (cout) or null
  const float *scale;    // (cout) or null, and with it
  const float *shift;    // (cout)
  const void *residual;  // (rows, cout) or null
  bool relu;
  const int32_t *gather;
  const int32_t *scatter;
  const int64_t *starts;
  int64_t kernel_volume, granules, rows, cin, cout;
};

// dW_k = sum over the pairs p of offset k of x[gather[p]]^T g[scatter[p]], for all offsets.
struct WeightGrad {
  Features x;  // (sources, cin)
  Features g;  // (rows, cout)
  const int32_t *gather;
  const int32_t *scatter;
  const int64_t *starts;  // as in ConvProduct
  int64_t granules, cin, cout;
  float *out;  // (offsets, cin, cout)
};

struct ConvKernels {
  const char *name;
  int64_t strip;      // columns of one packed weight strip
  int64_t pair;       // input channels of a packed weight: 1, or 2 of kernels that take bfloat16 features only
  int64_t step;       // input channels of a packed weight are filled up to a multiple of it, with zeros
  int64_t cin_block;  // input channels of one weight-gradient task
  // Packs columns [s * strip, (s + 1) * strip) of the (cin, cout) matrix with element (i, j) at w[i * row + j * column].
  void (*pack)(const float *w, int64_t row, int64_t column, int64_t cin, int64_t cout, int64_t s, float *packed);
  // All offsets of the destination granules [first, last) and the column strips [strip_first, strip_last). Where y is
  // bfloat16, `sums` has room for them in float32.
  void (*tile)(const ConvProduct &product, int64_t first, int64_t last, int64_t strip_first, int64_t strip_last, float *sums);
  // The rows [first, last), at most cin_block of them, of the weight gradients of the offsets [kernel_first, kernel_last).
  void (*weight_grad)(const WeightGrad &product, int64_t kernel_first, int64_t kernel_last, int64_t first, int64_t last);
};

// Null where the compiler was not given the instruction set. The caller checks that the CPU has it.
const ConvKernels *conv_kernels_amx();
const ConvKernels *conv_kernels_avx512bf16();
const ConvKernels *conv_kernels_avx512();
const ConvKernels *conv_kernels_avx2();
const ConvKernels *conv_kernels_generic();

}  // namespace pc3d
