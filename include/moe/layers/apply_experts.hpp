// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/layer_workspace.hpp>

// The way of the data, once for every layer.
namespace moe {

/// y [tokens, d_model] from x [tokens, d_model]: dispatch, experts, combine. `kept` is where experts keep
/// what they need: an ExpertWorkspace or, for a backward pass, an ExpertCache. Throws as these do.
template <class X, class S, Expert E, class Kept, Executor Ex>
void apply_experts(const X& x, const CheckedPlan<S>& plan, const GroupedExperts<E>& experts, MatrixRef<S> y,
                   LayerWorkspace<S>& workspace, Kept& kept, const Ex& executor) {
  dispatch(x, plan, workspace.x_rows, executor);
  experts.forward(workspace.x_rows, plan->expert_begin, workspace.y_rows, kept, executor);
  combine(workspace.y_rows, plan, x, y, executor);
}

}  // namespace moe
