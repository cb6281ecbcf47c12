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
template <class X, class S, Expert E, class W, class Kept, Executor Ex>
void apply_experts(const X& x, const CheckedPlan<S>& plan, const GroupedExperts<E>& experts, MatrixRef<S> y,
                   LayerWorkspace<S, W>& workspace, Kept& kept, const Ex& executor) {
  dispatch(x, plan, workspace.x_rows, executor);
  experts.forward(workspace.x_rows, plan->expert_begin, workspace.y_rows, kept, executor);
  combine(workspace.y_rows, plan, x, y, executor);
}

/// The way back: d_x [tokens, d_model] and cache.d_gate [assignments] from d_y [tokens, d_model]; adds to the
/// parameters of `grad`. `cache` is what apply_experts filled, plan the one that it followed, cache.x its x.
/// Throws as these do.
template <class Dy, class S, Expert E, class W, class C, Executor Ex>
void apply_experts_backward(const Dy& d_y, const CheckedPlan<S>& plan, const GroupedExperts<E>& experts,
                            LayerCache<S, W, C>& cache, MatrixRef<S> d_x, GroupedExperts<E>& grad,
                            const Ex& executor) {
  combine_backward(d_y, cache.y_rows, plan, cache.d_rows, cache.d_gate, executor);
  experts.backward(cache.x_rows, plan->expert_begin, cache.d_rows, cache.experts, cache.d_x_rows, grad,
                   executor);
  dispatch_backward(cache.d_x_rows, plan, cache.x, d_y, d_x, cache.d_gate, executor);
}

}  // namespace moe
