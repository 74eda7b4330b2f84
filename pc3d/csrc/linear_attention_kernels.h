// Kernels of linear attention inside windows for one instruction set; see linear_attention.cpp for what they compute together.
#pragma once

#include <stdint.h>

namespace pc3d {

// Rows of a window lie one after the other. The state of a window and head is (width + 1, padded width): k^T v, and below it
// the sum of k.
struct LinearAttention {
  int64_t heads, width;  // width: channels of a head
  float eps;
  const float *qkv;      // (points, 3, heads, width), before the ReLU of q and k
  float *out;            // (points, heads, width)

  const float *grad;     // backward: (points, heads, width), as `out`
  float *grad_qkv;       // (points, 3, heads, width)
};

struct LinearAttentionKernels {
  const char *name;
  int64_t (*state_size)(int64_t width);  // floats of a state
  int64_t (*space)(int64_t width);       // floats of scratch that each of these needs
  // Rows [begin, end), all in one window. `sum` and `query_grad` write what these rows alone add to the state of the window
  // and to its gradient; the others take the whole one.
  void (*sum)(const LinearAttention &attention, int64_t begin, int64_t end, int64_t head, float *state, float *space);
  void (*forward)(const LinearAttention &attention, int64_t begin, int64_t end, int64_t head, const float *state, float *space);
  void (*query_grad)(const LinearAttention &attention, int64_t begin, int64_t end, int64_t head, const float *state,
                     float *grad_state, float *space);
  void (*key_grad)(const LinearAttention &attention, int64_t begin, int64_t end, int64_t head, const float *grad_state, float *space);
};

const LinearAttentionKernels *linear_attention_kernels_generic();
const LinearAttentionKernels *linear_attention_kernels_avx2();    // null when not compiled
const LinearAttentionKernels *linear_attention_kernels_avx512();  // null when not compiled

}  // namespace pc3d
