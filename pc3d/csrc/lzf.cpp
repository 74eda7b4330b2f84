// LZF, the byte compression of `DATA binary_compressed` PCD files.
//
// A stream is a row of two kinds of records. A control byte c < 32 is followed by c + 1 literal bytes. Any other control byte holds a length
// in its upper three bits (7: one more byte is added to it) and, with the byte after that, a distance of 13 bits: copy length + 2 bytes that
// start distance + 1 bytes back in the output, where source and target may overlap.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace nb = nanobind;

namespace pc3d {
namespace {

constexpr size_t kMaxLiterals = 32;
constexpr size_t kMaxDistance = 1 << 13;
constexpr size_t kMaxMatch = 2 + 7 + 255;
constexpr int kHashBits = 15;

// Returns the number of bytes written, or -1 when the stream is damaged or does not fit.
ptrdiff_t decompress(const uint8_t *in, size_t in_size, uint8_t *out, size_t out_size) {
  size_t i = 0, o = 0;
  while (i < in_size) {
    const size_t control = in[i++];
    if (control < kMaxLiterals) {
      const size_t run = control + 1;
      if (in_size - i < run || out_size - o < run) return -1;
      std::memcpy(out + o, in + i, run);
      i += run;
      o += run;
      continue;
    }
    size_t length = control >> 5;
    if (length == 7) {
      if (i == in_size) return -1;
      length += in[i++];
    }
    length += 2;
    if (i == in_size) return -1;
    const size_t distance = ((control & 31) << 8 | in[i++]) + 1;
    if (distance > o || out_size - o < length) return -1;
    for (const uint8_t *from = out + o - distance, *end = from + length; from < end;) out[o++] = *from++;
  }
  return static_cast<ptrdiff_t>(o);
}

void put_literals(std::vector<uint8_t> &out, const uint8_t *from, const uint8_t *to) {
  while (from < to) {
    const size_t run = std::min<size_t>(kMaxLiterals, to - from);
    out.push_back(static_cast<uint8_t>(run - 1));
    out.insert(out.end(), from, from + run);
    from += run;
  }
}

void put_match(std::vector<uint8_t> &out, size_t length, size_t distance) {
  const size_t code = length - 2, back = distance - 1;
  if (code < 7) {
    out.push_back(static_cast<uint8_t>(code << 5 | back >> 8));
  } else {
    out.push_back(static_cast<uint8_t>(7 << 5 | back >> 8));
    out.push_back(static_cast<uint8_t>(code - 7));
  }
  out.push_back(static_cast<uint8_t>(back & 255));
}

// Greedy: the latest earlier place with the same three bytes is taken when it is near enough.
std::vector<uint8_t> compress(const uint8_t *in, size_t size) {
  std::vector<uint8_t> out;
  out.reserve(size + size / kMaxLiterals + 1);
  std::vector<size_t> latest(size_t{1} << kHashBits, SIZE_MAX);
  size_t pending = 0, i = 0;
  while (i + 2 < size) {
    const uint32_t key = in[i] | in[i + 1] << 8 | in[i + 2] << 16;
    size_t &slot = latest[(key * 2654435761u) >> (32 - kHashBits)];
    const size_t candidate = slot;
    slot = i;
    if (candidate == SIZE_MAX || i - candidate > kMaxDistance || std::memcmp(in + candidate, in + i, 3) != 0) {
      ++i;
      continue;
    }
    const size_t limit = std::min(kMaxMatch, size - i);
    size_t length = 3;
    while (length < limit && in[candidate + length] == in[i + length]) ++length;
    put_literals(out, in + pending, in + i);
    put_match(out, length, i - candidate);
    pending = i += length;
  }
  put_literals(out, in + pending, in + size);
  return out;
}

}  // namespace

void register_lzf(nb::module_ &m) {
  m.def(
      "lzf_decompress",
      [](nb::bytes data, size_t size) {
        std::vector<uint8_t> out(size);
        ptrdiff_t written;
        {
          nb::gil_scoped_release release;
          written = decompress(reinterpret_cast<const uint8_t *>(data.c_str()), data.size(), out.data(), size);
        }
        if (written != static_cast<ptrdiff_t>(size)) throw std::invalid_argument("LZF data are damaged");
        return nb::bytes(reinterpret_cast<const char *>(out.data()), size);
      },
      nb::arg("data"), nb::arg("size"), "The `size` bytes that `data` holds; ValueError if it does not hold exactly that many.");
  m.def(
      "lzf_compress",
      [](nb::bytes data) {
        std::vector<uint8_t> out;
        {
          nb::gil_scoped_release release;
          out = compress(reinterpret_cast<const uint8_t *>(data.c_str()), data.size());
        }
        return nb::bytes(reinterpret_cast<const char *>(out.data()), out.size());
      },
      nb::arg("data"), "LZF stream of `data`; at worst 1/32 longer.");
}

}  // namespace pc3d
