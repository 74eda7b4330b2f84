// For every CPU.
#define PC3D_ISA linear_attention_generic
#define PC3D_WIDTH 4
#include "linear_attention_kernels.h"

#include "linear_attention_kernels_impl.h"

const pc3d::LinearAttentionKernels *pc3d::linear_attention_kernels_generic() {
  using namespace linear_attention_generic;
  static const LinearAttentionKernels kernels{"generic", &state_size, &space, &sum, &forward, &query_grad, &key_grad};
  return &kernels;
}
