// Micro-kernels of sparse convolution, written once with vector extensions. A file that includes this defines first
//   PC3D_ISA (a namespace name), PC3D_WIDTH (floats per register), PC3D_ROWS (rows of a register block), and PC3D_BF16 for
//   products of bfloat16: an element of panels and packed weights is then a pair of numbers, the first in the upper half.
//   PC3D_AMX, beside that, makes blocks of matrix tiles.
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Every output element is one chain of multiply-adds: offsets ascending, channels ascending. So neither the tile, the
// thread count nor the register width changes a bit of the result. Matrix tiles sum the channels of an offset apart, and
// then add them: other bits than those of registers, but the same for every tile and thread count.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) || defined(PC3D_AMX)
#include <immintrin.h>
#endif

#include "conv_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

constexpr int64_t kWidth = PC3D_WIDTH, kRows = PC3D_ROWS, kStrip = 2 * kWidth;
constexpr int64_t kDepth = 2048 / kWidth;  // elements of one pass: a strip of weights takes 16 KiB, half of a first-level cache
constexpr int64_t kPanel = 60 * 256;   // elements gathered before the next strip of columns, at most, and
constexpr int64_t kPanelRows = 504;    // rows
constexpr int64_t kGradRows = 128;     // rows of a weight gradient made together, from
constexpr int64_t kGradPairs = 192;    // elements of pairs at a time
constexpr int64_t kGradColumns = 256;  // columns packed beside them
constexpr int64_t kAhead = 12;         // rows prefetched ahead of their use

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
#if defined(PC3D_AMX)
constexpr int64_t kStep = 32;  // numbers that a packed weight is filled up to a multiple of: the width of a tile
#else
constexpr int64_t kStep = kPair;
#endif
inline int64_t elements(int64_t numbers) { return (numbers + kPair - 1) / kPair; }
inline int64_t packed_elements(int64_t numbers) { return (numbers + kStep - 1) / kStep * (kStep / kPair); }

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

// The left operand of a block: (r, d) is at at[index[r] * stride + d], rows of a matrix where they lie, or, when packed
// (weight gradient: d is a pair, r a channel), at at[d * kRows + r].
struct Left {
  const float *at;
  const int32_t *index;
  int64_t stride;
};

#if defined(PC3D_AMX)
constexpr int64_t kTile = 16;          // rows of a tile, of 16 elements each
constexpr int64_t kBeyond = kTile - 1;  // rows that a block may read after its last

// The tiles of a thread, all whole: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;
};

// sums(r, c) = sum over d of a(r, d) * b(d, c), for NR tiles of rows and NV of columns.
template <int NR, int NV>
void multiply(const float *a, int64_t stride, const float *b, int64_t depth, float *sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < depth; d += kTile, b += kTile * kStrip) {
    _tile_loadd(4, a + d, stride * 4);
    if (NR == 2) _tile_loadd(5, a + kTile * stride + d, stride * 4);
    _tile_loadd(6, b, kStrip * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (NR == 2) _tile_dpbf16ps(2, 5, 6);
    if (NV < 2) continue;
    _tile_loadd(7, b + kWidth, kStrip * 4);
    _tile_dpbf16ps(1, 4, 7);
    if (NR == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kStrip * 4);
  if (NV == 2) _tile_stored(1, sums + kWidth, kStrip * 4);
  if (NR == 2) _tile_stored(2, sums + kTile * kStrip, kStrip * 4);
  if (NR == 2 && NV == 2) _tile_stored(3, sums + kTile * kStrip + kWidth, kStrip * 4);
}

// Row rows[r] of y, columns [0, NV * kWidth), plus the sum over d of left(r, d) * b[d][:], for R rows.
template <int R, int NV, bool Packed>
void block(const Left &left, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride) {
  static_assert(!Packed, "rows of numbers side by side");
  alignas(64) float sums[2 * kTile * kStrip];
  multiply<(R + kTile - 1) / kTile, NV>(left.at + left.index[0] * left.stride, left.stride, b, depth, sums);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV * kWidth; v += kWidth) store(y + rows[r] * stride + v, load(y + rows[r] * stride + v) + load(sums + r * kStrip + v));
}
#else
constexpr int64_t kBeyond = 0;

// Row rows[r] of y, columns [0, NV * kWidth), plus the sum over d of left(r, d) * b[d][:], for R rows.
template <int R, int NV, bool Packed>
void block(const Left &left, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride) {
  const float *a[R];
  float *c[R];
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = Packed ? left.at + r : left.at + left.index[r] * left.stride;
    c[r] = y + rows[r] * stride;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = load(c[r] + v * kWidth);
    if (!Packed) asm("" : "+r"(a[r]));  // or compilers keep differences of the pointers, and add them up at every step
  }
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float s = a[r][Packed ? d * kRows : d];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) add_product(s, column[v], acc[r][v]);
    }
    b += kStrip;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(c[r] + v * kWidth, acc[r][v]);
}
#endif

using Block = void (*)(const Left &, const float *, int64_t, float *, const int32_t *, int64_t);

// 0, 1, 2 and so on.
struct Count {
  int32_t values[kPanelRows];
  constexpr Count() : values() {
    for (int32_t i = 0; i < kPanelRows; ++i) values[i] = i;
  }
};
constexpr Count kCount;

template <int NV, bool Packed, int R = kRows>
Block find_block(int64_t rows) {
  if constexpr (R > 1) {
    if (rows != R) return find_block<NV, Packed, R - 1>(rows);
  }
  return &block<R, NV, Packed>;
}

// Splits [0, n) into the fewest parts of at most `most`, as equal as they come (11 + 11 + 10 instead of 12 + 12 + 8), the
// larger ones first.
struct Split {
  int64_t parts, small, larger;  // `larger` parts of small + 1, then the rest of `small`
  Split(int64_t n, int64_t most) : parts((n + most - 1) / most), small(n / (parts ? parts : 1)), larger(n - parts * small) {}
  int64_t size(int64_t i) const { return small + (i < larger); }
};

constexpr int64_t whole_registers(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// A packed part: kRows channels of n elements of pairs, one after the other, written with whole registers.
constexpr int64_t kWhole = whole_registers(kRows);
constexpr int64_t part_size(int64_t n) { return n * kRows + kWhole; }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows [from, to) of a left operand, if there are so many, on their way to the cache.
inline void prefetch(const Left &left, int64_t from, int64_t to, int64_t depth) {
  for (int64_t r = from; r < to; ++r) {
    const char *row = reinterpret_cast<const char *>(left.at + left.index[r] * left.stride);
    for (int64_t byte = 0; byte < depth * 4; byte += 64) __builtin_prefetch(row + byte);
  }
}

// Blocks of rows times one strip of columns, at most one strip wide.
template <bool Packed>
struct Strip {
  int64_t columns;
  Split split;
  Block larger, smaller;
  Strip(const Split &split, int64_t columns) : columns(columns), split(split), larger(find(split.small + 1)), smaller(find(split.small)) {}

  // `following`: how many rows the index of `left` still has; those ahead of the blocks are prefetched.
  void run(Left left, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride, int64_t following = 0) const {
    for (int64_t i = 0; i < split.parts; ++i) {
      const int64_t n = split.size(i);
      prefetch(left, kAhead, min64(kAhead + n, following), depth);
      const Block f = i < split.larger ? larger : smaller;
      if (columns % kWidth == 0)
        f(left, b, depth, y, rows, stride);
      else
        run_copied(f, left, b, depth, y, rows, stride, n);
      if (Packed)
        left.at += part_size(depth), y += n * stride;
      else
        left.index += n, rows += n, following -= n;
    }
  }

 private:
  Block find(int64_t rows) const { return columns <= kWidth ? find_block<1, Packed>(rows) : find_block<2, Packed>(rows); }

  // A strip that ends inside a register goes through a local copy.
  void run_copied(Block f, Left left, const float *b, int64_t depth, float *y, const int32_t *rows, int64_t stride, int64_t n) const {
    float part[kRows * kStrip] = {};
    for (int64_t r = 0; r < n; ++r) memcpy(part + r * kStrip, y + rows[r] * stride, columns * sizeof(float));
    f(left, b, depth, part, kCount.values, kStrip);
    for (int64_t r = 0; r < n; ++r) memcpy(y + rows[r] * stride, part + r * kStrip, columns * sizeof(float));
  }
};

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
  // Row i, where it lies or, of bfloat16, in `wide`.
  const float *floats(int64_t i, float *wide) const {
    if (!matrix.bf16) return reinterpret_cast<const float *>(address(i, 0));
    widen(halves(i, 0), width, wide);
    return wide;
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
inline Vec down(const uint16_t *row, const uint16_t *next, int64_t j, int64_t n) {
  return reinterpret_cast<Vec>(some_bits(row + j, n - j) << 16 | (next ? some_bits(next + j, n - j) : Bits{}));
}
inline void read_down(const uint16_t *row, const uint16_t *next, int64_t n, float *to) {
  for (int64_t j = 0; j < n; j += kWidth) store(to + j, down(row, next, j, n));
}
#endif

// Rows [0, n) side by side, `stride` elements apart.
inline void gather_panel(const Rows &rows, int64_t n, int64_t stride, float *to) {
  for (int64_t i = 0; i < n; ++i, to += stride) {
    if (i + kAhead < n) rows.prefetch(i + kAhead);
#if defined(PC3D_BF16)
    read_across(rows.halves(i, 0), rows.width, to);
#else
    rows.read(i, 0, rows.width, to);
#endif
  }
}

// Row i, where it lies or in `wide`; of pairs beside row i + 1, which is none where that is n.
inline const float *elements_of(const Rows &rows, int64_t i, int64_t n, float *wide) {
#if defined(PC3D_BF16)
  read_down(rows.halves(i, 0), i + 1 < n ? rows.halves(i + 1, 0) : nullptr, rows.width, wide);
  return wide;
#else
  static_cast<void>(n);
  return rows.floats(i, wide);
#endif
}

inline void prefetch_ahead(const Rows &rows, int64_t i, int64_t end) {
  for (int64_t ahead = i + kAhead; ahead < min64(i + kAhead + kPair, end); ++ahead) rows.prefetch(ahead);
}

// Rows [0, n) cut into strips of `depth` elements, strip after strip, zero-padded; pairs are of two rows. The index goes on to
// `end`.
inline void gather_strips(const Rows &rows, int64_t n, int64_t end, int64_t depth, float *to) {
  alignas(64) float wide[kGradColumns];
  for (int64_t i = 0; i < n; i += kPair, to += kStrip) {
    prefetch_ahead(rows, i, end);
    const float *from = elements_of(rows, i, n, wide);
    float *strip = to;
    int64_t d = 0;
    for (; d + kStrip <= rows.width; d += kStrip, strip += depth * kStrip) copy(from + d, kStrip, strip);
    if (d < rows.width) {
      memset(strip, 0, kStrip * sizeof(float));
      copy(from + d, rows.width - d, strip);
    }
  }
  const int64_t missing = (depth - elements(n)) * kStrip;
  for (int64_t d = 0; missing && d < rows.width; d += kStrip, to += depth * kStrip) memset(to, 0, missing * sizeof(float));
}

// Rows [0, n) cut into the parts of `split`, part after part; pairs are of two rows. The index goes on to `end`.
inline void gather_parts(const Rows &rows, const Split &split, int64_t n, int64_t end, float *to) {
  alignas(64) float wide[kGradRows];
  for (int64_t i = 0; i < n; i += kPair, to += kRows) {
    prefetch_ahead(rows, i, end);
    const float *from = elements_of(rows, i, n, wide), *last = from + rows.width;
    float *part = to;
    for (int64_t j = 0; j < split.parts; from += split.size(j++), part += part_size(elements(n)))
      copy(from, from + kWhole <= last ? kWhole : split.size(j), part);
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
  for (int64_t i = 0; i < kPair * packed_elements(cin); i += 2, packed += kStrip) {
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

void tile(const ConvProduct &p, int64_t first, int64_t last, int64_t strip_first, int64_t strip_last, float *sums) {
  const int64_t strips = (p.cout + kStrip - 1) / kStrip;
  const Target target(p, first * kGranule, min64(last * kGranule, p.rows), strip_first * kStrip, min64(strip_last * kStrip, p.cout), sums);
  target.start();
#if defined(PC3D_AMX)
  const Tiles tiles;
#endif
  alignas(64) float panel[kPanel + kBeyond * kDepth];
  const int64_t stride = whole_registers(min64(elements(p.cin), kDepth));
  const int64_t most = min64(kPanel / stride / kRows * kRows, kPanelRows);
  for (int64_t k = 0; k < p.kernel_volume; ++k) {
    const int64_t *starts = p.starts + k * (p.granules + 1), end = starts[last];
    const Split panels(end - starts[first], most);
    for (int64_t i = 0, begin = starts[first]; i < panels.parts; begin += panels.size(i++)) {
      const Split blocks(panels.size(i), kRows);
      const Strip<false> full(blocks, kStrip), rest(blocks, p.cout - (strips - 1) * kStrip);
      for (int64_t d = 0; d < p.cin; d += kPair * kDepth) {
        const int64_t channels = min64(p.cin - d, kPair * kDepth), depth = elements(channels);
        Left left{panel, kCount.values, stride};
        if (p.x.bf16)
          gather_panel({p.x, p.cin, d, channels, p.gather + begin}, panels.size(i), stride, panel);
        else
          left = {static_cast<const float *>(p.x.data) + d, p.gather + begin, p.cin};
        for (int64_t s = strip_first; s < strip_last; ++s) {
          const float *weights = p.weights + ((k * strips + s) * packed_elements(p.cin) + d / kPair) * kStrip;
          const int64_t following = s == strip_first && !p.x.bf16 && depth >= 16 ? end - begin : 0;
          (s + 1 < strips ? full : rest).run(left, weights, depth, target.sums + s * kStrip, p.scatter + begin, target.stride, following);
        }
      }
    }
  }
  target.finish();
}

#if defined(PC3D_AMX)
// Element c of register r becomes element r of register c.
inline void transpose(__m512 *v) {
  __m512 pairs[16], fours[16];
  const auto low = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  const auto high = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  for (int i = 0; i < 16; i += 2) pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    fours[i] = low(pairs[i], pairs[i + 2]), fours[i + 1] = high(pairs[i], pairs[i + 2]);
    fours[i + 2] = low(pairs[i + 1], pairs[i + 3]), fours[i + 3] = high(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88), odd = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xDD);
    const __m512 even_after = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88), odd_after = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xDD);
    v[i] = _mm512_shuffle_f32x4(even, even_after, 0x88), v[8 + i] = _mm512_shuffle_f32x4(even, even_after, 0xDD);
    v[4 + i] = _mm512_shuffle_f32x4(odd, odd_after, 0x88), v[12 + i] = _mm512_shuffle_f32x4(odd, odd_after, 0xDD);
  }
}

// Rows [0, n) as columns: element d of channel r, a pair of two rows, at to[r * kGradPairs + d], zero-padded to whole tiles. The
// index goes on to `end`.
inline void gather_channels(const Rows &rows, int64_t n, int64_t end, float *to) {
  for (int64_t i = 0; i < n; i += kPair * kTile, to += kTile) {
    for (int64_t ahead = i; ahead < min64(i + kPair * kTile, n); ahead += kPair) prefetch_ahead(rows, ahead, end);
    for (int64_t j = 0; j < rows.width; j += kTile) {
      __m512 block[kTile];
      for (int64_t d = 0; d < kTile; ++d) {
        const int64_t row = i + kPair * d;
        block[d] = row < n ? down(rows.halves(row, 0), row + 1 < n ? rows.halves(row + 1, 0) : nullptr, j, rows.width) : Vec{};
      }
      transpose(block);
      for (int64_t r = 0; r < kTile; ++r) store(to + (j + r) * kGradPairs, block[r]);
    }
  }
}

// Adds the products of the pairs [begin, end) to the rows [first, last) of `out`.
void add_pairs(const WeightGrad &p, int64_t begin, int64_t end, int64_t first, int64_t last, float *out) {
  static_assert(kGradRows % kRows == 0 && kGradPairs % kTile == 0);
  alignas(64) float panel[kGradRows * kGradPairs], strips[kGradPairs * kGradColumns], sums[kRows * kStrip];
  const Split chunks(end - begin, kPair * kGradPairs);
  for (int64_t i = 0; i < chunks.parts; begin += chunks.size(i++)) {
    const int64_t n = chunks.size(i), depth = (elements(n) + kTile - 1) / kTile * kTile;
    gather_channels({p.x, p.cin, first, last - first, p.gather + begin}, n, end - begin, panel);
    for (int64_t group = 0; group < p.cout; group += kGradColumns) {
      const int64_t width = min64(p.cout - group, kGradColumns);
      gather_strips({p.g, p.cout, group, width, p.scatter + begin}, n, end - begin, depth, strips);
      for (int64_t d = 0; d < width; d += kStrip) {
        const int64_t columns = min64(width - d, kStrip);
        for (int64_t r = first; r < last; r += kRows) {
          const float *channels = panel + (r - first) * kGradPairs, *strip = strips + d * depth;
          const int64_t rows = min64(last - r, kRows);
          if (rows > kTile)
            columns > kWidth ? multiply<2, 2>(channels, kGradPairs, strip, depth, sums) : multiply<2, 1>(channels, kGradPairs, strip, depth, sums);
          else
            columns > kWidth ? multiply<1, 2>(channels, kGradPairs, strip, depth, sums) : multiply<1, 1>(channels, kGradPairs, strip, depth, sums);
          for (int64_t row = 0; row < rows; ++row) {
            float *const to = out + (r + row) * p.cout + group + d;
            int64_t c = 0;
            for (; c + kWidth <= columns; c += kWidth) store(to + c, load(to + c) + load(sums + row * kStrip + c));
            for (; c < columns; ++c) to[c] += sums[row * kStrip + c];
          }
        }
      }
    }
  }
}
#else
// Adds the products of the pairs [begin, end) to the rows [first, last) of `out`.
void add_pairs(const WeightGrad &p, int64_t begin, int64_t end, int64_t first, int64_t last, float *out) {
  alignas(64) float panel[(kGradRows + kRows - 1) / kRows * part_size(kGradPairs)];
  alignas(64) float strips[kGradPairs * kGradColumns];
  const Split chunks(end - begin, kPair * kGradPairs), parts(last - first, kRows);
  for (int64_t i = 0; i < chunks.parts; begin += chunks.size(i++)) {
    const int64_t n = chunks.size(i);
    gather_parts({p.x, p.cin, first, last - first, p.gather + begin}, parts, n, end - begin, panel);
    for (int64_t group = 0; group < p.cout; group += kGradColumns) {
      const int64_t width = min64(p.cout - group, kGradColumns);
      gather_strips({p.g, p.cout, group, width, p.scatter + begin}, n, end - begin, elements(n), strips);
      for (int64_t d = 0; d < width; d += kStrip)
        Strip<true>(parts, min64(width - d, kStrip))
            .run({panel, nullptr, 0}, strips + d * elements(n), elements(n), out + first * p.cout + group + d, kCount.values, p.cout);
    }
  }
}

#endif

// Offset by offset over so many rows at a time that their features stay in the cache for all offsets, and that the sums of
// an offset, which do not, are worth fetching.
void weight_grad(const WeightGrad &p, int64_t kernel_first, int64_t kernel_last, int64_t first, int64_t last) {
#if defined(PC3D_AMX)
  const Tiles tiles;
#endif
  const int64_t step = 4 + (p.cin + p.cout) / 16;
  for (int64_t granule = 0; granule < p.granules; granule += step) {
    const int64_t next = min64(granule + step, p.granules);
    for (int64_t k = kernel_first; k < kernel_last; ++k) {
      const int64_t *starts = p.starts + k * (p.granules + 1);
      float *out = p.out + k * p.cin * p.cout;
      if (granule == 0) memset(out + first * p.cout, 0, (last - first) * p.cout * sizeof(float));
      add_pairs(p, starts[granule], starts[next], first, last, out);
    }
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
