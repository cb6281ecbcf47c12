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
#include <moe/routing/seating_rule.hpp>

// All that TopKRouter may vary.
namespace moe {

/// Options of TopKRouter; the same for every scalar.
struct TopKOptions {
  Index d_model = 0;
  Index num_experts = 0;
  Index top_k = 2;
  /// Below 1: a token chooses only until the router_probs of its choices sum to more than this, top_k
  /// at most (top-p routing, Huang et al. 2024, "Harder Tasks Need More Experts", eq. 4: 0.4 and
  /// top_k = num_experts).
  double top_p = 1;
  /// A token takes an expert after its first only where its gate among all top_k is above this (ST-MoE,
  /// Zoph et al. 2022: 0.2). Gates stay what they are among all top_k.
  double second_threshold = 0;
  /// Above 0: in training a token takes an expert after its first with probability
  /// min(1, gate / random_second_threshold) instead (random routing; GShard, Lepikhin et al. 2021,
  /// algorithm 1: 0.5; ST-MoE: 0.2).
  double random_second_threshold = 0;
  /// What gates are made of. With relu, a token chooses the experts with positive logits, top_k at most
  /// (ReMoE, Wang et al. 2024: top_k = num_experts).
  Score score = Score::softmax;
  /// Softmax over all experts before selection (true), or over the selected ones after it.
  bool softmax_before_selection = true;
  /// Whether gates of a token are divided by their sum. After selection a softmax always has a sum of 1.
  bool renormalise = false;
  /// Added to that sum. The authors' value where they publish one (DeepSeek-V3: 1e-20); it matters
  /// where all scores of a token underflow.
  double renormalise_epsilon = 0;
  /// The least that renormalised gates are divided by (ERNIE-4.5: 1e-12).
  double renormalise_minimum = 0;
  /// Every gate is multiplied by this, after renormalising (DeepSeek-V3: 2.5).
  double gate_scale = 1;
  /// What gates multiply: outputs, or inputs (Llama-4).
  GateSide gate_side = GateSide::output;
  bool bias = false;
  /// Whether there is a selection_bias, added to scores for selection alone: see
  /// update_selection_bias.
  bool selection_bias = false;
  GroupLimit group_limit{};
  /// In training logits get Gaussian noise of this standard deviation (V-MoE: 1 / num_experts).
  double noise_stddev = 0;
  /// In training x is multiplied by a draw from [1 - jitter, 1 + jitter], for the router only.
  double jitter = 0;
  /// Capacity factor of inference, see expert_capacity; none: dropless.
  std::optional<double> capacity{};
  /// Capacity factor of training; none: dropless.
  std::optional<double> training_capacity{};
  CapacityRule capacity_rule{};  ///< of both
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
  /// Whether gates that sum to 1 do so over the experts that kept the token, not over those that it
  /// chose. Gates that do not sum to 1 are what they are either way.
  bool renormalise_after_drop = false;
  /// Allows training where every gate is 1 and the router learns nothing from the task.
  bool allow_constant_gate = false;
};

/// Options of top-p routing, in which a token chooses experts until their router_probs sum to more than
/// top_p, however many these are (Huang et al. 2024, eq. 4).
inline TopKOptions top_p_options(Index d_model, Index num_experts, double top_p = 0.4) {
  return {.d_model = d_model, .num_experts = num_experts, .top_k = num_experts, .top_p = top_p};
}

/// Options of ReLU routing, in which a token chooses every expert with a positive logit, which is its gate
/// (ReMoE, Wang et al. 2024, eq. 5). Train with relu_balance_loss.
inline TopKOptions relu_options(Index d_model, Index num_experts) {
  return {.d_model = d_model, .num_experts = num_experts, .top_k = num_experts, .score = Score::relu};
}

/// Throws std::invalid_argument for options out of range, and for some that exclude each other.
inline void check_top_k_options(const TopKOptions& options) {
  require(options.d_model > 0, "TopKRouter: d_model = ", options.d_model, ", expected at least 1");
  require(options.num_experts > 0, "TopKRouter: num_experts = ", options.num_experts,
          ", expected at least 1");
  check_token_choice(options, "TopKRouter");
  require(number_kind(options.jitter) == NumberKind::finite && options.jitter >= 0 && options.jitter < 1,
          "TopKRouter: jitter = ", options.jitter, " is not in [0, 1)");
  const auto at_least_0 = [](double value, const char* what) {
    require(number_kind(value) == NumberKind::finite && value >= 0, "TopKRouter: ", what, " = ", value,
            ", expected a finite number of at least 0");
  };
  at_least_0(options.renormalise_epsilon, "renormalise_epsilon");
  at_least_0(options.renormalise_minimum, "renormalise_minimum");
  const auto check_threshold = [&](double threshold, const char* what) {
    at_least_0(threshold, what);
    require(is_equal(threshold, 0.0) || (!options.selection_bias && !options.group_limit.applies() &&
                                         is_equal(options.top_p, 1.0) && options.score != Score::relu),
            "TopKRouter: ", what, " = ", threshold,
            " beside a selection bias, a group limit, top_p or relu, expected 0");
  };
  check_threshold(options.second_threshold, "second_threshold");
  check_threshold(options.random_second_threshold, "random_second_threshold");
  require(options.top_p > 0 && options.top_p <= 1, "TopKRouter: top_p = ", options.top_p,
          " is not in (0, 1]");
  at_least_0(options.noise_stddev, "noise_stddev");
  at_least_0(options.gate_scale, "gate_scale");
  require(options.gate_scale > 0, "TopKRouter: gate_scale = ", options.gate_scale, ", expected more than 0");
  require(options.score == Score::softmax || options.softmax_before_selection,
          "TopKRouter: a softmax after selection beside another score, expected one of the two");
  check_group_limit(options.group_limit, options.num_experts, options.top_k, "TopKRouter");
}

}  // namespace moe
