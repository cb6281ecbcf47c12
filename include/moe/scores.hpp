// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/check.hpp>
#include <moe/executor.hpp>
#include <moe/product.hpp>
#include <moe/softmax.hpp>
#include <moe/types.hpp>

// From x to logits and from logits to gates, with the backward of both.
namespace moe {

/// How the gates of the experts that a token uses follow from its logits z over all experts.
enum class GateRecipe {
  /// softmax over all experts, p_e, taken as it is: gates of a token sum to less than 1 (Switch,
  /// V-MoE, Grok-1, OLMoE, Qwen2-MoE).
  softmax,
  /// softmax over the experts in use, exp(z_e) / sum over those (Shazeer et al. 2017, eq. 3 to 5;
  /// Mixtral, gpt-oss). Equal to p_e renormalised to sum to 1 (GShard, DBRX, Qwen3-MoE), in value
  /// and in gradient, and computed without the intermediate p_e, which may underflow.
  softmax_of_chosen,
};

/// gates[i] of the experts[i], i < n, of one token. logits and probs are the token's rows
/// [num_experts]. O(n).
template <class S>
void compute_gates(GateRecipe recipe, const S* logits, const S* probs, Index n,
                   const Index* experts, S* gates) {
  if (recipe == GateRecipe::softmax) {
    for (Index i = 0; i < n; ++i) gates[i] = probs[experts[i]];
  } else if (n > 0) {
    for (Index i = 0; i < n; ++i) gates[i] = logits[experts[i]];
    softmax(n, gates, gates);
  }
}

/// Adds to d_logits [num_experts] what the gradient d_gates[i] by the gates[i] of the experts[i]
/// makes of it. O(n) for softmax_of_chosen, O(num_experts) for softmax.
template <class S>
void compute_gates_backward(GateRecipe recipe, const S* probs, Index num_experts, Index n,
                            const Index* experts, const S* gates, const S* d_gates, S* d_logits) {
  S mean = 0;
  for (Index i = 0; i < n; ++i) mean += gates[i] * d_gates[i];
  for (Index i = 0; i < n; ++i) d_logits[experts[i]] += gates[i] * d_gates[i];
  if (recipe == GateRecipe::softmax) {
    for (Index e = 0; e < num_experts; ++e) d_logits[e] -= probs[e] * mean;
  } else {
    for (Index i = 0; i < n; ++i) d_logits[experts[i]] -= gates[i] * mean;
  }
}

/// logits [tokens, experts] = x w^T for the tokens [begin, end) of x [tokens, d_model].
template <class S, class X>
void block_logits(const X& x, const Matrix<S>& w, Index begin, Index end, Matrix<S>& logits) {
  require(begin >= 0 && begin <= end && end <= x.rows(), "block_logits: rows [", begin, ", ", end,
          ") of x, which has ", x.rows());
  require_shape(logits, x.rows(), w.rows(), "block_logits", "logits");
  linear(x.middleRows(begin, end - begin), w, logits.middleRows(begin, end - begin));
}

/// Backward of a router's linear layer logits = x w^T: d_w [experts, d_model] += d_logits^T x and
/// d_x [tokens, d_model] += d_logits w, in blocks of fixed size. O(tokens * experts * d_model).
template <class S, class X, class Dx, Executor E>
void router_linear_backward(const X& x, const Matrix<S>& w, const Matrix<S>& d_logits,
                            Matrix<S>& d_w, Dx&& d_x, const E& executor) {
  require_shape(d_logits, x.rows(), w.rows(), "router_linear_backward", "d_logits");
  require_shape(d_w, w.rows(), x.cols(), "router_linear_backward", "d_w");
  require_shape(d_x, x.rows(), w.cols(), "router_linear_backward", "d_x");
  if (x.rows() == 0) return;
  constexpr Index kCols = 128;
  executor.for_each((x.cols() + kCols - 1) / kCols, [&](Index block, Index) {
    const Index begin = block * kCols, count = std::min(kCols, x.cols() - begin);
    linear_backward_weight(d_logits, x.middleCols(begin, count), d_w.middleCols(begin, count));
  });
  for_each_block(x.rows(), executor, [&](Index begin, Index end, Index) {
    linear_backward_input(d_logits.middleRows(begin, end - begin), w,
                          d_x.middleRows(begin, end - begin), Write::add);
  });
}

}  // namespace moe
