// Selective scan and causal convolution on the CPU: streams of segments, the parallel loops around the kernels, and the Python functions.
//
// The segments (clouds) are dealt, in order, to at most kStreams streams of about equal length; a stream is walked tile by
// tile, forward with the state in registers, backward with the gradient of the state handed from tile to tile. Streams and
// channels are independent. Streams, tiles and the order of every sum depend on the input alone, not on the threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "array.h"
#include "isa.h"
#include "module.h"
#include "parallel.h"
#include "scan_kernels.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr int64_t kStreams = 16, kStreamTokens = 1024;

template <int Dimensions>
using Floats = Array<const float, Dimensions>;
template <int Dimensions>
using Maybe = std::optional<Array<const float, Dimensions>>;

const std::vector<const ScanKernels *> &usable() {
  static const auto kernels = usable_kernels(scan_kernels_avx512(), scan_kernels_avx2(), scan_kernels_generic());
  return kernels;
}

// A state that has decayed below the smallest normal number is zero: arithmetic on denormal numbers is slow.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

struct Stream {
  int64_t first_tile, last_tile;
};

// The walk over the tokens: segments that have any, streams of them, and tiles.
struct Walk {
  std::vector<int64_t> borders, ids;
  std::vector<Stream> streams;
  std::vector<ScanTile> tiles;

  Walk(const int64_t *offsets, int64_t segments, int64_t tokens, bool reverse) : borders{0} {
    if (segments < 0 || offsets[0] != 0 || offsets[segments] != tokens) throw std::invalid_argument("offsets must rise from 0 to the number of tokens");
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t id = reverse ? segments - 1 - i : i, length = offsets[id + 1] - offsets[id];
      if (length < 0) throw std::invalid_argument("offsets must rise from 0 to the number of tokens");
      if (length == 0) continue;
      borders.push_back(borders.back() + length);
      ids.push_back(id);
    }
    const int64_t count = std::max<int64_t>(1, std::min(kStreams, tokens / kStreamTokens));
    int64_t segment = 0;
    for (int64_t s = 0; s < count && segment < static_cast<int64_t>(ids.size()); ++s) {
      const int64_t first = segment, target = tokens * (s + 1) / count;
      while (segment < static_cast<int64_t>(ids.size()) && (borders[segment + 1] <= target || segment == first)) ++segment;
      add_stream(first, s + 1 == count ? segment = static_cast<int64_t>(ids.size()) : segment);
    }
  }

 private:
  void add_stream(int64_t first, int64_t last) {
    const int64_t before = static_cast<int64_t>(tiles.size());
    int64_t segment = first;
    for (int64_t begin = borders[first]; begin < borders[last]; begin += kScanTile) {
      while (borders[segment + 1] <= begin) ++segment;
      tiles.push_back({begin, std::min(begin + kScanTile, borders[last]), segment});
    }
    streams.push_back({before, static_cast<int64_t>(tiles.size())});
  }
};

template <class Tensor>
auto data(const std::optional<Tensor> &tensor) -> decltype(tensor->data()) {
  return tensor ? tensor->data() : nullptr;
}

template <class Tensor>
bool has_shape(const Tensor &tensor, std::initializer_list<int64_t> shape) {
  size_t i = 0;
  for (int64_t size : shape)
    if (static_cast<int64_t>(tensor.shape(i++)) != size) return false;
  return true;
}

struct Inputs {
  Floats<2> u, delta;
  Floats<2> a;
  Floats<3> b, c;  // (tokens, groups, state), or (1, channels, state) when constant
  Maybe<1> skip;
  Maybe<2> z;
  Maybe<1> bias;
  Maybe<3> initial;
  bool constant, softplus, reverse;
};

Scan describe(const Inputs &in, const Walk &walk, int64_t segments) {
  Scan scan{};
  scan.tokens = in.u.shape(0), scan.channels = in.u.shape(1), scan.state = in.b.shape(2);
  scan.groups = in.constant ? 0 : in.b.shape(1);
  scan.scalar_a = in.a.shape(1) == 1 && scan.state != 1;
  const int64_t rows = in.constant ? 1 : scan.tokens, columns = in.constant ? scan.channels : scan.groups;
  const bool fits = has_shape(in.delta, {scan.tokens, scan.channels}) && has_shape(in.a, {scan.channels, scan.scalar_a ? 1 : scan.state}) &&
                    has_shape(in.b, {rows, columns, scan.state}) && has_shape(in.c, {rows, columns, scan.state}) &&
                    (!in.skip || has_shape(*in.skip, {scan.channels})) && (!in.bias || has_shape(*in.bias, {scan.channels})) &&
                    (!in.z || has_shape(*in.z, {scan.tokens, scan.channels})) &&
                    (!in.initial || has_shape(*in.initial, {segments, scan.channels, scan.state}));
  if (!fits || scan.state < 1 || scan.state > 256 || (scan.groups && scan.channels % scan.groups))
    throw std::invalid_argument("the tensors of the scan do not fit each other");
  scan.u = in.u.data(), scan.delta = in.delta.data(), scan.z = data(in.z);
  scan.a = in.a.data(), scan.b = in.b.data(), scan.c = in.c.data();
  scan.skip = data(in.skip), scan.bias = data(in.bias), scan.initial = data(in.initial);
  scan.softplus = in.softplus, scan.reverse = in.reverse;
  scan.borders = walk.borders.data(), scan.ids = walk.ids.data();
  return scan;
}

// Blocks of channels, none across groups.
struct Channels {
  int64_t first, last;
};
std::vector<Channels> split_channels(const Scan &scan, int64_t size) {
  std::vector<Channels> blocks;
  const int64_t groups = std::max<int64_t>(1, scan.groups), per_group = scan.channels / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t d = 0; d < per_group; d += size)
      blocks.push_back({g * per_group + d, g * per_group + std::min(d + size, per_group)});
  return blocks;
}

int64_t scan_tiles(Array<const int64_t, 1> offsets, bool reverse) {
  const int64_t segments = static_cast<int64_t>(offsets.shape(0)) - 1;
  return static_cast<int64_t>(Walk(offsets.data(), segments, offsets.data()[segments], reverse).tiles.size());
}

void scan_forward(Floats<2> u, Floats<2> delta, Floats<2> a, Floats<3> b, Floats<3> c, Maybe<1> skip, Maybe<2> z, Maybe<1> bias,
                  Maybe<3> initial, Array<const int64_t, 1> offsets, bool constant, bool softplus, bool reverse,
                  Array<float, 2> y, Array<float, 3> last, std::optional<Array<float, 3>> saved, const std::string &isa) {
  const ScanKernels &kernels = find_kernels(usable(), isa);
  const int64_t segments = static_cast<int64_t>(offsets.shape(0)) - 1;
  const Walk walk(offsets.data(), segments, u.shape(0), reverse);
  Scan scan = describe({u, delta, a, b, c, skip, z, bias, initial, constant, softplus, reverse}, walk, segments);
  if (!has_shape(y, {scan.tokens, scan.channels}) || !has_shape(last, {segments, scan.channels, scan.state}) ||
      (saved && !has_shape(*saved, {static_cast<int64_t>(walk.tiles.size()), scan.channels, scan.state})))
    throw std::invalid_argument("the results of the scan do not fit its inputs");
  scan.y = y.data(), scan.last = last.data();
  nb::gil_scoped_release release;
  const std::vector<Channels> blocks = split_channels(scan, kernels.width);
  const int64_t count = static_cast<int64_t>(blocks.size());
  parallel_tasks(static_cast<int64_t>(walk.streams.size()) * count, [&](int64_t i) {
    const FlushDenormals flush;
    const Stream &stream = walk.streams[i / count];
    const Channels &block = blocks[i % count];
    float *states = saved ? saved->data() + stream.first_tile * scan.channels * scan.state : nullptr;
    kernels.forward(scan, walk.tiles.data() + stream.first_tile, stream.last_tile - stream.first_tile, states, block.first,
                    block.last - block.first);
  });
}

// out[i] = the sum over streams of parts[stream][i], streams in order.
void add_streams(const std::vector<float> &parts, int64_t size, float *out) {
  const int64_t streams = static_cast<int64_t>(parts.size()) / std::max<int64_t>(size, 1);
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0;
    for (int64_t s = 0; s < streams; ++s) sum += parts[s * size + i];
    out[i] = sum;
  }
}

void scan_backward(Floats<2> grad_y, Maybe<3> grad_last, Floats<2> u, Floats<2> delta, Floats<2> a, Floats<3> b, Floats<3> c,
                   Maybe<1> skip, Maybe<2> z, Maybe<1> bias, Maybe<3> initial, Array<const int64_t, 1> offsets, Floats<3> saved,
                   bool constant, bool softplus, bool reverse, Array<float, 2> grad_u, Array<float, 2> grad_delta,
                   Array<float, 2> grad_a, Array<float, 3> grad_b, Array<float, 3> grad_c, Array<float, 1> grad_skip,
                   Array<float, 1> grad_bias, std::optional<Array<float, 2>> grad_z,
                   std::optional<Array<float, 3>> grad_initial, const std::string &isa) {
  const ScanKernels &kernels = find_kernels(usable(), isa);
  const int64_t segments = static_cast<int64_t>(offsets.shape(0)) - 1;
  const Walk walk(offsets.data(), segments, u.shape(0), reverse);
  Scan scan = describe({u, delta, a, b, c, skip, z, bias, initial, constant, softplus, reverse}, walk, segments);
  const int64_t streams = static_cast<int64_t>(walk.streams.size()), rates = a.shape(1), matrix = scan.channels * scan.state;
  const bool fits = has_shape(grad_y, {scan.tokens, scan.channels}) && has_shape(grad_u, {scan.tokens, scan.channels}) &&
                    has_shape(grad_delta, {scan.tokens, scan.channels}) && has_shape(grad_a, {scan.channels, rates}) &&
                    has_shape(saved, {static_cast<int64_t>(walk.tiles.size()), scan.channels, scan.state}) &&
                    grad_b.size() == b.size() && grad_c.size() == c.size() && has_shape(grad_skip, {scan.channels}) &&
                    has_shape(grad_bias, {scan.channels}) && (!z || (grad_z && grad_z->size() == u.size())) &&
                    (!initial || (grad_initial && grad_initial->size() == initial->size())) &&
                    (!grad_last || has_shape(*grad_last, {segments, scan.channels, scan.state}));
  if (!fits) throw std::invalid_argument("the gradients of the scan do not fit its inputs");
  scan.grad_y = grad_y.data(), scan.grad_last = data(grad_last);
  scan.grad_u = grad_u.data(), scan.grad_delta = grad_delta.data();
  scan.grad_z = grad_z ? grad_z->data() : nullptr, scan.grad_initial = grad_initial ? grad_initial->data() : nullptr;
  nb::gil_scoped_release release;
  std::vector<float> carry(streams * matrix), sum_a(streams * scan.channels * rates), sum_b, sum_c, sum_skip(streams * scan.channels),
      sum_bias(streams * scan.channels);
  if (constant) sum_b.resize(streams * matrix), sum_c.resize(streams * matrix);
  scan.carry = carry.data(), scan.sum_a = sum_a.data(), scan.sum_b = sum_b.data(), scan.sum_c = sum_c.data();
  scan.sum_skip = sum_skip.data(), scan.sum_bias = sum_bias.data();

  const std::vector<Channels> blocks = split_channels(scan, kernels.width * kScanBlocks);
  const int64_t count = static_cast<int64_t>(blocks.size()), pairs_size = constant ? 0 : 2 * kScanTile * scan.state;
  const std::unique_ptr<float[]> pairs(new float[std::max<int64_t>(1, streams * count * pairs_size)]);
  int64_t steps = 0;
  for (const Stream &s : walk.streams) steps = std::max(steps, s.last_tile - s.first_tile);
  // All streams take one tile at a time, from their ends, so that the sums over channels are of one tile only.
  for (int64_t step = 0; step < steps; ++step) {
    parallel_tasks(streams * count, [&](int64_t i) {
      const int64_t s = i / count, tile = walk.streams[s].last_tile - 1 - step;
      if (tile < walk.streams[s].first_tile) return;
      const FlushDenormals flush;
      thread_local std::vector<float> space;
      space.resize(kernels.backward_space(scan.state));
      const Channels &block = blocks[i % count];
      kernels.backward(scan, walk.tiles[tile], saved.data() + tile * matrix, s, block.first, block.last,
                       pairs.get() + i * pairs_size, space.data());
    });
    if (constant) continue;
    const int64_t groups = scan.groups, per_group = count / groups;
    parallel_tasks(streams * groups, [&](int64_t i) {
      const int64_t s = i / groups, g = i % groups, tile = walk.streams[s].last_tile - 1 - step;
      if (tile < walk.streams[s].first_tile) return;
      const float *parts = pairs.get() + (s * count + g * per_group) * pairs_size;
      for (int64_t t = 0; t < walk.tiles[tile].end - walk.tiles[tile].begin; ++t) {
        const int64_t to = (scan.row(walk.tiles[tile].begin + t) * groups + g) * scan.state;
        for (int64_t n = 0; n < scan.state; ++n) {
          float total_b = 0, total_c = 0;
          for (int64_t block = 0; block < per_group; ++block) {
            const float *part = parts + block * pairs_size + t * scan.state + n;
            total_b += part[0];
            total_c += part[kScanTile * scan.state];
          }
          grad_b.data()[to + n] = total_b;
          grad_c.data()[to + n] = total_c;
        }
      }
    });
  }
  add_streams(sum_a, scan.channels * rates, grad_a.data());
  add_streams(sum_skip, scan.channels, grad_skip.data());
  add_streams(sum_bias, scan.channels, grad_bias.data());
  if (constant) {
    add_streams(sum_b, matrix, grad_b.data());
    add_streams(sum_c, matrix, grad_c.data());
  }
}

// Convolution: stretches of tokens, as many as the input asks for and not the threads; each sums its own gradients.

constexpr int64_t kStretches = 64;

struct Stretch {
  int64_t begin, end, segment;
};
std::vector<Stretch> stretches(const Walk &walk, int64_t tokens) {
  const int64_t length = std::max(kConvTile, (tokens + kStretches - 1) / kStretches);
  std::vector<Stretch> all;
  int64_t segment = 0;
  for (int64_t begin = 0; begin < tokens; begin += length) {
    while (walk.borders[segment + 1] <= begin) ++segment;
    all.push_back({begin, std::min(begin + length, tokens), segment});
  }
  return all;
}

Conv describe_conv(Floats<2> x, Floats<2> weight, const Maybe<1> &bias, bool silu, bool reverse, const Walk &walk) {
  Conv conv{};
  conv.tokens = x.shape(0), conv.channels = x.shape(1), conv.width = weight.shape(0);
  if (conv.width < 1 || static_cast<int64_t>(weight.shape(1)) != conv.channels || (bias && !has_shape(*bias, {conv.channels})))
    throw std::invalid_argument("the tensors of the convolution do not fit each other");
  conv.x = x.data(), conv.weight = weight.data(), conv.bias = data(bias);
  conv.silu = silu, conv.reverse = reverse, conv.borders = walk.borders.data();
  return conv;
}

void conv1d_forward(Floats<2> x, Floats<2> weight, Maybe<1> bias, Array<const int64_t, 1> offsets, bool silu, bool reverse,
                    Array<float, 2> y, const std::string &isa) {
  const ScanKernels &kernels = find_kernels(usable(), isa);
  const Walk walk(offsets.data(), static_cast<int64_t>(offsets.shape(0)) - 1, x.shape(0), reverse);
  Conv conv = describe_conv(x, weight, bias, silu, reverse, walk);
  if (!has_shape(y, {conv.tokens, conv.channels})) throw std::invalid_argument("the result of the convolution does not fit its input");
  conv.y = y.data();
  nb::gil_scoped_release release;
  const std::vector<Stretch> all = stretches(walk, conv.tokens);
  parallel_tasks(static_cast<int64_t>(all.size()), [&](int64_t i) {
    const FlushDenormals flush;
    kernels.conv_forward(conv, all[i].begin, all[i].end, all[i].segment);
  });
}

void conv1d_backward(Floats<2> grad_y, Floats<2> x, Floats<2> weight, Maybe<1> bias, Array<const int64_t, 1> offsets, bool silu,
                     bool reverse, Array<float, 2> grad_x, Array<float, 2> grad_weight, Array<float, 1> grad_bias,
                     const std::string &isa) {
  const ScanKernels &kernels = find_kernels(usable(), isa);
  const Walk walk(offsets.data(), static_cast<int64_t>(offsets.shape(0)) - 1, x.shape(0), reverse);
  Conv conv = describe_conv(x, weight, bias, silu, reverse, walk);
  if (!has_shape(grad_y, {conv.tokens, conv.channels}) || !has_shape(grad_x, {conv.tokens, conv.channels}) ||
      !has_shape(grad_weight, {conv.width, conv.channels}) || !has_shape(grad_bias, {conv.channels}))
    throw std::invalid_argument("the gradients of the convolution do not fit its inputs");
  conv.grad_y = grad_y.data(), conv.grad_x = grad_x.data();
  nb::gil_scoped_release release;
  const std::vector<Stretch> all = stretches(walk, conv.tokens);
  const int64_t count = static_cast<int64_t>(all.size()), size = (conv.width + 1) * conv.channels;
  std::vector<float> sums(count * size), total(size);
  parallel_tasks(count, [&](int64_t i) {
    const FlushDenormals flush;
    thread_local std::vector<float> space;
    space.resize((kConvTile + conv.width - 1) * conv.channels);
    int64_t segment = all[i].segment;
    for (int64_t begin = all[i].begin; begin < all[i].end; begin += kConvTile) {
      while (walk.borders[segment + 1] <= begin) ++segment;
      kernels.conv_backward(conv, begin, std::min(begin + kConvTile, all[i].end), segment, sums.data() + i * size, space.data());
    }
  });
  add_streams(sums, size, total.data());
  std::copy(total.begin(), total.end() - conv.channels, grad_weight.data());
  std::copy(total.end() - conv.channels, total.end(), grad_bias.data());
}

}  // namespace

void register_scan(nb::module_ &m) {
  m.def("scan_isas", [] { return names_of(usable()); }, "Instruction sets of the scan kernels usable here, fastest first.");
  m.def("scan_tiles", &scan_tiles, nb::arg("offsets"), nb::arg("reverse"), "States that scan_forward saves for scan_backward.");
  m.def("scan_forward", &scan_forward, nb::arg("u"), nb::arg("delta"), nb::arg("a"), nb::arg("b"), nb::arg("c"),
        nb::arg("skip").none(), nb::arg("z").none(), nb::arg("bias").none(), nb::arg("initial").none(), nb::arg("offsets"),
        nb::arg("constant"), nb::arg("softplus"), nb::arg("reverse"), nb::arg("y"), nb::arg("last"), nb::arg("saved").none(),
        nb::arg("isa") = "", "Selective scan of packed float32 tokens; writes `last` of segments that have tokens only.");
  m.def("scan_backward", &scan_backward, nb::arg("grad_y"), nb::arg("grad_last").none(), nb::arg("u"), nb::arg("delta"),
        nb::arg("a"), nb::arg("b"), nb::arg("c"), nb::arg("skip").none(), nb::arg("z").none(), nb::arg("bias").none(),
        nb::arg("initial").none(), nb::arg("offsets"), nb::arg("saved"), nb::arg("constant"), nb::arg("softplus"),
        nb::arg("reverse"), nb::arg("grad_u"), nb::arg("grad_delta"), nb::arg("grad_a"), nb::arg("grad_b"), nb::arg("grad_c"),
        nb::arg("grad_skip"), nb::arg("grad_bias"), nb::arg("grad_z").none(), nb::arg("grad_initial").none(), nb::arg("isa") = "",
        "Gradients of scan_forward; `grad_initial` of segments without tokens is left alone.");
  m.def("conv1d_forward", &conv1d_forward, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("offsets"),
        nb::arg("silu"), nb::arg("reverse"), nb::arg("y"), nb::arg("isa") = "",
        "Causal depth-wise convolution of packed float32 tokens; weight (width, channels), the last row for the token itself.");
  m.def("conv1d_backward", &conv1d_backward, nb::arg("grad_y"), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("offsets"), nb::arg("silu"), nb::arg("reverse"), nb::arg("grad_x"), nb::arg("grad_weight"), nb::arg("grad_bias"),
        nb::arg("isa") = "", "Gradients of conv1d_forward.");
}

}  // namespace pc3d
