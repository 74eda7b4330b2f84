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
#include <sys/mman.h>
#endif

namespace pc3d {

template <class T, int Dimensions>
using Array = nanobind::ndarray<T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

// Memory that std::free takes back. Much of it is asked for in huge pages, which cost a tenth of what small ones do when they are
// first written.
inline void *allocate(size_t bytes) {
  void *memory;
#if defined(__linux__)
  constexpr size_t kHugePage = size_t{1} << 21;
  if (bytes >= kHugePage / 2) {
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory = std::aligned_alloc(kHugePage, whole);
    if (memory) madvise(memory, whole, MADV_HUGEPAGE);  // a wish
  } else
#endif
    memory = std::malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
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
  T *release() { return data_.release(); }     // for std::free

 private:
  struct Free {
    void operator()(T *memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_;
};

// Whether all of `count` numbers are in 0..rows - 1.
inline bool inside(const int32_t *numbers, int64_t count, int64_t rows) {
  const uint32_t last = static_cast<uint32_t>(rows < INT32_MAX ? rows : INT32_MAX) - 1;
  uint32_t signs = 0;  // of each number, and of its distance to the last
  for (int64_t i = 0; i < count; ++i) signs |= static_cast<uint32_t>(numbers[i]) | (last - static_cast<uint32_t>(numbers[i]));
  return !(signs >> 31);
}

// A torch tensor, (n,) or (n / columns, columns), that owns the buffer's memory. Needs the GIL.
template <class T>
nanobind::object to_torch(Buffer<T> buffer, int64_t columns = 0) {
  const size_t size = static_cast<size_t>(buffer.size()), width = static_cast<size_t>(columns);
  const size_t shape[2] = {columns ? size / width : size, width};
  T *memory = buffer.release();
  nanobind::capsule owner(memory, [](void *p) noexcept { std::free(p); });
  return nanobind::cast(nanobind::ndarray<nanobind::pytorch, T>(memory, columns ? 2 : 1, shape, owner));
}

}  // namespace pc3d
