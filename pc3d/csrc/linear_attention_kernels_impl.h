// Linear attention inside a window, written once with vector extensions. A file that includes this defines first
//   PC3D_ISA (a namespace name), PC3D_WIDTH (floats per register).
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Rows are taken in chunks that stay in the first-level cache, as (rows, padded width) tables; everything costly is a product
// of two of these, or of one and the state.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "linear_attention_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

#include "vectors.h"

constexpr int64_t kRows = 64;  // of a chunk
constexpr int kTile = 4;       // rows of a product that are computed together
enum Part { kQuery, kKey, kValue };

inline int64_t padded(int64_t width) { return (width + kWidth - 1) / kWidth * kWidth; }
inline float rectified(float x) { return x <= 0.0f ? 0.0f : x; }  // NaN stays

// Element (row, term) of the left factor of a product.
struct Factor {
  const float *data;
  int64_t row_stride, term_stride;
};

// out[r][c] (+)= sum over t of left(r, t) * right[t][c] for Rows rows and Vectors registers of columns; tables are `stride` wide.
template <int Rows, int Vectors>
void multiply_tile(Factor left, const float *right, int64_t terms, int64_t stride, bool add, float *out) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? load(out + r * stride + v * kWidth) : Vec{};
  for (int64_t t = 0; t < terms; ++t) {
    Vec column[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) column[v] = held(load(right + t * stride + v * kWidth));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float factor = left.data[r * left.row_stride + t * left.term_stride];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(out + r * stride + v * kWidth, sum[r][v]);
}

template <int Rows>
void multiply_rows(Factor left, const float *right, int64_t terms, int64_t stride, bool add, float *out) {
  int64_t column = 0;
  for (; column + 2 * kWidth <= stride; column += 2 * kWidth)
    multiply_tile<Rows, 2>(left, right + column, terms, stride, add, out + column);
  if (column < stride) multiply_tile<Rows, 1>(left, right + column, terms, stride, add, out + column);
}

void multiply(Factor left, int64_t rows, const float *right, int64_t terms, int64_t stride, bool add, float *out) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile, left.data += kTile * left.row_stride)
    multiply_rows<kTile>(left, right, terms, stride, add, out + r * stride);
  for (; r < rows; ++r, left.data += left.row_stride) multiply_rows<1>(left, right, terms, stride, add, out + r * stride);
}

// One head of the attention, and its tables.
struct Head {
  const LinearAttention &attention;
  int64_t head, width, stride;  // stride: the padded width

  Head(const LinearAttention &attention, int64_t head)
      : attention(attention), head(head), width(attention.width), stride(padded(attention.width)) {}

  int64_t row(int64_t point) const { return (point * attention.heads + head) * width; }
  int64_t row(int64_t point, Part part) const { return ((point * 3 + part) * attention.heads + head) * width; }

  // Rows of q, k or v, rectified but for v; zeros beyond the width.
  void read(Part part, int64_t begin, int64_t rows, float *table) const {
    for (int64_t i = 0; i < rows; ++i, table += stride) {
      const float *__restrict from = attention.qkv + row(begin + i, part);
      if (part == kValue)
        for (int64_t d = 0; d < width; ++d) table[d] = from[d];
      else
        for (int64_t d = 0; d < width; ++d) table[d] = rectified(from[d]);
      for (int64_t d = width; d < stride; ++d) table[d] = 0.0f;
    }
  }
  // A table as the left factor: row by row, or transposed.
  Factor rows_of(const float *table) const { return {table, stride, 1}; }
  Factor columns_of(const float *table) const { return {table, 1, stride}; }
  const float *key_sum(const float *state) const { return state + width * stride; }
  float *key_sum(float *state) const { return state + width * stride; }

  float dot(const float *a, const float *b) const {
    Vec sum{};
    for (int64_t d = 0; d < stride; d += kWidth) sum += load(a + d) * load(b + d);
    return total(sum);
  }
  void add_scaled(const float *a, float factor, float *to) const {
    for (int64_t d = 0; d < stride; d += kWidth) store(to + d, load(to + d) + factor * load(a + d));
  }
  // a + factor * b where the ReLU let `rectified` pass, else 0; in the place of a.
  void add_where_passed(float *a, const float *b, float factor, const float *rectified) const {
    for (int64_t d = 0; d < stride; d += kWidth) {
      const Vec sum = load(a + d) + factor * load(b + d);
      store(a + d, load(rectified + d) == 0.0f ? Vec{} : sum);
    }
  }
  void write(const float *from, float *to) const { memcpy(to, from, width * sizeof(float)); }
  // (width, stride) transposed, zeros beyond the width.
  void transpose(const float *state, float *to) const {
    for (int64_t e = 0; e < width; ++e)
      for (int64_t d = 0; d < stride; ++d) to[e * stride + d] = d < width ? state[d * stride + e] : 0.0f;
  }
};

int64_t state_size(int64_t width) { return (width + 1) * padded(width); }
int64_t space(int64_t width) { return (4 * kRows + width) * padded(width); }

void sum(const LinearAttention &attention, int64_t begin, int64_t end, int64_t number, float *state, float *keys) {
  const Head head(attention, number);
  float *values = keys + kRows * head.stride;
  memset(state, 0, state_size(head.width) * sizeof(float));
  for (; begin < end; begin += kRows) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    head.read(kKey, begin, rows, keys);
    head.read(kValue, begin, rows, values);
    multiply(head.columns_of(keys), head.width, values, rows, head.stride, true, state);
    for (int64_t i = 0; i < rows; ++i) head.add_scaled(keys + i * head.stride, 1.0f, head.key_sum(state));
  }
}

void forward(const LinearAttention &attention, int64_t begin, int64_t end, int64_t number, const float *state, float *queries) {
  const Head head(attention, number);
  float *results = queries + kRows * head.stride;
  for (; begin < end; begin += kRows) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    head.read(kQuery, begin, rows, queries);
    multiply(head.rows_of(queries), rows, state, head.width, head.stride, false, results);
    for (int64_t i = 0; i < rows; ++i) {
      const float *from = results + i * head.stride;
      const float inverse = 1.0f / (head.dot(queries + i * head.stride, head.key_sum(state)) + attention.eps);
      float *__restrict to = attention.out + head.row(begin + i);
      for (int64_t d = 0; d < head.width; ++d) to[d] = from[d] * inverse;
    }
  }
}

// The gradient of numerator n and denominator s of y = n / s is g / s and -(g y) / s; both are linear in q and in the state.
void query_grad(const LinearAttention &attention, int64_t begin, int64_t end, int64_t number, const float *state, float *grad_state,
                float *queries) {
  const Head head(attention, number);
  const int64_t size = kRows * head.stride;
  float *grads = queries + size, *results = grads + size, *errors = results + size, *transposed = errors + size;
  head.transpose(state, transposed);
  memset(grad_state, 0, state_size(head.width) * sizeof(float));
  for (; begin < end; begin += kRows) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    head.read(kQuery, begin, rows, queries);
    multiply(head.rows_of(queries), rows, state, head.width, head.stride, false, results);
    for (int64_t i = 0; i < rows; ++i) {
      const float *query = queries + i * head.stride, *upstream = attention.grad + head.row(begin + i);
      float *__restrict grad = grads + i * head.stride;
      const float inverse = 1.0f / (head.dot(query, head.key_sum(state)) + attention.eps);
      for (int64_t d = 0; d < head.width; ++d) grad[d] = upstream[d] * inverse;
      for (int64_t d = head.width; d < head.stride; ++d) grad[d] = 0.0f;
      errors[i] = -head.dot(grad, results + i * head.stride) * inverse;
      head.add_scaled(query, errors[i], head.key_sum(grad_state));
    }
    multiply(head.columns_of(queries), head.width, grads, rows, head.stride, true, grad_state);
    multiply(head.rows_of(grads), rows, transposed, head.width, head.stride, false, results);
    for (int64_t i = 0; i < rows; ++i) {
      float *grad = results + i * head.stride;
      head.add_where_passed(grad, head.key_sum(state), errors[i], queries + i * head.stride);
      head.write(grad, attention.grad_qkv + head.row(begin + i, kQuery));
    }
  }
}

void key_grad(const LinearAttention &attention, int64_t begin, int64_t end, int64_t number, const float *grad_state, float *keys) {
  const Head head(attention, number);
  const int64_t size = kRows * head.stride;
  float *values = keys + size, *grad_keys = values + size, *grad_values = grad_keys + size, *transposed = grad_values + size;
  const float *grad_sum = head.key_sum(grad_state);
  head.transpose(grad_state, transposed);
  for (; begin < end; begin += kRows) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    head.read(kKey, begin, rows, keys);
    head.read(kValue, begin, rows, values);
    multiply(head.rows_of(keys), rows, grad_state, head.width, head.stride, false, grad_values);
    multiply(head.rows_of(values), rows, transposed, head.width, head.stride, false, grad_keys);
    for (int64_t i = 0; i < rows; ++i) {
      float *grad = grad_keys + i * head.stride;
      head.add_where_passed(grad, grad_sum, 1.0f, keys + i * head.stride);
      head.write(grad, attention.grad_qkv + head.row(begin + i, kKey));
      head.write(grad_values + i * head.stride, attention.grad_qkv + head.row(begin + i, kValue));
    }
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
