// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <moe/check.hpp>
#include <moe/executor.hpp>
#include <moe/product.hpp>
#include <moe/softmax.hpp>
#include <moe/types.hpp>

// From x to logits, from logits to scores, from scores to gates; with the backward of each.
namespace moe {

/// What makes a router's logits z a score of every expert.
enum class Score {
  softmax,        ///< exp(z_e) / sum of exp(z_j), over all experts
  sigmoid,        ///< 1 / (1 + exp(-z_e)) (DeepSeek-V3, Llama-4)
  sqrt_softplus,  ///< sqrt(log(1 + exp(z_e))) (Megatron-LM)
  relu,           ///< max(z_e, 0); an expert with a score of 0 is not chosen (ReMoE)
};

/// How the gates of the experts that a token uses follow from its scores s:
///   gate_e = scale * s_e                                            (Switch, Grok-1, OLMoE, ...)
///   gate_e = scale * s_e / (sum over the experts in use of s + epsilon)   where renormalised
/// A renormalised softmax without epsilon is computed as the softmax over the logits of the experts in
/// use: equal in value and gradient (Mixtral is published in both forms), but nothing underflows.
struct GateRule {
  Score score = Score::softmax;
  bool renormalise = false;
  double epsilon = 0;
  double scale = 1;

  bool is_softmax_of_chosen() const {
    return score == Score::softmax && renormalise && epsilon == 0;
  }
};

namespace detail {

template <class S>
S softplus(S z) {
  return std::max(z, S(0)) + std::log1p(std::exp(-std::abs(z)));
}

template <class S>
S sigmoid(S z) {
  const S e = std::exp(-std::abs(z));
  return (z < S(0) ? e : S(1)) / (S(1) + e);
}

// The score of one expert, for scores that look at its logit alone; 0 for an unavailable one.
template <class S>
S score_of(Score score, S z) {
  if (is_unavailable(z)) return S(0);
  switch (score) {
    case Score::sigmoid:
      return sigmoid(z);
    case Score::sqrt_softplus:
      return std::sqrt(softplus(z));
    default:
      return std::max(z, S(0));
  }
}

// The derivative of score_of, s being its value.
template <class S>
S score_slope(Score score, S z, S s) {
  if (!(s > S(0))) return S(0);
  switch (score) {
    case Score::sigmoid:
      return s * (S(1) - s);
    case Score::sqrt_softplus:
      return sigmoid(z) / (S(2) * s);
    default:
      return S(1);
  }
}

// What scores are divided by: never zero, so that scores that all underflow give gates of zero.
template <class S>
S score_sum(S sum, double epsilon) {
  return std::max(sum + S(epsilon), std::numeric_limits<S>::min());
}

inline constexpr double kProbsEpsilon = 1e-20;  // as Megatron-LM

}  // namespace detail

/// probs [n] = the scores of one token divided by their sum (+ 1e-20 where the score is not softmax, as
/// Megatron-LM has it); 0 where the logit is minus infinity. In place is allowed. O(n).
template <class S>
void normalised_scores(Score score, Index n, const S* logits, S* probs) {
  if (score == Score::softmax) return softmax(n, logits, probs);
  S sum = 0;
  for (Index e = 0; e < n; ++e) sum += probs[e] = detail::score_of(score, logits[e]);
  for (Index e = 0; e < n; ++e) probs[e] /= detail::score_sum(sum, detail::kProbsEpsilon);
}

/// Adds to d_logits [n] what the gradient d_probs [n] by normalised_scores makes of it. O(n).
template <class S>
void normalised_scores_backward(Score score, Index n, const S* logits, const S* probs,
                                const S* d_probs, S* d_logits) {
  if (score == Score::softmax) return softmax_backward(n, probs, d_probs, d_logits);
  S sum = 0, mean = 0;
  for (Index e = 0; e < n; ++e) {
    sum += detail::score_of(score, logits[e]);
    mean += probs[e] * d_probs[e];
  }
  for (Index e = 0; e < n; ++e) {
    const S s = detail::score_of(score, logits[e]);
    d_logits[e] += (d_probs[e] - mean) / detail::score_sum(sum, detail::kProbsEpsilon) *
                   detail::score_slope(score, logits[e], s);
  }
}

/// gates[i] of the experts[i], i < n, of one token. logits and probs (normalised_scores) are the
/// token's rows [num_experts]. O(n).
template <class S>
void compute_gates(const GateRule& rule, const S* logits, const S* probs, Index n,
                   const Index* experts, S* gates) {
  if (n == 0) return;
  S sum = 1;
  if (rule.is_softmax_of_chosen()) {
    for (Index i = 0; i < n; ++i) gates[i] = logits[experts[i]];
    softmax(n, gates, gates);
  } else {
    for (Index i = 0; i < n; ++i)
      gates[i] = rule.score == Score::softmax ? probs[experts[i]]
                                              : detail::score_of(rule.score, logits[experts[i]]);
    if (rule.renormalise) {
      sum = 0;
      for (Index i = 0; i < n; ++i) sum += gates[i];
      sum = detail::score_sum(sum, rule.epsilon);
    }
  }
  if (sum == S(1) && rule.scale == 1) return;
  for (Index i = 0; i < n; ++i) gates[i] = S(rule.scale) * (gates[i] / sum);
}

/// Adds to d_logits [num_experts] what the gradient d_gates[i] by the gates[i] of the experts[i]
/// makes of it. O(n), and O(num_experts) for a softmax that is not one of the chosen alone.
template <class S>
void compute_gates_backward(const GateRule& rule, const S* logits, const S* probs,
                            Index num_experts, Index n, const Index* experts, const S* gates,
                            const S* d_gates, S* d_logits) {
  S mean = 0, sum = 0;
  for (Index i = 0; i < n; ++i) mean += gates[i] * d_gates[i];
  if (rule.is_softmax_of_chosen()) {
    for (Index i = 0; i < n; ++i)
      d_logits[experts[i]] += gates[i] * (d_gates[i] - mean / S(rule.scale));
    return;
  }
  const auto score = [&](Index e) {
    return rule.score == Score::softmax ? probs[e] : detail::score_of(rule.score, logits[e]);
  };
  if (rule.renormalise) {
    for (Index i = 0; i < n; ++i) sum += score(experts[i]);
    sum = detail::score_sum(sum, rule.epsilon);
  }
  const auto d_score = [&](Index i) {
    return rule.renormalise ? (S(rule.scale) * d_gates[i] - mean) / sum : S(rule.scale) * d_gates[i];
  };
  if (rule.score == Score::softmax) {
    S all = 0;
    for (Index i = 0; i < n; ++i) {
      const S d = probs[experts[i]] * d_score(i);
      d_logits[experts[i]] += d;
      all += d;
    }
    for (Index e = 0; e < num_experts; ++e) d_logits[e] -= probs[e] * all;
  } else {
    for (Index i = 0; i < n; ++i) {
      const Index e = experts[i];
      d_logits[e] += d_score(i) * detail::score_slope(rule.score, logits[e], score(e));
    }
  }
}

/// A router's linear layer: logits [tokens, experts] = x w^T, in blocks of tokens; where there is but one,
/// in blocks of experts, so that one token uses every worker. O(tokens * experts * d_model).
template <class S, class X, Executor E>
void router_linear(const X& x, const Matrix<S>& w, Matrix<S>& logits, const E& executor) {
  require_shape(w, w.rows(), x.cols(), "router_linear", "w");
  require_shape(logits, x.rows(), w.rows(), "router_linear", "logits");
  const Index tokens = x.rows(), experts = w.rows();
  if (experts == 0) return;
  if (tokens > kTokenBlock) {
    return for_each_block(tokens, executor, [&](Index begin, Index end, Index) {
      linear(x.middleRows(begin, end - begin), w, logits.middleRows(begin, end - begin));
    });
  }
  // A block for each worker, but not less than a register of experts for a few tokens, or a panel for many;
  // nor than 2^15 products.
  const Index least = tokens <= 8 ? 16 : 64;
  const Index products = std::max<Index>(1, tokens * x.cols()), share = least * executor.concurrency();
  const Index cols = least * std::max((experts + share - 1) / share, (Index(1) << 15) / (products * least));
  executor.for_each((experts + cols - 1) / cols, [&](Index block, Index) {
    const Index begin = block * cols, count = std::min(cols, experts - begin);
    linear(x, w.middleRows(begin, count), logits.middleCols(begin, count));
  });
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
