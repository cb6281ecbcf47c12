// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <memory>
#include <new>
#include <utility>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// Matrices and vectors that are filled anew in every call, with another number of tokens each time.
namespace moe {

/// A Plain - a Matrix<S>, a Mask, ... - whose memory only grows: a smaller shape never allocates, a larger
/// one only beyond capacity(). It is an expression of Eigen and binds to views as a Plain does; a `const
/// Plain&` is a copy of it. A copy holds the elements, not the spare capacity.
template <class Plain>
class Reused : public Eigen::Map<Plain> {
  using View = Eigen::Map<Plain>;
  static constexpr bool kIsVector = Plain::ColsAtCompileTime == 1;

 public:
  using S = typename Plain::Scalar;

  Reused() : View(nullptr, 0, kIsVector ? 1 : 0) {}
  Reused(const Reused& other) : Reused() { *this = other; }
  Reused(Reused&& other) noexcept : Reused() { *this = std::move(other); }
  /// A copy of the values of an expression of Eigen.
  template <class M>
  Reused(const Eigen::DenseBase<M>& values) : Reused() {
    *this = values.derived();
  }

  Reused& operator=(const Reused& other) {
    if (this == &other) return *this;
    resize(other.rows(), other.cols());
    std::copy_n(other.data(), other.size(), this->data());
    return *this;
  }
  Reused& operator=(Reused&& other) noexcept {
    if (this == &other) return *this;
    const Index rows = other.rows(), cols = other.cols();
    memory_ = std::move(other.memory_);
    capacity_ = std::exchange(other.capacity_, 0);
    show(rows, cols);
    other.show(0, kIsVector ? 1 : 0);
    return *this;
  }
  /// Takes the shape of the values, too. A Plain's are copied as they are, set or not.
  template <std::same_as<Plain> P>
  Reused& operator=(const P& values) {
    resize(values.rows(), values.cols());
    std::copy_n(values.data(), values.size(), this->data());
    return *this;
  }
  /// Values that are computed are none of its own where the shape changes.
  template <class M>
  Reused& operator=(const Eigen::DenseBase<M>& values) {
    resize(values.rows(), values.cols());
    View::operator=(values.derived());
    return *this;
  }

  /// Values that it holds without allocating.
  Index capacity() const { return capacity_; }
  /// Makes room for a number of values. Changes neither the shape nor the elements.
  void reserve(Index values) {
    if (values <= capacity_) return;
    Memory memory(LineAllocator<S>().allocate(std::size_t(values)));
    std::copy_n(this->data(), this->size(), memory.get());
    memory_ = std::move(memory);
    capacity_ = values;
    show(this->rows(), this->cols());
  }
  /// Sets the shape; what the elements are then is unspecified. Throws std::invalid_argument for negative
  /// ones, and for a vector of other than one column.
  [[gnu::noinline]] void resize(Index rows, Index cols) {
    require(rows >= 0 && cols >= 0, "Reused::resize: shape [", rows, ", ", cols,
            "], expected at least [0, 0]");
    require(!kIsVector || cols == 1, "Reused::resize: a vector of ", cols, " columns, expected 1");
    if (rows * cols > capacity_) {
      show(0, cols);
      memory_.reset();
      capacity_ = 0;
      memory_.reset(LineAllocator<S>().allocate(std::size_t(rows * cols)));
      capacity_ = rows * cols;
    }
    show(rows, cols);
  }
  /// The same for a vector.
  void resize(Index size) requires kIsVector { resize(size, 1); }

  using View::setConstant;
  using View::setZero;
  Reused& setConstant(Index rows, Index cols, const S& value) {
    resize(rows, cols);
    View::setConstant(value);
    return *this;
  }
  Reused& setConstant(Index size, const S& value) requires kIsVector { return setConstant(size, 1, value); }
  Reused& setZero(Index rows, Index cols) { return setConstant(rows, cols, S(0)); }
  Reused& setZero(Index size) requires kIsVector { return setConstant(size, 1, S(0)); }

 private:
  // How a map of Eigen is made to show another array.
  void show(Index rows, Index cols) { ::new (static_cast<View*>(this)) View(memory_.get(), rows, cols); }

  struct Free {
    void operator()(S* p) const { LineAllocator<S>().deallocate(p, 0); }
  };
  using Memory = std::unique_ptr<S, Free>;

  Memory memory_;
  Index capacity_ = 0;
};

/// A Matrix<S> whose memory only grows.
template <class S>
using ReusedMatrix = Reused<Matrix<S>>;

}  // namespace moe
