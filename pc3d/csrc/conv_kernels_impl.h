// Micro-kernels of sparse convolution, written once with vector extensions. A file that includes this defines first
//   PC3D_ISA (a namespace name), PC3D_WIDTH (floats per register), PC3D_ROWS (rows of a register block), and PC3D_BF16 for
//   products of bfloat16: an element of panels and packed weights is then a pair of numbers, the first in the upper half.
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Every output element is one chain of multiply-adds: offsets ascending, channels ascending. So neither the tile, the
// thread count nor the register width changes a bit of the result.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "conv_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

constexpr int64_t kWidth = PC3D_WIDTH, kRows = PC3D_ROWS, kStrip = 2 * kWidth;
constexpr int64_t kDepth = 128;        // channels of a packed panel, and its fixed row stride
constexpr int64_t kPanelRows = 60;     // 30 KiB of packed rows: a panel stays in the first-level cache
constexpr int64_t kGradPairs = 96;     // pairs of a weight-gradient panel
constexpr int64_t kGradColumns = 256;  // columns packed beside them
constexpr int64_t kAhead = 12;         // rows prefetched ahead of the gather

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Loose __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float *p) { return *reinterpret_cast<const Loose *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<Loose *>(p) = v; }

typedef uint32_t Bits __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kWidth * sizeof(uint16_t)), aligned(2), may_alias));

#if defined(PC3D_BF16)
constexpr int64_t kPair = 2;  // numbers of an element
#else
constexpr int64_t kPair = 1;
#endif
inline int64_t elements(int64_t numbers) { return (numbers + kPair - 1) / kPair; }

// sum += a * b, of pairs the upper product first, as Intel describes the instruction. It takes subnormal numbers for zero.
inline void add_product(float a, Vec b, Vec &sum) {
#if !defined(PC3D_BF16)
  sum += a * b;
#elif defined(__AVX512BF16__)
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(_mm512_set1_ps(a)));
#else
  uint32_t bits;
  memcpy(&bits, &a, 4);
  const Bits left = Bits{} + bits, right = reinterpret_cast<Bits>(b);
  sum += reinterpret_cast<Vec>(left & 0xFFFF0000) * reinterpret_cast<Vec>(right & 0xFFFF0000);
  sum += reinterpret_cast<Vec>(left << 16) * reinterpret_cast<Vec>(right << 16);
#endif
}

// Row rows[r] of y, columns [0, NV * kWidth), plus the sum over d of a(r, d) * b[d][:]. The panel `a` holds (r, d) at
// a[r * kDepth + d], or, when transposed (weight gradient: d is a pair, r a channel), at a[d * kDepth + r].
template <int R, int NV, bool Transposed>
void block(const float *a, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride) {
  float *c[R];
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    c[r] = y + rows[r] * stride;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = load(c[r] + v * kWidth);
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float s = Transposed ? a[r] : a[r * kDepth];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) add_product(s, column[v], acc[r][v]);
    }
    a += Transposed ? kDepth : 1;
    b += kStrip;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(c[r] + v * kWidth, acc[r][v]);
}

using Block = void (*)(const float *, const float *, int64_t, float *, const int32_t *, int64_t);
constexpr int32_t kConsecutive[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

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

// Splits [0, n) into the fewest parts of at most `most`, as equal as they come (11 + 11 + 10 instead of 12 + 12 + 8), the
// larger ones first.
struct Split {
  int64_t parts, small, larger;  // `larger` parts of small + 1, then the rest of `small`
  Split(int64_t n, int64_t most) : parts((n + most - 1) / most), small(n / (parts ? parts : 1)), larger(n - parts * small) {}
  int64_t size(int64_t i) const { return small + (i < larger); }
};

// Blocks of rows times one strip of columns, at most one strip wide.
template <bool Transposed>
struct Strip {
  int64_t columns;
  Split split;
  Block larger, smaller;
  Strip(int64_t n, int64_t columns)
      : columns(columns),
        split(n, kRows),
        larger(find_block<Transposed>(split.small + 1, columns)),
        smaller(find_block<Transposed>(split.small, columns)) {}

  void run(const float *a, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride) const {
    for (int64_t i = 0; i < split.parts; ++i) {
      const int64_t n = split.size(i);
      const Block f = i < split.larger ? larger : smaller;
      if (columns % kWidth == 0)
        f(a, b, depth, y, rows, stride);
      else
        run_copied(f, a, b, depth, y, rows, stride, n);
      if (Transposed)
        a += n, y += n * stride;
      else
        a += n * kDepth, rows += n;
    }
  }

  // A strip that ends inside a register goes through a local copy.
  void run_copied(Block f, const float *a, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride, int64_t n) const {
    float part[kRows * kStrip] = {};
    for (int64_t r = 0; r < n; ++r) memcpy(part + r * kStrip, y + rows[r] * stride, columns * sizeof(float));
    f(a, b, depth, part, kConsecutive, kStrip);
    for (int64_t r = 0; r < n; ++r) memcpy(y + rows[r] * stride, part + r * kStrip, columns * sizeof(float));
  }
};

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline void copy(const float *from, int64_t n, float *to) {
  int64_t d = 0;
  for (; d + kWidth <= n; d += kWidth) store(to + d, load(from + d));
  for (; d + 4 <= n; d += 4) memcpy(to + d, from + d, 16);
  for (; d < n; ++d) to[d] = from[d];
}

// bfloat16 is the upper half of a float32.
inline Bits bits_of(const uint16_t *p) { return __builtin_convertvector(*reinterpret_cast<const Halves *>(p), Bits); }
inline Vec widen(const uint16_t *p) { return reinterpret_cast<Vec>(bits_of(p) << 16); }
inline void widen(const uint16_t *from, int64_t n, float *to) {
  int64_t d = 0;
  for (; d + kWidth <= n; d += kWidth) store(to + d, widen(from + d));
  for (; d < n; ++d) {
    const uint32_t bits = static_cast<uint32_t>(from[d]) << 16;
    memcpy(to + d, &bits, 4);
  }
}
// To the nearest, ties to even, as PyTorch does; NaN stays NaN.
inline Bits narrow(Vec value) {
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = bits + 0x7FFF + (bits >> 16 & 1), nan = reinterpret_cast<Bits>(value != value);
  return ((rounded >> 16) & ~nan) | (nan & 0x7FC0);
}
inline void narrow(Vec value, uint16_t *p) { *reinterpret_cast<Halves *>(p) = __builtin_convertvector(narrow(value), Halves); }

// A part of the rows of a matrix: columns [first, first + width).
struct Rows {
  Features matrix;
  int64_t stride, first, width;
  const int32_t *index;

  const char *address(int64_t i, int64_t d) const {
    return static_cast<const char *>(matrix.data) + (index[i] * stride + first + d) * (matrix.bf16 ? 2 : 4);
  }
  const uint16_t *halves(int64_t i, int64_t d) const { return reinterpret_cast<const uint16_t *>(address(i, d)); }
  void read(int64_t i, int64_t d, int64_t n, float *to) const {
    if (matrix.bf16)
      widen(halves(i, d), n, to);
    else
      copy(reinterpret_cast<const float *>(address(i, d)), n, to);
  }
  void prefetch(int64_t i) const {
    const char *row = address(i, 0), *end = row + width * (matrix.bf16 ? 2 : 4);
    for (; row < end; row += 64) __builtin_prefetch(row);
  }
};

#if defined(PC3D_BF16)
// Up to kWidth numbers, then zeros.
inline Bits some_bits(const uint16_t *p, int64_t n) {
  if (n >= kWidth) return bits_of(p);
  uint16_t part[kWidth] = {};
  if (n > 0) memcpy(part, p, n * sizeof(uint16_t));
  return bits_of(part);
}

// n numbers as pairs of neighbours; writes whole registers.
inline Vec across(const uint16_t *row) {
  Bits bits;
  memcpy(&bits, row, sizeof bits);
  return reinterpret_cast<Vec>(bits << 16 | bits >> 16);
}
inline void read_across(const uint16_t *row, int64_t n, float *to) {
  for (; n >= 2 * kWidth; n -= 2 * kWidth, row += 2 * kWidth, to += kWidth) store(to, across(row));
  if (n == 0) return;
  uint16_t part[2 * kWidth] = {};
  memcpy(part, row, n * sizeof(uint16_t));
  store(to, across(part));
}

// n numbers paired with those of the next row, which is null behind the last one; writes whole registers.
inline void read_down(const uint16_t *row, const uint16_t *next, int64_t n, float *to) {
  for (int64_t j = 0; j < n; j += kWidth)
    store(to + j, reinterpret_cast<Vec>(some_bits(row + j, n - j) << 16 | (next ? some_bits(next + j, n - j) : Bits{})));
}
#endif

// Rows [0, n) side by side, kDepth elements apart.
inline void gather_panel(const Rows &rows, int64_t n, float *to) {
  for (int64_t i = 0; i < n; ++i, to += kDepth) {
    if (i + kAhead < n) rows.prefetch(i + kAhead);
#if defined(PC3D_BF16)
    read_across(rows.halves(i, 0), rows.width, to);
#else
    rows.read(i, 0, rows.width, to);
#endif
  }
}

// Numbers [d, d + n) of row i, of pairs beside those of row i + 1.
inline void read_rows(const Rows &rows, int64_t i, int64_t end, int64_t d, int64_t n, float *to) {
#if defined(PC3D_BF16)
  read_down(rows.halves(i, d), i + 1 < end ? rows.halves(i + 1, d) : nullptr, n, to);
#else
  static_cast<void>(end);
  rows.read(i, d, n, to);
#endif
}

// Rows [0, n) side by side, kDepth numbers apart; pairs are of two rows.
inline void gather_rows(const Rows &rows, int64_t n, float *to) {
  for (int64_t i = 0; i < n; i += kPair, to += kDepth) {
    for (int64_t ahead = i + kAhead; ahead < min64(i + kAhead + kPair, n); ++ahead) rows.prefetch(ahead);
    read_rows(rows, i, n, 0, rows.width, to);
  }
}

// Rows [0, n) cut into strips, strip after strip, zero-padded columns; pairs are of two rows.
inline void gather_strips(const Rows &rows, int64_t n, float *to) {
  for (int64_t i = 0; i < n; i += kPair, to += kStrip) {
    for (int64_t ahead = i + kAhead; ahead < min64(i + kAhead + kPair, n); ++ahead) rows.prefetch(ahead);
    float *strip = to;
    int64_t d = 0;
    for (; d + kStrip <= rows.width; d += kStrip, strip += elements(n) * kStrip) read_rows(rows, i, n, d, kStrip, strip);
    if (d < rows.width) {
      memset(strip, 0, kStrip * sizeof(float));
      read_rows(rows, i, n, d, rows.width - d, strip);
    }
  }
}

// Columns [0, columns) of one row of a matrix, zero-padded.
inline void read_row(const float *w, int64_t column, int64_t columns, float *to) {
  if (column == 1) {
    memcpy(to, w, columns * sizeof(float));
  } else {
    for (int64_t j = 0; j < columns; ++j) to[j] = w[j * column];
  }
  memset(to + columns, 0, (kStrip - columns) * sizeof(float));
}

void pack(const float *w, int64_t row, int64_t column, int64_t cin, int64_t cout, int64_t s, float *packed) {
  const int64_t first = s * kStrip, columns = min64(cout - first, kStrip);
  w += first * column;
#if defined(PC3D_BF16)
  float rows[2][kStrip];
  for (int64_t i = 0; i < cin; i += 2, packed += kStrip) {
    for (int64_t r = 0; r < 2; ++r) read_row(w + (i + r) * row, column, i + r < cin ? columns : 0, rows[r]);
    for (int64_t j = 0; j < kStrip; j += kWidth)
      store(packed + j, reinterpret_cast<Vec>(narrow(load(rows[0] + j)) << 16 | narrow(load(rows[1] + j))));
  }
#else
  for (int64_t i = 0; i < cin; ++i, w += row, packed += kStrip) read_row(w, column, columns, packed);
#endif
}

// Rows [row_first, row_last) and columns [first, last) of y, and their sums: in y itself, or beside it where y is bfloat16.
// The sum of (row, column) is at sums[row * stride + column].
struct Target {
  const ConvProduct &p;
  int64_t row_first, row_last, first, last, stride;
  float *sums;

  Target(const ConvProduct &p, int64_t row_first, int64_t row_last, int64_t first, int64_t last, float *beside)
      : p(p),
        row_first(row_first),
        row_last(row_last),
        first(first),
        last(last),
        stride(p.x.bf16 ? last - first : p.cout),
        sums(p.x.bf16 ? beside - row_first * stride - first : static_cast<float *>(p.y)) {}

  void start() const {
    const int64_t bytes = (last - first) * sizeof(float);
    for (int64_t r = row_first; r < row_last; ++r) {
      float *row = sums + r * stride + first;
      if (p.bias)
        memcpy(row, p.bias + first, bytes);
      else
        memset(row, 0, bytes);
    }
  }

  void finish() const {
    if (!p.x.bf16 && !p.scale && !p.residual && !p.relu) return;
    for (int64_t r = row_first; r < row_last; ++r) {
      int64_t c = first;
      for (; c + kWidth <= last; c += kWidth) {
        const Vec value = finished(load(sums + r * stride + c), r, c, kWidth);
        if (p.x.bf16)
          narrow(value, static_cast<uint16_t *>(p.y) + r * p.cout + c);
        else
          store(sums + r * stride + c, value);
      }
      if (c == last) continue;
      float part[kWidth] = {};
      memcpy(part, sums + r * stride + c, (last - c) * sizeof(float));
      const Vec value = finished(load(part), r, c, last - c);
      if (p.x.bf16) {
        uint16_t halves[kWidth];
        narrow(value, halves);
        memcpy(static_cast<uint16_t *>(p.y) + r * p.cout + c, halves, (last - c) * sizeof(uint16_t));
      } else {
        store(part, value);
        memcpy(sums + r * stride + c, part, (last - c) * sizeof(float));
      }
    }
  }

 private:
  static Vec some(const float *from, int64_t n) {
    if (n == kWidth) return load(from);
    float part[kWidth] = {};
    memcpy(part, from, n * sizeof(float));
    return load(part);
  }
  Vec finished(Vec value, int64_t r, int64_t c, int64_t n) const {
    if (p.scale) {
      const Vec scale = some(p.scale + c, n), shift = some(p.shift + c, n);  // first: the compiler fuses only what is side by side
      value = value * scale + shift;
    }
    if (p.residual) {
      float part[kWidth] = {};
      const int32_t row = static_cast<int32_t>(r);
      Rows{{p.residual, p.x.bf16}, p.cout, c, n, &row}.read(0, 0, n, part);
      value += load(part);
    }
    return p.relu ? (value < 0.0f ? Vec{} : value) : value;
  }
};

// The pairs of a tile, panel after panel: kernel offsets ascending, at most kPanelRows pairs of one offset.
struct Panels {
  const ConvProduct &p;
  int64_t first, last;  // granules of the tile
  int64_t kernel = -1, part = 0, begin = 0, rows = 0;
  Split split{0, kPanelRows};

  Panels(const ConvProduct &p, int64_t first, int64_t last) : p(p), first(first), last(last) {}

  bool next() {
    begin += rows;
    if (++part >= split.parts) {
      do {
        if (++kernel == p.kernel_volume) return false;
        const int64_t *starts = p.starts + kernel * (p.granules + 1);
        begin = starts[first];
        split = Split(starts[last] - begin, kPanelRows);
      } while (split.parts == 0);
      part = 0;
    }
    rows = split.size(part);
    return true;
  }
};

void tile(const ConvProduct &p, int64_t first, int64_t last, int64_t strip_first, int64_t strip_last, float *sums) {
  const int64_t strips = (p.cout + kStrip - 1) / kStrip;
  const Target target(p, first * kGranule, min64(last * kGranule, p.rows), strip_first * kStrip, min64(strip_last * kStrip, p.cout), sums);
  target.start();
  alignas(64) float panel[kPanelRows * kDepth];
  Panels now(p, first, last), ahead(p, first, last);
  ahead.next();
  while (now.next()) {
    const bool more = ahead.next();
    const Strip<false> full(now.rows, kStrip), rest(now.rows, p.cout - (strips - 1) * kStrip);
    for (int64_t d = 0; d < p.cin; d += kPair * kDepth) {
      const int64_t channels = min64(p.cin - d, kPair * kDepth);
      gather_panel({p.x, p.cin, d, channels, p.gather + now.begin}, now.rows, panel);
      // The first rows of the next panel travel while this one is multiplied.
      const bool same = d + kPair * kDepth < p.cin;
      if (same || more) {
        const Panels &next = same ? now : ahead;
        const int64_t from = same ? d + kPair * kDepth : 0;
        const Rows rows{p.x, p.cin, from, min64(p.cin - from, kPair * kDepth), p.gather + next.begin};
        for (int64_t i = 0; i < min64(next.rows, kAhead); ++i) rows.prefetch(i);
      }
      for (int64_t s = strip_first; s < strip_last; ++s) {
        const float *weights = p.weights + ((now.kernel * strips + s) * elements(p.cin) + d / kPair) * kStrip;
        (s + 1 < strips ? full : rest).run(panel, weights, elements(channels), target.sums + s * kStrip, p.scatter + now.begin, target.stride);
      }
    }
  }
  target.finish();
}

void weight_grad(const WeightGradPart &p, int64_t first, int64_t last) {
  memset(p.out + first * p.cout, 0, (last - first) * p.cout * sizeof(float));
  alignas(64) float panel[kGradPairs * kDepth];
  alignas(64) float strips[kGradPairs * kGradColumns];
  const Split chunks(p.pairs, kPair * kGradPairs);
  for (int64_t i = 0, begin = 0; i < chunks.parts; begin += chunks.size(i++)) {
    const int64_t n = chunks.size(i);
    gather_rows({p.x, p.cin, first, last - first, p.in_rows + begin}, n, panel);
    for (int64_t group = 0; group < p.cout; group += kGradColumns) {
      const int64_t width = min64(p.cout - group, kGradColumns);
      gather_strips({p.g, p.cout, group, width, p.out_rows + begin}, n, strips);
      for (int64_t d = 0; d < width; d += kStrip) {
        const Strip<true> strip(last - first, min64(width - d, kStrip));
        strip.run(panel, strips + d * elements(n), elements(n), p.out + first * p.cout + group + d, kConsecutive, p.cout);
      }
    }
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
