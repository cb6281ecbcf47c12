// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <variant>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/layers/checked_plan.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/layers/shared_experts.hpp>

// How much each number of a weight matters: what rounding goes by, if it is told.
namespace moe {

/// Mean squares of what the weights of an expert multiply. An error of a weight adds as much to the squared
/// error of the output as this of its input (the importance matrix of llama.cpp). Empty for an expert that is
/// rounded without.
struct ExpertImportance {
  Vector<float> x;       ///< [d_model], of gate and linear branch
  Vector<float> hidden;  ///< [d_ff], of the second product
};

/// An expert whose cache tells what its second product multiplies: see GatedFeedForward::hidden.
template <class E>
concept HiddenExpert = BufferedExpert<E> && requires(const E& expert, const Matrix<float>& cache) {
  { expert.hidden(cache) } -> std::convertible_to<ConstMatrixRef<float>>;
};

namespace detail {

template <HiddenExpert E>
Matrix<float> hidden_rows(const E& expert, const ConstMatrixRef<float>& x) {
  Matrix<float> y(x.rows(), x.cols()), cache(x.rows(), expert.cache_cols());
  expert.forward(x, y, cache);
  return expert.hidden(cache);
}
template <HiddenExpert... Kinds>
Matrix<float> hidden_rows(const VariantExpert<Kinds...>& expert, const ConstMatrixRef<float>& x) {
  return std::visit([&](const auto& kind) { return hidden_rows(kind, x); }, expert.get());
}

// The sum of rows of squares in their order.
inline void add_squares(const ConstMatrixRef<float>& rows, Vector<double>& sums) {
  for (Index i = 0; i < rows.rows(); ++i)
    for (Index j = 0; j < rows.cols(); ++j) sums[j] += double(rows(i, j)) * double(rows(i, j));
}

}  // namespace detail

/// The importance of the weights of a layer's experts, routed and then shared, by tokens x [tokens, d_model]
/// as the layer meets them. Of an expert that none of them uses both vectors are empty. Takes what a forward
/// pass takes. Throws std::invalid_argument for another d_model.
/// @code
/// moe::Rng rng(1);
/// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 32, .d_ff = 64}, rng),
///                     moe::TopKRouter<float>({.d_model = 32, .num_experts = 4, .top_k = 2}, rng));
/// moe::Matrix<float> x(100, 32);
/// moe::fill_normal(x, 1.0, rng);
/// const auto importance = moe::importance_of(layer, x);
/// const auto small = moe::pack<moe::Int4>(layer, {.importance = importance});
/// assert(importance.size() == 4 && small.d_model() == 32);
/// @endcode
template <class E, class R>
requires requires(const E& expert, const Matrix<float>& x) { detail::hidden_rows(expert, x); }
std::vector<ExpertImportance> importance_of(const MoELayer<E, R>& layer, const ConstMatrixRef<float>& x) {
  require(x.cols() == layer.d_model(), "importance_of: x has ", x.cols(),
          " columns, expected d_model = ", layer.d_model(), "; tokens are rows");
  const Routing<float> routing = layer.route(x);
  DispatchPlan<float> with_shared;
  ReusedMatrix<float> gates;
  const DispatchPlan<float>& plan = add_shared_experts(x, routing.plan, layer.num_shared_experts(),
                                                       layer.w_shared_gate, with_shared, gates, Sequential{});
  RowBuffer<float> rows;
  dispatch(x, CheckedPlan<float>::trusted(plan), rows, Sequential{});
  std::vector<ExpertImportance> all(std::size_t(plan.num_experts()));
  for (Index e = 0; e < plan.num_experts(); ++e) {
    const Index count = plan.rows_of(e), begin = plan.expert_begin[e];
    if (count == 0) continue;
    const Index routed = layer.num_experts();
    const E& expert =
        e < routed ? layer.experts()[std::size_t(e)] : layer.shared_experts()[std::size_t(e - routed)];
    constexpr Index kRows = 256;  // at a time
    Vector<double> x_sums = Vector<double>::Zero(x.cols()), hidden_sums;
    for (Index i = 0; i < count; i += kRows) {
      const Eigen::Map<const Matrix<float>> some(rows.row(begin + i), (std::min)(kRows, count - i), x.cols());
      const Matrix<float> hidden = detail::hidden_rows(expert, some);
      if (i == 0) hidden_sums = Vector<double>::Zero(hidden.cols());
      detail::add_squares(some, x_sums);
      detail::add_squares(hidden, hidden_sums);
    }
    all[std::size_t(e)] = {(x_sums / double(count)).template cast<float>(),
                           (hidden_sums / double(count)).template cast<float>()};
  }
  return all;
}

namespace detail {

inline void check_importance(const Vector<float>& values, Index expected, const char* name) {
  require(values.size() == 0 || values.size() == expected, "pack: importance.", name, " has ", values.size(),
          " values, expected ", expected);
  for (Index i = 0; i < values.size(); ++i)
    require(values[i] >= 0 && values[i] <= (std::numeric_limits<float>::max)(), "pack: importance.", name,
            "[", i, "] = ", values[i], ", expected a finite number of at least 0");
}

}  // namespace detail

/// Throws std::invalid_argument unless it is that of an expert of such widths. O(d_model + d_ff).
inline void check_importance(const ExpertImportance& importance, Index d_model, Index d_ff) {
  detail::check_importance(importance.x, d_model, "x");
  detail::check_importance(importance.hidden, d_ff, "hidden");
}

}  // namespace moe
