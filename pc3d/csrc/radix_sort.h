#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "array.h"
#include "parallel.h"

namespace pc3d {

// Number of bits that hold every value up to `largest`.
inline int bit_length(uint64_t largest) {
  int bits = 0;
  while (bits < 64 && largest >> bits) ++bits;
  return bits;
}

// A key and the row it came from; PackedRow holds both in one word where they fit, which halves the traffic of a sort.
struct KeyedRow {
  uint64_t key_;
  int64_t row_;
  static KeyedRow make(uint64_t key, int64_t row, int) { return {key, row}; }
  uint64_t key(int) const { return key_; }
  int64_t row(int) const { return row_; }
};
struct PackedRow {
  uint64_t word;
  static PackedRow make(uint64_t key, int64_t row, int row_bits) { return {key << row_bits | static_cast<uint64_t>(row)}; }
  uint64_t key(int row_bits) const { return word >> row_bits; }
  int64_t row(int row_bits) const { return static_cast<int64_t>(word & ((uint64_t{1} << row_bits) - 1)); }
};

constexpr int64_t kSortChunk = 1 << 15;  // rows worth a thread of their own

inline int sort_digit_bits(int key_bits, int64_t rows) {
  const int widest = std::clamp(bit_length(rows) - 3, 6, 11);  // a histogram much longer than the data costs more than a pass
  const int passes = (key_bits + widest - 1) / widest;
  return (key_bits + passes - 1) / passes;
}

// Stable sort by the low `key_bits` bits of the keys, least significant digit first. Stability fixes the result, so it does
// not depend on the number of threads. `other` is as long as `items` and left with anything.
template <class Item>
void radix_sort(Buffer<Item> &items, Buffer<Item> &other, int key_bits, int row_bits) {
  const int64_t rows = items.size();
  if (key_bits == 0 || rows < 2) return;
  const int digit_bits = sort_digit_bits(key_bits, rows), passes = (key_bits + digit_bits - 1) / digit_bits;
  const int64_t buckets = int64_t{1} << digit_bits;
  const uint64_t mask = static_cast<uint64_t>(buckets - 1);
  const int64_t chunks = std::clamp<int64_t>(rows / kSortChunk, 1, num_threads());
  const auto border = [&](int64_t chunk) { return rows * chunk / chunks; };
  std::vector<int64_t> starts((chunks > 1 ? chunks : passes) * buckets);
  if (chunks == 1)  // the digits of all passes are counted in one: the order does not matter
    for (int64_t i = 0; i < rows; ++i) {
      uint64_t key = items[i].key(row_bits);
      for (int64_t *counts = starts.data(), *end = counts + passes * buckets; counts < end; counts += buckets, key >>= digit_bits) ++counts[key & mask];
    }
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit = [&](const Item &item) { return (item.key(row_bits) >> pass * digit_bits) & mask; };
    int64_t *const first = starts.data() + (chunks > 1 ? 0 : pass * buckets);
    if (chunks > 1) {
      std::fill(starts.begin(), starts.end(), 0);
      parallel_tasks(chunks, [&](int64_t chunk) {
        for (int64_t i = border(chunk), end = border(chunk + 1); i < end; ++i) ++first[chunk * buckets + digit(items[i])];
      });
    }
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += std::exchange(first[chunk * buckets + bucket], total);
    parallel_tasks(chunks, [&](int64_t chunk) {
      int64_t *next = first + chunk * buckets;
      for (int64_t i = border(chunk), end = border(chunk + 1); i < end; ++i) other[next[digit(items[i])]++] = items[i];
    });
    std::swap(items, other);
  }
}

template <class Item>
void radix_sort(Buffer<Item> &items, int key_bits, int row_bits) {
  if (key_bits == 0 || items.size() < 2) return;
  Buffer<Item> other(items.size());
  radix_sort(items, other, key_bits, row_bits);
}

}  // namespace pc3d
