// SPDX-License-Identifier: MIT
#pragma once

#include <moe/balance/metrics.hpp>
#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/softmax.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// The auxiliary losses of routing. Each returns its value and its gradient by what the routing
// shows; the router turns that into gradients of its parameters. Coefficients stand in the user's
// line: layer.backward(d_y, cache, grad, 0.01f * load_balancing_loss(cache.routing).gradient).
// Counts and selections are constants to every gradient. Only valid tokens count. Sums over tokens are made
// in double, in the order of tokens.
namespace moe {

/// The value of a loss and its gradient by what a routing shows.
template <class S>
struct Loss {
  S value = 0;                  ///< without a coefficient
  RoutingGradient<S> gradient;  ///< for the backward pass of a layer or a router
};

/// Throws std::invalid_argument unless router_logits or router_probs are there: not every router fills them.
template <class S>
void require_filled(const ReusedMatrix<S>& part, const Routing<S>& routing, const char* where,
                    const char* what) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  require(part.rows() == tokens && part.cols() == experts, where, ": ", what, " has shape [", part.rows(),
          ", ", part.cols(), "], expected [", tokens, ", ", experts, "]",
          part.size() > 0 ? "" : ": the router did not fill them");
}

/// Squared coefficient of variation, population variance / (mean^2 + 1e-10), and, in `x`, its
/// gradient in place of the values. O(size).
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

/// The sum over the valid tokens [begin, end) and all experts of slope[e] * router_probs(t, e). Rows of its
/// gradient are written to d_probs. O(tokens * num_experts).
template <class S>
Sum<S> linear_loss(const Routing<S>& routing, Index begin, Index end, const Vector<Sum<S>>& slope,
                   ReusedMatrix<S>& d_probs) {
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

/// Load-balancing loss of Fedus et al. 2021 (Switch Transformer), eq. 4 to 6, for any k:
///   num_experts * sum over e of f_e P_e,  f_e = demand_e / sum of demand,  P_e = sum over t of p_te / tokens
/// with the demand before capacity. It is 1 at perfect balance for every k, and 0 for an empty batch.
/// `demand` [num_experts] and `num_tokens` may come from several batches or machines: then the
/// losses of the parts add up to the loss of the whole. Other libraries' values differ by constant
/// factors (Hugging Face: k times this one), so coefficients do too. Gradient by router_probs.
/// O(tokens * num_experts). Throws when the sizes do not fit, and for negative counts.
template <class S>
Loss<S> load_balancing_loss(const Routing<S>& routing, const IndexVector& demand, Index num_tokens) {
  const ReusedMatrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "load_balancing_loss");
  require_filled(p, routing, "load_balancing_loss", "router_probs");
  require(demand.size() == experts, "load_balancing_loss: demand has ", demand.size(), " entries, expected ",
          experts, " experts");
  require(num_tokens >= 0, "load_balancing_loss: num_tokens = ", num_tokens, ", expected at least 0");
  for (Index e = 0; e < experts; ++e)
    require(demand[e] >= 0, "load_balancing_loss: demand[", e, "] = ", demand[e], ", expected at least 0");
  Loss<S> loss;
  const Index total = demand.sum();
  loss.gradient.d_router_probs.setZero(tokens, experts);
  if (total == 0 || num_tokens == 0) return loss;
  Vector<Sum<S>> slope(experts);  // of the loss by p_te, the same for every valid token t
  for (Index e = 0; e < experts; ++e)
    slope[e] = double(experts) * double(demand[e]) / (double(total) * double(num_tokens));
  loss.value = S(linear_loss(routing, 0, tokens, slope, loss.gradient.d_router_probs));
  return loss;
}

/// The same for this batch alone. Example: load_balancing_loss(cache.routing).value.
/// @code
/// moe::Rng rng(1);
/// moe::Matrix<float> x(16, 8);
/// moe::fill_normal(x, 1.0, rng);
/// moe::Routing<float> routing;
/// moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng).route(x, {}, routing);
/// const moe::Loss<float> loss = moe::load_balancing_loss(routing);
/// assert(loss.value > 0 && loss.gradient.d_router_probs.rows() == 16);
/// @endcode
template <class S>
Loss<S> load_balancing_loss(const Routing<S>& routing) {
  return load_balancing_loss(routing, demand_per_expert(routing), routing.plan.num_valid_tokens());
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
    require_filled(routing.router_logits, routing, "importance_loss", "router_logits");
  Loss<S> loss;
  Vector<Sum<S>> importance = Vector<Sum<S>>::Zero(experts);
  if (recipe == Importance::gates) {
    const Choices<S>& chosen = routing.chosen;
    for (Index c = 0; c < chosen.size(); ++c) importance[chosen.expert[c]] += Sum<S>(chosen.gate[c]);
    loss.value = S(squared_variation(importance));
    loss.gradient.d_chosen_gate.resize(chosen.size());
    for (Index c = 0; c < chosen.size(); ++c)
      loss.gradient.d_chosen_gate[c] = S(importance[chosen.expert[c]]);
    return loss;
  }
  Matrix<S> p = Matrix<S>::Zero(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    if (!routing.is_valid(t)) continue;
    softmax(experts, &routing.router_logits(t, 0), &p(t, 0));
    importance += p.row(t).transpose().template cast<Sum<S>>();
  }
  loss.value = S(squared_variation(importance));
  const Vector<S> d_importance = importance.template cast<S>();
  ReusedMatrix<S>& d = loss.gradient.d_router_logits;
  d.setZero(tokens, experts);
  for (Index t = 0; t < tokens; ++t)
    if (routing.is_valid(t)) softmax_backward(experts, &p(t, 0), d_importance.data(), &d(t, 0));
  return loss;
}

/// Router z-loss (Zoph et al. 2022, ST-MoE, eq. 5): the mean over valid tokens of the squared
/// log-sum-exp of router_logits. Gradient by router_logits. O(tokens * num_experts).
/// @code
/// const moe::TopKRouter<float> router({.d_model = 8, .num_experts = 4});  // its logits are 0
/// moe::Routing<float> routing;
/// router.route(moe::Matrix<float>::Ones(16, 8), {}, routing);
/// assert(std::abs(moe::router_z_loss(routing).value - std::pow(std::log(4.0f), 2)) < 1e-5f);
/// @endcode
template <class S>
Loss<S> router_z_loss(const Routing<S>& routing) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "router_z_loss");
  require_filled(routing.router_logits, routing, "router_z_loss", "router_logits");
  Loss<S> loss;
  ReusedMatrix<S>& d = loss.gradient.d_router_logits;
  d.setZero(tokens, experts);
  const Index valid = routing.plan.num_valid_tokens();
  Sum<S> sum = 0;
  for (Index t = 0; t < tokens; ++t) {
    if (!routing.is_valid(t)) continue;
    const S* const z = &routing.router_logits(t, 0);
    const S lse = log_sum_exp(experts, z);
    sum += Sum<S>(lse) * Sum<S>(lse);
    softmax(experts, z, &d(t, 0));
    d.row(t) *= S(2) * lse / S(valid);
  }
  if (valid > 0) loss.value = S(sum / Sum<S>(valid));
  return loss;
}

}  // namespace moe
