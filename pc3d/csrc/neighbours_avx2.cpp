// Compiled with AVX2 flags (see CMakeLists.txt).
#define PC3D_ISA neighbours_avx2
#define PC3D_WIDTH 8
#include "neighbours_kernels.h"

#if defined(__AVX2__)
#include "neighbours_kernels_impl.h"

const pc3d::NeighbourKernels *pc3d::neighbour_kernels_avx2() {
  using namespace neighbours_avx2;
  static const NeighbourKernels kernels{"avx2", &nearest, &farthest, &normals, &edge_weights, &one_way, &pairs, &put_distinct};
  return &kernels;
}
#else
const pc3d::NeighbourKernels *pc3d::neighbour_kernels_avx2() { return nullptr; }
#endif
