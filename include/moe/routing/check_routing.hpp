// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// What a routing must be for the library to follow it, and how one begins.
namespace moe {

/// Throws std::invalid_argument unless the members of `info` fit a batch of `tokens`.
/// O(tokens + groups).
inline void check_batch_info(const BatchInfo& info, Index tokens, const char* where) {
  require(info.mask.size() == 0 || info.mask.size() == tokens, where, ": mask has ", info.mask.size(),
          " entries, expected ", tokens, " tokens");
  require(info.token_ids.size() == 0 || info.token_ids.size() == tokens, where, ": token_ids has ",
          info.token_ids.size(), " entries, expected ", tokens, " tokens");
  const auto& begin = info.group_begin;
  if (begin.size() == 0) return;
  require(begin.size() >= 2, where, ": group_begin has ", begin.size(), " entry, expected at least 2");
  require(begin[0] == 0 && begin[begin.size() - 1] == tokens, where, ": group_begin goes from ", begin[0],
          " to ", begin[begin.size() - 1], ", expected from 0 to ", tokens, " tokens");
  for (Index g = 1; g < begin.size(); ++g) {
    require(begin[g - 1] <= begin[g], where, ": group_begin[", g, "] = ", begin[g],
            " is less than the entry before it, ", begin[g - 1]);
  }
}

/// Throws std::invalid_argument unless the arrays of a plan fit each other. O(num_experts).
template <class S>
void check_plan_arrays(const DispatchPlan<S>& plan, const char* where) {
  const Index experts = plan.num_experts(), assignments = plan.num_assignments();
  require(plan.token_state.size() == plan.num_tokens, where, ": token_state has ", plan.token_state.size(),
          " entries, expected ", plan.num_tokens, " tokens");
  require(plan.gate.size() == assignments, where, ": gate has ", plan.gate.size(), " entries, expected ",
          assignments, " assignments");
  require(experts >= 1, where, ": the routing is over ", experts, " experts, expected at least 1");
  require(plan.expert_begin[0] == 0 && plan.expert_begin[experts] == assignments, where,
          ": expert_begin goes from ", plan.expert_begin[0], " to ", plan.expert_begin[experts],
          ", expected from 0 to ", assignments, " assignments");
  for (Index e = 0; e < experts; ++e)
    require(plan.expert_begin[e] <= plan.expert_begin[e + 1], where, ": expert_begin[", e + 1,
            "] = ", plan.expert_begin[e + 1], " is less than the entry before it, ", plan.expert_begin[e]);
}

/// Throws std::invalid_argument unless a plan from outside is one that the library may follow.
/// O(tokens + assignments).
template <class S>
void check_plan(const DispatchPlan<S>& plan, Index tokens, Index num_experts, const char* where) {
  require(plan.num_tokens == tokens, where, ": the routing is of ", plan.num_tokens, " tokens, expected ",
          tokens);
  require(plan.num_experts() == num_experts, where, ": the routing is over ", plan.num_experts(),
          " experts, expected ", num_experts);
  check_plan_arrays(plan, where);
  for (Index e = 0; e < num_experts; ++e) {
    const Index begin = plan.expert_begin[e], end = plan.expert_begin[e + 1];
    for (Index a = begin; a < end; ++a) {
      const Index t = plan.token[a];
      require(t >= 0 && t < tokens, where, ": assignment ", a, " is of token ", t, " of ", tokens);
      require(a == begin || plan.token[a - 1] < t, where, ": tokens of expert ", e, " must ascend, but ",
              plan.token[a > begin ? a - 1 : a], " goes before ", t);
      require(plan.token_state[t] == TokenState::valid, where, ": assignment ", a, " is of token ", t,
              ", which is masked or poisoned");
    }
  }
  for (Index i = 0; i < plan.passed_through.size(); ++i) {
    const Index t = plan.passed_through[i];
    require(t >= 0 && t < tokens, where, ": passed_through[", i, "] is token ", t, " of ", tokens);
    require(i == 0 || plan.passed_through[i - 1] < t, where, ": passed_through must ascend, but ",
            plan.passed_through[i > 0 ? i - 1 : i], " goes before ", t);
    require(plan.token_state[t] == TokenState::valid, where, ": passed_through[", i, "] is token ", t,
            ", which is masked or poisoned");
  }
}

/// Throws std::invalid_argument unless `chosen` lists choices that `tokens` tokens may make among
/// `num_experts` experts, each at most once. O(tokens + choices * choices of a token).
template <class S>
void check_choices(const Choices<S>& chosen, Index tokens, Index num_experts, const char* where) {
  const Buffer<Index>& begin = chosen.token_begin;
  require(tokens >= 0, where, ": num_tokens = ", tokens, ", expected at least 0");
  require(begin.size() == tokens + 1, where, ": chosen.token_begin has ", begin.size(), " entries, expected ",
          tokens + 1);
  require(begin[0] == 0 && begin[tokens] == chosen.size(), where, ": chosen.token_begin goes from ", begin[0],
          " to ", begin[tokens], ", expected from 0 to ", chosen.size(), " choices");
  require(chosen.gate.size() == chosen.size(), where, ": chosen.gate has ", chosen.gate.size(),
          " entries, expected ", chosen.size(), " choices");
  for (Index t = 0; t < tokens; ++t)
    require(begin[t] <= begin[t + 1], where, ": chosen.token_begin[", t + 1, "] = ", begin[t + 1],
            " is less than the entry before it, ", begin[t]);
  for (Index c = 0; c < chosen.size(); ++c)
    require(chosen.expert[c] >= 0 && chosen.expert[c] < num_experts, where, ": choice ", c, " is expert ",
            chosen.expert[c], " of ", num_experts);
  for (Index t = 0; t < tokens; ++t)
    for (Index c = begin[t]; c < begin[t + 1]; ++c)
      for (Index d = begin[t]; d < c; ++d)
        require(chosen.expert[c] != chosen.expert[d], where, ": token ", t, " chose expert ",
                chosen.expert[c], " twice, as choices ", d - begin[t], " and ", c - begin[t]);
}

/// Throws std::invalid_argument unless every member of `gradient` that is there has the shape that
/// the routing gives it.
template <class S>
void check_routing_gradient(const RoutingGradient<S>& gradient, const Routing<S>& routing,
                            const char* where) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  const auto matrix = [&](const ReusedMatrix<S>& m, const char* what) {
    if (m.size() > 0) require_shape(m, tokens, experts, where, what);
  };
  matrix(gradient.d_router_logits, "d_router_logits");
  matrix(gradient.d_router_probs, "d_router_probs");
  matrix(gradient.d_noise_stddev, "d_noise_stddev");
  const auto array = [&](const Buffer<S>& b, Index size, const char* what) {
    require(b.empty() || b.size() == size, where, ": ", what, " has ", b.size(), " entries, expected ", size);
  };
  array(gradient.d_chosen_gate, routing.chosen.size(), "d_chosen_gate");
  array(gradient.d_gate, routing.plan.num_assignments(), "d_gate");
}

/// Throws std::invalid_argument unless a routing that a caller hands to backward has choices and
/// probabilities that fit its plan. O(tokens + choices + assignments).
template <class S>
void check_choices(const Routing<S>& routing, const char* where) {
  const Choices<S>& chosen = routing.chosen;
  const DispatchPlan<S>& plan = routing.plan;
  const Index tokens = plan.num_tokens, experts = plan.num_experts();
  require_shape(routing.router_probs, tokens, experts, where, "router_probs");
  check_choices(chosen, tokens, experts, where);
  require(plan.choice.size() == plan.num_assignments(), where, ": plan.choice has ", plan.choice.size(),
          " entries, expected ", plan.num_assignments(), " assignments");
  for (Index a = 0; a < plan.num_assignments(); ++a) {
    const Index c = plan.choice[a];
    require(c >= 0 && c < chosen.size(), where, ": assignment ", a, " stems from choice ", c, " of ",
            chosen.size());
    const Index t = plan.token[a];
    require(t >= 0 && t < tokens, where, ": assignment ", a, " is of token ", t, " of ", tokens);
    require(chosen.token_begin[t] <= c && c < chosen.token_begin[t + 1], where, ": assignment ", a,
            " of token ", t, " stems from choice ", c, " of another token");
  }
}

/// Makes `routing` an empty one for a batch: shapes set, tokens valid or masked, nothing chosen. Every router
/// begins with this and says which parts it `fills`: these keep their memory, and what it holds until they
/// are filled. All other parts are emptied. O(tokens + num_experts); allocates only
/// when shapes grow. Throws std::invalid_argument for counts out of range and when `info` does not fit.
template <class S>
void begin_routing(Index tokens, Index num_experts, const BatchInfo& info, Routing<S>& routing,
                   const char* where, const RoutingParts& fills = {}) {
  require(tokens >= 0, where, ": ", tokens, " tokens, expected at least 0");
  require(num_experts >= 1, where, ": ", num_experts, " experts, expected at least 1");
  check_batch_info(info, tokens, where);
  if (!fills.router_logits) routing.router_logits.resize(0, 0);
  if (!fills.router_probs) routing.router_probs.resize(0, 0);
  if (!fills.noise) routing.noise.clear();
  if (!fills.input_factor) routing.input_factor.resize(0, 0);
  if (!fills.levels) routing.levels.clear();
  DispatchPlan<S>& plan = routing.plan;
  plan.num_tokens = tokens;
  plan.token_state.assign(tokens, TokenState::valid);
  for (Index t = 0; t < info.mask.size(); ++t)
    if (!info.mask[t]) plan.token_state[t] = TokenState::masked;
  plan.expert_begin.assign(num_experts + 1, 0);
  plan.token.clear();
  plan.gate.clear();
  plan.choice.clear();
  plan.gate_side = GateSide::output;
  plan.dropped.clear();
  plan.passed_through.clear();
  routing.chosen.token_begin.assign(tokens + 1, 0);
  routing.chosen.expert.clear();
  routing.chosen.gate.clear();
}

/// Marks a valid token as poisoned unless its logits [num_experts] are fit to route by: none NaN or plus
/// infinity, some finite. O(num_experts).
template <class S>
void check_logits(Index num_experts, const S* logits, TokenState& state) {
  if (state != TokenState::valid) return;
  bool any_finite = false;
  for (Index e = 0; e < num_experts; ++e) {
    const NumberKind kind = number_kind(logits[e]);
    any_finite |= kind == NumberKind::finite;
    if (kind == NumberKind::nan || (kind == NumberKind::infinite && !std::signbit(logits[e]))) {
      state = TokenState::poisoned;
      return;
    }
  }
  if (!any_finite) state = TokenState::poisoned;
}

/// Marks valid tokens with a NaN or an infinity in their row of x [tokens, d_model] as poisoned.
/// O(tokens * d_model). Throws when x has another number of rows than the plan has tokens.
template <class S>
void mark_poisoned_rows(const ConstMatrixRef<S>& x, DispatchPlan<S>& plan) {
  require(x.rows() == plan.token_state.size(), "mark_poisoned_rows: x has ", x.rows(), " rows, expected ",
          plan.token_state.size(), " tokens");
  for (Index t = 0; t < x.rows(); ++t)
    for (Index j = 0; j < x.cols(); ++j)
      if (plan.token_state[t] == TokenState::valid && number_kind(x(t, j)) != NumberKind::finite)
        plan.token_state[t] = TokenState::poisoned;
}

}  // namespace moe
