// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>
#include <concepts>

#include <moe/version.hpp>

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "moe needs Eigen 3.4 or later"
#endif

// The few types that every header shares. Tokens are rows; matrices are row-major.
namespace moe {

/// Sizes, counts and indices: signed.
using Index = Eigen::Index;

/// Dense matrix, row-major, e.g. tokens [tokens, d_model] or a weight [out, in].
template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Dense column vector, e.g. a bias [d_ff].
template <class S>
using Vector = Eigen::Matrix<S, Eigen::Dynamic, 1>;

/// Indices and counts, e.g. tokens_per_expert [num_experts].
using IndexVector = Eigen::Matrix<Index, Eigen::Dynamic, 1>;

/// One flag a token, e.g. which tokens are real and which are padding [tokens].
using Mask = Eigen::Array<bool, Eigen::Dynamic, 1>;

/// a == b, where exactly that is meant: ties, and values that were set rather than computed. Everywhere else
/// -Wfloat-equal stays of use.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wfloat-equal"
template <class S>
constexpr bool is_equal(S a, S b) {
  return a == b;
}
#pragma GCC diagnostic pop

/// Read-only view of a row-major matrix or of a block of its rows. A matrix of another storage order
/// binds through a copy, one of another scalar not at all: see docs/pitfalls.md.
template <class S>
using ConstMatrixRef = Eigen::Ref<const Matrix<S>>;

/// Writable view of a row-major matrix or of a block of its rows.
template <class S>
using MatrixRef = Eigen::Ref<Matrix<S>>;

/// Whether the elements of a row lie side by side: of a row-major matrix, a block of one, a vector.
template <class M>
inline constexpr bool kRowsAreContiguous =
    (M::IsRowMajor || M::ColsAtCompileTime == 1) && M::InnerStrideAtCompileTime == 1;

/// What is given where a ConstMatrixRef<S> is expected, and cannot become one.
template <class X, class S>
concept NotAMatrixOf = !std::convertible_to<X, ConstMatrixRef<S>>;

/// False, for whatever type: where a template is chosen only in order to say what is wrong.
template <class>
inline constexpr bool kNever = false;

}  // namespace moe
