// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>

#include <moe/core/buffer.hpp>
#include <moe/core/executor.hpp>
#include <moe/layers/checked_plan.hpp>
#include <moe/math/linear.hpp>
#include <moe/routing/routing.hpp>

// Moving rows: dispatch copies every assignment's token to a row of its expert, the experts work on their
// rows (grouped_experts.hpp), combine adds the rows up in token order; and the same backwards. All throw
// std::invalid_argument when their arguments do not fit the plan, or the plan itself is not one that can be
// followed, or where what they write overlaps what they read. Checking a plan takes O(tokens + assignments),
// little beside moving rows; a layer does it once, and hands the CheckedPlan on.
namespace moe {

/// What the functions here take as a matrix of tokens: the elements of a row lie side by side. A
/// column-major matrix does not compile: bind it to a ConstMatrixRef first, which copies.
template <class M>
concept TokenMatrix = kRowsAreContiguous<std::remove_cvref_t<M>>;

namespace detail {

// Calls f(assignment, token) for every assignment of the tokens [begin, end), experts ascending.
template <class S, class F>
void for_each_assignment(const DispatchPlan<S>& plan, Index begin, Index end, const F& f) {
  const Index* const token = plan.token.data();
  for (Index e = 0; e < plan.num_experts(); ++e) {
    const Index* const last = token + plan.expert_begin[e + 1];
    const Index* t = std::lower_bound(token + plan.expert_begin[e], last, begin);
    for (; t != last && *t < end; ++t) f(Index(t - token), *t);
  }
}

// Throws unless there is a row for every assignment.
template <class S>
void require_rows(const RowBuffer<S>& rows, const DispatchPlan<S>& plan, const char* where,
                  const char* what) {
  require(rows.rows() == plan.num_assignments(), where, ": ", what, " has ", rows.rows(), " rows, expected ",
          plan.num_assignments(), " assignments");
}

// out [tokens, d_model] = for each token the sum over its assignments a, in ascending expert, of
// weight(a) * rows[a]; plus the token's row of `passed` where it is passed through.
template <class S, class Out, class Weight, class Passed, Executor E>
void sum_rows(const DispatchPlan<S>& plan, const RowBuffer<S>& rows, const Passed& passed,
              const Weight& weight, Out&& out, const E& executor) {
  for_each_block(plan.num_tokens, executor, [&](Index begin, Index end, Index) {
    out.middleRows(begin, end - begin).setZero();
    const Index* const last = plan.passed_through.end();
    for (const Index* t = std::lower_bound(plan.passed_through.begin(), last, begin); t != last && *t < end;
         ++t)
      out.row(*t) = passed.row(*t);
    for_each_assignment(plan, begin, end, [&](Index a, Index t) {
      add_scaled(rows.cols(), weight(a), rows.row(a), &out(t, 0));
    });
  });
}

}  // namespace detail

/// rows [assignments, d_model]: row a is x's row of token[a], times gate[a] where gates scale inputs.
/// O(assignments * d_model). Allocates only when rows grows.
template <TokenMatrix X, class S, PlanOf<S> P, Executor E = DefaultExecutor>
void dispatch(const X& x, const P& given, RowBuffer<S>& rows, const E& executor = {}) {
  const DispatchPlan<S>& plan = to_follow(given, x.rows(), "dispatch");
  require_apart("dispatch", "rows", rows, "x", x, "plan", plan);
  rows.resize(plan.num_assignments(), x.cols(), plan.token.capacity());
  for_each_block(plan.num_assignments(), executor, [&](Index begin, Index end, Index) {
    for (Index a = begin; a < end; ++a) {
      if (x.cols() == 0) continue;
      const S* const from = &x.coeffRef(plan.token[a], 0);
      S* const to = rows.row(a);
      if (plan.gate_side == GateSide::output) {
        std::copy_n(from, x.cols(), to);
      } else {
        for (Index j = 0; j < x.cols(); ++j) to[j] = plan.gate[a] * from[j];
      }
    }
  });
}

/// y [tokens, d_model]: the sum over a token's assignments of gate * row, in ascending expert index;
/// x's row where the plan passes the token through (else x is not read); zero for a masked token, NaN for a
/// poisoned one.
/// O(tokens * d_model + assignments * d_model). The order does not depend on the executor.
template <TokenMatrix X, class S, PlanOf<S> P, TokenMatrix Y, Executor E = DefaultExecutor>
void combine(const RowBuffer<S>& rows, const P& given, const X& x, Y&& y, const E& executor = {}) {
  const DispatchPlan<S>& plan = to_follow(given, y.rows(), "combine");
  detail::require_rows(rows, plan, "combine", "rows");
  require_shape(x, plan.num_tokens, rows.cols(), "combine", "x");
  require_shape(y, plan.num_tokens, rows.cols(), "combine", "y");
  require_apart("combine", "y", y, "rows", rows, "plan", plan);
  if (!plan.passed_through.empty()) require_apart("combine", "y", y, "x", x);
  const bool scale = plan.gate_side == GateSide::output;
  detail::sum_rows(
      plan, rows, x, [&](Index a) { return scale ? plan.gate[a] : S(1); }, y, executor);
  for (Index t = 0; t < plan.num_tokens; ++t)
    if (plan.token_state[t] == TokenState::poisoned)
      y.row(t).setConstant(std::numeric_limits<S>::quiet_NaN());
}

/// Backward of combine by its rows: d_rows[a] = gate[a] * d_y[token[a]], and, where gates scale
/// outputs, d_gate[a] = <d_y[token[a]], rows[a]>. O(assignments * d_model).
template <TokenMatrix Dy, class S, PlanOf<S> P, Executor E = DefaultExecutor>
void combine_backward(const Dy& d_y, const RowBuffer<S>& rows, const P& given, RowBuffer<S>& d_rows,
                      Buffer<S>& d_gate, const E& executor = {}) {
  const DispatchPlan<S>& plan = to_follow(given, d_y.rows(), "combine_backward");
  detail::require_rows(rows, plan, "combine_backward", "rows");
  require_shape(d_y, plan.num_tokens, rows.cols(), "combine_backward", "d_y");
  require_apart("combine_backward", "d_rows", d_rows, "d_y", d_y, "rows", rows, "plan", plan);
  require_apart("combine_backward", "d_gate", d_gate, "d_y", d_y, "plan", plan);
  d_rows.resize(plan.num_assignments(), rows.cols(), plan.token.capacity());
  d_gate.reserve(plan.token.capacity());
  d_gate.assign(plan.num_assignments(), S(0));
  const Index cols = rows.cols();
  if (cols == 0) return;
  for_each_block(plan.num_assignments(), executor, [&](Index begin, Index end, Index) {
    for (Index a = begin; a < end; ++a) {
      const S* const from = &d_y.coeffRef(plan.token[a], 0);
      S* const to = d_rows.row(a);
      if (plan.gate_side == GateSide::output) {
        for (Index j = 0; j < cols; ++j) to[j] = plan.gate[a] * from[j];
        d_gate[a] = dot(cols, from, rows.row(a));
      } else {
        std::copy_n(from, cols, to);
      }
    }
  });
}

/// Backward of dispatch: d_x [tokens, d_model] = the sum of a token's d_rows in ascending expert
/// index (times their gates where gates scale inputs, with d_gate[a] = <d_rows[a], x[token[a]]>),
/// plus d_y's row where the plan passes the token through. O((tokens + assignments) * d_model).
template <TokenMatrix X, TokenMatrix Dy, class S, PlanOf<S> P, TokenMatrix Dx, Executor E = DefaultExecutor>
void dispatch_backward(const RowBuffer<S>& d_rows, const P& given, const X& x, const Dy& d_y, Dx&& d_x,
                       Buffer<S>& d_gate, const E& executor = {}) {
  const DispatchPlan<S>& plan = to_follow(given, d_x.rows(), "dispatch_backward");
  detail::require_rows(d_rows, plan, "dispatch_backward", "d_rows");
  require_shape(d_x, plan.num_tokens, d_rows.cols(), "dispatch_backward", "d_x");
  require_shape(d_y, plan.num_tokens, d_rows.cols(), "dispatch_backward", "d_y");
  const bool scale = plan.gate_side == GateSide::input;
  if (scale) {
    require_shape(x, plan.num_tokens, d_rows.cols(), "dispatch_backward", "x");
    require(d_gate.size() == plan.num_assignments(), "dispatch_backward: d_gate has ", d_gate.size(),
            " entries, expected ", plan.num_assignments(), " assignments");
    require_apart("dispatch_backward", "d_x", d_x, "x", x, "d_gate", d_gate);
    require_apart("dispatch_backward", "d_gate", d_gate, "x", x, "plan", plan);
  }
  require_apart("dispatch_backward", "d_x", d_x, "d_rows", d_rows, "plan", plan);
  if (!plan.passed_through.empty()) require_apart("dispatch_backward", "d_x", d_x, "d_y", d_y);
  if (scale && d_rows.cols() > 0) {
    for_each_block(plan.num_assignments(), executor, [&](Index begin, Index end, Index) {
      for (Index a = begin; a < end; ++a)
        d_gate[a] = dot(d_rows.cols(), d_rows.row(a), &x.coeffRef(plan.token[a], 0));
    });
  }
  detail::sum_rows(
      plan, d_rows, d_y, [&](Index a) { return scale ? plan.gate[a] : S(1); }, d_x, executor);
}

}  // namespace moe
