// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/sigmoid.hpp>
#include <moe/math/softmax.hpp>

// From x to logits, from logits to scores, from scores to gates; with the backward of each.
namespace moe {

/// What makes a router's logits z a score of every expert.
enum class Score {
  softmax,        ///< exp(z_e) / sum of exp(z_j), over all experts
  sigmoid,        ///< 1 / (1 + exp(-z_e)) (DeepSeek-V3, Llama-4)
  sqrt_softplus,  ///< sqrt(log(1 + exp(z_e))) (Megatron-LM)
  relu,           ///< max(z_e, 0); an expert with a score of 0 is not chosen (ReMoE)
};

/// How the gates of the experts that a token uses follow from its scores s: as they are (Switch, Grok-1,
/// OLMoE, ...), or renormalised over the experts in use:
///   gate_e = scale * s_e
///   gate_e = scale * s_e / max(sum of s + epsilon, minimum)
/// A renormalised softmax with neither epsilon nor minimum is computed as the softmax over the logits of the
/// experts in use: equal in value and gradient (Mixtral is published in both forms), but nothing underflows.
/// So are renormalised sigmoid and sqrt_softplus where all logits are so low that these are exp(z) and exp(z
/// / 2).
struct GateRule {
  Score score = Score::softmax;  ///< what s is
  bool renormalise = false;      ///< whether gates are divided by the sum of s
  double epsilon = 0;            ///< added to that sum
  double minimum = 0;            ///< the least that gates are divided by
  double scale = 1;              ///< what every gate is multiplied by
};

namespace detail {

// Below this logit 1 + exp(z) is 1, in double too.
inline constexpr double kFarBelow = -40;

}  // namespace detail

/// The score of one expert by its logit, for all but softmax; 0 for an unavailable one.
template <class S>
S score_of(Score score, S z) {
  if (is_unavailable(z)) return S(0);
  switch (score) {
    case Score::sigmoid:
      return sigmoid(z);
    case Score::sqrt_softplus:
      return z < S(detail::kFarBelow) ? std::exp(z / S(2)) : std::sqrt(softplus(z));
    default:
      return (std::max)(z, S(0));
  }
}

namespace detail {

// The derivative of score_of, s being its value.
template <class S>
S score_slope(Score score, S z, S s) {
  if (!(s > S(0))) return S(0);
  switch (score) {
    case Score::sigmoid:
      return sigmoid_slope(z);
    case Score::sqrt_softplus:
      return z < S(kFarBelow) ? s / S(2) : sigmoid(z) / (S(2) * s);
    default:
      return S(1);
  }
}

// What scores are divided by: never zero, so that scores that all underflow give quotients of zero.
template <class S>
struct Divisor {
  S value;
  bool varies;  // with the scores, rather than being the least that there may be
};
template <class S>
Divisor<S> divisor_of(S sum, double epsilon, double minimum) {
  const S least = (std::max)(S(minimum), (std::numeric_limits<S>::min)());
  sum += S(epsilon);
  return sum < least ? Divisor<S>{least, false} : Divisor<S>{sum, true};
}

inline constexpr double kProbsEpsilon = 1e-20;  // as Megatron-LM

// The backward of quotients q_i = s_i / (sum of s + epsilon): calls f(i, divisor * the gradient by s_i) for
// all i < n. d_i - sum of q_j d_j is taken from the d of a quotient above 1/2, as in softmax_backward.
// `scaled` are the q_i times `scale`, d the gradients by these.
template <class S, class F>
void quotients_backward(Index n, const S* scaled, const S* d, double scale, double epsilon,
                        const Divisor<S>& divisor, const F& f) {
  if (n == 0) return;
  if (!divisor.varies) {
    for (Index i = 0; i < n; ++i) f(i, S(scale) * d[i]);
    return;
  }
  const S half = S(scale) / S(2);
  S origin = d[0];
  for (Index i = 0; i < n; ++i) origin = scaled[i] > half ? d[i] : origin;
  const S rest = S(scale) * origin * (S(epsilon) / divisor.value);  // the quotients sum to less than 1
  S mean = 0;
  for (Index i = 0; i < n; ++i) mean += scaled[i] * (d[i] - origin);
  for (Index i = 0; i < n; ++i) f(i, (S(scale) * (d[i] - origin) - mean) + rest);
}

// What the logits of these experts are multiplied by where their gates are a softmax of them; 0 where gates
// are quotients of scores.
template <class S>
S softmax_factor(const GateRule& rule, const S* logits, Index n, const Index* experts) {
  if (!rule.renormalise || rule.epsilon > 0 || rule.minimum > 0 || rule.score == Score::relu) return S(0);
  if (rule.score == Score::softmax) return S(1);
  for (Index i = 0; i < n; ++i)
    if (!(logits[experts[i]] < S(kFarBelow))) return S(0);
  return rule.score == Score::sigmoid ? S(1) : S(0.5);
}

// The sum of the scores of some experts, and what it makes of a renormalised gate; 1 for one that is not.
template <class S, class ScoreOf>
Divisor<S> gate_divisor(const GateRule& rule, Index n, const ScoreOf& score) {
  if (!rule.renormalise) return {S(1), false};
  S sum = 0;
  for (Index i = 0; i < n; ++i) sum += score(i);
  return divisor_of(sum, rule.epsilon, rule.minimum);
}

// Calls f(begin, count, p) for blocks of experts, p [kOthers] being their probabilities with zeros in place
// of the n experts' and behind the last. O(num_experts (1 + n / kOthers)).
inline constexpr Index kOthers = 64;
template <class S, class F>
void for_each_block_of_others(Index num_experts, Index n, const Index* experts, const S* probs, const F& f) {
  for (Index begin = 0; begin < num_experts; begin += kOthers) {
    const Index count = (std::min)(kOthers, num_experts - begin);
    std::array<S, std::size_t(kOthers)> p{};
    std::copy_n(probs + begin, count, p.data());
    for (Index i = 0; i < n; ++i)
      if (experts[i] >= begin && experts[i] < begin + count) p[std::size_t(experts[i] - begin)] = 0;
    f(begin, count, p.data());
  }
}

// The sum of p [kOthers], in lanes that a compiler may take for a register.
template <class S>
S sum_of_others(const S* p) {
  constexpr Index kLanes = 8;
  S lane[kLanes] = {};
  for (Index i = 0; i < kOthers; i += kLanes)
    for (Index j = 0; j < kLanes; ++j) lane[j] += p[i + j];
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

}  // namespace detail

/// What gates follow from, of one token: its logits, and what normalised_scores makes of them [num_experts].
template <class S>
struct TokenScores {
  Index num_experts;  ///< of either array
  const S* logits;    ///< [num_experts]
  const S* probs;     ///< [num_experts]
};

/// probs [n] = the scores of one token divided by their sum (+ 1e-20 where the score is not softmax, as
/// Megatron-LM has it); 0 where the logit is minus infinity. In place is allowed. O(n).
template <class S>
void normalised_scores(Score score, Index n, const S* logits, S* probs) {
  if (score == Score::softmax) return softmax(n, logits, probs);
  S sum = 0;
  for (Index e = 0; e < n; ++e) sum += probs[e] = score_of(score, logits[e]);
  const S divisor = detail::divisor_of(sum, detail::kProbsEpsilon, 0).value;
  for (Index e = 0; e < n; ++e) probs[e] /= divisor;
}

/// Adds to d_logits [n] what the gradient d_probs [n] by normalised_scores makes of it. O(n).
template <class S>
void normalised_scores_backward(Score score, Index n, const S* logits, const S* probs, const S* d_probs,
                                S* d_logits) {
  if (score == Score::softmax) return softmax_backward(n, probs, d_probs, d_logits);
  S sum = 0;
  for (Index e = 0; e < n; ++e) sum += score_of(score, logits[e]);
  const detail::Divisor<S> divisor = detail::divisor_of(sum, detail::kProbsEpsilon, 0);
  detail::quotients_backward(n, probs, d_probs, 1, detail::kProbsEpsilon, divisor, [&](Index e, S d) {
    const S s = score_of(score, logits[e]);
    d_logits[e] += d / divisor.value * detail::score_slope(score, logits[e], s);
  });
}

/// gates[i] of the experts[i], i < n, of one token. O(n).
template <class S>
void compute_gates(const GateRule& rule, const TokenScores<S>& token, Index n, const Index* experts,
                   S* gates) {
  if (n == 0) return;
  const S *const logits = token.logits, *const probs = token.probs;
  S divisor = 1;
  if (const S factor = detail::softmax_factor(rule, logits, n, experts); factor > S(0)) {
    for (Index i = 0; i < n; ++i) gates[i] = factor * logits[experts[i]];
    softmax(n, gates, gates);
  } else {
    for (Index i = 0; i < n; ++i)
      gates[i] = rule.score == Score::softmax ? probs[experts[i]] : score_of(rule.score, logits[experts[i]]);
    divisor = detail::gate_divisor<S>(rule, n, [&](Index i) { return gates[i]; }).value;
  }
  if (is_equal(divisor, S(1)) && is_equal(rule.scale, 1.0)) return;
  for (Index i = 0; i < n; ++i) gates[i] = S(rule.scale) * (gates[i] / divisor);
}

/// Adds to d_logits [num_experts] what the gradient d_gates[i] by the gates[i] of the experts[i]
/// makes of it. No difference of numbers near 1 is taken: errors are a few units in the last place of the
/// largest term of a sum, however far apart the logits are. O(n), and O(num_experts (1 + n / 64)) for a
/// softmax that is not one of the chosen alone.
template <class S>
void compute_gates_backward(const GateRule& rule, const TokenScores<S>& token, Index n, const Index* experts,
                            const S* gates, const S* d_gates, S* d_logits) {
  const S *const logits = token.logits, *const probs = token.probs;
  const Index num_experts = token.num_experts;
  const auto score = [&](Index i) {
    return rule.score == Score::softmax ? probs[experts[i]] : score_of(rule.score, logits[experts[i]]);
  };
  if (const S factor = detail::softmax_factor(rule, logits, n, experts); factor > S(0)) {
    detail::quotients_backward(n, gates, d_gates, rule.scale, 0, {S(1), true}, [&](Index i, S d) {
      d_logits[experts[i]] += factor * (gates[i] / S(rule.scale)) * d;
    });
    return;
  }
  const detail::Divisor<S> divisor = detail::gate_divisor<S>(rule, n, score);
  const auto for_each_score = [&](const auto& f) {  // f(i, the gradient by its score)
    detail::quotients_backward(n, gates, d_gates, rule.scale, rule.epsilon, divisor,
                               [&](Index i, S d) { f(i, d / divisor.value); });
  };
  if (rule.score != Score::softmax) {
    for_each_score([&](Index i, S d) {
      d_logits[experts[i]] += d * detail::score_slope(rule.score, logits[experts[i]], score(i));
    });
    return;
  }
  // softmax_backward, in which the gradients by the scores of the other experts are zero.
  S origin = 0, mean = 0, others = 0;
  for_each_score([&](Index i, S d) { origin = probs[experts[i]] > S(0.5) ? d : origin; });
  detail::for_each_block_of_others(num_experts, n, experts, probs,
                                   [&](Index, Index, const S* p) { others += detail::sum_of_others(p); });
  for_each_score([&](Index i, S d) { mean += probs[experts[i]] * (d - origin); });
  mean -= others * origin;
  detail::for_each_block_of_others(num_experts, n, experts, probs, [&](Index begin, Index count, const S* p) {
    for (Index e = 0; e < count; ++e) d_logits[begin + e] += p[e] * (-origin - mean);
  });
  for_each_score([&](Index i, S d) { d_logits[experts[i]] += probs[experts[i]] * ((d - origin) - mean); });
}

}  // namespace moe
