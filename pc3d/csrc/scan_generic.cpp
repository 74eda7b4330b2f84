// For every CPU.
#define PC3D_ISA scan_generic
#define PC3D_WIDTH 4
#include "scan_kernels.h"

#include "scan_kernels_impl.h"

const pc3d::ScanKernels *pc3d::scan_kernels_generic() {
  using namespace scan_generic;
  static const ScanKernels kernels{"generic", kWidth, &forward, &backward, &backward_space, &conv_forward, &conv_backward};
  return &kernels;
}
