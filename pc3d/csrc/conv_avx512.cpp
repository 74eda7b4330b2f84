// Compiled with AVX-512 flags (see CMakeLists.txt); 24 accumulators of 32 registers.
#define PC3D_ISA conv_avx512
#define PC3D_WIDTH 16
#define PC3D_ROWS 12
#include "conv_kernels.h"

#if defined(__AVX512F__) || defined(PC3D_EMULATE_AVX512)
#include "conv_kernels_impl.h"

const pc3d::ConvKernels *pc3d::conv_kernels_avx512() {
  using namespace conv_avx512;
  static const ConvKernels kernels{"avx512", kStrip, kPair, kStep, kGradRows, &pack, &tile, &weight_grad};
  return &kernels;
}
#else
const pc3d::ConvKernels *pc3d::conv_kernels_avx512() { return nullptr; }
#endif
