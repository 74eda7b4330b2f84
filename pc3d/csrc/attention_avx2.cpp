// Compiled with AVX2 flags (see CMakeLists.txt).
#define PC3D_ISA attention_avx2
#define PC3D_WIDTH 8
#include "attention_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "attention_kernels_impl.h"

const pc3d::AttentionKernels *pc3d::attention_kernels_avx2() {
  using namespace attention_avx2;
  static const AttentionKernels kernels{"avx2", &forward, &backward, &space};
  return &kernels;
}
#else
const pc3d::AttentionKernels *pc3d::attention_kernels_avx2() { return nullptr; }
#endif
