// Micro-kernels of sparse convolution, written once with vector extensions. A file that includes this defines first
//   PC3D_ISA (a namespace name), PC3D_WIDTH (floats per register), PC3D_ROWS (rows of a register block).
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Every output element is one chain of multiply-adds: offsets ascending, channels ascending. So neither the tile, the
// thread count nor the register width changes a bit of the result.
#pragma once

#include <stdint.h>
#include <string.h>

#include "conv_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

constexpr int64_t kWidth = PC3D_WIDTH, kRows = PC3D_ROWS, kStrip = 2 * kWidth;
constexpr int64_t kDepth = 64;        // channels of a packed panel, and its fixed row stride
constexpr int64_t kPanelRows = 96;    // 24 KiB of packed rows: a panel stays in the first-level cache
constexpr int64_t kGradPairs = 128;   // pairs of a weight-gradient panel
constexpr int64_t kAhead = 8;         // rows prefetched ahead of the gather

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Loose __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float *p) { return *reinterpret_cast<const Loose *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<Loose *>(p) = v; }

// c[r][0 : NV * kWidth] += sum over d of a(r, d) * b[d][:]. The panel `a` holds (r, d) at a[r * kDepth + d], or, when
// transposed (weight gradient: d is a pair, r a channel), at a[d * kDepth + r].
template <int R, int NV, bool Transposed>
void block(const float *a, const float *b, int64_t depth, float *const *c) {
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = load(c[r] + v * kWidth);
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float s = Transposed ? a[r] : a[r * kDepth];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] += s * column[v];
    }
    a += Transposed ? kDepth : 1;
    b += kStrip;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(c[r] + v * kWidth, acc[r][v]);
}

using Block = void (*)(const float *, const float *, int64_t, float *const *);

template <int R, int NV, bool Transposed>
struct Table {
  static Block find(int64_t rows) {
    if (rows == R) return &block<R, NV, Transposed>;
    return Table<R - 1, NV, Transposed>::find(rows);
  }
};
template <int NV, bool Transposed>
struct Table<1, NV, Transposed> {
  static Block find(int64_t) { return &block<1, NV, Transposed>; }
};

template <bool Transposed>
Block find_block(int64_t rows, int64_t columns) {
  return columns <= kWidth ? Table<kRows, 1, Transposed>::find(rows) : Table<kRows, 2, Transposed>::find(rows);
}

// Splits [0, n) into the fewest parts of at most `most`, as equal as they come: 11 + 11 + 10 instead of 12 + 12 + 8.
struct Split {
  int64_t n, parts;
  Split(int64_t n, int64_t most) : n(n), parts((n + most - 1) / most) {}
  int64_t begin(int64_t i) const { return n * i / parts; }
};

// Runs one register block; a strip that ends inside the row goes through a local copy.
inline void run_block(Block f, const float *a, const float *b, int64_t depth, float *const *c, int64_t rows, int64_t columns) {
  if (columns % kWidth == 0) return f(a, b, depth, c);
  float copy[kRows][kStrip];
  float *pointers[kRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(copy[r], c[r], columns * sizeof(float));
    memset(copy[r] + columns, 0, (kStrip - columns) * sizeof(float));
    pointers[r] = copy[r];
  }
  f(a, b, depth, pointers);
  for (int64_t r = 0; r < rows; ++r) memcpy(c[r], copy[r], columns * sizeof(float));
}

// to[i * stride : + width] = from[rows[i] * row_stride : + width]
inline void gather(const float *from, int64_t row_stride, const int32_t *rows, int64_t n, int64_t width, float *to, int64_t stride) {
  for (int64_t i = 0; i < n; ++i, to += stride) {
    const float *row = from + rows[i] * row_stride;
    if (i + kAhead < n) {
      const float *next = from + rows[i + kAhead] * row_stride;
      for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(next + d);
    }
    int64_t d = 0;
    for (; d + kWidth <= width; d += kWidth) store(to + d, load(row + d));
    for (; d < width; ++d) to[d] = row[d];
  }
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

void pack(const float *w, int64_t row, int64_t column, int64_t cin, int64_t cout, int64_t s, float *packed) {
  const int64_t first = s * kStrip, columns = min64(cout - first, kStrip);
  w += first * column;
  for (int64_t i = 0; i < cin; ++i, w += row, packed += kStrip) {
    if (column == 1) {
      memcpy(packed, w, columns * sizeof(float));
    } else {
      for (int64_t j = 0; j < columns; ++j) packed[j] = w[j * column];
    }
    memset(packed + columns, 0, (kStrip - columns) * sizeof(float));
  }
}

void start_rows(const ConvProduct &p, int64_t row_first, int64_t row_last, int64_t first, int64_t last) {
  const int64_t bytes = (last - first) * sizeof(float);
  for (int64_t r = row_first; r < row_last; ++r) {
    float *y = p.y + r * p.cout + first;
    if (p.bias)
      memcpy(y, p.bias + first, bytes);
    else
      memset(y, 0, bytes);
  }
}

// One panel of gathered rows times one strip of weights.
void multiply(const ConvProduct &p, const float *panel, const int32_t *scatter, int64_t n, const float *weights, int64_t depth, int64_t column) {
  const int64_t columns = min64(p.cout - column, kStrip);
  const Split blocks(n, kRows);
  for (int64_t i = 0; i < blocks.parts; ++i) {
    const int64_t begin = blocks.begin(i), rows = blocks.begin(i + 1) - begin;
    float *c[kRows];
    for (int64_t r = 0; r < rows; ++r) c[r] = p.y + scatter[begin + r] * p.cout + column;
    run_block(find_block<false>(rows, columns), panel + begin * kDepth, weights, depth, c, rows, columns);
  }
}

void tile(const ConvProduct &p, int64_t first, int64_t last, int64_t strip_first, int64_t strip_last) {
  const int64_t strips = (p.cout + kStrip - 1) / kStrip;
  start_rows(p, first * kGranule, min64(last * kGranule, p.rows), strip_first * kStrip, min64(strip_last * kStrip, p.cout));
  alignas(64) float panel[kPanelRows * kDepth];
  for (int64_t k = 0; k < p.kernel_volume; ++k) {
    const int64_t *starts = p.starts + k * (p.granules + 1);
    const int64_t pairs = starts[last] - starts[first];
    const Split panels(pairs, kPanelRows);
    for (int64_t i = 0; i < panels.parts; ++i) {
      const int64_t begin = starts[first] + panels.begin(i), n = starts[first] + panels.begin(i + 1) - begin;
      for (int64_t d = 0; d < p.cin; d += kDepth) {
        const int64_t depth = min64(p.cin - d, kDepth);
        gather(p.x + d, p.cin, p.gather + begin, n, depth, panel, kDepth);
        for (int64_t s = strip_first; s < strip_last; ++s) {
          const float *weights = p.weights + ((k * strips + s) * p.cin + d) * kStrip;
          multiply(p, panel, p.scatter + begin, n, weights, depth, s * kStrip);
        }
      }
    }
  }
}

void weight_grad(const WeightGradPart &p, int64_t first, int64_t last) {
  memset(p.out + first * p.cout, 0, (last - first) * p.cout * sizeof(float));
  alignas(64) float panel[kGradPairs * kDepth];
  alignas(64) float strip[kGradPairs * kStrip];
  const Split chunks(p.pairs, kGradPairs), blocks(last - first, kRows);
  for (int64_t i = 0; i < chunks.parts; ++i) {
    const int64_t begin = chunks.begin(i), n = chunks.begin(i + 1) - begin;
    gather(p.x + first, p.cin, p.in_rows + begin, n, last - first, panel, kDepth);
    for (int64_t column = 0; column < p.cout; column += kStrip) {
      const int64_t columns = min64(p.cout - column, kStrip);
      if (columns < kStrip) memset(strip, 0, n * kStrip * sizeof(float));
      gather(p.g + column, p.cout, p.out_rows + begin, n, columns, strip, kStrip);
      for (int64_t j = 0; j < blocks.parts; ++j) {
        const int64_t channel = blocks.begin(j), rows = blocks.begin(j + 1) - channel;
        float *c[kRows];
        for (int64_t r = 0; r < rows; ++r) c[r] = p.out + (first + channel + r) * p.cout + column;
        run_block(find_block<true>(rows, columns), panel + channel, strip, n, c, rows, columns);
      }
    }
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
