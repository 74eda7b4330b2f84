// Checks of row numbers.
#include "rows.h"

#include "isa.h"

namespace pc3d {
namespace {

uint32_t last_of(int64_t rows) { return static_cast<uint32_t>(rows < INT32_MAX ? rows : INT32_MAX) - 1; }

}  // namespace

PC3D_CLONES bool inside(const int32_t *numbers, int64_t count, int64_t rows) {
  const uint32_t last = last_of(rows);
  uint32_t signs = 0;  // of each number, and of its distance to the last
  for (int64_t i = 0; i < count; ++i) signs |= static_cast<uint32_t>(numbers[i]) | (last - static_cast<uint32_t>(numbers[i]));
  return !(signs >> 31);
}

PC3D_CLONES bool inside_or_negative(const int32_t *numbers, int64_t count, int64_t rows) {
  const int32_t last = static_cast<int32_t>(last_of(rows));
  bool found = true;
  for (int64_t i = 0; i < count; ++i) found &= numbers[i] <= last;
  return found;
}

}  // namespace pc3d
