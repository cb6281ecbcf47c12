// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cassert>
#include <limits>
#include <span>
#include <type_traits>

#include <moe/buffer.hpp>
#include <moe/executor.hpp>
#include <moe/expert.hpp>
#include <moe/product.hpp>
#include <moe/router.hpp>

// Moving rows: dispatch copies every assignment's token to a row of its expert, run_experts runs
// the experts on their rows, combine adds the rows up in token order; and the same backwards. All
// throw std::invalid_argument when their arguments do not fit the plan, or the plan itself is not
// one that can be followed, or where what they write overlaps what they read; checking the plan takes
// O(tokens + assignments), little beside moving rows.
namespace moe {

/// What the functions here take as a matrix of tokens: the elements of a row lie side by side. A
/// column-major matrix does not compile: bind it to a ConstMatrixRef first, which copies.
template <class M>
concept TokenMatrix = detail::kRowsAreContiguous<std::remove_cvref_t<M>>;

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
template <TokenMatrix X, class S, Executor E = DefaultExecutor>
void dispatch(const X& x, const DispatchPlan<S>& plan, RowBuffer<S>& rows, const E& executor = {}) {
  check_plan(plan, x.rows(), plan.num_experts(), "dispatch");
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
template <TokenMatrix X, class S, TokenMatrix Y, Executor E = DefaultExecutor>
void combine(const RowBuffer<S>& rows, const DispatchPlan<S>& plan, const X& x, Y&& y,
             const E& executor = {}) {
  check_plan(plan, y.rows(), plan.num_experts(), "combine");
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
template <TokenMatrix Dy, class S, Executor E = DefaultExecutor>
void combine_backward(const Dy& d_y, const RowBuffer<S>& rows, const DispatchPlan<S>& plan,
                      RowBuffer<S>& d_rows, Buffer<S>& d_gate, const E& executor = {}) {
  check_plan(plan, d_y.rows(), plan.num_experts(), "combine_backward");
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
template <TokenMatrix X, TokenMatrix Dy, class S, TokenMatrix Dx, Executor E = DefaultExecutor>
void dispatch_backward(const RowBuffer<S>& d_rows, const DispatchPlan<S>& plan, const X& x, const Dy& d_y,
                       Dx&& d_x, Buffer<S>& d_gate, const E& executor = {}) {
  check_plan(plan, d_x.rows(), plan.num_experts(), "dispatch_backward");
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

/// Memory in which experts keep what their backward pass needs: for each expert a block
/// [its rows, its cache_cols()], one after the other. Grow-only.
template <class S>
class ExpertCache {
 public:
  /// Lays blocks out for a plan. Room is made for `reserve_rows` rows of the widest expert, so that
  /// another batch of the same shape fits.
  template <class Ex>
  void resize(std::span<const Ex> experts, const DispatchPlan<S>& plan) {
    const Index count = plan.num_experts();
    require(Index(experts.size()) == count, "ExpertCache::resize: ", experts.size(),
            " experts, expected the plan's ", count);
    begin_.resize(count);
    rows_.resize(count);
    cols_.resize(count);
    Index size = 0, widest = 0;
    for (Index e = 0; e < count; ++e) {
      rows_[e] = plan.rows_of(e);
      cols_[e] = experts[std::size_t(e)].cache_cols();
      begin_[e] = size;
      size += rows_[e] * cols_[e];
      widest = (std::max)(widest, cols_[e]);
    }
    storage_.reserve((std::max)(size, plan.token.capacity() * widest));
    storage_.resize(size);
  }
  /// Throws std::invalid_argument unless the blocks are those of such experts under such a plan.
  /// O(num_experts).
  template <class Ex>
  void check(std::span<const Ex> experts, const DispatchPlan<S>& plan, const char* where) const {
    require(rows_.size() == plan.num_experts(), where, ": the cache is of ", rows_.size(),
            " experts, expected ", plan.num_experts());
    for (Index e = 0; e < rows_.size(); ++e)
      require(rows_[e] == plan.rows_of(e), where, ": the cache has ", rows_[e], " rows of expert ", e,
              ", expected ", plan.rows_of(e));
    for (Index e = 0; e < cols_.size(); ++e)
      require(cols_[e] == experts[std::size_t(e)].cache_cols(), where, ": the cache has ", cols_[e],
              " columns for expert ", e, ", expected ", experts[std::size_t(e)].cache_cols());
  }
  /// Rows [begin, begin + count) of an expert's block, counted from its first row.
  Eigen::Map<Matrix<S>> block(Index expert, Index begin, Index count) {
    assert(begin >= 0 && count >= 0 && begin + count <= rows_[expert]);
    return {storage_.data() + begin_[expert] + begin * cols_[expert], count, cols_[expert]};
  }
  template <class F>
  void for_each_array(const F& f) const {
    f(storage_);
  }

 private:
  Buffer<S> storage_;
  Buffer<Index> begin_, rows_, cols_;
};

namespace detail {

// A block of the rows of one expert; row counts from the expert's first.
struct ExpertRows {
  Index expert, begin, count;
};

// Rows of one expert that one task takes. A multiple of every register tile's height.
inline constexpr Index kExpertRows = 192;

template <class S>
void list_expert_rows(const DispatchPlan<S>& plan, Buffer<ExpertRows>& tasks) {
  tasks.reserve(plan.num_experts() + plan.token.capacity() / kExpertRows);
  tasks.clear();
  for (Index e = plan.num_experts(); e-- > 0;)
    for (Index begin = 0; begin < plan.rows_of(e); begin += kExpertRows)
      tasks.push_back({e, begin, (std::min)(kExpertRows, plan.rows_of(e) - begin)});
}

}  // namespace detail

/// Scratch of run_experts. Grow-only.
template <class S>
struct ExpertScratch {
  Buffer<detail::ExpertRows> tasks;
  Buffer<S> rows;

  template <class F>
  void for_each_array(const F& f) const {
    f(rows);
  }
};

/// y_rows [assignments, d_model]: every expert on its rows of x_rows, for inference. Experts and
/// blocks of their rows are tasks of the executor.
template <class S, class Ex, Executor E = DefaultExecutor>
void run_experts(std::span<const Ex> experts, const DispatchPlan<S>& plan, const RowBuffer<S>& x_rows,
                 RowBuffer<S>& y_rows, ExpertScratch<S>& scratch, const E& executor = {}) {
  require(Index(experts.size()) == plan.num_experts(), "run_experts: ", experts.size(),
          " experts, expected the plan's ", plan.num_experts());
  check_plan_arrays(plan, "run_experts");
  detail::require_rows(x_rows, plan, "run_experts", "x_rows");
  require_apart("run_experts", "y_rows", y_rows, "x_rows", x_rows);
  y_rows.resize(x_rows.rows(), x_rows.cols(), plan.token.capacity());
  detail::list_expert_rows(plan, scratch.tasks);
  Index widest = 0;
  if constexpr (BufferedExpert<Ex>) {
    for (const Ex& expert : experts) widest = std::max<Index>(widest, expert.cache_cols());
    scratch.rows.resize(executor.concurrency() * detail::kExpertRows * widest);
  }
  executor.for_each(scratch.tasks.size(), [&](Index task, Index worker) {
    const auto [e, begin, count] = scratch.tasks[task];
    const Ex& expert = experts[std::size_t(e)];
    const auto x = x_rows.block(plan.expert_begin[e] + begin, count);
    auto y = y_rows.block(plan.expert_begin[e] + begin, count);
    if constexpr (BufferedExpert<Ex>) {
      expert.forward(x, y,
                     Eigen::Map<Matrix<S>>(scratch.rows.data() + worker * detail::kExpertRows * widest, count,
                                           expert.cache_cols()));
    } else {
      expert.forward(x, y);
    }
  });
}

/// The same, keeping in `cache` what run_experts_backward needs.
template <class S, TrainableExpert Ex, Executor E = DefaultExecutor>
void run_experts(std::span<const Ex> experts, const DispatchPlan<S>& plan, const RowBuffer<S>& x_rows,
                 RowBuffer<S>& y_rows, ExpertCache<S>& cache, ExpertScratch<S>& scratch,
                 const E& executor = {}) {
  require(Index(experts.size()) == plan.num_experts(), "run_experts: ", experts.size(),
          " experts, expected the plan's ", plan.num_experts());
  check_plan_arrays(plan, "run_experts");
  detail::require_rows(x_rows, plan, "run_experts", "x_rows");
  require_apart("run_experts", "y_rows", y_rows, "x_rows", x_rows);
  y_rows.resize(x_rows.rows(), x_rows.cols(), plan.token.capacity());
  detail::list_expert_rows(plan, scratch.tasks);
  cache.resize(experts, plan);
  executor.for_each(scratch.tasks.size(), [&](Index task, Index) {
    const auto [e, begin, count] = scratch.tasks[task];
    experts[std::size_t(e)].forward(x_rows.block(plan.expert_begin[e] + begin, count),
                                    y_rows.block(plan.expert_begin[e] + begin, count),
                                    cache.block(e, begin, count));
  });
}

/// Backward of run_experts: writes d_x_rows [assignments, d_model] and adds to the gradients of the
/// experts' parameters, one task an expert. An expert without rows costs nothing.
template <class S, TrainableExpert Ex, Executor E = DefaultExecutor>
void run_experts_backward(std::span<const Ex> experts, const DispatchPlan<S>& plan,
                          const RowBuffer<S>& x_rows, const RowBuffer<S>& d_y_rows, ExpertCache<S>& cache,
                          RowBuffer<S>& d_x_rows, std::span<Ex> grads, const E& executor = {}) {
  const Index count = plan.num_experts();
  require(Index(experts.size()) == count && Index(grads.size()) == count,
          "run_experts_backward: ", experts.size(), " experts and ", grads.size(),
          " gradients, expected the plan's ", count);
  check_plan_arrays(plan, "run_experts_backward");
  detail::require_rows(x_rows, plan, "run_experts_backward", "x_rows");
  require_shape(d_y_rows, x_rows.rows(), x_rows.cols(), "run_experts_backward", "d_y_rows");
  require_apart("run_experts_backward", "d_x_rows", d_x_rows, "x_rows", x_rows, "d_y_rows", d_y_rows);
  require(count == 0 || grads.data() != experts.data(), "run_experts_backward: the gradients are the ", count,
          " experts themselves, expected others");
  cache.check(experts, plan, "run_experts_backward");
  d_x_rows.resize(x_rows.rows(), x_rows.cols(), plan.token.capacity());
  executor.for_each(count, [&](Index task, Index) {
    const Index e = count - 1 - task;  // shared experts stand last and are the largest
    const Index begin = plan.expert_begin[e], rows = plan.rows_of(e);
    if (rows == 0) return;
    experts[std::size_t(e)].backward(x_rows.block(begin, rows), d_y_rows.block(begin, rows),
                                     cache.block(e, 0, rows), d_x_rows.block(begin, rows),
                                     grads[std::size_t(e)]);
  });
}

}  // namespace moe
