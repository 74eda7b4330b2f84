// For every CPU.
#define PC3D_ISA attention_generic
#define PC3D_WIDTH 4
#include "attention_kernels.h"

#include "attention_kernels_impl.h"

const pc3d::AttentionKernels *pc3d::attention_kernels_generic() {
  using namespace attention_generic;
  static const AttentionKernels kernels{"generic", &forward, &backward, &space};
  return &kernels;
}
