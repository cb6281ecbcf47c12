// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// A plan is checked once, where it enters.
namespace moe {

/// A plan that was checked: the functions here follow it without looking again. Refers to the plan, which
/// must not change meanwhile.
template <class S>
class CheckedPlan {
 public:
  /// Throws std::invalid_argument unless the plan is of so many tokens and experts and can be followed.
  CheckedPlan(const DispatchPlan<S>& plan, Index tokens, Index num_experts, const char* where)
      : plan_(&plan) {
    check_plan(plan, tokens, num_experts, where);
  }
  CheckedPlan(DispatchPlan<S>&&, Index, Index, const char*) = delete;  // would be gone
  /// What a router made. Throws std::invalid_argument, too, where it chose but did not seat.
  static CheckedPlan of_router(const Routing<S>& routing, Index tokens, Index num_experts,
                               const char* where) {
    const DispatchPlan<S>& plan = routing.plan;
    require(plan.num_tokens == tokens && plan.num_experts() == num_experts, where,
            ": the router made a plan of ", plan.num_tokens, " tokens and ", plan.num_experts(),
            " experts, expected ", tokens, " and ", num_experts);
    require(routing.chosen.size() == 0 || plan.num_assignments() > 0 || !plan.dropped.empty() ||
                !plan.passed_through.empty(),
            where, ": the router made ", routing.chosen.size(),
            " choices, but its plan has no assignment of them and none is dropped: a router ends with "
            "dispatch_all or apply_capacity");
    return {plan, tokens, num_experts, where};
  }
  /// For who has made the plan of a checked one.
  static CheckedPlan trusted(const DispatchPlan<S>& plan) { return CheckedPlan(plan); }
  static CheckedPlan trusted(DispatchPlan<S>&&) = delete;
  static CheckedPlan of_router(Routing<S>&&, Index, Index, const char*) = delete;

  /// The plan.
  const DispatchPlan<S>& operator*() const { return *plan_; }
  /// The plan.
  const DispatchPlan<S>* operator->() const { return plan_; }

 private:
  explicit CheckedPlan(const DispatchPlan<S>& plan) : plan_(&plan) {}

  const DispatchPlan<S>* plan_;
};

/// A plan for the functions here: a DispatchPlan, which they check, or a CheckedPlan.
template <class P, class S>
concept PlanOf = std::same_as<P, DispatchPlan<S>> || std::same_as<P, CheckedPlan<S>>;

/// The plan to follow: checked here, or before. Throws std::invalid_argument unless it is of so many tokens.
template <class S>
const DispatchPlan<S>& to_follow(const DispatchPlan<S>& plan, Index tokens, const char* where) {
  check_plan(plan, tokens, plan.num_experts(), where);
  return plan;
}
/// The same of a plan that was checked before.
template <class S>
const DispatchPlan<S>& to_follow(const CheckedPlan<S>& checked, Index tokens, const char* where) {
  require(checked->num_tokens == tokens, where, ": the routing is of ", checked->num_tokens,
          " tokens, expected ", tokens);
  return *checked;
}

}  // namespace moe
