// Linear attention inside windows on the CPU: the parallel loops around the kernels, and the Python functions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "isa.h"
#include "linear_attention_kernels.h"
#include "module.h"
#include "parallel.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kTaskRows = 1024;   // rows of windows that one task takes, at least
constexpr int64_t kPieceRows = 2048;  // a longer window is cut into pieces of so many rows

const std::vector<const LinearAttentionKernels *> &usable() {
  static const auto kernels =
      usable_kernels(linear_attention_kernels_avx512(), linear_attention_kernels_avx2(), linear_attention_kernels_generic());
  return kernels;
}

struct Run {
  int64_t begin, end;
};

// Windows of rows. A task takes some whole ones; long ones are cut into pieces, so that no thread waits for one window. The
// cuts depend on the windows only, and so do the bits of every sum.
struct Windows {
  std::vector<Run> rows;    // of each window that is not long and not empty
  std::vector<Run> tasks;   // runs of these
  std::vector<Run> pieces;  // rows of the pieces of long windows
  std::vector<Run> longs;   // runs of pieces, one for each long window
  std::vector<int64_t> first_piece;  // of the window of each piece

  Windows(const Array<const int64_t, 1> &offsets, int64_t count) {
    const int64_t *border = offsets.data(), windows = static_cast<int64_t>(offsets.shape(0)) - 1;
    if (windows < 0 || border[0] != 0 || border[windows] != count || !std::is_sorted(border, border + windows + 1))
      throw std::invalid_argument("offsets do not rise from 0 to the number of rows");
    int64_t task_rows = kTaskRows;
    for (int64_t w = 0; w < windows; ++w) {
      const Run window{border[w], border[w + 1]};
      const int64_t length = window.end - window.begin, place = static_cast<int64_t>(rows.size());
      if (length > kPieceRows) {
        cut(window);
      } else if (length > 0) {
        if (task_rows >= kTaskRows) tasks.push_back({place, place}), task_rows = 0;
        rows.push_back(window);
        tasks.back().end = place + 1, task_rows += length;
      }
    }
  }

 private:
  void cut(const Run &window) {
    const int64_t first = static_cast<int64_t>(pieces.size());
    for (int64_t begin = window.begin; begin < window.end; begin += kPieceRows) {
      pieces.push_back({begin, std::min(begin + kPieceRows, window.end)});
      first_piece.push_back(first);
    }
    longs.push_back({first, static_cast<int64_t>(pieces.size())});
  }
};

// The states of all pieces and heads.
class States {
 public:
  States(const Windows &windows, int64_t heads, int64_t size)
      : windows_(windows), heads_(heads), size_(size), data_(static_cast<int64_t>(windows.pieces.size()) * heads * size) {}

  float *of_piece(int64_t piece, int64_t head) { return data_.data() + (piece * heads_ + head) * size_; }
  float *of_window(int64_t piece, int64_t head) { return of_piece(windows_.first_piece[piece], head); }

  // The states of the pieces of each window, added in their order, in the place of its first piece.
  void add_up() {
    parallel_tasks(static_cast<int64_t>(windows_.longs.size()) * heads_, [&](int64_t i) {
      const Run &pieces = windows_.longs[i / heads_];
      float *total = of_piece(pieces.begin, i % heads_);
      for (int64_t piece = pieces.begin + 1; piece < pieces.end; ++piece) {
        const float *state = of_piece(piece, i % heads_);
        for (int64_t j = 0; j < size_; ++j) total[j] += state[j];
      }
    });
  }

 private:
  const Windows &windows_;
  int64_t heads_, size_;
  Buffer<float> data_;
};

// task(rows, head, space) for every piece of a long window.
template <class Task>
void over_pieces(const Windows &windows, int64_t heads, int64_t space, Task &&task) {
  parallel_tasks(static_cast<int64_t>(windows.pieces.size()) * heads, [&](int64_t i) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), space));
    task(i / heads, i % heads, scratch.data());
  });
}

// task(rows, head, space) for every other window.
template <class Task>
void over_windows(const Windows &windows, int64_t heads, int64_t space, Task &&task) {
  parallel_tasks(static_cast<int64_t>(windows.tasks.size()), [&](int64_t i) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), space));
    for (int64_t w = windows.tasks[i].begin; w < windows.tasks[i].end; ++w)
      for (int64_t head = 0; head < heads; ++head) task(windows.rows[w], head, scratch.data());
  });
}

LinearAttention describe(const Array<const float, 4> &qkv, const Array<float, 3> &result, float eps) {
  LinearAttention attention{};
  attention.heads = qkv.shape(2), attention.width = qkv.shape(3), attention.eps = eps, attention.qkv = qkv.data();
  if (qkv.shape(1) != 3 || result.shape(0) != qkv.shape(0) || result.shape(1) != qkv.shape(2) || result.shape(2) != qkv.shape(3))
    throw std::invalid_argument("the result of the attention does not fit its inputs");
  return attention;
}

void linear_attention_forward(Array<const float, 4> qkv, Array<const int64_t, 1> offsets, float eps, Array<float, 3> out,
                              const std::string &isa) {
  const LinearAttentionKernels &kernels = find_kernels(usable(), isa);
  LinearAttention x = describe(qkv, out, eps);
  x.out = out.data();
  nb::gil_scoped_release release;
  const Windows windows(offsets, static_cast<int64_t>(qkv.shape(0)));
  const int64_t space = kernels.space(x.width), size = kernels.state_size(x.width);
  over_windows(windows, x.heads, space + size, [&](const Run &rows, int64_t head, float *scratch) {
    float *state = scratch + space;
    kernels.sum(x, rows.begin, rows.end, head, state, scratch);
    kernels.forward(x, rows.begin, rows.end, head, state, scratch);
  });
  States states(windows, x.heads, size);
  over_pieces(windows, x.heads, space, [&](int64_t piece, int64_t head, float *scratch) {
    const Run &rows = windows.pieces[piece];
    kernels.sum(x, rows.begin, rows.end, head, states.of_piece(piece, head), scratch);
  });
  states.add_up();
  over_pieces(windows, x.heads, space, [&](int64_t piece, int64_t head, float *scratch) {
    const Run &rows = windows.pieces[piece];
    kernels.forward(x, rows.begin, rows.end, head, states.of_window(piece, head), scratch);
  });
}

void linear_attention_backward(Array<float, 3> grad, Array<const float, 4> qkv, Array<const int64_t, 1> offsets, float eps,
                               Array<float, 4> grad_qkv, const std::string &isa) {
  const LinearAttentionKernels &kernels = find_kernels(usable(), isa);
  LinearAttention x = describe(qkv, grad, eps);
  if (grad_qkv.size() != qkv.size()) throw std::invalid_argument("the gradient of the attention does not fit its inputs");
  x.grad = grad.data(), x.grad_qkv = grad_qkv.data();
  nb::gil_scoped_release release;
  const Windows windows(offsets, static_cast<int64_t>(qkv.shape(0)));
  const int64_t space = kernels.space(x.width), size = kernels.state_size(x.width);
  over_windows(windows, x.heads, space + 2 * size, [&](const Run &rows, int64_t head, float *scratch) {
    float *state = scratch + space, *grad_state = state + size;
    kernels.sum(x, rows.begin, rows.end, head, state, scratch);
    kernels.query_grad(x, rows.begin, rows.end, head, state, grad_state, scratch);
    kernels.key_grad(x, rows.begin, rows.end, head, grad_state, scratch);
  });
  States states(windows, x.heads, size), grad_states(windows, x.heads, size);
  over_pieces(windows, x.heads, space, [&](int64_t piece, int64_t head, float *scratch) {
    const Run &rows = windows.pieces[piece];
    kernels.sum(x, rows.begin, rows.end, head, states.of_piece(piece, head), scratch);
  });
  states.add_up();
  over_pieces(windows, x.heads, space, [&](int64_t piece, int64_t head, float *scratch) {
    const Run &rows = windows.pieces[piece];
    float *grad_state = grad_states.of_piece(piece, head);
    kernels.query_grad(x, rows.begin, rows.end, head, states.of_window(piece, head), grad_state, scratch);
  });
  grad_states.add_up();
  over_pieces(windows, x.heads, space, [&](int64_t piece, int64_t head, float *scratch) {
    const Run &rows = windows.pieces[piece];
    kernels.key_grad(x, rows.begin, rows.end, head, grad_states.of_window(piece, head), scratch);
  });
}

}  // namespace

void register_linear_attention(nb::module_ &m) {
  m.def("linear_attention_isas", [] { return names_of(usable()); },
        "Instruction sets of the linear attention kernels usable here, fastest first.");
  m.def("linear_attention_forward", &linear_attention_forward, nb::arg("qkv"), nb::arg("offsets"), nb::arg("eps"), nb::arg("out"),
        nb::arg("isa") = "");
  m.def("linear_attention_backward", &linear_attention_backward, nb::arg("grad"), nb::arg("qkv"), nb::arg("offsets"), nb::arg("eps"),
        nb::arg("grad_qkv"), nb::arg("isa") = "");
}

}  // namespace pc3d
