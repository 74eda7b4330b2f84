// Compiled with AVX512 flags (see CMakeLists.txt).
#define PC3D_ISA scan_avx512
#define PC3D_WIDTH 16
#include "scan_kernels.h"

#if defined(__AVX512F__) || defined(PC3D_EMULATE_AVX512)
#include "scan_kernels_impl.h"

const pc3d::ScanKernels *pc3d::scan_kernels_avx512() {
  using namespace scan_avx512;
  static const ScanKernels kernels{"avx512", kWidth, &forward, &backward, &backward_space, &conv_forward, &conv_backward};
  return &kernels;
}
#else
const pc3d::ScanKernels *pc3d::scan_kernels_avx512() { return nullptr; }
#endif
