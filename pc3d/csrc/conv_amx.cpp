// Compiled with AVX-512 flags and AMX (see CMakeLists.txt); sums of 32 rows and 32 columns in four tiles.
#define PC3D_ISA conv_amx
#define PC3D_WIDTH 16
#define PC3D_ROWS 32
#define PC3D_BF16
#define PC3D_AMX
#include "conv_kernels.h"

#if defined(__AMX_BF16__)
#include "conv_kernels_impl.h"

const pc3d::ConvKernels *pc3d::conv_kernels_amx() {
  using namespace conv_amx;
  static const ConvKernels kernels{"amx", kStrip, kPair, kStep, kGradRows, &pack, &tile, &weight_grad};
  return &kernels;
}
#else
const pc3d::ConvKernels *pc3d::conv_kernels_amx() { return nullptr; }
#endif
