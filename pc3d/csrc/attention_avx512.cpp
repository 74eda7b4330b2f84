// Compiled with AVX512 flags (see CMakeLists.txt).
#define PC3D_ISA attention_avx512
#define PC3D_WIDTH 16
#include "attention_kernels.h"

#if defined(__AVX512F__) || defined(PC3D_EMULATE_AVX512)
#include "attention_kernels_impl.h"

const pc3d::AttentionKernels *pc3d::attention_kernels_avx512() {
  using namespace attention_avx512;
  static const AttentionKernels kernels{"avx512", &forward, &backward, &space};
  return &kernels;
}
#else
const pc3d::AttentionKernels *pc3d::attention_kernels_avx512() { return nullptr; }
#endif
