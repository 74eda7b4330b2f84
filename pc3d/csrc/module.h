#pragma once
#include <nanobind/nanobind.h>

namespace pc3d {
void register_threads(nanobind::module_ &m);
}  // namespace pc3d
