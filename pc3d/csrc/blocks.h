#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "array.h"

namespace pc3d {

constexpr int64_t kBlock = 1 << 14;  // rows of one task

struct Rows {
  int64_t cloud, begin, end;
};

// The clouds cut into blocks of rows.
inline std::vector<Rows> make_blocks(const Array<const int64_t, 1> &offsets, int64_t rows) {
  const int64_t *border = offsets.data();
  const int64_t clouds = static_cast<int64_t>(offsets.shape(0)) - 1;
  if (clouds < 0 || border[0] != 0 || border[clouds] != rows || !std::is_sorted(border, border + clouds + 1))
    throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
  std::vector<Rows> blocks;
  for (int64_t cloud = 0; cloud < clouds; ++cloud)
    for (int64_t begin = border[cloud]; begin < border[cloud + 1]; begin += kBlock)
      blocks.push_back({cloud, begin, std::min(begin + kBlock, border[cloud + 1])});
  return blocks;
}

}  // namespace pc3d
