// Attention inside windows on the CPU: the parallel loops around the kernels, and the Python functions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "attention_kernels.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

// Rows of heads beside each other; the rows may lie apart, as those of a packed (N, 3, H, D) tensor do.
using Rows = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Table = Array<float, 3>;
using Index = Array<const int64_t, 1>;

const std::vector<const AttentionKernels *> &usable() {
  static const auto kernels = usable_kernels(attention_kernels_avx512(), attention_kernels_avx2(), attention_kernels_generic());
  return kernels;
}

// `groups` holds pairs (count, length): that many windows of that length, one behind the other.
std::vector<Window> list_windows(const std::vector<int64_t> &groups, int64_t slots) {
  std::vector<Window> windows;
  int64_t begin = 0;
  for (size_t g = 0; g + 1 < groups.size(); g += 2)
    for (int64_t i = 0; i < groups[g]; ++i, begin += groups[g + 1]) windows.push_back({begin, groups[g + 1]});
  if (begin != slots) throw std::invalid_argument("the windows do not fill the slots");
  return windows;
}

bool same_shape(const Attention &attention, const Table &table) {
  return static_cast<int64_t>(table.shape(0)) == attention.points && static_cast<int64_t>(table.shape(1)) == attention.heads &&
         static_cast<int64_t>(table.shape(2)) == attention.width;
}

Attention describe(const Rows &q, const Rows &k, const Rows &v, const Index &rows, const Index &slots, float scale) {
  Attention attention{};
  attention.points = q.shape(0), attention.heads = q.shape(1), attention.width = q.shape(2);
  for (const Rows *table : {&q, &k, &v})
    if (table->shape(0) != q.shape(0) || table->shape(1) != q.shape(1) || table->shape(2) != q.shape(2) ||
        table->stride(2) != 1 || table->stride(1) != attention.width)
      throw std::invalid_argument("queries, keys and values must have one shape, and heads that lie beside each other");
  const int64_t count = static_cast<int64_t>(rows.shape(0));
  if (static_cast<int64_t>(slots.shape(0)) != attention.points) throw std::invalid_argument("every point needs one slot");
  for (int64_t s = 0; s < count; ++s)
    if (rows.data()[s] < 0 || rows.data()[s] >= attention.points) throw std::invalid_argument("a slot holds no point");
  for (int64_t r = 0; r < attention.points; ++r)
    if (slots.data()[r] < 0 || slots.data()[r] >= count || rows.data()[slots.data()[r]] != r)
      throw std::invalid_argument("the slot of a point does not hold it");
  attention.q = q.data(), attention.k = k.data(), attention.v = v.data();
  attention.q_stride = q.stride(0), attention.k_stride = k.stride(0), attention.v_stride = v.stride(0);
  attention.scale = scale, attention.rows = rows.data(), attention.slots = slots.data();
  return attention;
}

template <class Kernel>
void run(const Attention &attention, const std::vector<Window> &windows, const AttentionKernels &kernels, Kernel kernel) {
  const int64_t heads = attention.heads;
  parallel_tasks(static_cast<int64_t>(windows.size()) * heads, [&](int64_t i) {
    const Window &window = windows[i / heads];
    thread_local std::vector<float> space;
    space.resize(std::max<size_t>(space.size(), kernels.space(window.length, attention.width)));
    kernel(attention, window, i % heads, space.data());
  });
}

void attention_forward(Rows q, Rows k, Rows v, Index rows, Index slots, const std::vector<int64_t> &groups, float scale, Table out,
                       Table statistics, const std::string &isa) {
  const AttentionKernels &kernels = find_kernels(usable(), isa);
  const std::vector<Window> windows = list_windows(groups, rows.shape(0));
  Attention attention = describe(q, k, v, rows, slots, scale);
  if (!same_shape(attention, out) || statistics.size() != static_cast<size_t>(2 * attention.points * attention.heads))
    throw std::invalid_argument("the results of the attention do not fit its inputs");
  attention.out = out.data(), attention.statistics = statistics.data();
  nb::gil_scoped_release release;
  run(attention, windows, kernels, kernels.forward);
}

void attention_backward(Table grad, Rows q, Rows k, Rows v, Index rows, Index slots, const std::vector<int64_t> &groups, float scale,
                        Table out, Table statistics, Table grad_q, Table grad_k, Table grad_v, const std::string &isa) {
  const AttentionKernels &kernels = find_kernels(usable(), isa);
  const std::vector<Window> windows = list_windows(groups, rows.shape(0));
  Attention attention = describe(q, k, v, rows, slots, scale);
  for (const Table *table : {&grad, &out, &grad_q, &grad_k, &grad_v})
    if (!same_shape(attention, *table)) throw std::invalid_argument("the gradients of the attention do not fit its inputs");
  attention.grad = grad.data(), attention.out = out.data(), attention.statistics = statistics.data();
  attention.grad_q = grad_q.data(), attention.grad_k = grad_k.data(), attention.grad_v = grad_v.data();
  nb::gil_scoped_release release;
  // A point that is a guest in a second window gets gradients from both: the guest's are kept apart and added in order.
  const int64_t count = static_cast<int64_t>(rows.shape(0)), columns = attention.heads * attention.width;
  std::vector<int64_t> guests(count, -1), guest_rows;
  for (int64_t s = 0; s < count; ++s)
    if (attention.slots[attention.rows[s]] != s) {
      guests[s] = static_cast<int64_t>(guest_rows.size());
      guest_rows.push_back(attention.rows[s]);
    }
  std::vector<float> guest_k(guest_rows.size() * columns), guest_v(guest_rows.size() * columns);
  attention.guests = guests.data(), attention.guest_k = guest_k.data(), attention.guest_v = guest_v.data();
  run(attention, windows, kernels, kernels.backward);
  for (size_t g = 0; g < guest_rows.size(); ++g)
    for (int64_t c = 0; c < columns; ++c) {
      attention.grad_k[guest_rows[g] * columns + c] += guest_k[g * columns + c];
      attention.grad_v[guest_rows[g] * columns + c] += guest_v[g * columns + c];
    }
}

}  // namespace

void register_attention(nb::module_ &m) {
  m.def("attention_isas", [] { return names_of(usable()); }, "Instruction sets of the attention kernels usable here, fastest first.");
  m.def("attention_forward", &attention_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("rows"), nb::arg("slots"),
        nb::arg("groups"), nb::arg("scale"), nb::arg("out"), nb::arg("statistics"), nb::arg("isa") = "");
  m.def("attention_backward", &attention_backward, nb::arg("grad"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("rows"),
        nb::arg("slots"), nb::arg("groups"), nb::arg("scale"), nb::arg("out"), nb::arg("statistics"), nb::arg("grad_q"),
        nb::arg("grad_k"), nb::arg("grad_v"), nb::arg("isa") = "");
}

}  // namespace pc3d
