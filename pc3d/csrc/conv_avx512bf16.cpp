// Compiled with AVX-512 flags and AVX512-BF16 (see CMakeLists.txt); 24 accumulators of 32 registers.
#define PC3D_ISA conv_avx512bf16
#define PC3D_WIDTH 16
#define PC3D_ROWS 12
#define PC3D_BF16
#include "conv_kernels.h"

#if defined(__AVX512BF16__) || defined(PC3D_EMULATE_AVX512)
#include "conv_kernels_impl.h"

const pc3d::ConvKernels *pc3d::conv_kernels_avx512bf16() {
  using namespace conv_avx512bf16;
  static const ConvKernels kernels{"avx512bf16", kStrip, kPair, kStep, kGradRows, &pack, &tile, &weight_grad};
  return &kernels;
}
#else
const pc3d::ConvKernels *pc3d::conv_kernels_avx512bf16() { return nullptr; }
#endif
