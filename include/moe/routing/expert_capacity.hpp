// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// How many seats an expert has.
namespace moe {

/// How a number of seats becomes whole. Halves go to the even neighbour in `nearest_even`.
enum class Rounding {
  up,           ///< to the next whole number
  down,         ///< to the whole number before
  nearest_even  ///< to the nearest whole number
};

/// What becomes of an even share of seats. The default is Megatron-LM's; published models differ:
/// V-MoE {.multiple_of = 4}, Switch (mesh) {Rounding::down, 4}, GShard (lingvo) {Rounding::down, 4, 4},
/// flaxformer {Rounding::nearest_even, 4}, OpenMoE {Rounding::down, 4, 2}.
struct CapacityRule {
  Rounding rounding = Rounding::up;  ///< how the share becomes whole
  Index minimum = 0;                 ///< at least as many seats as this
  Index multiple_of = 1;             ///< then rounded up to a multiple of this
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
/// their factor.
/// @code
/// assert(moe::expert_capacity(100, 8, 2, 1.25) == 32);  // 31.25 seats, rounded up
/// assert(moe::expert_capacity(100, 8, 2, 1.25, {.rounding = moe::Rounding::down}) == 31);
/// @endcode
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
template <class S, class V>
void count_valid_tokens(const DispatchPlan<S>& plan, const BatchInfo& info, V& valid) {
  require(plan.token_state.size() == plan.num_tokens, "count_valid_tokens: token_state has ",
          plan.token_state.size(), " entries, expected ", plan.num_tokens, " tokens");
  check_batch_info(info, plan.num_tokens, "count_valid_tokens");
  valid.setZero(info.num_groups());
  for (Index g = 0; g < valid.size(); ++g)
    for (Index t = info.begin_of(g); t < info.end_of(g, plan.num_tokens); ++t)
      valid[g] += plan.token_state[t] == TokenState::valid;
}

}  // namespace moe
