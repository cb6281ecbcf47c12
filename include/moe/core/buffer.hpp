// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Storage that is reused from call to call.
namespace moe {

/// Memory that begins with a cache line, whatever flags Eigen's alignment follows.
template <class T>
struct LineAllocator {
  using value_type = T;
  /// Of what it allocates: 64 bytes, or more where T asks for more.
  static constexpr std::align_val_t kAlign{std::max<std::size_t>(64, alignof(T))};

  LineAllocator() = default;
  /// All of them are alike.
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  /// Room for n elements. Throws std::bad_alloc.
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlign)); }
  /// Frees what allocate returned.
  void deallocate(T* p, std::size_t) { ::operator delete(p, kAlign); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

/// A contiguous array whose memory only grows: resizing within capacity() never allocates, and keeps
/// what the memory held. New elements of a larger capacity are value-initialised. A copy holds the
/// elements, not the spare capacity.
template <class T>
class Buffer {
 public:
  using value_type = T;

  Buffer() = default;
  /// The given elements.
  Buffer(std::initializer_list<T> values) : storage_(values), size_(Index(values.size())) {}
  Buffer(const Buffer& other) : storage_(other.begin(), other.end()), size_(other.size_) {}
  Buffer(Buffer&& other) noexcept : storage_(std::move(other.storage_)), size_(other.size_) {
    other.size_ = 0;
  }
  Buffer& operator=(const Buffer& other) {
    if (this == &other) return *this;
    resize(other.size_);
    std::copy(other.begin(), other.end(), begin());
    return *this;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this == &other) return *this;
    storage_ = std::move(other.storage_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  Index size() const { return size_; }
  bool empty() const { return size_ == 0; }
  Index capacity() const { return Index(storage_.size()); }

  /// Makes room for n elements without changing size().
  [[gnu::noinline]] void reserve(Index n) {
    if (n > capacity()) storage_.resize(std::size_t(n));
  }
  /// Sets the size; elements that the memory held before are kept. Allocates only beyond capacity().
  /// Throws std::invalid_argument when n is negative.
  [[gnu::noinline]] void resize(Index n) {
    require(n >= 0, "Buffer::resize: n = ", n, ", expected at least 0");
    reserve(n);
    size_ = n;
  }
  /// Sets the size and every element.
  void assign(Index n, const T& value) {
    resize(n);
    std::fill(begin(), end(), value);
  }
  void clear() { size_ = 0; }
  void push_back(const T& value) {
    if (size_ == capacity()) reserve(std::max<Index>(16, 2 * size_));
    storage_[std::size_t(size_++)] = value;
  }

  T& operator[](Index i) {
    assert(i >= 0 && i < size_);
    return storage_[std::size_t(i)];
  }
  const T& operator[](Index i) const {
    assert(i >= 0 && i < size_);
    return storage_[std::size_t(i)];
  }
  T* data() { return storage_.data(); }
  const T* data() const { return storage_.data(); }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }

  friend bool operator==(const Buffer& a, const Buffer& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

 private:
  std::vector<T, LineAllocator<T>> storage_;
  Index size_ = 0;
};

/// A row-major matrix in a Buffer: its rows may change from call to call without allocating.
template <class S>
class RowBuffer {
 public:
  RowBuffer() = default;
  RowBuffer(const RowBuffer&) = default;
  RowBuffer& operator=(const RowBuffer&) = default;
  RowBuffer(RowBuffer&& other) noexcept { *this = std::move(other); }
  RowBuffer& operator=(RowBuffer&& other) noexcept {
    storage_ = std::move(other.storage_);
    rows_ = std::exchange(other.rows_, 0);
    cols_ = std::exchange(other.cols_, 0);
    return *this;
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  /// Values that it holds without allocating.
  Index capacity() const { return storage_.capacity(); }
  /// Rows of this width that it holds without allocating.
  Index reserved_rows() const { return cols_ > 0 ? capacity() / cols_ : rows_; }
  /// Sets the shape. `reserve_rows` rows are made room for. What the memory holds is unspecified.
  void resize(Index rows, Index cols, Index reserve_rows = 0) {
    require(rows >= 0 && cols >= 0, "RowBuffer::resize: shape [", rows, ", ", cols,
            "], expected at least [0, 0]");
    storage_.reserve((std::max)(rows, reserve_rows) * cols);
    storage_.resize(rows * cols);
    rows_ = rows;
    cols_ = cols;
  }
  S* data() { return storage_.data(); }
  const S* data() const { return storage_.data(); }
  S* row(Index i) { return data() + i * cols_; }
  const S* row(Index i) const { return data() + i * cols_; }

  /// The matrix [rows, cols].
  Eigen::Map<Matrix<S>> matrix() { return {data(), rows_, cols_}; }
  /// The same, read-only.
  Eigen::Map<const Matrix<S>> matrix() const { return {data(), rows_, cols_}; }
  /// Rows [begin, begin + count).
  Eigen::Map<Matrix<S>> block(Index begin, Index count) { return {row(begin), count, cols_}; }
  /// The same, read-only.
  Eigen::Map<const Matrix<S>> block(Index begin, Index count) const { return {row(begin), count, cols_}; }

 private:
  Buffer<S> storage_;
  Index rows_ = 0;
  Index cols_ = 0;
};

}  // namespace moe
