#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace pc3d {

template <class T, int Dimensions>
using Array = nanobind::ndarray<T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

#if defined(__linux__)
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLargeBlock = kHugePage / 2;

// Large blocks that a thread has freed and keeps for itself, 64 MiB at most: to get fresh pages costs as much as a pass over them.
struct KeptBlocks {
  static constexpr int kPlaces = 16;
  static constexpr size_t kMost = size_t{64} << 20;
  void *memory[kPlaces];
  size_t bytes[kPlaces], total;
  unsigned next;  // place of the one that goes first
  bool closed;  // at the end of the thread, after which others may still free blocks
};
inline thread_local KeptBlocks kept_blocks{};

inline bool keep_block(void *memory, size_t bytes) {
  struct Closing {
    ~Closing() {
      kept_blocks.closed = true;
      for (void *&block : kept_blocks.memory) std::free(std::exchange(block, nullptr));
    }
  };
  static thread_local const Closing closing;
  static_cast<void>(&closing);
  KeptBlocks &kept = kept_blocks;
  if (kept.closed || bytes > KeptBlocks::kMost) return false;
  int empty = -1;
  for (int place = 0; place < KeptBlocks::kPlaces; ++place)
    if (!kept.memory[place]) empty = place;
  while (empty < 0 || kept.total + bytes > KeptBlocks::kMost) {
    empty = kept.next++ % KeptBlocks::kPlaces;
    std::free(std::exchange(kept.memory[empty], nullptr));
    kept.total -= std::exchange(kept.bytes[empty], 0);
  }
  kept.memory[empty] = memory, kept.bytes[empty] = bytes, kept.total += bytes;
  return true;
}

// The smallest kept block that has room, and is not much too large; or null.
inline void *kept_block(size_t bytes) {
  KeptBlocks &kept = kept_blocks;
  int best = -1;
  for (int place = 0; place < KeptBlocks::kPlaces; ++place)
    if (kept.bytes[place] >= bytes && kept.bytes[place] <= 2 * bytes + kHugePage && (best < 0 || kept.bytes[place] < kept.bytes[best])) best = place;
  if (best < 0) return nullptr;
  kept.total -= std::exchange(kept.bytes[best], 0);
  return std::exchange(kept.memory[best], nullptr);
}
#endif

// Memory for `deallocate`. Much of it is asked for in huge pages, which cost a tenth of what small ones do when they are first
// written.
inline void *allocate(size_t bytes) {
  void *memory;
#if defined(__linux__)
  if (bytes >= kLargeBlock) {
    memory = kept_block(bytes);
    if (memory) return memory;
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory = std::aligned_alloc(kHugePage, whole);
    if (memory) madvise(memory, whole, MADV_HUGEPAGE);  // a wish
  } else
#endif
    memory = std::malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

inline void deallocate(void *memory) noexcept {
#if defined(__linux__)
  const size_t bytes = malloc_usable_size(memory);
  if (bytes >= kLargeBlock && keep_block(memory, bytes)) return;
#endif
  std::free(memory);
}

// Memory of a result or of intermediate values, not initialised.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= alignof(std::max_align_t));

 public:
  explicit Buffer(int64_t size = 0) : data_(static_cast<T *>(allocate(size * sizeof(T)))), size_(size) {}
  T *data() { return data_.get(); }
  const T *data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T &operator[](int64_t i) { return data_.get()[i]; }
  const T &operator[](int64_t i) const { return data_.get()[i]; }
  T *begin() { return data(); }
  T *end() { return data() + size_; }
  void shrink(int64_t size) { size_ = size; }  // keeps the memory
  T *release() { return data_.release(); }     // for deallocate

 private:
  struct Free {
    void operator()(T *memory) const { deallocate(memory); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_;
};

// A torch tensor, (n,) or (n / columns, columns), that owns the buffer's memory. Needs the GIL.
template <class T>
nanobind::object to_torch(Buffer<T> buffer, int64_t columns = 0) {
  const size_t size = static_cast<size_t>(buffer.size()), width = static_cast<size_t>(columns);
  const size_t shape[2] = {columns ? size / width : size, width};
  T *memory = buffer.release();
  nanobind::capsule owner(memory, [](void *p) noexcept { deallocate(p); });
  return nanobind::cast(nanobind::ndarray<nanobind::pytorch, T>(memory, columns ? 2 : 1, shape, owner));
}

}  // namespace pc3d
