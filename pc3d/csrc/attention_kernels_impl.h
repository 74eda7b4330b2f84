// Attention inside a window, written once with vector extensions. A file that includes this defines first
//   PC3D_ISA (a namespace name), PC3D_WIDTH (floats per register).
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Keys and values of a head are laid out in strips: kStrip keys beside each other, channel after channel. kQueries queries
// walk over blocks of keys, with the largest score and the sum so far (Dao et al. 2022, FlashAttention, arXiv 2205.14135), so
// that what they touch stays in the first-level cache. Scores are in units of ln 2: powers of two are cheaper. Every sum has
// one owner: results do not depend on the number of threads.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "attention_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

#include "vectors.h"

constexpr int64_t kStrip = 2 * kWidth;  // keys
constexpr int64_t kBlock = 256;         // keys
constexpr int kQueries = 6;
constexpr float kNever = -1e30f;  // score of a key that is not there
constexpr float kLog2 = 0.693147180559945f;

inline int64_t padded(int64_t length) { return (length + kStrip - 1) / kStrip * kStrip; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of a table, point after point, into strips; keys that are not there are zero.
void pack(const float *table, int64_t stride, const int64_t *rows, int64_t length, int64_t width, float *packed) {
  for (int64_t begin = 0; begin < length; begin += kStrip, packed += width * kStrip)
    for (int64_t i = 0; i < kStrip; ++i) {
      const float *row = begin + i < length ? table + rows[begin + i] * stride : nullptr;
      for (int64_t d = 0; d < width; ++d) packed[d * kStrip + i] = row ? row[d] : 0.0f;
    }
}

// products[r] = sum over d of queries[d][r] * keys[d], for one strip.
inline void multiply(const float *queries, const float *keys, int64_t width, Vec (&products)[kQueries][2]) {
#pragma GCC unroll 6
  for (int r = 0; r < kQueries; ++r) products[r][0] = products[r][1] = Vec{};
  for (int64_t d = 0; d < width; ++d) {
    const Vec first = load(keys), second = load(keys + kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kQueries; ++r) {
      products[r][0] += queries[r] * first;
      products[r][1] += queries[r] * second;
    }
    keys += kStrip, queries += kQueries;
  }
}

// Scores of the queries with one strip of keys, of which `there` exist.
inline void score(const float *queries, const float *keys, int64_t width, int64_t there, float *scores, Vec (&tile)[kQueries][2]) {
  multiply(queries, keys, width, tile);
#pragma GCC unroll 6
  for (int r = 0; r < kQueries; ++r) {
    store(scores + r * kBlock, tile[r][0]);
    store(scores + r * kBlock + kWidth, tile[r][1]);
  }
  if (there >= kStrip) return;
  for (int r = 0; r < kQueries; ++r) {
    for (int64_t i = there; i < kStrip; ++i) scores[r * kBlock + i] = kNever;
    tile[r][0] = load(scores + r * kBlock), tile[r][1] = load(scores + r * kBlock + kWidth);
  }
}

// sums[d][r] += weights[r][key] * values[key][d] over a block of keys, lane by lane, for channels [0, Channels).
template <int Channels>
void reduce(const float *weights, int64_t keys, const float *values, int64_t width, float *sums) {
  Vec sum[kQueries][Channels];
#pragma GCC unroll 6
  for (int r = 0; r < kQueries; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < Channels; ++c) sum[r][c] = load(sums + (c * kQueries + r) * kWidth);
  for (int64_t key = 0; key < keys; key += kStrip, values += width * kStrip)
    for (int half = 0; half < 2; ++half) {
      Vec value[Channels];
#pragma GCC unroll 2
      for (int c = 0; c < Channels; ++c) value[c] = load(values + c * kStrip + half * kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < kQueries; ++r) {
        const Vec weight = held(load(weights + r * kBlock + key + half * kWidth));
#pragma GCC unroll 2
        for (int c = 0; c < Channels; ++c) sum[r][c] += weight * value[c];
      }
    }
#pragma GCC unroll 6
  for (int r = 0; r < kQueries; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < Channels; ++c) store(sums + (c * kQueries + r) * kWidth, sum[r][c]);
}

// The same for all channels: `sums` is (width, kQueries) registers.
inline void add_weighted(const float *weights, int64_t keys, const float *values, int64_t width, float *sums) {
  int64_t d = 0;
  for (; d + 2 <= width; d += 2) reduce<2>(weights, keys, values + d * kStrip, width, sums + d * kQueries * kWidth);
  if (d < width) reduce<1>(weights, keys, values + d * kStrip, width, sums + d * kQueries * kWidth);
}

// into[strip][d] += sum over r of queries[d][r] * weights[r][strip], over a block of keys.
inline void spread(const float *queries, const float *weights, int64_t keys, int64_t width, float *into) {
  for (int64_t key = 0; key < keys; key += kStrip) {
    Vec first[kQueries], second[kQueries];
#pragma GCC unroll 6
    for (int r = 0; r < kQueries; ++r) {
      first[r] = load(weights + r * kBlock + key);
      second[r] = load(weights + r * kBlock + key + kWidth);
    }
    const float *query = queries;
    for (int64_t d = 0; d < width; ++d, query += kQueries, into += kStrip) {
      Vec a = load(into), b = load(into + kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < kQueries; ++r) {
        a += query[r] * first[r];
        b += query[r] * second[r];
      }
      store(into, a);
      store(into + kWidth, b);
    }
  }
}

// Up to kQueries slots whose queries count: the own slots of their points.
struct Queries {
  int64_t points[kQueries];
  int count = 0;

  // Takes the next ones from `slot` on; returns where to go on.
  int64_t take(const Attention &attention, int64_t slot, int64_t end) {
    for (count = 0; slot < end && count < kQueries; ++slot) {
      const int64_t point = attention.rows[slot];
      if (attention.slots[point] == slot) points[count++] = point;
    }
    return slot;
  }
  // (width, kQueries), times `factor`; zero for those that are not there.
  void gather(const float *table, int64_t stride, int64_t offset, int64_t width, float factor, float *out) const {
    for (int r = 0; r < kQueries; ++r)
      for (int64_t d = 0; d < width; ++d) out[d * kQueries + r] = r < count ? table[points[r] * stride + offset + d] * factor : 0.0f;
  }
};

int64_t space(int64_t length, int64_t width) {
  return 4 * padded(length) * width + 2 * kQueries * kBlock + (kWidth + 2) * kQueries * width;
}

void forward(const Attention &attention, const Window &window, int64_t head, float *keys) {
  const int64_t width = attention.width, offset = head * width, length = window.length, size = padded(length) * width;
  const int64_t *rows = attention.rows + window.begin;
  float *values = keys + size, *weights = values + size, *queries = weights + kQueries * kBlock, *sums = queries + kQueries * width;
  pack(attention.k + offset, attention.k_stride, rows, length, width, keys);
  pack(attention.v + offset, attention.v_stride, rows, length, width, values);

  Queries chosen;
  for (int64_t slot = window.begin, end = window.begin + length; slot < end;) {
    slot = chosen.take(attention, slot, end);
    if (!chosen.count) break;
    chosen.gather(attention.q, attention.q_stride, offset, width, attention.scale / kLog2, queries);
    memset(sums, 0, kQueries * width * sizeof(Vec));
    float top[kQueries];
    Vec share[kQueries];
    for (int r = 0; r < kQueries; ++r) top[r] = kNever, share[r] = Vec{};
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      const int64_t stop = smaller(kBlock, padded(length - begin));
      Vec best[kQueries];
      for (int r = 0; r < kQueries; ++r) best[r] = splat(top[r]);
      for (int64_t key = 0; key < stop; key += kStrip) {
        Vec tile[kQueries][2];
        score(queries, keys + (begin + key) * width, width, length - begin - key, weights + key, tile);
#pragma GCC unroll 6
        for (int r = 0; r < kQueries; ++r) best[r] = larger(best[r], larger(tile[r][0], tile[r][1]));
      }
      for (int r = 0; r < kQueries; ++r) {
        const float now = largest(best[r]);
        if (now != top[r] && begin) {
          const Vec factor = power_of_two(splat(top[r] - now));
          share[r] *= factor;
          for (int64_t d = 0; d < width; ++d) {
            float *sum = sums + (d * kQueries + r) * kWidth;
            store(sum, load(sum) * factor);
          }
        }
        top[r] = now;
        float *row = weights + r * kBlock;
        for (int64_t key = 0; key < stop; key += kStrip) {
          const Vec a = power_of_two(load(row + key) - now), b = power_of_two(load(row + key + kWidth) - now);
          store(row + key, a);
          store(row + key + kWidth, b);
          share[r] += a + b;
        }
      }
      add_weighted(weights, stop, values + begin * width, width, sums);
    }
    for (int r = 0; r < chosen.count; ++r) {
      const int64_t at = chosen.points[r] * attention.heads + head;
      const float inverse = 1.0f / total(share[r]);
      attention.statistics[2 * at] = top[r], attention.statistics[2 * at + 1] = inverse;
      for (int64_t d = 0; d < width; ++d) attention.out[at * width + d] = total(load(sums + (d * kQueries + r) * kWidth)) * inverse;
    }
  }
}

// Packed gradients of keys or values to their points, or to the places of guests.
void unpack(const Attention &attention, const Window &window, int64_t head, const float *packed, float factor, float *grad, float *guest) {
  const int64_t width = attention.width;
  for (int64_t i = 0; i < window.length; ++i) {
    const int64_t slot = window.begin + i, place = attention.guests[slot];
    float *to = place < 0 ? grad + (attention.rows[slot] * attention.heads + head) * width
                          : guest + (place * attention.heads + head) * width;
    const float *from = packed + i / kStrip * kStrip * width + i % kStrip;
    for (int64_t d = 0; d < width; ++d) to[d] = from[d * kStrip] * factor;
  }
}

void backward(const Attention &attention, const Window &window, int64_t head, float *keys) {
  const int64_t width = attention.width, offset = head * width, length = window.length, size = padded(length) * width;
  const int64_t *rows = attention.rows + window.begin;
  float *values = keys + size, *grad_keys = values + size, *grad_values = grad_keys + size;
  float *weights = grad_values + size, *grad_scores = weights + kQueries * kBlock;
  float *queries = grad_scores + kQueries * kBlock, *grads = queries + kQueries * width, *sums = grads + kQueries * width;
  pack(attention.k + offset, attention.k_stride, rows, length, width, keys);
  pack(attention.v + offset, attention.v_stride, rows, length, width, values);
  memset(grad_keys, 0, 2 * size * sizeof(float));

  Queries chosen;
  for (int64_t slot = window.begin, end = window.begin + length; slot < end;) {
    slot = chosen.take(attention, slot, end);
    if (!chosen.count) break;
    chosen.gather(attention.q, attention.q_stride, offset, width, attention.scale / kLog2, queries);
    chosen.gather(attention.grad, attention.heads * width, offset, width, 1.0f, grads);
    memset(sums, 0, kQueries * width * sizeof(Vec));
    float top[kQueries] = {}, share[kQueries] = {}, along[kQueries] = {};  // `along`: what all scores rising together would give
    for (int r = 0; r < chosen.count; ++r) {
      const int64_t at = chosen.points[r] * attention.heads + head;
      top[r] = attention.statistics[2 * at], share[r] = attention.statistics[2 * at + 1];
      for (int64_t d = 0; d < width; ++d) along[r] += attention.grad[at * width + d] * attention.out[at * width + d];
    }
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      const int64_t stop = smaller(kBlock, padded(length - begin));
      for (int64_t key = 0; key < stop; key += kStrip) {
        Vec tile[kQueries][2];
        score(queries, keys + (begin + key) * width, width, length - begin - key, weights + key, tile);
        multiply(grads, values + (begin + key) * width, width, tile);
        for (int r = 0; r < kQueries; ++r)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const int64_t at = r * kBlock + key + half * kWidth;
            const Vec weight = power_of_two(load(weights + at) - top[r]) * share[r];
            store(weights + at, weight);
            store(grad_scores + at, weight * (tile[r][half] - along[r]));
          }
      }
      add_weighted(grad_scores, stop, keys + begin * width, width, sums);
      spread(queries, grad_scores, stop, width, grad_keys + begin * width);
      spread(grads, weights, stop, width, grad_values + begin * width);
    }
    for (int r = 0; r < chosen.count; ++r) {
      float *out = attention.grad_q + (chosen.points[r] * attention.heads + head) * width;
      for (int64_t d = 0; d < width; ++d) out[d] = total(load(sums + (d * kQueries + r) * kWidth)) * attention.scale;
    }
  }
  unpack(attention, window, head, grad_keys, kLog2, attention.grad_k, attention.guest_k);
  unpack(attention, window, head, grad_values, 1.0f, attention.grad_v, attention.guest_v);
}

}  // namespace PC3D_ISA
}  // namespace pc3d
