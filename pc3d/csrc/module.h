#pragma once
#include <nanobind/nanobind.h>

namespace pc3d {
void register_attention(nanobind::module_ &m);
void register_boxes(nanobind::module_ &m);
void register_conv(nanobind::module_ &m);
void register_depthwise(nanobind::module_ &m);
void register_graph(nanobind::module_ &m);
void register_kernel_map(nanobind::module_ &m);
void register_linear_attention(nanobind::module_ &m);
void register_scan(nanobind::module_ &m);
void register_segment(nanobind::module_ &m);
void register_neighbours(nanobind::module_ &m);
void register_lzf(nanobind::module_ &m);
void register_order(nanobind::module_ &m);
void register_serialize(nanobind::module_ &m);
void register_threads(nanobind::module_ &m);
void register_voxel_query(nanobind::module_ &m);
void register_voxelize(nanobind::module_ &m);
}  // namespace pc3d
