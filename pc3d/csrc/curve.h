#pragma once

#include <cstdint>

#include "array.h"

namespace pc3d {

// Rows [0, rows) of a cloud, (rows, 3), along a z curve through its bounding box; points of one cell of the curve by x, y, z,
// equal points as given.
Buffer<int32_t> curve_order(const float *coord, int64_t rows);

}  // namespace pc3d
