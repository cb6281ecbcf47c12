// SPDX-License-Identifier: MIT
#pragma once

#include <moe/balance/loss.hpp>
#include <moe/balance/metrics.hpp>
#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// Balance of parts: within every group of tokens (a sequence), and between groups of experts (devices).
namespace moe {

/// Each valid token's `top_k` experts of the largest router_probs, whatever bias or group limit selected:
/// the demand that DeepSeek-V3's loss counts (eq. 18). The gates are those probabilities; ties go to the
/// lower expert. O(tokens * num_experts * top_k). Throws std::invalid_argument for a top_k out of range.
template <class S>
Choices<S> most_probable_choices(const Routing<S>& routing, Index top_k) {
  const ReusedMatrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "most_probable_choices");
  require_filled(p, routing, "most_probable_choices", "router_probs");
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
  const ReusedMatrix<S>& p = routing.router_probs;
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  check_plan_arrays(routing.plan, "sequence_balance_loss");
  check_batch_info(info, tokens, "sequence_balance_loss");
  check_choices(demand, tokens, experts, "sequence_balance_loss");
  require_filled(p, routing, "sequence_balance_loss", "router_probs");
  Loss<S> loss;
  loss.gradient.d_router_probs.setZero(tokens, experts);
  const auto valid_in = [&](Index g) {
    Index valid = 0;
    for (Index t = info.begin_of(g); t < info.end_of(g, tokens); ++t) valid += routing.is_valid(t);
    return valid;
  };
  Index groups = 0;
  for (Index g = 0; g < info.num_groups(); ++g) groups += valid_in(g) > 0;
  Sum<S> value = 0;
  Vector<Sum<S>> slope(experts);  // of the loss by p_te, the same for every valid token t of a group
  for (Index g = 0; g < info.num_groups(); ++g) {
    const Index valid = valid_in(g), begin = info.begin_of(g), end = info.end_of(g, tokens);
    const Index first = demand.token_begin[begin], last = demand.token_begin[end];
    if (valid == 0 || first == last) continue;
    IndexVector count = IndexVector::Zero(experts);
    for (Index c = first; c < last; ++c) ++count[demand.expert[c]];
    for (Index e = 0; e < experts; ++e)
      slope[e] = double(experts) * double(count[e]) / (double(last - first) * double(valid) * double(groups));
    value += linear_loss(routing, begin, end, slope, loss.gradient.d_router_probs);
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
  Vector<Sum<S>> slope(experts);
  for (Index e = 0; e < experts; ++e) {
    Index size = 0, group_demand = 0;
    for (Index other = 0; other < experts; ++other) {
      if (expert_group[other] != expert_group[e]) continue;
      ++size;
      group_demand += demand[other];
    }
    slope[e] = double(experts) * double(group_demand) / (double(size) * double(total) * double(valid));
  }
  loss.value = S(linear_loss(routing, 0, routing.num_tokens(), slope, loss.gradient.d_router_probs));
  return loss;
}

}  // namespace moe
