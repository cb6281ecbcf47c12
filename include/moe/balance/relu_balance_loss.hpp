// SPDX-License-Identifier: MIT
#pragma once

#include <moe/balance/loss.hpp>
#include <moe/balance/metrics.hpp>
#include <moe/core/check.hpp>
#include <moe/math/numbers.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// ReMoE's loss, which keeps the number of experts that tokens use, and its coefficient.
namespace moe {

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
  Sum<S> value = 0;
  for (Index c = 0; c < chosen.size(); ++c) {
    const double slope =
        double(experts) * double(demand[chosen.expert[c]]) / (double(top_k) * double(valid) * double(valid));
    value += slope * Sum<S>(chosen.gate[c]);
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

}  // namespace moe
