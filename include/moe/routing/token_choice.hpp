// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/group_limit.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/scores.hpp>

// What routers in which tokens choose their experts have in common: from selection logits to a plan,
// and from gradients by gates and losses back to selection logits.
namespace moe {

/// How choices become a plan. Every token-choice router makes one of its options.
struct SeatingRule {
  GateRule gate{};
  GateSide gate_side = GateSide::output;
  Index top_k = 1;
  double top_p = 1;  ///< a token stops choosing when the mass of its choices' router_probs exceeds this
  double second_threshold = 0;  ///< choices after the first need a gate above this
  /// Uniform draws from [0, 1) [tokens, top_k - 1]: such choices need a gate above draw *
  /// second_threshold instead. They are taken with probability min(1, gate / second_threshold).
  const double* second_draws = nullptr;
  GroupLimit group_limit{};
  std::optional<double> capacity_factor{};  ///< none: dropless
  CapacityRule capacity_rule{};
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
  bool renormalise_after_drop = false;

  /// Whether gates are the rule's over the experts that a token ends up with, rather than over
  /// those that it chose.
  bool gates_follow_seats() const {
    return overflow == Overflow::next_best || (renormalise_after_drop && gate.renormalise);
  }
  /// Whether tokens choose as many experts as they need, top_k at most.
  bool is_dynamic() const { return top_p < 1 || gate.score == Score::relu; }
};

namespace detail {

// Marks a valid token as poisoned unless its logits are fit to route by.
template <class S>
void check_logits(const S* logits, Index experts, TokenState& state) {
  bool any_finite = false;
  for (Index e = 0; e < experts; ++e) {
    const NumberKind kind = number_kind(logits[e]);
    any_finite |= kind == NumberKind::finite;
    if (kind == NumberKind::nan || (kind == NumberKind::infinite && !std::signbit(logits[e]))) {
      state = TokenState::poisoned;
      return;
    }
  }
  if (!any_finite) state = TokenState::poisoned;
}

// Keeps the first choice and those after it with gates above the threshold, or above what `draws` make of
// it (null: none). Returns their number.
template <class S>
Index keep_above(double threshold, const double* draws, Index n, Index* experts, S* gates) {
  Index kept = std::min<Index>(n, 1);
  for (Index i = 1; i < n; ++i) {
    const bool keeps =
        draws != nullptr ? double(gates[i]) > draws[i - 1] * threshold : gates[i] > S(threshold);
    if (!keeps) continue;
    experts[kept] = experts[i];
    gates[kept++] = gates[i];
  }
  return kept;
}

// Backward of the gates of a token that left out choices below a threshold: they were computed over all
// top_k, which are selected again. `d_gates` are by the `n` choices that were kept; `room` holds 2 * top_k
// values.
template <class S>
void all_gates_backward(const GateRule& rule, Index top, const S* logits, const S* probs, Index num_experts,
                        Index n, const Index* chosen, const S* d_gates, Buffer<Index>& best, S* room,
                        S* d_logits) {
  best.resize(top);
  top_k(num_experts, logits, top, best.data());
  while (top > 0 && is_unavailable(logits[best[top - 1]])) --top;
  S* const gates = room;
  S* const d_all = room + top;
  compute_gates(rule, logits, probs, top, best.data(), gates);
  for (Index i = 0; i < top; ++i) {
    const Index* const kept = std::find(chosen, chosen + n, best[i]);
    d_all[i] = kept == chosen + n ? S(0) : d_gates[kept - chosen];
  }
  compute_gates_backward(rule, logits, probs, num_experts, top, best.data(), gates, d_all, d_logits);
}

// For the experts that each token ends up with, calls f(token, n, experts, assignments).
template <class S, class F>
void for_each_final_set(const Routing<S>& routing, const F& f) {
  const Choices<S>& chosen = routing.chosen;
  const DispatchPlan<S>& plan = routing.plan;
  Buffer<Index>& seat = routing.scratch.seat;           // [choices]: the assignment of a choice, or -1
  Buffer<Index>& final_set = routing.scratch.position;  // experts, then assignments, of one token
  seat.assign(chosen.size(), -1);
  for (Index a = 0; a < plan.num_assignments(); ++a) seat[plan.choice[a]] = a;
  for (Index t = 0; t < plan.num_tokens; ++t) {
    const Index begin = chosen.token_begin[t], end = chosen.token_begin[t + 1];
    final_set.resize(2 * (end - begin));
    Index n = 0;
    for (Index c = begin; c < end; ++c)
      if (seat[c] >= 0) final_set[end - begin + n++] = seat[c];
    const Index* const assignments = final_set.data() + (end - begin);
    for (Index i = 0; i < n; ++i) {
      const auto& first = plan.expert_begin;
      final_set[i] = Index(std::upper_bound(first.begin(), first.end(), assignments[i]) - first.begin()) - 1;
    }
    if (n > 0) f(t, n, final_set.data(), assignments);
  }
}

}  // namespace detail

/// Selects each token's top_k experts and fills router_probs, chosen and plan. begin_routing must have
/// run and the logits be there. Selection is by the routing's selection logits; by scores where there
/// is a bias [num_experts] to add to them for selection alone, a group limit that sums scores, or ReLU, under
/// which an expert without a positive logit is never used; or by
/// `given_ranking` [tokens, num_experts], where minus infinity marks an unavailable expert, and what is NaN
/// or plus infinity poisons the token. A bias of minus infinity keeps every token from an expert; a token
/// that bias or ranking leave without any is poisoned. A token takes fewer experts where fewer are available,
/// or where the rule is dynamic; the seats of an expert then follow from the choices: capacity_factor *
/// choices of the group / num_experts. O(tokens * num_experts * top_k). Throws std::invalid_argument when the
/// logits do not fit the plan, for a bias of NaN or plus infinity, and for a rule out of range.
template <class S, Executor E>
void route_by_logits(const SeatingRule& rule, const Vector<S>& selection_bias, const BatchInfo& info,
                     Routing<S>& routing, const E& executor, const Matrix<S>* given_ranking = nullptr) {
  const Matrix<S>& logits = routing.selection_logits();
  require(routing.plan.token_state.size() == logits.rows() &&
              routing.chosen.token_begin.size() == logits.rows() + 1,
          "route_by_logits: begin_routing was for ", routing.plan.token_state.size(),
          " tokens, but the logits are of ", logits.rows());
  const Index tokens = routing.num_tokens(), experts = routing.num_experts(), k = rule.top_k;
  require_shape(routing.router_logits, tokens, experts, "route_by_logits", "router_logits");
  require_shape(logits, tokens, experts, "route_by_logits", "selection_logits");
  require(k >= 1 && k <= experts, "route_by_logits: top_k = ", k,
          " is not between 1 and num_experts = ", experts);
  require(selection_bias.size() == 0 || selection_bias.size() == experts,
          "route_by_logits: selection_bias has ", selection_bias.size(), " entries, expected ", experts,
          " experts");
  for (Index e = 0; e < selection_bias.size(); ++e)
    require(number_kind(selection_bias[e]) == NumberKind::finite || is_unavailable(selection_bias[e]),
            "route_by_logits: selection_bias[", e, "] = ", selection_bias[e],
            ", expected a finite number or minus infinity");
  check_group_limit(rule.group_limit, experts, k, "route_by_logits");
  require(
      is_equal(rule.second_threshold, 0.0) || (selection_bias.size() == 0 && !rule.group_limit.applies() &&
                                               !rule.is_dynamic() && given_ranking == nullptr),
      "route_by_logits: second_threshold = ", rule.second_threshold,
      " beside a selection bias, a group limit, a ranking or top-p, expected 0");
  require(rule.top_p > 0, "route_by_logits: top_p = ", rule.top_p, ", expected more than 0");
  const bool limited = rule.group_limit.applies();
  const bool relu = rule.gate.score == Score::relu;
  const bool by_scores =
      selection_bias.size() > 0 || relu || (limited && rule.group_limit.score == GroupScore::top_two_sum);
  if (given_ranking != nullptr)
    require_shape(*given_ranking, tokens, experts, "route_by_logits", "given_ranking");
  require(given_ranking == nullptr || !(by_scores || limited),
          "route_by_logits: a ranking beside a selection bias of ", selection_bias.size(),
          " entries, a group limit or ReLU scores, expected one of them");
  const Matrix<S>& ranking = given_ranking != nullptr ? *given_ranking
                             : by_scores || limited   ? routing.scratch.ranking
                                                      : logits;
  if (by_scores || limited) routing.scratch.ranking.resize(tokens, experts);
  Buffer<S>& group_score = routing.scratch.row;
  Buffer<Index>& kept_group = routing.scratch.order;
  if (limited) {
    group_score.resize(executor.concurrency() * rule.group_limit.groups);
    kept_group.resize(executor.concurrency() * rule.group_limit.kept);
  }
  routing.plan.gate_side = rule.gate_side;
  routing.router_probs.resize(tokens, experts);
  Choices<S>& chosen = routing.chosen;
  chosen.expert.resize(tokens * k);
  chosen.gate.resize(tokens * k);
  for_each_block(tokens, executor, [&](Index begin, Index end, Index worker) {
    for (Index t = begin; t < end; ++t) {
      TokenState& state = routing.plan.token_state[t];
      if (state == TokenState::valid) detail::check_logits(&logits(t, 0), experts, state);
      if (state == TokenState::valid && !routing.noise.empty())
        detail::check_logits(&routing.router_logits(t, 0), experts, state);
      if (state == TokenState::valid && given_ranking != nullptr)
        detail::check_logits(&ranking(t, 0), experts, state);
      if (state != TokenState::valid) {
        routing.router_probs.row(t).setZero();
        if (by_scores || limited)
          routing.scratch.ranking.row(t).setConstant(-std::numeric_limits<S>::infinity());
        continue;
      }
      const S* const z = &logits(t, 0);
      S* const probs = &routing.router_probs(t, 0);
      normalised_scores(rule.gate.score, experts, z, probs);
      if (by_scores || limited) {
        S* const values = &routing.scratch.ranking(t, 0);
        for (Index e = 0; e < experts; ++e) {
          if (!by_scores || is_unavailable(z[e]))
            values[e] = z[e];
          else if (relu && !(z[e] > S(0)))
            values[e] = -std::numeric_limits<S>::infinity();
          else if (rule.gate.score == Score::softmax)
            values[e] = probs[e];
          else
            values[e] = detail::score_of(rule.gate.score, z[e]);
          if (selection_bias.size() > 0) values[e] += selection_bias[e];
        }
        if (limited)
          limit_to_groups(rule.group_limit, experts, values,
                          group_score.data() + worker * rule.group_limit.groups,
                          kept_group.data() + worker * rule.group_limit.kept);
      }
      const S* const rank = &ranking(t, 0);
      Index* const best = chosen.expert.data() + t * k;
      top_k(experts, rank, k, best);
      Index n = k;
      while (n > 0 && is_unavailable(rank[best[n - 1]])) --n;
      if (n == 0 && !relu) {  // a bias of minus infinity, or a ranking, took all that were available
        state = TokenState::poisoned;
        routing.router_probs.row(t).setZero();
        continue;
      }
      if (rule.top_p < 1) {
        S mass = 0;
        for (Index i = 0; i < n; ++i) {
          mass += probs[best[i]];
          if (mass > S(rule.top_p)) n = i + 1;
        }
      }
      S* const gate = chosen.gate.data() + t * k;
      compute_gates(rule.gate, z, probs, n, best, gate);
      if (rule.second_threshold > 0)
        n = detail::keep_above(rule.second_threshold,
                               rule.second_draws != nullptr ? rule.second_draws + t * (k - 1) : nullptr, n,
                               best, gate);
      chosen.token_begin[t + 1] = n;
    }
  });
  // Close the gaps of tokens with fewer than k choices.
  for (Index t = 0; t < tokens; ++t) {
    const Index n = chosen.token_begin[t + 1], to = chosen.token_begin[t];
    if (to != t * k) {
      std::copy_n(chosen.expert.data() + t * k, n, chosen.expert.data() + to);
      std::copy_n(chosen.gate.data() + t * k, n, chosen.gate.data() + to);
    }
    chosen.token_begin[t + 1] = to + n;
  }
  chosen.expert.resize(chosen.token_begin[tokens]);
  chosen.gate.resize(chosen.token_begin[tokens]);

  if (!rule.capacity_factor) return dispatch_all(chosen, routing.plan);
  IndexVector& capacity = routing.scratch.capacity;
  count_valid_tokens(routing.plan, info, capacity);
  for (Index g = 0; g < capacity.size(); ++g) {
    const Index valid = capacity[g];
    capacity[g] = expert_capacity(valid, experts, k, *rule.capacity_factor, rule.capacity_rule);
    if (!rule.is_dynamic()) continue;
    const Index choices = chosen.token_begin[info.end_of(g, tokens)] - chosen.token_begin[info.begin_of(g)];
    capacity[g] =
        (std::min)(valid, expert_capacity(choices, experts, 1, *rule.capacity_factor, rule.capacity_rule));
  }
  apply_capacity(chosen, ranking, capacity, rule.overflow, rule.priority, info, routing.plan, routing.scratch,
                 &routing.router_probs);
  if (rule.gates_follow_seats()) {
    detail::for_each_final_set(routing, [&](Index t, Index n, const Index* used, const Index* assignments) {
      Buffer<S>& gates = routing.scratch.row;
      gates.resize(n);
      compute_gates(rule.gate, &logits(t, 0), &routing.router_probs(t, 0), n, used, gates.data());
      for (Index i = 0; i < n; ++i) routing.plan.gate[assignments[i]] = gates[i];
    });
  }
}

/// Throws std::invalid_argument unless every member of `gradient` that is there has the shape that
/// the routing gives it.
template <class S>
void check_routing_gradient(const RoutingGradient<S>& gradient, const Routing<S>& routing,
                            const char* where) {
  const Index tokens = routing.num_tokens(), experts = routing.num_experts();
  const auto matrix = [&](const Matrix<S>& m, const char* what) {
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

/// d_logits [tokens, num_experts] = the gradient by the selection logits of everything that
/// `gradient` says of gates and probabilities. Rows of tokens that are not valid are zero. Throws
/// std::invalid_argument when the routing and the gradient do not fit each other.
template <class S>
void selection_backward(const SeatingRule& rule, const Routing<S>& routing,
                        const RoutingGradient<S>& gradient, Matrix<S>& d_logits) {
  check_plan_arrays(routing.plan, "selection_backward");
  check_choices(routing, "selection_backward");
  check_routing_gradient(gradient, routing, "selection_backward");
  const Choices<S>& chosen = routing.chosen;
  const DispatchPlan<S>& plan = routing.plan;
  const Index tokens = routing.router_probs.rows(), experts = routing.router_probs.cols();
  const Matrix<S>& logits = routing.selection_logits();
  require_shape(logits, tokens, experts, "selection_backward", "selection_logits");
  d_logits.setZero(tokens, experts);
  Buffer<S>& row = routing.scratch.row;
  const bool by_seats = rule.gates_follow_seats();
  if (by_seats && !gradient.d_gate.empty()) {
    detail::for_each_final_set(routing, [&](Index t, Index n, const Index* used, const Index* assignments) {
      row.resize(2 * n);
      for (Index i = 0; i < n; ++i) {
        row[i] = plan.gate[assignments[i]];
        row[n + i] = gradient.d_gate[assignments[i]];
      }
      compute_gates_backward(rule.gate, &logits(t, 0), &routing.router_probs(t, 0), experts, n, used,
                             row.data(), row.data() + n, &d_logits(t, 0));
    });
  }
  // Gates over the set that was chosen: those of the losses, and those of the plan where they were
  // kept as they were.
  if (!gradient.d_chosen_gate.empty() || (!by_seats && !gradient.d_gate.empty())) {
    row.reserve(chosen.expert.capacity() + 2 * rule.top_k);
    row.assign(chosen.size() + 2 * rule.top_k, S(0));
    for (Index c = 0; c < gradient.d_chosen_gate.size(); ++c) row[c] = gradient.d_chosen_gate[c];
    if (!by_seats)
      for (Index a = 0; a < gradient.d_gate.size(); ++a) row[plan.choice[a]] += gradient.d_gate[a];
    for (Index t = 0; t < tokens; ++t) {
      const Index begin = chosen.token_begin[t], n = chosen.token_begin[t + 1] - begin;
      if (n == 0) continue;
      if (rule.second_threshold > 0) {
        detail::all_gates_backward(rule.gate, rule.top_k, &logits(t, 0), &routing.router_probs(t, 0), experts,
                                   n, chosen.expert.data() + begin, row.data() + begin, routing.scratch.order,
                                   row.data() + chosen.size(), &d_logits(t, 0));
        continue;
      }
      compute_gates_backward(rule.gate, &logits(t, 0), &routing.router_probs(t, 0), experts, n,
                             chosen.expert.data() + begin, chosen.gate.data() + begin, row.data() + begin,
                             &d_logits(t, 0));
    }
  }
  if (gradient.d_router_probs.size() > 0)
    for (Index t = 0; t < tokens; ++t)
      if (routing.is_valid(t))
        normalised_scores_backward(rule.gate.score, experts, &logits(t, 0), &routing.router_probs(t, 0),
                                   &gradient.d_router_probs(t, 0), &d_logits(t, 0));
}

/// d_logits += d for the rows of valid tokens; nothing where d is empty. Throws
/// std::invalid_argument when shapes do not fit.
template <class S>
void add_valid_rows(const Routing<S>& routing, const Matrix<S>& d, Matrix<S>& d_logits) {
  if (d.size() == 0) return;
  require_shape(d, routing.num_tokens(), routing.num_experts(), "add_valid_rows", "d");
  require_shape(d_logits, d.rows(), d.cols(), "add_valid_rows", "d_logits");
  for (Index t = 0; t < d.rows(); ++t)
    if (routing.is_valid(t)) d_logits.row(t) += d.row(t);
}

/// Throws std::invalid_argument unless the options that token-choice routers share are in range.
template <class Options>
void check_token_choice(const Options& options, const char* where) {
  require(options.top_k >= 1 && options.top_k <= options.num_experts, where, ": top_k = ", options.top_k,
          " is not between 1 and num_experts = ", options.num_experts);
  const auto check_factor = [&](const std::optional<double>& factor, const char* name) {
    if (factor)
      require(number_kind(*factor) == NumberKind::finite && *factor >= 0, where, ": ", name, " = ", *factor,
              ", expected a finite number of at least 0");
  };
  check_factor(options.capacity, "capacity");
  check_factor(options.training_capacity, "training_capacity");
  check_capacity_rule(options.capacity_rule, where);
}

/// Throws std::invalid_argument when every gate of the router is 1 whatever its weights are: more
/// than one expert, top_k of 1 and gates that sum to 1.
template <class Options>
void require_trainable(const Options& options, const SeatingRule& rule, Index num_experts,
                       const char* where) {
  require(options.allow_constant_gate || num_experts == 1 || rule.top_k > 1 || !rule.gate.renormalise, where,
          ": top_k = ", rule.top_k, " of num_experts = ", num_experts,
          " with gates that sum to 1 makes every gate 1, and the router learns nothing from the "
          "task; take softmax before selection without renormalising, or allow_constant_gate");
}

/// Appends the row `w` to a router's weight [experts, d_model].
template <class S>
Matrix<S> with_row(const Matrix<S>& weight, const Vector<S>& w, const char* where) {
  require(w.size() == weight.cols(), where, ": w has ", w.size(),
          " entries, expected d_model = ", weight.cols());
  Matrix<S> larger(weight.rows() + 1, weight.cols());
  larger << weight, w.transpose();
  return larger;
}

/// The experts that are left of num_experts without those that `removed` names in any order, ascending.
/// Throws std::invalid_argument unless all of these exist, each is named once, and at least `at_least` others
/// are left. O(num_experts + removed).
inline std::vector<Index> experts_without(const std::vector<Index>& removed, Index num_experts,
                                          Index at_least, const char* where) {
  std::vector<bool> goes(std::size_t(num_experts), false);
  for (const Index e : removed) {
    require(e >= 0 && e < num_experts, where, ": expert ", e, " of ", num_experts);
    require(!goes[std::size_t(e)], where, ": expert ", e, " is twice among the ", removed.size(),
            " to remove");
    goes[std::size_t(e)] = true;
  }
  const Index left = num_experts - Index(removed.size());
  require(removed.empty() || left >= at_least, where, ": ", left, " of ", num_experts,
          " experts, and at least ", at_least, " must be left");
  std::vector<Index> kept;
  kept.reserve(std::size_t(left));
  for (Index e = 0; e < num_experts; ++e)
    if (!goes[std::size_t(e)]) kept.push_back(e);
  return kept;
}

/// A copy of some rows of a matrix or vector of num_experts rows, an empty one of an empty one. Throws
/// std::invalid_argument when it has another number of rows.
template <class M>
M take_rows(const M& m, const std::vector<Index>& rows, Index num_experts, const char* where,
            const char* what) {
  if (m.size() == 0) return m;
  require_shape(m, num_experts, m.cols(), where, what);
  M taken(Index(rows.size()), m.cols());
  for (std::size_t i = 0; i < rows.size(); ++i) taken.row(Index(i)) = m.row(rows[i]);
  return taken;
}

/// Throws std::invalid_argument unless the arguments of a router's backward pass fit the router and
/// each other. What selection_backward checks is left to it. O(tokens + choices).
template <class R, class S>
void check_router_backward(const R& router, const ConstMatrixRef<S>& x, const Routing<S>& routing,
                           const R& grad, const char* where) {
  require(routing.num_tokens() == x.rows() && routing.num_experts() == router.num_experts(), where,
          ": the routing is of ", routing.num_tokens(), " tokens and ", routing.num_experts(),
          " experts, expected ", x.rows(), " and ", router.num_experts());
  require_shape(x, x.rows(), router.d_model(), where, "x");
  check_plan_arrays(routing.plan, where);
  check_choices(routing, where);
  if (routing.has_input_factor)
    require_shape(routing.input_factor, x.rows(), x.cols(), where, "input_factor");
  if (const RoutingNoise<S>& noise = routing.noise; !noise.empty()) {
    require_shape(noise.draws, x.rows(), router.num_experts(), where, "noise.draws");
    require_shape(noise.stddev, x.rows(), router.num_experts(), where, "noise.stddev");
  }
  require(&grad != &router, where, ": grad is the router of ", router.num_experts(),
          " experts itself, expected another one");
  R::visit([](const ParameterInfo&, const auto&...) {}, router, grad);  // throws if shapes differ
}

/// Throws std::invalid_argument unless what a router's backward pass writes, d_x, grad and the routing's
/// scratch, lies apart from each other and from what it reads, and d_x has the shape of x. O(1).
template <class R, class S>
void check_router_operands(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                           const RoutingGradient<S>& gradient, const MatrixRef<S>& d_x, const R& grad,
                           const char* where) {
  require_shape(d_x, x.rows(), x.cols(), where, "d_x");
  require_apart(where, "d_x", d_x, "x", x, "gradient", gradient, "routing", routing);
  require_apart(where, "the routing's scratch", routing.scratch, "x", x, "gradient", gradient);
  R::visit([&](const ParameterInfo&, const auto& g) { require_apart(where, "grad", g, "x", x, "d_x", d_x); },
           grad);
}

}  // namespace moe
