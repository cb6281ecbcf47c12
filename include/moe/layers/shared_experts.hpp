// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/sigmoid.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/scores.hpp>

// Shared experts as experts of the plan: the rest of a layer does not tell them from routed ones.
namespace moe {

/// Throws std::invalid_argument where shared experts have gates, `gated` of them, beside a router whose gates
/// scale inputs: a plan has one side.
inline void check_shared_gates(Index gated, GateSide side, const char* where) {
  require(gated == 0 || side == GateSide::output, where, ": ", gated,
          " gated shared experts beside a router whose gates scale inputs, expected 0");
}

/// `plan` becomes the routed plan with `num_shared` experts behind the routed ones: each takes every
/// valid token, with gate sigmoid(x w_shared_gate^T) [tokens, num_shared], or 1 where w_shared_gate is
/// empty. Returns `routed` itself where there are none. O(tokens * num_shared * d_model); allocates
/// only when shapes grow. Throws std::invalid_argument where w_shared_gate meets gates that scale inputs,
/// and where what is written overlaps what is read.
template <class S, Executor Ex>
const DispatchPlan<S>& add_shared_experts(const ConstMatrixRef<S>& x, const DispatchPlan<S>& routed,
                                          Index num_shared, const Matrix<S>& w_shared_gate,
                                          DispatchPlan<S>& plan, ReusedMatrix<S>& gate, const Ex& executor) {
  if (num_shared == 0) return routed;
  check_shared_gates(w_shared_gate.rows(), routed.gate_side, "add_shared_experts");
  require(&plan != &routed, "add_shared_experts: plan is the routed plan of ", routed.num_experts(),
          " experts itself, expected another one");
  require_apart("add_shared_experts", "gate", gate, "x", x, "w_shared_gate", w_shared_gate, "routed", routed);
  if (w_shared_gate.size() > 0) {
    gate.resize(x.rows(), num_shared);
    router_linear(x, w_shared_gate, gate, executor);
  }
  plan.num_tokens = routed.num_tokens;
  plan.token_state = routed.token_state;
  plan.gate_side = routed.gate_side;
  plan.passed_through.reserve(routed.passed_through.capacity());
  plan.passed_through = routed.passed_through;
  const Index room = routed.token.capacity() + num_shared * routed.num_tokens;
  plan.expert_begin.reserve(routed.num_experts() + num_shared + 1);
  plan.token.reserve(room);
  plan.gate.reserve(room);
  plan.expert_begin = routed.expert_begin;
  plan.token = routed.token;
  plan.gate = routed.gate;
  for (Index s = 0; s < num_shared; ++s) {
    for (Index t = 0; t < plan.num_tokens; ++t) {
      if (plan.token_state[t] != TokenState::valid) continue;
      plan.token.push_back(t);
      plan.gate.push_back(w_shared_gate.size() > 0 ? sigmoid(gate(t, s)) : S(1));
      if (plan.gate_side == GateSide::input) plan.gate[plan.gate.size() - 1] = S(1);
    }
    plan.expert_begin.push_back(plan.token.size());
  }
  return plan;
}

/// Throws std::invalid_argument unless `all` is a plan that add_shared_experts made of `routed`, as far as
/// the numbers of rows show. O(num_experts).
template <class S>
void check_shared_plan(const DispatchPlan<S>& routed, const DispatchPlan<S>& all, const char* where) {
  const Buffer<Index>&begin = routed.expert_begin, &begin_of_all = all.expert_begin;
  require(all.num_experts() >= routed.num_experts(), where, ": the cache's plan is over ", all.num_experts(),
          " experts, expected at least the routed ", routed.num_experts());
  require(all.num_tokens == routed.num_tokens && std::equal(begin.begin(), begin.end(), begin_of_all.begin()),
          where, ": the cache's routing of ", routed.num_assignments(),
          " assignments is not the one of its forward pass, which had ", begin_of_all[routed.num_experts()]);
}

/// d_logits [tokens, num_shared] = the gradient by the logits of the shared experts' gates. `plan` is what
/// add_shared_experts made, `gate` the logits, d_gate [assignments] the gradient by the plan's gates.
/// O(tokens * num_shared).
template <class S>
void shared_gate_backward(const DispatchPlan<S>& plan, const ReusedMatrix<S>& gate, const Buffer<S>& d_gate,
                          ReusedMatrix<S>& d_logits) {
  const Index num_shared = gate.cols(), routed = plan.num_experts() - num_shared;
  d_logits.setZero(plan.num_tokens, num_shared);
  for (Index s = 0; s < num_shared; ++s)
    for (Index a = plan.expert_begin[routed + s]; a < plan.expert_begin[routed + s + 1]; ++a)
      d_logits(plan.token[a], s) = d_gate[a] * sigmoid_slope(gate(plan.token[a], s));
}

}  // namespace moe
