// Compiled with AVX512 flags (see CMakeLists.txt).
#define PC3D_ISA neighbours_avx512
#define PC3D_WIDTH 16
#include "neighbours_kernels.h"

#if defined(__AVX512F__) || defined(PC3D_EMULATE_AVX512)
#include "neighbours_kernels_impl.h"

const pc3d::NeighbourKernels *pc3d::neighbour_kernels_avx512() {
  using namespace neighbours_avx512;
  static const NeighbourKernels kernels{"avx512", &nearest, &farthest, &normals, &edge_weights, &one_way, &pairs, &put_distinct};
  return &kernels;
}
#else
const pc3d::NeighbourKernels *pc3d::neighbour_kernels_avx512() { return nullptr; }
#endif
