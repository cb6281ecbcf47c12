// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/final_sets.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing_gradient.hpp>
#include <moe/routing/scores.hpp>
#include <moe/routing/seating_rule.hpp>

// From gradients by gates and losses back to the logits by which tokens chose their experts.
namespace moe {

namespace detail {

// A call of selection_backward.
template <class S>
struct SelectionBackward {
  const SeatingRule& rule;
  const Routing<S>& routing;
  TokenChoiceWorkspace<S>& workspace;
  ReusedMatrix<S>& d_logits;

  TokenScores<S> scores_of(Index t) const {
    return {routing.num_experts(), &routing.selection_logits()(t, 0), &routing.router_probs(t, 0)};
  }
};

// Of gates over the experts that tokens ended up with, by d_gate [assignments].
template <class S>
void final_gates_backward(const SelectionBackward<S>& b, const Buffer<S>& d_gate) {
  Buffer<S>& row = b.workspace.gate;  // a token's gates, then their gradient
  row.reserve(2 * b.rule.top_k);
  const auto backward = [&](Index t, Index n, const Index* used, const Index* assignments) {
    row.resize(2 * n);
    for (Index i = 0; i < n; ++i) {
      row[i] = b.routing.plan.gate[assignments[i]];
      row[n + i] = d_gate[assignments[i]];
    }
    compute_gates_backward(b.rule.gate, b.scores_of(t), n, used, row.data(), row.data() + n,
                           &b.d_logits(t, 0));
  };
  for_each_final_set(b.routing, b.workspace.final_sets, backward);
}

// Of the gates of a token that may have left out choices below a threshold: they were computed over all
// top_k, which are selected again. `d_gates` are by its `n` choices.
template <class S>
void all_gates_backward(const SelectionBackward<S>& b, Index t, Index n, const Index* chosen,
                        const S* d_gates) {
  const TokenScores<S> token = b.scores_of(t);
  Buffer<Index>& best = b.workspace.best;
  Index top = b.rule.top_k;
  best.resize(top);
  b.workspace.gate.resize(2 * top);
  top_k(token.num_experts, token.logits, top, best.data());
  while (top > 0 && is_unavailable(token.logits[best[top - 1]])) --top;
  S* const gates = b.workspace.gate.data();
  S* const d_all = gates + top;
  compute_gates(b.rule.gate, token, top, best.data(), gates);
  for (Index i = 0; i < top; ++i) {
    const Index* const kept = std::find(chosen, chosen + n, best[i]);
    d_all[i] = kept == chosen + n ? S(0) : d_gates[kept - chosen];
  }
  compute_gates_backward(b.rule.gate, token, top, best.data(), gates, d_all, &b.d_logits(t, 0));
}

// Of gates over the experts that tokens chose, by d_gate [choices].
template <class S>
void chosen_gates_backward(const SelectionBackward<S>& b, const Buffer<S>& d_gate) {
  const Choices<S>& chosen = b.routing.chosen;
  for (Index t = 0; t < b.routing.num_tokens(); ++t) {
    const Index begin = chosen.token_begin[t], n = chosen.token_begin[t + 1] - begin;
    const Index* const experts = chosen.expert.data() + begin;
    const S* const d_gates = d_gate.data() + begin;
    if (n == 0) continue;
    if (b.rule.second_threshold > 0)
      all_gates_backward(b, t, n, experts, d_gates);
    else
      compute_gates_backward(b.rule.gate, b.scores_of(t), n, experts, chosen.gate.data() + begin, d_gates,
                             &b.d_logits(t, 0));
  }
}

}  // namespace detail

/// d_logits [tokens, num_experts] = the gradient by the selection logits of everything that
/// `gradient` says of gates and probabilities. Rows of tokens that are not valid are zero. Throws
/// std::invalid_argument when the routing and the gradient do not fit each other.
template <class S>
void selection_backward(const SeatingRule& rule, const Routing<S>& routing,
                        const RoutingGradient<S>& gradient, TokenChoiceWorkspace<S>& workspace,
                        ReusedMatrix<S>& d_logits) {
  constexpr const char* kWhere = "selection_backward";
  check_plan_arrays(routing.plan, kWhere);
  check_choices(routing, kWhere);
  check_routing_gradient(gradient, routing, kWhere);
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  require_shape(routing.selection_logits(), tokens, experts, kWhere, "selection_logits");
  d_logits.setZero(tokens, experts);
  const detail::SelectionBackward<S> b{rule, routing, workspace, d_logits};
  const bool by_seats = rule.gates_follow_seats() && !gradient.d_gate.empty();
  const bool by_choices = !rule.gates_follow_seats() && !gradient.d_gate.empty();
  if (by_seats) detail::final_gates_backward(b, gradient.d_gate);
  // Over the experts that were chosen: the gates of the losses, and those of the plan where they were kept.
  if (by_choices || !gradient.d_chosen_gate.empty()) {
    Buffer<S>& d_gate = workspace.d_gate;
    d_gate.reserve(routing.chosen.expert.capacity());
    d_gate.assign(routing.chosen.size(), S(0));
    for (Index c = 0; c < gradient.d_chosen_gate.size(); ++c) d_gate[c] = gradient.d_chosen_gate[c];
    for (Index a = 0; by_choices && a < gradient.d_gate.size(); ++a)
      d_gate[routing.plan.choice[a]] += gradient.d_gate[a];
    detail::chosen_gates_backward(b, d_gate);
  }
  if (gradient.d_router_probs.size() == 0) return;
  for (Index t = 0; t < tokens; ++t)
    if (routing.is_valid(t))
      normalised_scores_backward(rule.gate.score, experts, &routing.selection_logits()(t, 0),
                                 &routing.router_probs(t, 0), &gradient.d_router_probs(t, 0),
                                 &d_logits(t, 0));
}

/// d_logits += d for the rows of valid tokens; nothing where d is empty. Throws
/// std::invalid_argument when shapes do not fit.
template <class S, class D, class DLogits>
void add_valid_rows(const Routing<S>& routing, const D& d, DLogits&& d_logits) {
  if (d.size() == 0) return;
  require_shape(d, routing.num_tokens(), routing.num_experts(), "add_valid_rows", "d");
  require_shape(d_logits, d.rows(), d.cols(), "add_valid_rows", "d_logits");
  for (Index t = 0; t < d.rows(); ++t)
    if (routing.is_valid(t)) d_logits.row(t) += d.row(t);
}

}  // namespace moe
