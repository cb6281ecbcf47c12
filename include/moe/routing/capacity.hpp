// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/expert_capacity.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/seating_order.hpp>

// Who gets a seat at an expert, and what becomes of the others.
namespace moe {

/// What becomes of an assignment whose expert is full.
enum class Overflow {
  drop,          ///< it contributes nothing
  next_best,     ///< it takes the token's most probable expert that has room and is not in use by
                 ///< the token already; dropped if there is none
  pass_through,  ///< dropped; a token that loses all of its assignments outputs x instead
};

/// Who is seated first, and what becomes of those who find no seat.
struct SeatingPolicy {
  Overflow overflow = Overflow::drop;         ///< what becomes of the others
  Priority priority = Priority::token_order;  ///< who is seated first
};

namespace detail {

// The token that a choice belongs to.
template <class S>
Index token_of(const Choices<S>& chosen, Index choice) {
  const auto& begin = chosen.token_begin;
  return Index(std::upper_bound(begin.begin(), begin.end(), choice) - begin.begin()) - 1;
}

// The best expert by `scores` [num_experts] that has room and that none of `seats` names, or -1.
template <class S>
Index best_free_expert(Index num_experts, const S* scores, const Index* load, Index capacity,
                       const Index* seats_begin, const Index* seats_end) {
  Index best = -1;
  for (Index e = 0; e < num_experts; ++e) {
    if (load[e] >= capacity || is_unavailable(scores[e])) continue;
    if (std::find(seats_begin, seats_end, e) != seats_end) continue;
    if (best < 0 || selected_before(scores, e, best)) best = e;
  }
  return best;
}

// Builds the plan from the expert at which each choice is seated (-1: none).
template <class S>
void plan_from_seats(const Choices<S>& chosen, const Buffer<Index>& seat, DispatchPlan<S>& plan) {
  const Index experts = plan.num_experts(), tokens = plan.num_tokens;
  plan.expert_begin.assign(experts + 1, 0);
  Index kept = 0;
  for (const Index e : seat) {
    if (e < 0) continue;
    ++plan.expert_begin[e + 1];
    ++kept;
  }
  for (Index e = 0; e < experts; ++e) plan.expert_begin[e + 1] += plan.expert_begin[e];
  for (Buffer<Index>* array : {&plan.token, &plan.choice}) {
    array->reserve(chosen.expert.capacity());
    array->resize(kept);
  }
  plan.gate.reserve(chosen.expert.capacity());
  plan.gate.resize(kept);
  for (Index t = 0; t < tokens; ++t) {
    for (Index c = chosen.token_begin[t]; c < chosen.token_begin[t + 1]; ++c) {
      if (seat[c] < 0) continue;
      const Index a = plan.expert_begin[seat[c]]++;  // the begin moves on, and is put back below
      plan.token[a] = t;
      plan.choice[a] = c;
      plan.gate[a] = chosen.gate[c];
    }
  }
  for (Index e = experts; e > 0; --e) plan.expert_begin[e] = plan.expert_begin[e - 1];
  plan.expert_begin[0] = 0;
}

}  // namespace detail

/// Dropless: seats every choice. plan.num_tokens, token_state and the number of experts must be set.
/// Gates are those of the choices. O(choices + tokens + num_experts). Throws std::invalid_argument
/// when the choices do not fit the plan.
template <class S>
void dispatch_all(const Choices<S>& chosen, DispatchPlan<S>& plan) {
  check_choices(chosen, plan.num_tokens, plan.num_experts(), "dispatch_all");
  plan.dropped.clear();
  plan.passed_through.clear();
  detail::plan_from_seats(chosen, chosen.expert, plan);
}

namespace detail {

// A call of apply_capacity. `scores` are for next_best, `probs` for token_max_prob.
template <class S>
struct Seating {
  const Choices<S>& chosen;
  const ConstMatrixRef<S>& scores;
  const Eigen::Ref<const IndexVector>& capacity;  // [groups]
  SeatingPolicy policy;
  const BatchInfo& info;
  DispatchPlan<S>& plan;
  CapacityWorkspace<S>& workspace;
  const ReusedMatrix<S>* probs;
};

template <class S>
void check_seating(const Seating<S>& s) {
  constexpr const char* kWhere = "apply_capacity";
  const Index tokens = s.plan.num_tokens, experts = s.plan.num_experts();
  const Priority priority = s.policy.priority;
  check_choices(s.chosen, tokens, experts, kWhere);
  for (Index c = 0; priority != Priority::token_order && c < s.chosen.size(); ++c)
    require(number_kind(s.chosen.gate[c]) != NumberKind::nan, kWhere, ": the gate of choice ", c, " of ",
            s.chosen.size(), " is NaN");
  if (priority == Priority::token_max_prob) {
    require(s.probs != nullptr, kWhere, ": token_max_prob without probs");
    require_shape(*s.probs, tokens, experts, kWhere, "probs");
    for (Index i = 0; i < s.probs->size(); ++i)
      require(number_kind(s.probs->data()[i]) != NumberKind::nan, kWhere, ": probs of token ", i / experts,
              " of ", tokens, " are NaN");
  }
  check_batch_info(s.info, tokens, kWhere);
  require(s.capacity.size() == s.info.num_groups(), kWhere, ": ", s.capacity.size(),
          " capacities, expected one for each of ", s.info.num_groups(), " groups");
  for (Index g = 0; g < s.capacity.size(); ++g)
    require(s.capacity[g] >= 0, kWhere, ": capacity[", g, "] = ", s.capacity[g], ", expected at least 0");
  if (s.policy.overflow == Overflow::next_best) require_shape(s.scores, tokens, experts, kWhere, "scores");
}

// Seats the choices of one group.
template <class S>
void seat_group(const Seating<S>& s, Index group) {
  const Index tokens = s.plan.num_tokens, experts = s.plan.num_experts(), capacity = s.capacity[group];
  Buffer<Index>&load = s.workspace.load, &seat = s.workspace.seat;
  order_choices(s.chosen, s.probs, s.policy.priority, s.info.begin_of(group), s.info.end_of(group, tokens),
                s.workspace);
  load.assign(experts, 0);
  for (const Index c : s.workspace.order) {
    const Index e = s.chosen.expert[c];
    if (load[e] >= capacity) continue;
    ++load[e];
    seat[c] = e;
  }
  for (const Index c : s.workspace.order) {
    if (seat[c] >= 0) continue;
    const Index t = token_of(s.chosen, c);
    if (s.policy.overflow == Overflow::next_best) {
      seat[c] =
          best_free_expert(experts, &s.scores.coeffRef(t, 0), load.data(), capacity,
                           seat.data() + s.chosen.token_begin[t], seat.data() + s.chosen.token_begin[t + 1]);
      if (seat[c] >= 0) {
        ++load[seat[c]];
        continue;
      }
    }
    s.plan.dropped.push_back({t, s.chosen.expert[c], c - s.chosen.token_begin[t]});
  }
}

}  // namespace detail

/// Seats at most capacity[g] choices of the tokens of group g at each expert, in order of priority;
/// then handles the others as the policy says, in the same order. For next_best, `scores`
/// [tokens, num_experts] ranks a token's experts (minus infinity: unavailable); it may be empty
/// otherwise. For token_max_prob, `probs` are the router_probs [tokens, num_experts]; null otherwise.
/// Gates are those of the choices, also where an expert was replaced: recomputing them is the router's
/// business. Everything dropped is listed in the plan.
/// O(choices log choices), O(tokens * num_experts) more for token_max_prob, and O(num_experts) more per
/// overflowing choice for next_best. Throws std::invalid_argument when the arguments do not fit each
/// other, and for gates or probabilities that can not be ordered.
/// @code
/// moe::Routing<float> routing;
/// moe::begin_routing(3, 2, {}, routing, "example");  // 3 tokens, 2 experts
/// routing.chosen = {{0, 1, 2, 3}, {0, 0, 0}, {0.5f, 0.9f, 0.7f}};  // all want expert 0
/// const moe::IndexVector seats{{2}};                               // of an expert, in the only group
/// moe::CapacityWorkspace<float> workspace;
/// moe::apply_capacity(routing.chosen, moe::Matrix<float>(), seats,
///                     {.priority = moe::Priority::assignment_gate}, {}, routing.plan, workspace);
/// assert(routing.plan.dropped.size() == 1 && routing.plan.dropped[0].token == 0);  // the smallest gate
/// @endcode
template <class S>
void apply_capacity(const Choices<S>& chosen, const std::type_identity_t<ConstMatrixRef<S>>& scores,
                    const Eigen::Ref<const IndexVector>& capacity, const SeatingPolicy& policy,
                    const BatchInfo& info, DispatchPlan<S>& plan, CapacityWorkspace<S>& workspace,
                    const ReusedMatrix<S>* probs = nullptr) {
  const detail::Seating<S> seating{chosen, scores, capacity, policy, info, plan, workspace, probs};
  detail::check_seating(seating);
  Buffer<Index>& seat = workspace.seat;
  seat.reserve(chosen.expert.capacity());
  seat.assign(chosen.size(), -1);
  plan.dropped.reserve(chosen.expert.capacity());
  plan.dropped.clear();
  plan.passed_through.reserve(plan.num_tokens);
  plan.passed_through.clear();
  for (Index g = 0; g < info.num_groups(); ++g) detail::seat_group(seating, g);
  for (Index t = 0; policy.overflow == Overflow::pass_through && t < plan.num_tokens; ++t) {
    const Index* const begin = seat.data() + chosen.token_begin[t];
    const Index* const end = seat.data() + chosen.token_begin[t + 1];
    if (begin != end && std::all_of(begin, end, [](Index e) { return e < 0; }))
      plan.passed_through.push_back(t);
  }
  detail::plan_from_seats(chosen, seat, plan);
}

}  // namespace moe
