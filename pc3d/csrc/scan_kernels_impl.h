// Selective scan and causal convolution, written once with vector extensions: a register holds one value of several channels, the states of a
// channel follow each other in memory. A file that includes this defines PC3D_ISA (a namespace name) and PC3D_WIDTH first.
// Only headers without inline functions are included: the linker could otherwise keep a copy compiled for a CPU we are not on.
//
// Every channel is one chain over its tokens, every sum has one owner: results do not depend on the number of threads.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "scan_kernels.h"

namespace pc3d {
namespace PC3D_ISA {

#include "vectors.h"

inline Vec load(const float *p, int64_t lanes) {
  if (lanes == kWidth) return load(p);
  float all[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) all[i] = p[i];
  return load(all);
}
inline void store(float *p, Vec v, int64_t lanes) {
  if (lanes == kWidth) return store(p, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = v[i];
}

// (lanes, state) rows to and from registers.
inline void load_states(const float *p, int64_t state, int64_t lanes, Vec *out) {
  for (int64_t n = 0; n < state; ++n) {
    Vec v{};
    for (int64_t i = 0; i < lanes; ++i) v[i] = p[i * state + n];
    out[n] = v;
  }
}
inline void store_states(float *p, int64_t state, int64_t lanes, const Vec *in) {
  for (int64_t n = 0; n < state; ++n)
    for (int64_t i = 0; i < lanes; ++i) p[i * state + n] = in[n][i];
}
inline void add_states(float *p, int64_t state, int64_t lanes, const Vec *in) {
  for (int64_t n = 0; n < state; ++n)
    for (int64_t i = 0; i < lanes; ++i) p[i * state + n] += in[n][i];
}
inline void add(float *p, Vec v, int64_t lanes) { store(p, load(p, lanes) + v, lanes); }

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// log(1 + exp(x)); above 20 the identity, as in torch.
inline Vec softplus(Vec x) {
  const Vec y = exponential(x < 0.0f ? x : -x), s = y / (y + 2.0f), q = s * s;  // log(1 + y) = 2 artanh(s), s <= 1/3
  Vec p = splat(2.0f / 15);
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  const Vec positive = x > 0.0f ? x : Vec{};
  const Vec soft = p * s + positive;
  return x > 20.0f ? x : soft;
}

// What a block of channels [first, first + lanes) needs of a scan.
struct Block {
  const Scan &scan;
  int64_t first, lanes, group;
  Vec a[256], b[256], c[256], skip, bias;

  Block(const Scan &s, int64_t f, int64_t l) : scan(s), first(f), lanes(l), group(s.groups ? f * s.groups / s.channels : 0) {
    load_states(s.a + f * (s.scalar_a ? 1 : s.state), s.scalar_a ? 1 : s.state, l, a);
    if (!s.groups) {
      load_states(s.b + f * s.state, s.state, l, b);
      load_states(s.c + f * s.state, s.state, l, c);
    }
    skip = s.skip ? load(s.skip + f, l) : Vec{};
    bias = s.bias ? load(s.bias + f, l) : Vec{};
  }
  Vec at(const float *table, int64_t row) const { return load(table + row * scan.channels + first, lanes); }
  void put(float *table, int64_t row, Vec v) const { store(table + row * scan.channels + first, v, lanes); }
  Vec step(int64_t row) const {
    const Vec raw = at(scan.delta, row) + bias;
    return scan.softplus ? softplus(raw) : raw;
  }
  const float *states(const float *table, int64_t index) const {
    return table + (index * scan.channels + first) * scan.state;
  }
  float *states(float *table, int64_t index) const { return table + (index * scan.channels + first) * scan.state; }
  const float *coefficients(const float *table, int64_t row) const {
    return table + (row * scan.groups + group) * scan.state;
  }
  void begin_segment(int64_t segment, Vec *h) const {
    if (scan.initial)
      load_states(states(scan.initial, scan.ids[segment]), scan.state, lanes, h);
    else
      memset(h, 0, scan.state * sizeof(Vec));
  }
};

// One token: h <- exp(step a) h + b x, and the sum of c h. `decay`, when kept, takes exp(step a).
template <bool Grouped, bool ScalarA, bool Keep>
inline Vec advance(const Block &block, int64_t row, Vec step, Vec x, const Vec *before, Vec *h, Vec *decay) {
  const int64_t state = block.scan.state;
  const float *b = Grouped ? block.coefficients(block.scan.b, row) : nullptr;
  const float *c = Grouped ? block.coefficients(block.scan.c, row) : nullptr;
  const Vec shared = ScalarA ? exponential(step * block.a[0]) : Vec{};
  if (ScalarA && Keep) decay[0] = shared;
  Vec y{};
#pragma GCC unroll 2
  for (int64_t n = 0; n < state; ++n) {
    const Vec e = ScalarA ? shared : exponential(step * block.a[n]);
    if (!ScalarA && Keep) decay[n] = e;
    const Vec now = e * before[n] + (Grouped ? b[n] * x : block.b[n] * x);
    h[n] = now;
    y += Grouped ? c[n] * now : block.c[n] * now;
  }
  return y;
}

template <bool Grouped, bool ScalarA>
void forward_tiles(const Scan &scan, const ScanTile *tiles, int64_t count, float *saved, int64_t first, int64_t lanes) {
  const Block block(scan, first, lanes);
  Vec h[256];
  int64_t segment = tiles[0].segment;
  for (int64_t i = 0; i < count; ++i) {
    if (saved && tiles[i].begin != scan.borders[segment])
      store_states(block.states(saved, i), scan.state, lanes, h);
    for (int64_t token = tiles[i].begin; token < tiles[i].end; ++token) {
      const int64_t row = scan.row(token);
      if (token == scan.borders[segment]) block.begin_segment(segment, h);
      const Vec step = block.step(row), u = block.at(scan.u, row);
      Vec y = advance<Grouped, ScalarA, false>(block, row, step, step * u, h, h, nullptr) + block.skip * u;
      if (scan.z) {
        const Vec z = block.at(scan.z, row);
        y *= z * sigmoid(z);
      }
      block.put(scan.y, row, y);
      if (token + 1 == scan.borders[segment + 1]) {
        store_states(block.states(scan.last, scan.ids[segment]), scan.state, lanes, h);
        ++segment;
      }
    }
  }
}

inline int64_t backward_space(int64_t state) {
  // states of a tile and the one before it, decays, sums for B and C; aligned
  return ((2 * kScanTile + 1) + 2 * kScanTile) * state * kWidth + kWidth;
}

template <bool Grouped, bool ScalarA>
void backward_block(const Scan &scan, const ScanTile &tile, const float *saved, int64_t stream, int64_t first, int64_t lanes,
                    Vec *sum_b, Vec *sum_c, Vec *h, Vec *decay) {
  const Block block(scan, first, lanes);
  const int64_t state = scan.state, length = tile.end - tile.begin;
  Vec step[kScanTile], grad[kScanTile], carry[256], sum_a[256] = {}, all_b[256] = {}, all_c[256] = {};
  Vec sum_skip{}, sum_bias{};

  // Forward again, keeping what the way back needs: h[(i + 1) * state] is the state after token i.
  int64_t segment = tile.segment;
  if (tile.begin != scan.borders[segment]) load_states(block.states(saved, 0), state, lanes, h);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t token = tile.begin + i, row = scan.row(token);
    const Vec *before = h + i * state;
    Vec fresh[256];
    if (token == scan.borders[segment]) {
      block.begin_segment(segment, fresh);
      before = fresh;
    }
    const Vec u = block.at(scan.u, row);
    step[i] = block.step(row);
    grad[i] = block.at(scan.grad_y, row);
    Vec y = advance<Grouped, ScalarA, true>(block, row, step[i], step[i] * u, before, h + (i + 1) * state,
                                            decay + i * (ScalarA ? 1 : state));
    if (scan.z) {
      const Vec z = block.at(scan.z, row), gate = sigmoid(z);
      y += block.skip * u;
      block.put(scan.grad_z, row, grad[i] * y * (gate * (1.0f + z * (1.0f - gate))));
      grad[i] *= z * gate;
    }
    if (token + 1 == scan.borders[segment + 1]) ++segment;
  }

  // Back: `carry` is the gradient of the state after the token at hand.
  load_states(block.states(scan.carry, stream), state, lanes, carry);
  for (int64_t i = length - 1; i >= 0; --i) {
    const int64_t token = tile.begin + i, row = scan.row(token);
    if (token + 1 == scan.borders[segment]) {  // the last token of a segment
      --segment;
      if (scan.grad_last)
        load_states(block.states(scan.grad_last, scan.ids[segment]), state, lanes, carry);
      else
        memset(carry, 0, state * sizeof(Vec));
    }
    const bool starts = token == scan.borders[segment];
    const Vec *before = h + i * state, *now = before + state, *e = decay + i * (ScalarA ? 1 : state);
    Vec fresh[256];
    if (starts) {
      block.begin_segment(segment, fresh);
      before = fresh;
    }
    const float *b = Grouped ? block.coefficients(scan.b, row) : nullptr;
    const float *c = Grouped ? block.coefficients(scan.c, row) : nullptr;
    const Vec u = block.at(scan.u, row), x = step[i] * u, g = grad[i];
    Vec inflow{}, grad_step{}, grad_decay{};
#pragma GCC unroll 2
    for (int64_t n = 0; n < state; ++n) {
      const Vec lambda = g * (Grouped ? splat(c[n]) : block.c[n]) + carry[n];
      const Vec into_b = lambda * x, into_c = g * now[n];
      if (Grouped) {
        sum_b[i * state + n] += into_b;
        sum_c[i * state + n] += into_c;
      } else {
        all_b[n] += into_b;
        all_c[n] += into_c;
      }
      inflow += lambda * (Grouped ? splat(b[n]) : block.b[n]);
      const Vec back = lambda * e[ScalarA ? 0 : n], through = back * before[n];
      carry[n] = back;
      if (ScalarA) {
        grad_decay += through;
      } else {
        sum_a[n] += step[i] * through;
        grad_step += block.a[n] * through;
      }
    }
    if (ScalarA) {
      sum_a[0] += step[i] * grad_decay;
      grad_step = block.a[0] * grad_decay;
    }
    grad_step += u * inflow;
    block.put(scan.grad_u, row, step[i] * inflow + block.skip * g);
    sum_skip += g * u;
    if (scan.softplus) {
      const Vec raw = block.at(scan.delta, row) + block.bias;
      grad_step = raw > 20.0f ? grad_step : grad_step * sigmoid(raw);
    }
    block.put(scan.grad_delta, row, grad_step);
    sum_bias += grad_step;
    if (starts && scan.grad_initial) store_states(block.states(scan.grad_initial, scan.ids[segment]), state, lanes, carry);
  }
  store_states(block.states(scan.carry, stream), state, lanes, carry);
  const int64_t rates = ScalarA ? 1 : state;
  add_states(scan.sum_a + (stream * scan.channels + first) * rates, rates, lanes, sum_a);
  if (!Grouped) {
    add_states(block.states(scan.sum_b, stream), state, lanes, all_b);
    add_states(block.states(scan.sum_c, stream), state, lanes, all_c);
  }
  add(scan.sum_skip + stream * scan.channels + first, sum_skip, lanes);
  add(scan.sum_bias + stream * scan.channels + first, sum_bias, lanes);
}

template <bool Grouped, bool ScalarA>
void backward_tile(const Scan &scan, const ScanTile &tile, const float *saved, int64_t stream, int64_t first, int64_t last,
                   float *pairs, float *space) {
  const int64_t size = kScanTile * scan.state, bytes = kWidth * sizeof(float);
  space = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(space) + bytes - 1) / bytes * bytes);
  Vec *sum_b = reinterpret_cast<Vec *>(space), *sum_c = sum_b + size, *decay = sum_c + size, *h = decay + size;
  if (Grouped) memset(sum_b, 0, 2 * size * sizeof(Vec));
  for (int64_t d = first; d < last; d += kWidth)
    backward_block<Grouped, ScalarA>(scan, tile, saved, stream, d, last - d < kWidth ? last - d : kWidth, sum_b, sum_c, h, decay);
  if (Grouped)
    for (int64_t i = 0; i < 2 * size; ++i) pairs[i] = total(sum_b[i]);
}

void forward(const Scan &scan, const ScanTile *tiles, int64_t count, float *saved, int64_t first, int64_t lanes) {
  const auto run = scan.groups ? (scan.scalar_a ? &forward_tiles<true, true> : &forward_tiles<true, false>)
                               : (scan.scalar_a ? &forward_tiles<false, true> : &forward_tiles<false, false>);
  run(scan, tiles, count, saved, first, lanes);
}

void backward(const Scan &scan, const ScanTile &tile, const float *saved, int64_t stream, int64_t first, int64_t last,
              float *pairs, float *space) {
  const auto run = scan.groups ? (scan.scalar_a ? &backward_tile<true, true> : &backward_tile<true, false>)
                               : (scan.scalar_a ? &backward_tile<false, true> : &backward_tile<false, false>);
  run(scan, tile, saved, stream, first, last, pairs, space);
}

// Convolution: tokens outside, channels inside, so that a row stays in the cache while `width` tokens read it.

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline Vec convolve(const Conv &conv, int64_t token, int64_t taps, int64_t channel, int64_t lanes) {
  Vec y = conv.bias ? load(conv.bias + channel, lanes) : Vec{};
  for (int64_t back = 0; back < taps; ++back)
    y += load(conv.weight + (conv.width - 1 - back) * conv.channels + channel, lanes) *
         load(conv.x + conv.row(token - back) * conv.channels + channel, lanes);
  return y;
}

void conv_forward(const Conv &conv, int64_t begin, int64_t end, int64_t segment) {
  for (int64_t token = begin; token < end; ++token) {
    if (token == conv.borders[segment + 1]) ++segment;
    const int64_t taps = smaller(conv.width, token - conv.borders[segment] + 1);
    float *y = conv.y + conv.row(token) * conv.channels;
    for (int64_t d = 0; d < conv.channels; d += kWidth) {
      const int64_t lanes = smaller(kWidth, conv.channels - d);
      const Vec v = convolve(conv, token, taps, d, lanes);
      store(y + d, conv.silu ? v * sigmoid(v) : v, lanes);
    }
  }
}

void conv_backward(const Conv &conv, int64_t begin, int64_t end, int64_t segment, float *sums, float *space) {
  const int64_t channels = conv.channels, width = conv.width;
  int64_t here = segment;
  // `space` takes the gradients before the activation, of the tokens that the last ones reach in their segment too.
  for (int64_t token = begin; token < smaller(end + width - 1, conv.tokens); ++token) {
    if (token == conv.borders[here + 1]) {
      if (token >= end) break;
      ++here;
    }
    const int64_t row = conv.row(token), taps = smaller(width, token - conv.borders[here] + 1);
    for (int64_t d = 0; d < channels; d += kWidth) {
      const int64_t lanes = smaller(kWidth, channels - d);
      Vec g = load(conv.grad_y + row * channels + d, lanes);
      if (conv.silu) {
        const Vec v = convolve(conv, token, taps, d, lanes), gate = sigmoid(v);
        g *= gate * (1.0f + v * (1.0f - gate));
      }
      store(space + (token - begin) * channels + d, g, lanes);
      if (token >= end) continue;
      for (int64_t back = 0; back < taps; ++back)
        add(sums + (width - 1 - back) * channels + d, g * load(conv.x + conv.row(token - back) * channels + d, lanes), lanes);
      add(sums + width * channels + d, g, lanes);
    }
  }
  for (int64_t token = begin; token < end; ++token) {
    if (token == conv.borders[segment + 1]) ++segment;
    const int64_t ahead = smaller(width, conv.borders[segment + 1] - token);
    for (int64_t d = 0; d < channels; d += kWidth) {
      const int64_t lanes = smaller(kWidth, channels - d);
      Vec g{};
      for (int64_t k = 0; k < ahead; ++k)
        g += load(conv.weight + (width - 1 - k) * channels + d, lanes) * load(space + (token + k - begin) * channels + d, lanes);
      store(conv.grad_x + conv.row(token) * channels + d, g, lanes);
    }
  }
}

}  // namespace PC3D_ISA
}  // namespace pc3d
