// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/math/softmax.hpp>
#include <moe/math/top_k.hpp>

// Group-limited selection: a token's experts come from few groups of experts, which stand on few
// machines.
namespace moe {

/// What ranks a group of experts.
enum class GroupScore {
  max,          ///< the group's largest value (DeepSeek-V2)
  top_two_sum,  ///< the sum of its two largest values (DeepSeek-V3)
};

/// Experts e of equal e / (num_experts / groups) form a group; a token keeps the `kept` best groups.
struct GroupLimit {
  Index groups = 1;                    ///< how many there are
  Index kept = 1;                      ///< how many of them a token may use
  GroupScore score = GroupScore::max;  ///< what ranks them

  /// Whether it keeps a token from any group.
  bool applies() const { return kept < groups; }
};

/// Throws std::invalid_argument unless a limit can work for num_experts and top_k.
inline void check_group_limit(const GroupLimit& limit, Index num_experts, Index top_k, const char* where) {
  require(limit.groups >= 1 && num_experts % limit.groups == 0, where, ": ", limit.groups,
          " groups do not divide num_experts = ", num_experts);
  require(limit.kept >= 1 && limit.kept <= limit.groups, where, ": kept groups = ", limit.kept,
          ", expected between 1 and groups = ", limit.groups);
  const Index group_size = num_experts / limit.groups;
  require(limit.kept * group_size >= top_k, where, ": the kept groups have ", limit.kept * group_size,
          " experts, expected at least top_k = ", top_k);
  require(limit.score == GroupScore::max || group_size >= 2 || !limit.applies(), where, ": groups of ",
          group_size, " expert have no two largest values, expected at least 2");
}

/// Sets to minus infinity the values [num_experts] of experts outside the kept groups. Equal groups:
/// the lower index is kept. `scratch` holds at least groups values, `order` at least kept indices.
/// O(num_experts + groups * kept). DeepSeek-AI 2024 (V2), section 2.1.2; 2024 (V3), section 2.1.2.
template <class S>
void limit_to_groups(const GroupLimit& limit, Index num_experts, S* values, S* scratch, Index* order) {
  if (!limit.applies()) return;
  constexpr S kUnavailable = -std::numeric_limits<S>::infinity();
  const Index size = num_experts / limit.groups;
  for (Index g = 0; g < limit.groups; ++g) {
    S first = kUnavailable, second = kUnavailable;
    for (Index e = g * size; e < (g + 1) * size; ++e) {
      const S v = values[e];
      if (is_unavailable(v)) continue;
      if (is_unavailable(first) || v > first) {
        second = first;
        first = v;
      } else if (is_unavailable(second) || v > second) {
        second = v;
      }
    }
    // A group with one available expert counts that one.
    scratch[g] = limit.score == GroupScore::max || is_unavailable(second) ? first : first + second;
  }
  top_k(limit.groups, scratch, limit.kept, order);
  std::sort(order, order + limit.kept);
  const Index* kept = order;
  for (Index g = 0; g < limit.groups; ++g) {
    if (kept != order + limit.kept && *kept == g)
      ++kept;
    else
      std::fill(values + g * size, values + (g + 1) * size, kUnavailable);
  }
}

}  // namespace moe
