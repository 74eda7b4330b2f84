// For every CPU.
#define PC3D_ISA neighbours_generic
#define PC3D_WIDTH 4
#include "neighbours_kernels.h"

#include "neighbours_kernels_impl.h"

const pc3d::NeighbourKernels *pc3d::neighbour_kernels_generic() {
  using namespace neighbours_generic;
  static const NeighbourKernels kernels{"generic", &nearest, &farthest, &normals, &edge_weights, &one_way, &pairs, &put_distinct};
  return &kernels;
}
