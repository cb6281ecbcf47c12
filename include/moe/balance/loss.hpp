// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <moe/balance/metrics.hpp>
#include <moe/core/check.hpp>
#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/router.hpp>

// The auxiliary losses of routing. Each returns its value and its gradient by what the routing
// shows; the router turns that into gradients of its parameters. Coefficients stand in the user's
// line: layer.backward(d_y, cache, grad, 0.01f * load_balancing_loss(cache.routing).gradient).
// Counts and selections are constants to every gradient. Only valid tokens count. Sums over tokens are made
// in double, in the order of tokens.
namespace moe {

template <class S>
struct Loss {
  S value = 0;
  RoutingGradient<S> gradient;
};

namespace detail {

// Squared coefficient of variation, population variance / (mean^2 + 1e-10), and, in `x`, its
// gradient in place of the values.
template <class T>
T squared_variation(Vector<T>& x) {
  constexpr T kEpsilon = T(1e-10);
  const Index n = x.size();
  if (n == 0) return 0;
  T mean = 0, variance = 0;
  for (Index i = 0; i < n; ++i) mean += x[i];
  mean /= T(n);
  for (Index i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  variance /= T(n);
  const T scale = mean * mean + kEpsilon;
  for (Index i = 0; i < n; ++i)
    x[i] = T(2) / T(n) * ((x[i] - mean) / scale - mean * variance / (scale * scale));
  return variance / scale;
}

// The sum over the valid tokens [begin, end) and all experts of slope[e] * router_probs(t, e). Rows of its
// gradient are written to d_probs.
template <class S>
Sum<S> linear_loss(const Routing<S>& routing, Index begin, Index end, const Vector<Sum<S>>& slope,
                   Matrix<S>& d_probs) {
  Vector<Sum<S>> sum = Vector<Sum<S>>::Zero(slope.size());  // of every expert's probabilities
  for (Index t = begin; t < end; ++t) {
    if (!routing.is_valid(t)) continue;
    sum += routing.router_probs.row(t).transpose().template cast<Sum<S>>();
    d_probs.row(t) = slope.transpose().template cast<S>();
  }
  Sum<S> value = 0;
  for (Index e = 0; e < slope.size(); ++e) value += slope[e] * sum[e];
  return value;
}

}  // namespace detail

/// Load-balancing loss of Fedus et al. 2021 (Switch Transformer), eq. 4 to 6, for any k:
///   num_experts * sum over e of f_e P_e,  f_e = demand_e / sum of demand,  P_e = sum over t of p_te / tokens
/// with the demand before capacity. It is 1 at perfect balance for every k, and 0 for an empty batch.
/// `demand` [num_experts] and `num_tokens` may come from several batches or machines: then the
/// losses of the parts add up to the loss of the whole. Other libraries' values differ by constant
/// factors (Hugging Face: k times this one), so coefficients do too. Gradient by router_probs.
/// O(tokens * num_experts). Throws when the sizes do not fit, and for negative counts.
template <class S>
Loss<S> load_balancing_loss(const Routing<S>& routing, const IndexVector& demand, Index num_tokens) {
  const Matrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "load_balancing_loss");
  require_shape(p, tokens, experts, "load_balancing_loss",
                p.size() > 0 ? "router_probs" : "router_probs (the router did not fill them)");
  require(demand.size() == experts, "load_balancing_loss: demand has ", demand.size(), " entries, expected ",
          experts, " experts");
  require(num_tokens >= 0, "load_balancing_loss: num_tokens = ", num_tokens, ", expected at least 0");
  for (Index e = 0; e < experts; ++e)
    require(demand[e] >= 0, "load_balancing_loss: demand[", e, "] = ", demand[e], ", expected at least 0");
  Loss<S> loss;
  const Index total = demand.sum();
  loss.gradient.d_router_probs.setZero(tokens, experts);
  if (total == 0 || num_tokens == 0) return loss;
  Vector<detail::Sum<S>> slope(experts);  // of the loss by p_te, the same for every valid token t
  for (Index e = 0; e < experts; ++e)
    slope[e] = double(experts) * double(demand[e]) / (double(total) * double(num_tokens));
  loss.value = S(detail::linear_loss(routing, 0, tokens, slope, loss.gradient.d_router_probs));
  return loss;
}

/// The same for this batch alone. Example: load_balancing_loss(cache.routing).value.
template <class S>
Loss<S> load_balancing_loss(const Routing<S>& routing) {
  return load_balancing_loss(routing, demand_per_expert(routing), routing.plan.num_valid_tokens());
}

/// Each valid token's `top_k` experts of the largest router_probs, whatever bias or group limit selected:
/// the demand that DeepSeek-V3's loss counts (eq. 18). The gates are those probabilities; ties go to the
/// lower expert. O(tokens * num_experts * top_k). Throws std::invalid_argument for a top_k out of range.
template <class S>
Choices<S> most_probable_choices(const Routing<S>& routing, Index top_k) {
  const Matrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "most_probable_choices");
  require_shape(p, tokens, experts, "most_probable_choices", "router_probs");
  require(top_k >= 1 && top_k <= experts, "most_probable_choices: top_k = ", top_k,
          " is not between 1 and num_experts = ", experts);
  Choices<S> choices;
  choices.token_begin.assign(tokens + 1, 0);
  Buffer<Index> best;
  best.resize(top_k);
  for (Index t = 0; t < tokens; ++t) {
    if (routing.is_valid(t)) {
      moe::top_k(experts, &p(t, 0), top_k, best.data());
      for (const Index e : best) {
        choices.expert.push_back(e);
        choices.gate.push_back(p(t, e));
      }
    }
    choices.token_begin[t + 1] = choices.size();
  }
  return choices;
}

/// The mean over groups of each group's own load-balancing loss, groups without valid tokens left out:
/// balance within every sequence. Its f_e counts `demand`: for DeepSeek-V3 (DeepSeek-AI 2024, eq. 17 to 20)
/// that is most_probable_choices(routing, top_k), which no selection bias moves. It is 1 at perfect balance,
/// and equal to load_balancing_loss for one group and its demand. Gradient by router_probs. O(tokens *
/// num_experts). Throws when `info` or `demand` does not fit the routing.
template <class S>
Loss<S> sequence_balance_loss(const Routing<S>& routing, const BatchInfo& info, const Choices<S>& demand) {
  const Matrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "sequence_balance_loss");
  check_batch_info(info, tokens, "sequence_balance_loss");
  check_choices(demand, tokens, experts, "sequence_balance_loss");
  require_shape(p, tokens, experts, "sequence_balance_loss", "router_probs");
  Loss<S> loss;
  loss.gradient.d_router_probs.setZero(tokens, experts);
  const auto valid_in = [&](Index g) {
    Index valid = 0;
    for (Index t = info.begin_of(g); t < info.end_of(g, tokens); ++t) valid += routing.is_valid(t);
    return valid;
  };
  Index groups = 0;
  for (Index g = 0; g < info.num_groups(); ++g) groups += valid_in(g) > 0;
  detail::Sum<S> value = 0;
  Vector<detail::Sum<S>> slope(experts);  // of the loss by p_te, the same for every valid token t of a group
  for (Index g = 0; g < info.num_groups(); ++g) {
    const Index valid = valid_in(g), begin = info.begin_of(g), end = info.end_of(g, tokens);
    const Index first = demand.token_begin[begin], last = demand.token_begin[end];
    if (valid == 0 || first == last) continue;
    IndexVector count = IndexVector::Zero(experts);
    for (Index c = first; c < last; ++c) ++count[demand.expert[c]];
    for (Index e = 0; e < experts; ++e)
      slope[e] = double(experts) * double(count[e]) / (double(last - first) * double(valid) * double(groups));
    value += detail::linear_loss(routing, begin, end, slope, loss.gradient.d_router_probs);
  }
  loss.value = S(value);
  return loss;
}

/// The same with the demand of the experts that were chosen, as Hugging Face's loss of Switch. Under a
/// selection bias it is not DeepSeek-V3's.
template <class S>
Loss<S> sequence_balance_loss(const Routing<S>& routing, const BatchInfo& info) {
  return sequence_balance_loss(routing, info, routing.chosen);
}

/// Device-level balance loss (DeepSeekMoE; Dai et al. 2024, eq. 15 to 17): the sum over groups of experts
/// (those of one device) of the mean of f_e times the sum of P_e over its experts, f and P as in
/// load_balancing_loss. `expert_group` [num_experts] gives every expert its group, from 0. It is 1 at
/// perfect balance. Gradient by router_probs. O(tokens * num_experts). Throws when sizes do not fit, and for
/// negative groups.
template <class S>
Loss<S> device_balance_loss(const Routing<S>& routing, const IndexVector& expert_group) {
  const Index experts = routing.num_experts();
  require(expert_group.size() == experts, "device_balance_loss: expert_group has ", expert_group.size(),
          " entries, expected ", experts, " experts");
  for (Index e = 0; e < experts; ++e)
    require(expert_group[e] >= 0, "device_balance_loss: expert_group[", e, "] = ", expert_group[e],
            ", expected at least 0");
  // A loss that is linear in P: that of a demand which is the group's mean, times the group's size.
  const IndexVector demand = demand_per_expert(routing);
  Loss<S> loss = load_balancing_loss(routing);
  const Index total = demand.sum(), valid = routing.plan.num_valid_tokens();
  loss.value = 0;
  if (total == 0 || valid == 0) return loss;
  Vector<detail::Sum<S>> slope(experts);
  for (Index e = 0; e < experts; ++e) {
    Index size = 0, group_demand = 0;
    for (Index other = 0; other < experts; ++other) {
      if (expert_group[other] != expert_group[e]) continue;
      ++size;
      group_demand += demand[other];
    }
    slope[e] = double(experts) * double(group_demand) / (double(size) * double(total) * double(valid));
  }
  loss.value = S(detail::linear_loss(routing, 0, routing.num_tokens(), slope, loss.gradient.d_router_probs));
  return loss;
}

/// Load-balanced L1 regularisation of ReLU routing (ReMoE; Wang et al. 2024, eq. 9 and 10):
///   num_experts / (top_k * tokens^2) * sum over e of (tokens that chose e) * (sum of e's gates)
/// with top_k the number of experts that a token is to use on average. Gates are what the layer multiplies
/// by, gate_scale included. Gradient by the chosen gates. O(choices). Throws for a top_k out of range.
template <class S>
Loss<S> relu_balance_loss(const Routing<S>& routing, Index top_k) {
  const Index experts = routing.num_experts(), valid = routing.plan.num_valid_tokens();
  check_plan_arrays(routing.plan, "relu_balance_loss");
  check_choices(routing.chosen, routing.num_tokens(), experts, "relu_balance_loss");
  require(top_k >= 1 && top_k <= experts, "relu_balance_loss: top_k = ", top_k,
          " is not between 1 and num_experts = ", experts);
  const Choices<S>& chosen = routing.chosen;
  const IndexVector demand = demand_per_expert(routing);
  Loss<S> loss;
  loss.gradient.d_chosen_gate.resize(chosen.size());
  detail::Sum<S> value = 0;
  for (Index c = 0; c < chosen.size(); ++c) {
    const double slope =
        double(experts) * double(demand[chosen.expert[c]]) / (double(top_k) * double(valid) * double(valid));
    value += slope * detail::Sum<S>(chosen.gate[c]);
    loss.gradient.d_chosen_gate[c] = S(slope);
  }
  loss.value = S(value);
  return loss;
}

/// ReMoE's next coefficient of relu_balance_loss, once per optimiser step (Wang et al. 2024, eq. 6): 1.2
/// times as large where tokens use more than top_k experts on average, else 1.2 times as small. Its authors
/// begin with 1e-8. `experts_per_token` is the mean over tokens, layers and machines.
inline double update_relu_coefficient(double coefficient, double experts_per_token, Index top_k) {
  require(number_kind(coefficient) == NumberKind::finite && coefficient > 0,
          "update_relu_coefficient: coefficient = ", coefficient, ", expected a finite number above 0");
  require(number_kind(experts_per_token) == NumberKind::finite && experts_per_token >= 0,
          "update_relu_coefficient: experts_per_token = ", experts_per_token,
          ", expected a finite number of at least 0");
  return experts_per_token > double(top_k) ? coefficient * 1.2 : coefficient / 1.2;
}

/// How a library writes down its load-balancing loss. Those that count first choices only are
/// load_balancing_loss(routing, demand_per_expert(routing, 1), tokens).
enum class BalanceConvention {
  choices,       ///< E sum f P, f = choices of e / all choices: this library, Megatron-LM, MegaBlocks
  tokens,        ///< E sum f P, f = choices of e / tokens: Hugging Face, flaxformer, OpenMoE
  mean_product,  ///< mean over e of f P, f = choices of e / tokens: FairScale (first choices)
};

/// The value of a convention's loss where load_balancing_loss is 1: multiply a published coefficient by
/// it and use it with ours. For losses that count first choices only top_k is 1; where a convention divides
/// by the number of layers, so must the caller. Throws std::invalid_argument for counts out of range.
/// Example: Mixtral's 0.001 is 0.001 * balance_factor(BalanceConvention::tokens, 8, 2) = 0.002 here.
inline double balance_factor(BalanceConvention convention, Index num_experts, Index top_k) {
  require(num_experts >= 1, "balance_factor: num_experts = ", num_experts, ", expected at least 1");
  require(top_k >= 1 && top_k <= num_experts, "balance_factor: top_k = ", top_k,
          " is not between 1 and num_experts = ", num_experts);
  switch (convention) {
    case BalanceConvention::choices:
      return 1;
    case BalanceConvention::tokens:
      return double(top_k);
    case BalanceConvention::mean_product:
      return double(top_k) / (double(num_experts) * double(num_experts));
  }
  return 1;
}

/// Which quantity importance_loss sums over tokens.
enum class Importance {
  gates,  ///< gates of the chosen experts, before capacity (Shazeer et al. 2017, eq. 6)
  probs,  ///< softmax of router_logits, without noise (V-MoE; Riquelme et al. 2021, appendix A.1)
};

/// CV^2 of the experts' importance (Shazeer et al. 2017, eq. 6 and 7, without the coefficient):
/// population variance / (mean^2 + 1e-10). Gradient by the chosen gates, or by router_logits.
/// O(choices), or O(tokens * num_experts) for probs.
template <class S>
Loss<S> importance_loss(const Routing<S>& routing, Importance recipe = Importance::gates) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "importance_loss");
  check_choices(routing.chosen, tokens, experts, "importance_loss");
  if (recipe == Importance::probs)
    require_shape(routing.router_logits, tokens, experts, "importance_loss", "router_logits");
  Loss<S> loss;
  using Sum = detail::Sum<S>;
  Vector<Sum> importance = Vector<Sum>::Zero(experts);
  if (recipe == Importance::gates) {
    const Choices<S>& chosen = routing.chosen;
    for (Index c = 0; c < chosen.size(); ++c) importance[chosen.expert[c]] += Sum(chosen.gate[c]);
    loss.value = S(detail::squared_variation(importance));
    loss.gradient.d_chosen_gate.resize(chosen.size());
    for (Index c = 0; c < chosen.size(); ++c)
      loss.gradient.d_chosen_gate[c] = S(importance[chosen.expert[c]]);
    return loss;
  }
  Matrix<S> p = Matrix<S>::Zero(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    if (!routing.is_valid(t)) continue;
    softmax(experts, &routing.router_logits(t, 0), &p(t, 0));
    importance += p.row(t).transpose().template cast<Sum>();
  }
  loss.value = S(detail::squared_variation(importance));
  const Vector<S> d_importance = importance.template cast<S>();
  Matrix<S>& d = loss.gradient.d_router_logits;
  d.setZero(tokens, experts);
  for (Index t = 0; t < tokens; ++t)
    if (routing.is_valid(t)) softmax_backward(experts, &p(t, 0), d_importance.data(), &d(t, 0));
  return loss;
}

/// Router z-loss (Zoph et al. 2022, ST-MoE, eq. 5): the mean over valid tokens of the squared
/// log-sum-exp of router_logits. Gradient by router_logits. O(tokens * num_experts).
template <class S>
Loss<S> router_z_loss(const Routing<S>& routing) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "router_z_loss");
  require_shape(routing.router_logits, tokens, experts, "router_z_loss", "router_logits");
  Loss<S> loss;
  Matrix<S>& d = loss.gradient.d_router_logits;
  d.setZero(tokens, experts);
  const Index valid = routing.plan.num_valid_tokens();
  detail::Sum<S> sum = 0;
  for (Index t = 0; t < tokens; ++t) {
    if (!routing.is_valid(t)) continue;
    const S* const z = &routing.router_logits(t, 0);
    const S lse = log_sum_exp(experts, z);
    sum += detail::Sum<S>(lse) * detail::Sum<S>(lse);
    softmax(experts, z, &d(t, 0));
    d.row(t) *= S(2) * lse / S(valid);
  }
  if (valid > 0) loss.value = S(sum / detail::Sum<S>(valid));
  return loss;
}

}  // namespace moe
