// Compiled with AVX512 flags (see CMakeLists.txt).
#define PC3D_ISA linear_attention_avx512
#define PC3D_WIDTH 16
#include "linear_attention_kernels.h"

#if defined(__AVX512F__) || defined(PC3D_EMULATE_AVX512)
#include "linear_attention_kernels_impl.h"

const pc3d::LinearAttentionKernels *pc3d::linear_attention_kernels_avx512() {
  using namespace linear_attention_avx512;
  static const LinearAttentionKernels kernels{"avx512", &state_size, &space, &sum, &forward, &query_grad, &key_grad};
  return &kernels;
}
#else
const pc3d::LinearAttentionKernels *pc3d::linear_attention_kernels_avx512() { return nullptr; }
#endif
