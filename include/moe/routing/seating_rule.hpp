// SPDX-License-Identifier: MIT
#pragma once

#include <optional>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/group_limit.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/scores.hpp>

// What a router in which tokens choose their experts may vary, and what it checks of it.
namespace moe {

/// How logits become choices and choices a plan. Every token-choice router makes one of its options.
struct SeatingRule {
  GateRule gate{};  ///< how gates follow from logits
  GateSide gate_side = GateSide::output;
  Index top_k = 1;
  double top_p = 1;  ///< a token stops choosing when the mass of its choices' router_probs exceeds this
  double second_threshold = 0;  ///< choices after the first need a gate above this
  GroupLimit group_limit{};
  std::optional<double> capacity_factor{};  ///< none: dropless
  CapacityRule capacity_rule{};
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
  bool renormalise_after_drop = false;  ///< whether gates that sum to 1 do so over the seated experts

  /// Whether gates are the rule's over the experts that a token ends up with, rather than over
  /// those that it chose.
  bool gates_follow_seats() const {
    return overflow == Overflow::next_best || (renormalise_after_drop && gate.renormalise);
  }
  /// Whether tokens choose as many experts as they need, top_k at most.
  bool is_dynamic() const { return top_p < 1 || gate.score == Score::relu; }
};

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

}  // namespace moe
