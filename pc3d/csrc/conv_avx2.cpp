// Compiled with AVX2 and FMA flags (see CMakeLists.txt); 12 accumulators of 16 registers.
#define PC3D_ISA conv_avx2
#define PC3D_WIDTH 8
#define PC3D_ROWS 6
#include "conv_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "conv_kernels_impl.h"

const pc3d::ConvKernels *pc3d::conv_kernels_avx2() {
  using namespace conv_avx2;
  static const ConvKernels kernels{"avx2", kStrip, kPair, kStep, kGradRows, &pack, &tile, &weight_grad};
  return &kernels;
}
#else
const pc3d::ConvKernels *pc3d::conv_kernels_avx2() { return nullptr; }
#endif
