// Sums and maxima over runs of rows. Columns are reduced in blocks that stay in registers, rows in their order, so the result
// does not depend on the number of threads.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "array.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kColumns = 32;         // columns reduced together
constexpr int64_t kTaskValues = 1 << 16;  // values of one task, about

// Segments [first, last) of a (rows, columns) table.
struct Slice {
  const int64_t *offsets;
  int64_t columns, first, last;
};

// Sums in double: one rounding per result, however long the run (a whole cloud, say).
template <class T>
[[gnu::always_inline]] inline void sum_slice(const Slice &s, const T *values, T *out) {
  for (int64_t segment = s.first; segment < s.last; ++segment)
    for (int64_t begin = 0; begin < s.columns; begin += kColumns) {
      const int64_t width = std::min(kColumns, s.columns - begin);
      double total[kColumns] = {};
      for (int64_t row = s.offsets[segment]; row < s.offsets[segment + 1]; ++row) {
        const T *from = values + row * s.columns + begin;
        if (width == kColumns)
          for (int64_t j = 0; j < kColumns; ++j) total[j] += from[j];
        else
          for (int64_t j = 0; j < width; ++j) total[j] += from[j];
      }
      for (int64_t j = 0; j < width; ++j) out[segment * s.columns + begin + j] = static_cast<T>(total[j]);
    }
}

template <class T>
[[gnu::always_inline]] inline T larger(T a, T b) {
  return (b > a || b != b) ? b : a;  // NaN wins, and stays: nothing is larger than NaN
}

template <class T>
[[gnu::always_inline]] inline void max_slice(const Slice &s, const T *values, T *out) {
  for (int64_t segment = s.first; segment < s.last; ++segment)
    for (int64_t begin = 0; begin < s.columns; begin += kColumns) {
      const int64_t width = std::min(kColumns, s.columns - begin);
      const bool empty = s.offsets[segment] == s.offsets[segment + 1];
      T largest[kColumns];
      std::fill(largest, largest + kColumns, empty ? T{0} : -std::numeric_limits<T>::infinity());
      for (int64_t row = s.offsets[segment]; row < s.offsets[segment + 1]; ++row) {
        const T *from = values + row * s.columns + begin;
        if (width == kColumns)
          for (int64_t j = 0; j < kColumns; ++j) largest[j] = larger(largest[j], from[j]);
        else
          for (int64_t j = 0; j < width; ++j) largest[j] = larger(largest[j], from[j]);
      }
      std::copy(largest, largest + width, out + segment * s.columns + begin);
    }
}

// Rows that tie for the maximum share its gradient evenly.
template <class T>
[[gnu::always_inline]] inline void max_backward_slice(const Slice &s, const T *grad, const T *values, const T *largest,
                                                      T *out) {
  for (int64_t segment = s.first; segment < s.last; ++segment)
    for (int64_t begin = 0; begin < s.columns; begin += kColumns) {
      const int64_t width = std::min(kColumns, s.columns - begin);
      const T *top = largest + segment * s.columns + begin, *above = grad + segment * s.columns + begin;
      T share[kColumns] = {};
      for (int64_t row = s.offsets[segment]; row < s.offsets[segment + 1]; ++row)
        for (int64_t j = 0; j < width; ++j) share[j] += values[row * s.columns + begin + j] == top[j] ? T{1} : T{0};
      for (int64_t j = 0; j < width; ++j) share[j] = above[j] / std::max(share[j], T{1});
      for (int64_t row = s.offsets[segment]; row < s.offsets[segment + 1]; ++row) {
        const int64_t at = row * s.columns + begin;
        for (int64_t j = 0; j < width; ++j) out[at + j] = values[at + j] == top[j] ? share[j] : T{0};
      }
    }
}

template <class T>
[[gnu::always_inline]] inline void expand_slice(const Slice &s, const T *values, T *out) {
  for (int64_t segment = s.first; segment < s.last; ++segment)
    for (int64_t row = s.offsets[segment]; row < s.offsets[segment + 1]; ++row)
      std::copy(values + segment * s.columns, values + (segment + 1) * s.columns, out + row * s.columns);
}

#define PC3D_CLONE_SLICES(T)                                                                                \
  PC3D_CLONES void sum_rows(const Slice &s, const T *values, T *out) { sum_slice(s, values, out); }         \
  PC3D_CLONES void max_rows(const Slice &s, const T *values, T *out) { max_slice(s, values, out); }         \
  PC3D_CLONES void max_rows_backward(const Slice &s, const T *grad, const T *values, const T *top, T *out) { \
    max_backward_slice(s, grad, values, top, out);                                                          \
  }
PC3D_CLONE_SLICES(float)
PC3D_CLONE_SLICES(double)
#undef PC3D_CLONE_SLICES

template <class T>
using Table = Array<T, 2>;
using Offsets = Array<const int64_t, 1>;

void check(const Offsets &offsets, size_t rows) {
  const int64_t *border = offsets.data();
  const size_t last = offsets.shape(0) - 1;
  if (border[0] == 0 && border[last] == static_cast<int64_t>(rows) && std::is_sorted(border, border + last + 1)) return;
  std::string first;
  for (size_t i = 0; i <= std::min<size_t>(last, 7); ++i) first += (i ? ", " : "") + std::to_string(border[i]);
  throw std::invalid_argument("offsets must rise from 0 to " + std::to_string(rows) + ", got [" + first + "]");
}

// Runs body(slice) over all segments, cut where about the same number of rows has passed.
template <class Body>
void for_slices(const Offsets &offsets, int64_t columns, Body &&body) {
  const int64_t *border = offsets.data();
  const int64_t segments = static_cast<int64_t>(offsets.shape(0)) - 1;
  const int64_t work = border[segments] + segments;
  const int64_t tasks = std::clamp<int64_t>(work * columns / kTaskValues, 1, 4096);
  // Segment s starts after offsets[s] + s units of work (a row each, and one for the segment itself).
  const auto cut = [&](int64_t task) {
    int64_t low = 0, high = segments;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (border[middle] + middle < work * task / tasks) low = middle + 1; else high = middle;
    }
    return task == tasks ? segments : low;
  };
  parallel_tasks(tasks, [&](int64_t task) { body(Slice{border, columns, cut(task), cut(task + 1)}); });
}

template <class T>
void segment_sum(Table<const T> values, Offsets offsets, Table<T> out) {
  check(offsets, values.shape(0));
  nb::gil_scoped_release release;
  for_slices(offsets, static_cast<int64_t>(values.shape(1)),
             [&](const Slice &slice) { sum_rows(slice, values.data(), out.data()); });
}

template <class T>
void segment_max(Table<const T> values, Offsets offsets, Table<T> out) {
  check(offsets, values.shape(0));
  nb::gil_scoped_release release;
  for_slices(offsets, static_cast<int64_t>(values.shape(1)),
             [&](const Slice &slice) { max_rows(slice, values.data(), out.data()); });
}

template <class T>
void segment_max_backward(Table<const T> grad, Table<const T> values, Table<const T> largest, Offsets offsets,
                          Table<T> out) {
  check(offsets, values.shape(0));
  nb::gil_scoped_release release;
  for_slices(offsets, static_cast<int64_t>(values.shape(1)), [&](const Slice &slice) {
    max_rows_backward(slice, grad.data(), values.data(), largest.data(), out.data());
  });
}

template <class T>
void segment_expand(Table<const T> values, Offsets offsets, Table<T> out) {
  check(offsets, out.shape(0));
  nb::gil_scoped_release release;
  for_slices(offsets, static_cast<int64_t>(values.shape(1)),
             [&](const Slice &slice) { expand_slice(slice, values.data(), out.data()); });
}

template <class T>
void register_for(nb::module_ &m) {
  m.def("segment_sum", &segment_sum<T>, nb::arg("values"), nb::arg("offsets"), nb::arg("out"),
        "out[s] = sum of values[offsets[s]:offsets[s + 1]].");
  m.def("segment_max", &segment_max<T>, nb::arg("values"), nb::arg("offsets"), nb::arg("out"),
        "out[s] = maximum of values[offsets[s]:offsets[s + 1]] per column, 0 where there are none.");
  m.def("segment_max_backward", &segment_max_backward<T>, nb::arg("grad"), nb::arg("values"), nb::arg("largest"),
        nb::arg("offsets"), nb::arg("out"), "Gradient of segment_max; rows that tie share it.");
  m.def("segment_expand", &segment_expand<T>, nb::arg("values"), nb::arg("offsets"), nb::arg("out"),
        "out[offsets[s]:offsets[s + 1]] = values[s].");
}

}  // namespace

void register_segment(nb::module_ &m) {
  register_for<float>(m);
  register_for<double>(m);
}

}  // namespace pc3d
