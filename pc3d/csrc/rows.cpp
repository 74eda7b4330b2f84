// Checks of row numbers.
#include "rows.h"

#include "isa.h"

namespace pc3d {

PC3D_CLONES bool inside(const int32_t *numbers, int64_t count, int64_t rows) {
  uint32_t largest = 0;  // negative ones are larger than any other
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t number = static_cast<uint32_t>(numbers[i]);
    largest = number > largest ? number : largest;
  }
  return count == 0 || static_cast<int64_t>(largest) < (rows < INT32_MAX ? rows : INT32_MAX);
}

PC3D_CLONES bool inside_or_negative(const int32_t *numbers, int64_t count, int64_t rows) {
  int32_t largest = -1;
  for (int64_t i = 0; i < count; ++i) largest = numbers[i] > largest ? numbers[i] : largest;
  return largest < rows;
}

}  // namespace pc3d
