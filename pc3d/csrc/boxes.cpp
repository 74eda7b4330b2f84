// Area shared by rotated rectangles, and greedy suppression by it.
//
// A rectangle is x, y, length, width, angle. Of a pair, the second is seen in the frame of the first, where its corners are clipped by
// |x| <= length / 2 and |y| <= width / 2 (Sutherland and Hodgman): coordinates are relative, so equal rectangles share their whole area.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "array.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kRows = 16;  // rectangles of one task

struct Rectangle {
  double x, y, length, width, cos, sin, reach;

  explicit Rectangle(const double *row)
      : x(row[0]), y(row[1]), length(row[2]), width(row[3]), cos(std::cos(row[4])), sin(std::sin(row[4])), reach(std::hypot(row[2], row[3]) / 2) {}
};

struct Polygon {
  double x[20], y[20];  // a line adds one corner; where rounding has bent the polygon, half as many as there are
  int size = 0;

  void add(double px, double py) {
    x[size] = px;
    y[size++] = py;
  }
};

// What of a polygon lies where side(corner) >= 0.
template <class Side>
Polygon clipped(const Polygon &in, Side &&side) {
  Polygon out;
  for (int i = 0; i < in.size; ++i) {
    const int next = i + 1 == in.size ? 0 : i + 1;
    const double here = side(in.x[i], in.y[i]), there = side(in.x[next], in.y[next]);
    if (here >= 0) out.add(in.x[i], in.y[i]);
    if ((here >= 0) != (there >= 0)) {
      const double t = here / (here - there);
      out.add(in.x[i] + t * (in.x[next] - in.x[i]), in.y[i] + t * (in.y[next] - in.y[i]));
    }
  }
  return out;
}

double shared_area(const Rectangle &a, const Rectangle &b) {
  const double dx = b.x - a.x, dy = b.y - a.y, reach = a.reach + b.reach;
  if (!(dx * dx + dy * dy < reach * reach)) return 0;  // also where a number is none
  const double x = a.cos * dx + a.sin * dy, y = a.cos * dy - a.sin * dx;
  const double cos = a.cos * b.cos + a.sin * b.sin, sin = a.cos * b.sin - a.sin * b.cos;
  const double ux = cos * b.length / 2, uy = sin * b.length / 2, vx = -sin * b.width / 2, vy = cos * b.width / 2;
  Polygon polygon;
  polygon.add(x + ux + vx, y + uy + vy);
  polygon.add(x - ux + vx, y - uy + vy);
  polygon.add(x - ux - vx, y - uy - vy);
  polygon.add(x + ux - vx, y + uy - vy);
  const double half_length = a.length / 2, half_width = a.width / 2;
  polygon = clipped(polygon, [&](double px, double) { return half_length - px; });
  polygon = clipped(polygon, [&](double px, double) { return half_length + px; });
  polygon = clipped(polygon, [&](double, double py) { return half_width - py; });
  polygon = clipped(polygon, [&](double, double py) { return half_width + py; });
  double twice = 0;
  for (int i = 2; i < polygon.size; ++i)  // relative to the first corner
    twice += (polygon.x[i - 1] - polygon.x[0]) * (polygon.y[i] - polygon.y[0]) - (polygon.x[i] - polygon.x[0]) * (polygon.y[i - 1] - polygon.y[0]);
  return std::max(twice / 2, 0.0);
}

std::vector<Rectangle> rectangles(const Array<const double, 2> &rows) {
  if (rows.shape(1) != 5) throw std::invalid_argument("a rectangle has five numbers");
  std::vector<Rectangle> made;
  made.reserve(rows.shape(0));
  for (size_t i = 0; i < rows.shape(0); ++i) made.emplace_back(rows.data() + 5 * i);
  return made;
}

void rectangle_intersection(Array<const double, 2> first, Array<const double, 2> second, Array<double, 2> out) {
  if (out.shape(0) != first.shape(0) || out.shape(1) != second.shape(0)) throw std::invalid_argument("area must be (N, M)");
  const std::vector<Rectangle> a = rectangles(first), b = rectangles(second);
  nb::gil_scoped_release release;
  const int64_t rows = static_cast<int64_t>(a.size()), columns = static_cast<int64_t>(b.size());
  parallel_tasks((rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < std::min((task + 1) * kRows, rows); ++i)
      for (int64_t j = 0; j < columns; ++j) out.data()[i * columns + j] = shared_area(a[i], b[j]);
  });
}

// Marks, best first, what is kept: rows of one group whose overlap with nothing kept before exceeds the group's threshold.
void rectangle_nms(Array<const double, 2> rows, Array<const int64_t, 1> group, Array<const double, 1> thresholds, int64_t limit, Array<bool, 1> keep) {
  const int64_t count = static_cast<int64_t>(rows.shape(0)), groups = static_cast<int64_t>(thresholds.shape(0));
  if (static_cast<int64_t>(group.shape(0)) != count || static_cast<int64_t>(keep.shape(0)) != count)
    throw std::invalid_argument("group and keep must be (N,)");
  for (int64_t i = 0; i < count; ++i)
    if (group.data()[i] < 0 || group.data()[i] >= groups) throw std::invalid_argument("a group has no threshold");
  const std::vector<Rectangle> boxes = rectangles(rows);
  nb::gil_scoped_release release;
  bool *alive = keep.data();
  std::fill(alive, alive + count, true);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!alive[i]) continue;
    if (kept == limit) {
      std::fill(alive + i, alive + count, false);
      return;
    }
    ++kept;
    const double area = boxes[i].length * boxes[i].width, threshold = thresholds.data()[group.data()[i]];
    for (int64_t j = i + 1; j < count; ++j) {
      if (!alive[j] || group.data()[j] != group.data()[i]) continue;
      const double shared = shared_area(boxes[i], boxes[j]);
      alive[j] = !(shared / std::max(area + boxes[j].length * boxes[j].width - shared, 1e-8) > threshold);
    }
  }
}

}  // namespace

void register_boxes(nb::module_ &m) {
  m.def("rectangle_intersection", &rectangle_intersection, nb::arg("a"), nb::arg("b"), nb::arg("out"),
        "Writes the area shared by each of (N, 5) and each of (M, 5) rectangles to (N, M).");
  m.def("rectangle_nms", &rectangle_nms, nb::arg("rows"), nb::arg("group"), nb::arg("thresholds"), nb::arg("limit"), nb::arg("keep"),
        "Greedy suppression of (N, 5) rectangles, best first, inside their groups; marks the first `limit` kept, all if it is negative.");
}

}  // namespace pc3d
