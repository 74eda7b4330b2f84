// Kernels of attention inside windows for one instruction set; see attention.cpp for what they compute together.
#pragma once

#include <stdint.h>

namespace pc3d {

// Attention of many windows. A point is in one slot of its own, whose query gives its result, and may be in further ones
// as key and value only.
struct Attention {
  int64_t points, heads, width;           // width: channels of a head
  const float *q, *k, *v;                 // point r, head h: (r * stride + h * width); the strides may differ
  int64_t q_stride, k_stride, v_stride;
  float scale;
  const int64_t *rows, *slots;            // the point in each slot, the own slot of each point
  float *out, *statistics;                // (points, heads, width); (points, heads, 2): largest score, 1 / sum of exp(score - largest)

  // Backward.
  const float *grad;                      // (points, heads, width), as `out`
  float *grad_q, *grad_k, *grad_v;        // (points, heads, width)
  const int64_t *guests;                  // (slots): place of a slot in `guest_k` and `guest_v`, or -1 where it is its point's own
  float *guest_k, *guest_v;               // (guests, heads, width)
};

struct Window {
  int64_t begin, length;  // slots
};

struct AttentionKernels {
  const char *name;
  void (*forward)(const Attention &attention, const Window &window, int64_t head, float *space);
  void (*backward)(const Attention &attention, const Window &window, int64_t head, float *space);
  int64_t (*space)(int64_t length, int64_t width);  // floats, for both
};

const AttentionKernels *attention_kernels_generic();
const AttentionKernels *attention_kernels_avx2();    // null when not compiled
const AttentionKernels *attention_kernels_avx512();  // null when not compiled

}  // namespace pc3d
