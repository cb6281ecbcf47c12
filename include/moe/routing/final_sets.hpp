// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/types.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>

// The experts that tokens end up with, after capacity.
namespace moe {

/// Calls f(token, n, experts, assignments) for every token with n > 0 experts in the plan, these in the order
/// of its choices. O(tokens + choices + assignments * log(num_experts)).
template <class S, class F>
void for_each_final_set(const Routing<S>& routing, FinalSetWorkspace& workspace, const F& f) {
  const Choices<S>& chosen = routing.chosen;
  const DispatchPlan<S>& plan = routing.plan;
  Buffer<Index>&assignment = workspace.assignment, &set = workspace.set;
  assignment.reserve(chosen.expert.capacity());
  assignment.assign(chosen.size(), -1);
  for (Index a = 0; a < plan.num_assignments(); ++a) assignment[plan.choice[a]] = a;
  set.reserve(2 * plan.num_experts());
  for (Index t = 0; t < plan.num_tokens; ++t) {
    const Index begin = chosen.token_begin[t], end = chosen.token_begin[t + 1];
    set.resize(2 * (end - begin));
    Index* const experts = set.data();
    Index* const assignments = experts + (end - begin);
    Index n = 0;
    for (Index c = begin; c < end; ++c)
      if (assignment[c] >= 0) assignments[n++] = assignment[c];
    for (Index i = 0; i < n; ++i) {
      const auto& first = plan.expert_begin;
      experts[i] = Index(std::upper_bound(first.begin(), first.end(), assignments[i]) - first.begin()) - 1;
    }
    if (n > 0) f(t, n, experts, assignments);
  }
}

}  // namespace moe
