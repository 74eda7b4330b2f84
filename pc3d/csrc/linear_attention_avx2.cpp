// Compiled with AVX2 flags (see CMakeLists.txt).
#define PC3D_ISA linear_attention_avx2
#define PC3D_WIDTH 8
#include "linear_attention_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "linear_attention_kernels_impl.h"

const pc3d::LinearAttentionKernels *pc3d::linear_attention_kernels_avx2() {
  using namespace linear_attention_avx2;
  static const LinearAttentionKernels kernels{"avx2", &state_size, &space, &sum, &forward, &query_grad, &key_grad};
  return &kernels;
}
#else
const pc3d::LinearAttentionKernels *pc3d::linear_attention_kernels_avx2() { return nullptr; }
#endif
