// For any CPU: the compiler's baseline instruction set (SSE2 on x86-64, NEON on AArch64).
#define PC3D_ISA conv_generic
#define PC3D_WIDTH 4
#define PC3D_ROWS 6
#include "conv_kernels_impl.h"

const pc3d::ConvKernels *pc3d::conv_kernels_generic() {
  using namespace conv_generic;
  static const ConvKernels kernels{"generic", kStrip, kPair, kStep, kGradRows, &pack, &tile, &weight_grad};
  return &kernels;
}
