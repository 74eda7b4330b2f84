// Compiled with AVX2 flags (see CMakeLists.txt).
#define PC3D_ISA scan_avx2
#define PC3D_WIDTH 8
#include "scan_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "scan_kernels_impl.h"

const pc3d::ScanKernels *pc3d::scan_kernels_avx2() {
  using namespace scan_avx2;
  static const ScanKernels kernels{"avx2", kWidth, &forward, &backward, &backward_space, &conv_forward, &conv_backward};
  return &kernels;
}
#else
const pc3d::ScanKernels *pc3d::scan_kernels_avx2() { return nullptr; }
#endif
