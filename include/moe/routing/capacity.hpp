// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include <moe/core/check.hpp>
#include <moe/math/top_k.hpp>
#include <moe/routing/router.hpp>

// How many tokens an expert takes, who gets a seat, and what becomes of the others.
namespace moe {

/// What becomes of an assignment whose expert is full.
enum class Overflow {
  drop,          ///< it contributes nothing
  next_best,     ///< it takes the token's most probable expert that has room and is not in use by
                 ///< the token already; dropped if there is none
  pass_through,  ///< dropped; a token that loses all of its assignments outputs x instead
};

/// In which order assignments are seated.
enum class Priority {
  token_order,      ///< all first choices in token order, then all second choices, ... (GShard)
  token_max_gate,   ///< the same, with tokens in order of their largest gate, which may be
                    ///< renormalised (batch-prioritised routing; Riquelme et al. 2021, section 4; Tutel)
  assignment_gate,  ///< by gate: each expert keeps its largest
  token_max_prob,   ///< as token_max_gate, but in order of the largest of a token's router_probs,
                    ///< over all experts (fairseq's and Hugging Face's NLLB)
};

/// How a number of seats becomes whole. Halves go to the even neighbour in `nearest_even`.
enum class Rounding { up, down, nearest_even };

/// What becomes of an even share of seats. The default is Megatron-LM's; published models differ:
/// V-MoE {.multiple_of = 4}, Switch (mesh) {Rounding::down, 4}, GShard (lingvo) {Rounding::down, 4, 4},
/// flaxformer {Rounding::nearest_even, 4}, OpenMoE {Rounding::down, 4, 2}.
struct CapacityRule {
  Rounding rounding = Rounding::up;
  Index minimum = 0;      ///< at least as many seats as this
  Index multiple_of = 1;  ///< then rounded up to a multiple of this
};

/// Throws std::invalid_argument unless the rule is in range.
inline void check_capacity_rule(const CapacityRule& rule, const char* where) {
  require(rule.minimum >= 0, where, ": capacity_rule.minimum = ", rule.minimum, ", expected at least 0");
  require(rule.multiple_of >= 1, where, ": capacity_rule.multiple_of = ", rule.multiple_of,
          ", expected at least 1");
}

/// Seats that each expert has for `tokens` valid tokens: capacity_factor * top_k * tokens /
/// num_experts, then made whole as `rule` says, and at most `tokens`: nobody could take more, because a
/// token sits at most once at an expert. The product is made in double, which errs by up to 2^-51 of it; so
/// within 2^-50 of a whole number, or of a half, it is that number: 1.05 * 6 * 80 / 8 is 63 seats, not the 64
/// of 63.00000000000001 rounded up. With the default rule a factor of 1 never drops from a balanced batch.
/// O(1). Throws std::invalid_argument for a negative or not finite factor, and for counts and rules out of
/// range. Authors who do not multiply by top_k (mesh, lingvo, flaxformer) have capacity_factor * top_k as
/// their factor. Example: expert_capacity(100, 8, 2, 1.25) is 32.
inline Index expert_capacity(Index tokens, Index num_experts, Index top_k, double capacity_factor,
                             const CapacityRule& rule = {}) {
  require(tokens >= 0, "expert_capacity: tokens = ", tokens, ", expected at least 0");
  require(num_experts >= 1, "expert_capacity: num_experts = ", num_experts, ", expected at least 1");
  require(top_k >= 0 && top_k <= num_experts, "expert_capacity: top_k = ", top_k,
          " is not between 0 and num_experts = ", num_experts);
  require(number_kind(capacity_factor) == NumberKind::finite && capacity_factor >= 0,
          "expert_capacity: capacity_factor = ", capacity_factor, ", expected a finite number of at least 0");
  check_capacity_rule(rule, "expert_capacity");
  if (tokens == 0) return 0;
  double share = capacity_factor * double(top_k) * double(tokens) / double(num_experts);
  const double nearest_half = std::round(2 * share) / 2;
  if (std::abs(share - nearest_half) <= 0x1p-50 * nearest_half) share = nearest_half;
  double whole = std::floor(share);
  const double rest = share - whole;
  if (rule.rounding == Rounding::up) whole = std::ceil(share);
  if (rule.rounding == Rounding::nearest_even &&
      (rest > 0.5 || (is_equal(rest, 0.5) && !is_equal(std::fmod(whole, 2.0), 0.0))))
    ++whole;
  if (whole >= double(tokens)) return tokens;
  const Index seats = (std::max)(Index(whole), rule.minimum);
  if (seats >= tokens || seats % rule.multiple_of == 0) return (std::min)(seats, tokens);
  const Index missing = rule.multiple_of - seats % rule.multiple_of;
  return missing > tokens - seats ? tokens : seats + missing;
}

/// valid [groups] = number of valid tokens of every group. O(tokens). Throws std::invalid_argument
/// when `info` does not fit the plan.
template <class S>
void count_valid_tokens(const DispatchPlan<S>& plan, const BatchInfo& info, IndexVector& valid) {
  require(plan.token_state.size() == plan.num_tokens, "count_valid_tokens: token_state has ",
          plan.token_state.size(), " entries, expected ", plan.num_tokens, " tokens");
  check_batch_info(info, plan.num_tokens, "count_valid_tokens");
  valid.setZero(info.num_groups());
  for (Index g = 0; g < valid.size(); ++g)
    for (Index t = info.begin_of(g); t < info.end_of(g, plan.num_tokens); ++t)
      valid[g] += plan.token_state[t] == TokenState::valid;
}

namespace detail {

// Writes the choices of the tokens [begin, end) in order of priority to scratch.order. `probs` are for
// token_max_prob.
template <class S>
void order_choices(const Choices<S>& chosen, const Matrix<S>* probs, Priority priority, Index begin,
                   Index end, RoutingScratch<S>& scratch) {
  const Index* const first = chosen.token_begin.data();
  Buffer<Index>& order = scratch.order;
  order.reserve(chosen.expert.capacity());
  order.clear();
  if (priority == Priority::assignment_gate) {
    for (Index c = first[begin]; c < first[end]; ++c) order.push_back(c);
    // Choices are in token order, so the lower choice is the lower token.
    std::sort(order.begin(), order.end(), [&](Index a, Index b) {
      return is_equal(chosen.gate[a], chosen.gate[b]) ? a < b : chosen.gate[a] > chosen.gate[b];
    });
    return;
  }
  Buffer<Index>& tokens = scratch.position;
  tokens.resize(end - begin);
  Index most = 0;
  for (Index t = begin; t < end; ++t) {
    tokens[t - begin] = t;
    most = (std::max)(most, first[t + 1] - first[t]);
  }
  if (priority == Priority::token_max_gate || priority == Priority::token_max_prob) {
    scratch.row.resize(end - begin);
    for (Index t = begin; t < end; ++t) {
      S& value = scratch.row[t - begin];
      const S* const gate = chosen.gate.data();
      if (first[t] == first[t + 1])
        value = 0;
      else if (priority == Priority::token_max_gate)
        value = *std::max_element(gate + first[t], gate + first[t + 1]);
      else
        value = probs->row(t).maxCoeff();
    }
    const S* const largest = scratch.row.data();
    std::sort(tokens.begin(), tokens.end(), [&](Index a, Index b) {
      const S of_a = largest[a - begin], of_b = largest[b - begin];
      return is_equal(of_a, of_b) ? a < b : of_a > of_b;
    });
  }
  for (Index rank = 0; rank < most; ++rank)
    for (const Index t : tokens)
      if (first[t] + rank < first[t + 1]) order.push_back(first[t] + rank);
}

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

/// Seats at most capacity[g] choices of the tokens of group g at each expert, in order of priority;
/// then handles the others as `overflow` says, in the same order. For next_best, `scores`
/// [tokens, num_experts] ranks a token's experts (minus infinity: unavailable); it may be empty
/// otherwise. For token_max_prob, `probs` are the router_probs [tokens, num_experts]; null otherwise.
/// Gates are those of the choices, also where an expert was replaced: recomputing them is the router's
/// business. Everything dropped is listed in the plan.
/// O(choices log choices), O(tokens * num_experts) more for token_max_prob, and O(num_experts) more per
/// overflowing choice for next_best. Throws std::invalid_argument when the arguments do not fit each
/// other, and for gates or probabilities that can not be ordered.
template <class S>
void apply_capacity(const Choices<S>& chosen, const Matrix<S>& scores, const IndexVector& capacity,
                    Overflow overflow, Priority priority, const BatchInfo& info, DispatchPlan<S>& plan,
                    RoutingScratch<S>& scratch, const Matrix<S>* probs = nullptr) {
  const Index tokens = plan.num_tokens, experts = plan.num_experts();
  check_choices(chosen, tokens, experts, "apply_capacity");
  for (Index c = 0; priority != Priority::token_order && c < chosen.size(); ++c)
    require(number_kind(chosen.gate[c]) != NumberKind::nan, "apply_capacity: the gate of choice ", c, " of ",
            chosen.size(), " is NaN");
  if (priority == Priority::token_max_prob) {
    require(probs != nullptr, "apply_capacity: token_max_prob without probs");
    require_shape(*probs, tokens, experts, "apply_capacity", "probs");
    for (Index i = 0; i < probs->size(); ++i)
      require(number_kind(probs->data()[i]) != NumberKind::nan, "apply_capacity: probs of token ",
              i / experts, " of ", tokens, " are NaN");
  }
  check_batch_info(info, tokens, "apply_capacity");
  require(capacity.size() == info.num_groups(), "apply_capacity: ", capacity.size(),
          " capacities, expected one for each of ", info.num_groups(), " groups");
  for (Index g = 0; g < capacity.size(); ++g)
    require(capacity[g] >= 0, "apply_capacity: capacity[", g, "] = ", capacity[g], ", expected at least 0");
  if (overflow == Overflow::next_best) require_shape(scores, tokens, experts, "apply_capacity", "scores");

  Buffer<Index>& seat = scratch.seat;  // the expert at which a choice is seated, or -1
  seat.reserve(chosen.expert.capacity());
  seat.assign(chosen.size(), -1);
  plan.dropped.reserve(chosen.expert.capacity());
  plan.dropped.clear();
  plan.passed_through.reserve(tokens);
  plan.passed_through.clear();

  for (Index g = 0; g < info.num_groups(); ++g) {
    detail::order_choices(chosen, probs, priority, info.begin_of(g), info.end_of(g, tokens), scratch);
    scratch.load.assign(experts, 0);
    for (const Index c : scratch.order) {
      const Index e = chosen.expert[c];
      if (scratch.load[e] >= capacity[g]) continue;
      ++scratch.load[e];
      seat[c] = e;
    }
    for (const Index c : scratch.order) {
      if (seat[c] >= 0) continue;
      const Index t = detail::token_of(chosen, c);
      if (overflow == Overflow::next_best) {
        seat[c] = detail::best_free_expert(experts, &scores(t, 0), scratch.load.data(), capacity[g],
                                           seat.data() + chosen.token_begin[t],
                                           seat.data() + chosen.token_begin[t + 1]);
        if (seat[c] >= 0) {
          ++scratch.load[seat[c]];
          continue;
        }
      }
      plan.dropped.push_back({t, chosen.expert[c], c - chosen.token_begin[t]});
    }
  }
  if (overflow == Overflow::pass_through) {
    for (Index t = 0; t < tokens; ++t) {
      const Index* const begin = seat.data() + chosen.token_begin[t];
      const Index* const end = seat.data() + chosen.token_begin[t + 1];
      if (begin != end && std::all_of(begin, end, [](Index e) { return e < 0; }))
        plan.passed_through.push_back(t);
    }
  }
  detail::plan_from_seats(chosen, seat, plan);
}

}  // namespace moe
