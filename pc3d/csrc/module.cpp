// The Python module of the CPU kernels. Each kernel family registers its functions in its own file.
#include <nanobind/nanobind.h>

#include "module.h"

NB_MODULE(_C, m) {
  m.doc() = "pc3d CPU kernels (C++17, no libtorch): arrays cross as DLPack tensors";
  pc3d::register_attention(m);
  pc3d::register_boxes(m);
  pc3d::register_conv(m);
  pc3d::register_depthwise(m);
  pc3d::register_graph(m);
  pc3d::register_kernel_map(m);
  pc3d::register_linear_attention(m);
  pc3d::register_segment(m);
  pc3d::register_lzf(m);
  pc3d::register_neighbours(m);
  pc3d::register_order(m);
  pc3d::register_scan(m);
  pc3d::register_serialize(m);
  pc3d::register_threads(m);
  pc3d::register_voxel_query(m);
  pc3d::register_voxelize(m);
}
