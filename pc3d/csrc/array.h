#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <utility>

namespace pc3d {

template <class T, int Dimensions>
using Array = nanobind::ndarray<T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

// Memory of a result or of intermediate values, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : data_(new T[size]), size_(size) {}
  T *data() { return data_.get(); }
  const T *data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T &operator[](int64_t i) { return data_[i]; }
  const T &operator[](int64_t i) const { return data_[i]; }
  T *begin() { return data(); }
  T *end() { return data() + size_; }
  void shrink(int64_t size) { size_ = size; }  // keeps the memory
  T *release() { return data_.release(); }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_;
};

// A torch tensor, (n,) or (n / columns, columns), that owns the buffer's memory. Needs the GIL.
template <class T>
nanobind::object to_torch(Buffer<T> buffer, int64_t columns = 0) {
  const size_t size = static_cast<size_t>(buffer.size()), width = static_cast<size_t>(columns);
  const size_t shape[2] = {columns ? size / width : size, width};
  T *memory = buffer.release();
  nanobind::capsule owner(memory, [](void *p) noexcept { delete[] static_cast<T *>(p); });
  return nanobind::cast(nanobind::ndarray<nanobind::pytorch, T>(memory, columns ? 2 : 1, shape, owner));
}

}  // namespace pc3d
