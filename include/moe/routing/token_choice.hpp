// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/reused.hpp>
#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/final_sets.hpp>
#include <moe/routing/group_limit.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/scores.hpp>
#include <moe/routing/seating_rule.hpp>

// How tokens choose their experts: what ranks the experts, how many a token takes, what its gates are; and
// then seats. Read route_by_logits() first.
namespace moe {

/// What selection looks at beside the logits. Null or empty: nothing.
template <class S>
struct SelectionInputs {
  const Vector<S>* bias = nullptr;           ///< added to scores, for selection alone [num_experts]
  const ReusedMatrix<S>* ranking = nullptr;  ///< ranks experts in place of logits and scores
                                             ///< [tokens, num_experts]
  /// Uniform draws from [0, 1) [tokens, top_k - 1]: choices after the first need a gate above
  /// draw * second_threshold. They are taken with probability min(1, gate / second_threshold).
  std::span<const double> second_draws{};
};

namespace detail {

// A call of route_by_logits.
template <class S>
struct Selection {
  const SeatingRule& rule;
  const SelectionInputs<S>& inputs;
  const ReusedMatrix<S>& logits;  // that selection looks at
  Routing<S>& routing;
  TokenChoiceWorkspace<S>& workspace;

  bool has_bias() const { return inputs.bias != nullptr && inputs.bias->size() > 0; }
  bool is_limited() const { return rule.group_limit.applies(); }
  bool is_relu() const { return rule.gate.score == Score::relu; }
  bool by_scores() const {
    return has_bias() || is_relu() || (is_limited() && rule.group_limit.score == GroupScore::top_two_sum);
  }
  // Whether experts are ranked by neither the logits nor a given ranking.
  bool ranks_anew() const { return by_scores() || is_limited(); }
  const ReusedMatrix<S>& ranking() const {
    return inputs.ranking != nullptr ? *inputs.ranking : ranks_anew() ? workspace.ranking : logits;
  }
};

template <class S>
void check_selection(const Selection<S>& s) {
  constexpr const char* kWhere = "route_by_logits";
  const Index tokens = s.routing.num_tokens(), experts = s.routing.num_experts(), k = s.rule.top_k;
  const Index num_biases = s.has_bias() ? s.inputs.bias->size() : 0;
  require(s.routing.plan.token_state.size() == s.logits.rows() &&
              s.routing.chosen.token_begin.size() == s.logits.rows() + 1,
          kWhere, ": begin_routing was for ", s.routing.plan.token_state.size(),
          " tokens, but the logits are of ", s.logits.rows());
  require_shape(s.routing.router_logits, tokens, experts, kWhere, "router_logits");
  require_shape(s.logits, tokens, experts, kWhere, "selection_logits");
  require(k >= 1 && k <= experts, kWhere, ": top_k = ", k, " is not between 1 and num_experts = ", experts);
  require(num_biases == 0 || num_biases == experts, kWhere, ": selection_bias has ", num_biases,
          " entries, expected ", experts, " experts");
  for (Index e = 0; e < num_biases; ++e) {
    const S bias = (*s.inputs.bias)[e];
    require(number_kind(bias) == NumberKind::finite || is_unavailable(bias), kWhere, ": selection_bias[", e,
            "] = ", bias, ", expected a finite number or minus infinity");
  }
  check_group_limit(s.rule.group_limit, experts, k, kWhere);
  require(is_equal(s.rule.second_threshold, 0.0) ||
              (!s.has_bias() && !s.is_limited() && !s.rule.is_dynamic() && s.inputs.ranking == nullptr),
          kWhere, ": second_threshold = ", s.rule.second_threshold,
          " beside a selection bias, a group limit, a ranking or top-p, expected 0");
  const Index draws = Index(s.inputs.second_draws.size());
  require(draws == 0 || draws == tokens * (k - 1), kWhere, ": ", draws, " second_draws, expected ",
          tokens * (k - 1));
  require(s.rule.top_p > 0, kWhere, ": top_p = ", s.rule.top_p, ", expected more than 0");
  if (s.inputs.ranking == nullptr) return;
  require_shape(*s.inputs.ranking, tokens, experts, kWhere, "given_ranking");
  require(!s.ranks_anew(), kWhere, ": a ranking beside a selection bias of ", num_biases,
          " entries, a group limit or ReLU scores, expected one of them");
}

// Ranks a token's experts, and fills its row of router_probs.
template <class S>
const S* rank_experts(const Selection<S>& s, Index t, Index worker) {
  constexpr S kUnavailable = -std::numeric_limits<S>::infinity();
  const Index experts = s.routing.num_experts();
  const Score score = s.rule.gate.score;
  const S* const z = &s.logits(t, 0);
  S* const probs = &s.routing.router_probs(t, 0);
  normalised_scores(score, experts, z, probs);
  if (!s.ranks_anew()) return &s.ranking()(t, 0);
  const bool by_scores = s.by_scores(), relu = s.is_relu(), biased = s.has_bias();
  S* const values = &s.workspace.ranking(t, 0);
  for (Index e = 0; e < experts; ++e) {
    if (!by_scores || is_unavailable(z[e]))
      values[e] = z[e];
    else if (relu && !(z[e] > S(0)))
      values[e] = kUnavailable;
    else
      values[e] = score == Score::softmax ? probs[e] : score_of(score, z[e]);
    if (biased) values[e] += (*s.inputs.bias)[e];
  }
  const GroupLimit& limit = s.rule.group_limit;
  if (s.is_limited())
    limit_to_groups(limit, experts, values, s.workspace.group_score.data() + worker * limit.groups,
                    s.workspace.kept_group.data() + worker * limit.kept);
  return values;
}

// How many experts a token takes; `best` [top_k] are these, the best first.
template <class S>
Index choose(const Selection<S>& s, Index t, const S* rank, Index* best) {
  Index n = s.rule.top_k;
  top_k(s.routing.num_experts(), rank, n, best);
  while (n > 0 && is_unavailable(rank[best[n - 1]])) --n;
  if (!(s.rule.top_p < 1)) return n;
  S mass = 0;
  for (Index i = 0; i < n; ++i) {
    mass += s.routing.router_probs(t, best[i]);
    if (mass > S(s.rule.top_p)) n = i + 1;
  }
  return n;
}

// Leaves out choices after the first whose gates are too small. Returns how many there are then.
template <class S>
Index keep_above_threshold(const Selection<S>& s, Index t, Index n, Index* experts, S* gates) {
  if (!(s.rule.second_threshold > 0)) return n;
  const bool drawn = !s.inputs.second_draws.empty();
  const double* const draws = s.inputs.second_draws.data() + (drawn ? t * (s.rule.top_k - 1) : 0);
  Index kept = std::min<Index>(n, 1);
  for (Index i = 1; i < n; ++i) {
    const bool keeps = drawn ? double(gates[i]) > draws[i - 1] * s.rule.second_threshold
                             : gates[i] > S(s.rule.second_threshold);
    if (!keeps) continue;
    experts[kept] = experts[i];
    gates[kept++] = gates[i];
  }
  return kept;
}

// Whether a token may be routed: poisoned where what selection looks at is not fit.
template <class S>
bool may_choose(const Selection<S>& s, Index t) {
  TokenState& state = s.routing.plan.token_state[t];
  const Index experts = s.routing.num_experts();
  check_logits(experts, &s.logits(t, 0), state);
  if (!s.routing.noise.empty()) check_logits(experts, &s.routing.router_logits(t, 0), state);
  if (s.inputs.ranking != nullptr) check_logits(experts, &s.ranking()(t, 0), state);
  return state == TokenState::valid;
}

// Chooses for one token: fills its places among top_k for every token. Returns the number of its choices.
template <class S>
Index route_token(const Selection<S>& s, Index t, Index worker) {
  if (!may_choose(s, t)) {
    s.routing.router_probs.row(t).setZero();
    if (s.ranks_anew()) s.workspace.ranking.row(t).setConstant(-std::numeric_limits<S>::infinity());
    return 0;
  }
  Index* const experts = s.routing.chosen.expert.data() + t * s.rule.top_k;
  S* const gates = s.routing.chosen.gate.data() + t * s.rule.top_k;
  const S* const rank = rank_experts(s, t, worker);
  const Index n = choose(s, t, rank, experts);
  if (n == 0 && !s.is_relu()) {  // a bias of minus infinity, or a ranking, took all that were available
    s.routing.plan.token_state[t] = TokenState::poisoned;
    s.routing.router_probs.row(t).setZero();
    return 0;
  }
  const TokenScores<S> token{s.routing.num_experts(), &s.logits(t, 0), &s.routing.router_probs(t, 0)};
  compute_gates(s.rule.gate, token, n, experts, gates);
  return keep_above_threshold(s, t, n, experts, gates);
}

// Closes the gaps that tokens with fewer than top_k choices left. token_begin[t + 1] is their number before.
template <class S>
void close_gaps(Index top_k, Choices<S>& chosen) {
  const Index tokens = chosen.num_tokens();
  for (Index t = 0; t < tokens; ++t) {
    const Index n = chosen.token_begin[t + 1], to = chosen.token_begin[t];
    if (to != t * top_k) {
      std::copy_n(chosen.expert.data() + t * top_k, n, chosen.expert.data() + to);
      std::copy_n(chosen.gate.data() + t * top_k, n, chosen.gate.data() + to);
    }
    chosen.token_begin[t + 1] = to + n;
  }
  chosen.expert.resize(chosen.token_begin[tokens]);
  chosen.gate.resize(chosen.token_begin[tokens]);
}

// capacity [groups] = the seats of an expert for the tokens of every group.
template <class S>
void count_seats(const SeatingRule& rule, const BatchInfo& info, const Routing<S>& routing,
                 Reused<IndexVector>& capacity) {
  const Buffer<Index>& begin = routing.chosen.token_begin;
  const Index experts = routing.num_experts();
  const auto seats = [&](Index tokens, Index k) {
    return expert_capacity(tokens, experts, k, *rule.capacity_factor, rule.capacity_rule);
  };
  count_valid_tokens(routing.plan, info, capacity);
  for (Index g = 0; g < capacity.size(); ++g) {
    const Index valid = capacity[g];
    const Index choices = begin[info.end_of(g, routing.num_tokens())] - begin[info.begin_of(g)];
    capacity[g] = seats(valid, rule.top_k);
    if (rule.is_dynamic()) capacity[g] = (std::min)(valid, seats(choices, 1));
  }
}

// From choices to the plan.
template <class S>
void seat(const Selection<S>& s, const BatchInfo& info, RouterWorkspace<S>& workspace) {
  Routing<S>& routing = s.routing;
  if (!s.rule.capacity_factor) return dispatch_all(routing.chosen, routing.plan);
  count_seats(s.rule, info, routing, workspace.capacity);
  apply_capacity(routing.chosen, s.ranking(), workspace.capacity, {s.rule.overflow, s.rule.priority}, info,
                 routing.plan, workspace.seating, &routing.router_probs);
  if (!s.rule.gates_follow_seats()) return;
  Buffer<S>& gates = s.workspace.gate;
  gates.reserve(s.rule.top_k);
  const auto gates_of = [&](Index t, Index n, const Index* used, const Index* assignments) {
    gates.resize(n);
    const TokenScores<S> token{routing.num_experts(), &s.logits(t, 0), &routing.router_probs(t, 0)};
    compute_gates(s.rule.gate, token, n, used, gates.data());
    for (Index i = 0; i < n; ++i) routing.plan.gate[assignments[i]] = gates[i];
  };
  for_each_final_set(routing, s.workspace.final_sets, gates_of);
}

}  // namespace detail

/// Selects each token's top_k experts and fills router_probs, chosen and plan. begin_routing must have
/// run and the logits be there. Selection is by the routing's selection logits; by scores where there
/// is a bias to add to them, a group limit that sums scores, or ReLU, under which an expert without a
/// positive logit is never used; or by a ranking that is given, where minus infinity marks an unavailable
/// expert, and what is NaN or plus infinity poisons the token. A bias of minus infinity keeps every token
/// from an expert; a token that bias or ranking leave without any is poisoned. A token takes fewer experts
/// where fewer are available, or where the rule is dynamic; the seats of an expert then follow from the
/// choices: capacity_factor * choices of the group / num_experts. O(tokens * num_experts * top_k). Throws
/// std::invalid_argument when the logits do not fit the plan, for a bias of NaN or plus infinity, and for a
/// rule out of range.
template <class S, Executor E>
void route_by_logits(const SeatingRule& rule, const SelectionInputs<S>& inputs, const BatchInfo& info,
                     Routing<S>& routing, RouterWorkspace<S>& workspace, const E& executor) {
  const detail::Selection<S> selection{rule, inputs, routing.selection_logits(), routing,
                                       workspace.token_choice};
  detail::check_selection(selection);
  const Index tokens = routing.num_tokens(), experts = routing.num_experts(), k = rule.top_k;
  if (selection.ranks_anew()) workspace.token_choice.ranking.resize(tokens, experts);
  if (selection.is_limited()) {
    workspace.token_choice.group_score.resize(executor.concurrency() * rule.group_limit.groups);
    workspace.token_choice.kept_group.resize(executor.concurrency() * rule.group_limit.kept);
  }
  routing.plan.gate_side = rule.gate_side;
  routing.router_probs.resize(tokens, experts);
  Choices<S>& chosen = routing.chosen;
  chosen.expert.resize(tokens * k);
  chosen.gate.resize(tokens * k);
  for_each_block(tokens, executor, [&](Index begin, Index end, Index worker) {
    for (Index t = begin; t < end; ++t) chosen.token_begin[t + 1] = detail::route_token(selection, t, worker);
  });
  detail::close_gaps(k, chosen);
  detail::seat(selection, info, workspace);
}

}  // namespace moe
