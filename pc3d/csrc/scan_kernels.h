// Kernels of the selective scan for one instruction set; see scan.cpp for what they compute together.
#pragma once

#include <stdint.h>

namespace pc3d {

constexpr int64_t kScanTile = 64;    // tokens between two saved states
constexpr int64_t kScanBlocks = 4;   // registers of channels whose dB and dC are summed before they leave the core

// Tokens are numbered along the walk: 0 is the first one visited, in reverse the last row.
struct ScanTile {
  int64_t begin, end;  // tokens
  int64_t segment;     // of the token `begin`, in walk order
};

struct Scan {
  int64_t tokens, channels, state, groups;  // groups = 0: B and C are (channels, state), the same for every token
  const float *u, *delta, *z;               // (tokens, channels); z may be null
  const float *a, *b, *c;                   // (channels, state) or (channels, 1); (tokens, groups, state)
  const float *skip, *bias;                 // (channels), may be null
  const float *initial;                     // (segments, channels, state), may be null
  bool softplus, reverse, scalar_a;
  const int64_t *borders, *ids;             // walk order: first token of each segment (one more than segments), its row in `initial`
  float *saved;                             // (tiles, channels, state): state before each tile; may be null in forward
  float *y, *last;                          // (tokens, channels), (segments, channels, state)

  // Backward: gradients of the above and what streams of segments carry.
  const float *grad_y, *grad_last;          // grad_last may be null
  float *grad_u, *grad_delta, *grad_z, *grad_initial;
  float *carry;                             // (streams, channels, state): gradient that flows to earlier tokens
  float *sum_a, *sum_b, *sum_c;             // (streams, channels, state): totals; b and c only without groups
  float *sum_skip, *sum_bias;               // (streams, channels)

  int64_t row(int64_t token) const { return reverse ? tokens - 1 - token : token; }
};

constexpr int64_t kConvTile = 64;  // tokens whose gradients before the activation are held at a time

// A causal depth-wise convolution; tokens are numbered along the walk, as above.
struct Conv {
  int64_t tokens, channels, width;
  const float *x, *weight, *bias;  // (tokens, channels), (width, channels), (channels) or null
  bool silu, reverse;
  const int64_t *borders;          // walk order: first token of each segment that has any, and the end
  float *y;

  const float *grad_y;  // backward
  float *grad_x;

  int64_t row(int64_t token) const { return reverse ? tokens - 1 - token : token; }
};

struct ScanKernels {
  const char *name;
  int64_t width;  // channels of a register
  // Channels [first, first + lanes) of every tile of a stream; lanes <= width.
  void (*forward)(const Scan &scan, const ScanTile *tiles, int64_t count, float *saved, int64_t first, int64_t lanes);
  // Channels [first, last), at most kScanBlocks registers and all of one group, of one tile. `pairs` takes the sums over
  // these channels of the gradients of B and C, (2, kScanTile, state); `space` holds backward_space(state) floats.
  void (*backward)(const Scan &scan, const ScanTile &tile, const float *saved, int64_t stream, int64_t first, int64_t last,
                   float *pairs, float *space);
  int64_t (*backward_space)(int64_t state);
  // Tokens [begin, end), the first of them in `segment`.
  void (*conv_forward)(const Conv &conv, int64_t begin, int64_t end, int64_t segment);
  // The same, at most kConvTile of them. Adds the gradients of weight and bias to `sums` (width + 1, channels); `space`
  // holds (kConvTile + width - 1) * channels floats.
  void (*conv_backward)(const Conv &conv, int64_t begin, int64_t end, int64_t segment, float *sums, float *space);
};

const ScanKernels *scan_kernels_generic();
const ScanKernels *scan_kernels_avx2();    // null when not compiled
const ScanKernels *scan_kernels_avx512();  // null when not compiled

}  // namespace pc3d
