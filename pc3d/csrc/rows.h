#pragma once

#include <cstdint>

namespace pc3d {

// Whether all of `count` numbers are in 0..rows - 1; or are that or negative.
bool inside(const int32_t *numbers, int64_t count, int64_t rows);
bool inside_or_negative(const int32_t *numbers, int64_t count, int64_t rows);

}  // namespace pc3d
