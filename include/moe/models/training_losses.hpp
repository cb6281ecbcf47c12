// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/balance/group_balance_loss.hpp>
#include <moe/balance/load_loss.hpp>
#include <moe/balance/loss.hpp>
#include <moe/balance/metrics.hpp>
#include <moe/routing/router.hpp>

// The auxiliary losses that a published model trains with, as data, and their weighted sum.
namespace moe {

/// Which choices a model's balance loss counts, and over which tokens.
enum class BalanceOf {
  choices,          ///< all choices of the batch: load_balancing_loss(routing)
  first_choices,    ///< each token's most probable expert alone, in each group of BatchInfo (GShard, GLaM,
                    ///< ST-MoE; NLLB, whose authors have no groups)
  sequences,        ///< all choices of each group of BatchInfo: sequence_balance_loss (Switch, DeepSeek-V2)
  sequence_scores,  ///< the same, but of the experts that a token would choose by its scores alone,
                    ///< without selection bias and group limit (DeepSeek-V3, eq. 18)
};

/// How the losses of a model's layers become one.
enum class OverLayers {
  sum,   ///< they are added up
  mean,  ///< Hugging Face (which averages counts and probabilities first), MegaBlocks
};

/// Coefficients of the auxiliary losses of one layer, 0 where the model has no such loss. They are for
/// the losses as this library normalises them: a published coefficient times balance_factor.
struct Losses {
  double balance = 0;                                 ///< of the balance loss
  BalanceOf balance_of = BalanceOf::choices;          ///< what that counts
  double z = 0;                                       ///< of router_z_loss
  double importance = 0;                              ///< of importance_loss
  Importance importance_of = Importance::gates;       ///< what that sums
  double load = 0;                                    ///< of load_loss
  LoadThreshold load_threshold = LoadThreshold::two;  ///< what that asks
  double device = 0;                                  ///< of device_balance_loss, for the batch as a whole
  Index devices = 1;                                  ///< expert e is on device e * devices / num_experts
  OverLayers over_layers = OverLayers::sum;           ///< how the losses of layers become one
};

namespace detail {

// sequence_balance_loss with the demand of scores alone, for as many experts as tokens choose.
template <class S>
Loss<S> sequence_score_loss(const Routing<S>& routing, const BatchInfo& info) {
  const Choices<S>& chosen = routing.chosen;
  check_choices(chosen, routing.num_tokens(), routing.num_experts(), "routing_loss");
  Index top_k = 0;
  for (Index t = 0; t < routing.num_tokens(); ++t)
    top_k = (std::max)(top_k, chosen.token_begin[t + 1] - chosen.token_begin[t]);
  if (top_k == 0) return sequence_balance_loss(routing, info);  // nobody chose: zero
  return sequence_balance_loss(routing, info, most_probable_choices(routing, top_k));
}

template <class S>
Loss<S> balance_loss(BalanceOf balance_of, const Routing<S>& routing, const BatchInfo& info) {
  switch (balance_of) {
    case BalanceOf::choices:
      return load_balancing_loss(routing);
    case BalanceOf::first_choices:
      return sequence_balance_loss(routing, info, most_probable_choices(routing, 1));
    case BalanceOf::sequences:
      return sequence_balance_loss(routing, info);
    case BalanceOf::sequence_scores:
      return sequence_score_loss(routing, info);
  }
  return {};
}

// Expert e is on device e * devices / num_experts.
inline IndexVector device_of_experts(Index num_experts, Index devices) {
  require(devices >= 1, "routing_loss: devices = ", devices, ", expected at least 1");
  IndexVector device(num_experts);
  for (Index e = 0; e < num_experts; ++e) device[e] = e * devices / num_experts;
  return device;
}

}  // namespace detail

/// The weighted sum of a model's auxiliary losses for the routing of one layer, with its gradient.
/// A model adds up, or averages, those of its layers: see Losses::over_layers.
/// `info` is what the routing was made with: its groups are the sequences of a balance loss of each.
/// Throws std::invalid_argument where the routing lacks what a loss needs.
/// Example: layer.backward(d_y, cache, grad, routing_loss(mixtral_8x7b.losses, cache.routing).gradient).
template <class S>
Loss<S> routing_loss(const Losses& losses, const Routing<S>& routing, const BatchInfo& info = {}) {
  Loss<S> sum;
  const auto add = [&](double coefficient, const auto& loss) {
    if (is_equal(coefficient, 0.0)) return;
    const Loss<S> part = loss();
    sum.value += S(coefficient) * part.value;
    sum.gradient += S(coefficient) * part.gradient;
  };
  add(losses.balance, [&] { return detail::balance_loss(losses.balance_of, routing, info); });
  add(losses.z, [&] { return router_z_loss(routing); });
  add(losses.importance, [&] { return importance_loss(routing, losses.importance_of); });
  add(losses.load, [&] { return load_loss(routing, losses.load_threshold); });
  add(losses.device, [&] {
    return device_balance_loss(routing, detail::device_of_experts(routing.num_experts(), losses.devices));
  });
  return sum;
}

}  // namespace moe
