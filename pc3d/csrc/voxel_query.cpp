// Voxels near places that are no voxels: the first few within a radius, as voxels lie along x, then y, then z.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "array.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kPlaces = 256;  // of one task

// `starts` are borders of the runs of voxels along x, for every y of every z of every cloud; `x` and `order` say for a voxel of a run
// where it is and which row it has.
void voxel_query(Array<const int64_t, 1> starts, Array<const int32_t, 1> x, Array<const int64_t, 1> order, Array<const float, 2> center,
                 Array<const int32_t, 2> cells, Array<const float, 2> places, int64_t clouds, int64_t height, int64_t width, int64_t reach,
                 float radius, Array<int64_t, 2> out) {
  const int64_t count = cells.shape(0), samples = out.shape(1), voxels = x.shape(0);
  if (cells.shape(1) != 4 || places.shape(1) != 3 || center.shape(1) != 3 || static_cast<int64_t>(places.shape(0)) != count ||
      static_cast<int64_t>(out.shape(0)) != count || static_cast<int64_t>(order.shape(0)) != voxels || static_cast<int64_t>(center.shape(0)) != voxels ||
      static_cast<int64_t>(starts.shape(0)) != clouds * height * width + 1 || starts.data()[starts.shape(0) - 1] != voxels)
    throw std::invalid_argument("voxels, places and results do not fit each other");
  nb::gil_scoped_release release;
  const float most = radius * radius;
  parallel_tasks((count + kPlaces - 1) / kPlaces, [&](int64_t task) {
    for (int64_t q = task * kPlaces; q < std::min((task + 1) * kPlaces, count); ++q) {
      const int32_t *cell = cells.data() + 4 * q;
      const float *place = places.data() + 3 * q;
      int64_t *found = out.data() + q * samples, size = 0;
      const int64_t cloud = cell[0], last_z = std::min<int64_t>(cell[3] + reach, height - 1), last_y = std::min<int64_t>(cell[2] + reach, width - 1);
      if (cloud >= 0 && cloud < clouds)
        for (int64_t z = std::max<int64_t>(cell[3] - reach, 0); z <= last_z && size < samples; ++z)
          for (int64_t y = std::max<int64_t>(cell[2] - reach, 0); y <= last_y && size < samples; ++y) {
            const int64_t *run = starts.data() + (cloud * height + z) * width + y;
            const int32_t *end = x.data() + run[1];
            for (const int32_t *at = std::lower_bound(x.data() + run[0], end, cell[1] - reach); at < end && *at <= cell[1] + reach && size < samples; ++at) {
              const int64_t row = order.data()[at - x.data()];
              const float *c = center.data() + 3 * row, dx = c[0] - place[0], dy = c[1] - place[1], dz = c[2] - place[2];
              if ((dx * dx + dy * dy) + dz * dz <= most) found[size++] = row;
            }
          }
      std::fill(found + size, found + samples, size ? found[0] : -1);
    }
  });
}

}  // namespace

void register_voxel_query(nb::module_ &m) {
  m.def("voxel_query", &voxel_query, nb::arg("starts"), nb::arg("x"), nb::arg("order"), nb::arg("center"), nb::arg("cells"), nb::arg("places"),
        nb::arg("clouds"), nb::arg("height"), nb::arg("width"), nb::arg("reach"), nb::arg("radius"), nb::arg("out"),
        "Rows of the first voxels within `reach` cells and `radius` of every place, along x, then y, then z; -1 where there is none.");
}

}  // namespace pc3d
