// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>

// The concepts that an expert satisfies. An expert maps rows [rows, d_model] to rows of the same
// shape, each output row from its input row alone: the layer may hand it any block of rows.
namespace moe {

/// An expert for inference: forward writes y from x and returns nothing; const, and callable from several
/// threads. One that says multiply_adds_per_row() wakes no threads where that is little.
template <class E>
concept Expert = requires(const E& expert, const ConstMatrixRef<typename E::Scalar>& x,
                          MatrixRef<typename E::Scalar> y) {
  typename E::Scalar;
  { expert.d_model() } -> std::convertible_to<Index>;
  { expert.forward(x, y) } -> std::same_as<void>;
};

/// An expert that works in memory of its caller, `cache_cols()` scalars a row: this forward allocates
/// nothing.
template <class E>
concept BufferedExpert = Expert<E> &&
    requires(const E& expert, const ConstMatrixRef<typename E::Scalar>& x, MatrixRef<typename E::Scalar> y,
             MatrixRef<typename E::Scalar> cache) {
  { expert.cache_cols() } -> std::convertible_to<Index>;
  { expert.forward(x, y, cache) } -> std::same_as<void>;
};

/// An expert with a backward pass. What backward needs of the forward pass stands in a block of the
/// layer's cache: forward fills it, backward may use what it does not need as scratch, but must leave
/// it fit for another backward. backward writes d_x and adds to the parameters of `grad`, an expert of
/// the same type.
template <class E>
concept TrainableExpert = BufferedExpert<E> &&
    requires(const E& expert, E& grad, const ConstMatrixRef<typename E::Scalar>& x,
             MatrixRef<typename E::Scalar> y, MatrixRef<typename E::Scalar> cache) {
  expert.backward(x, x, cache, y, grad);
  E::visit([](const ParameterInfo&, auto&...) {}, grad);
};

/// Throws std::invalid_argument unless x and y of an expert's forward pass are [rows, d_model] and lie apart.
/// An expert begins with this. O(1).
template <Expert E, class S = typename E::Scalar>
void check_expert_forward(const E& expert, const ConstMatrixRef<S>& x, const MatrixRef<S>& y,
                          const char* where) {
  require_shape(x, x.rows(), expert.d_model(), where, "x");
  require_shape(y, x.rows(), expert.d_model(), where, "y");
  require_apart(where, "y", y, "x", x);
}

/// The same for an expert that works in memory of its caller: cache is [rows, cache_cols()].
template <BufferedExpert E, class S = typename E::Scalar>
void check_expert_forward(const E& expert, const ConstMatrixRef<S>& x, const MatrixRef<S>& y,
                          const MatrixRef<S>& cache, const char* where) {
  check_expert_forward(expert, x, y, where);
  require_shape(cache, x.rows(), expert.cache_cols(), where, "cache");
  require_apart(where, "cache", cache, "x", x, "y", y);
}

/// The same for a backward pass; `grad` has the parameters' shapes and is another expert.
template <class E, class S = typename E::Scalar>
void check_expert_backward(const E& expert, const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& d_y,
                           const MatrixRef<S>& cache, const MatrixRef<S>& d_x, const E& grad,
                           const char* where) {
  require_shape(x, x.rows(), expert.d_model(), where, "x");
  require_shape(d_y, x.rows(), expert.d_model(), where, "d_y");
  require_shape(cache, x.rows(), expert.cache_cols(), where, "cache");
  require_shape(d_x, x.rows(), expert.d_model(), where, "d_x");
  require_apart(where, "d_x", d_x, "x", x, "d_y", d_y, "cache", cache);
  require_apart(where, "cache", cache, "x", x, "d_y", d_y);
  require(&grad != &expert, where, ": grad is the expert of d_model = ", expert.d_model(),
          " itself, expected another one");
  E::visit(  // throws if shapes differ
      [&](const ParameterInfo&, const auto&, const auto& g) {
        require_apart(where, "grad", g, "x", x, "d_y", d_y, "cache", cache, "d_x", d_x);
      },
      expert, grad);
  require(grad.d_model() == expert.d_model(), where, ": grad has d_model = ", grad.d_model(), ", expected ",
          expert.d_model());  // of an expert without parameters
}

/// `count` experts of one configuration, each with weights of its own drawn from rng in turn.
/// Throws std::invalid_argument when count is negative.
/// @code
/// moe::Rng rng(1);
/// using Expert = moe::GatedFeedForward<float>;
/// const auto experts = moe::make_experts<Expert>(8, {.d_model = 64, .d_ff = 256}, rng);
/// assert(experts.size() == 8 && experts[0].w_up.rows() == 256);
/// @endcode
template <class E, class R>
std::vector<E> make_experts(Index count, const typename E::Options& options, R& rng) {
  require(count >= 0, "make_experts: count = ", count, ", expected at least 0");
  std::vector<E> experts;
  experts.reserve(std::size_t(count));
  for (Index e = 0; e < count; ++e) experts.emplace_back(options, rng);
  return experts;
}

}  // namespace moe
