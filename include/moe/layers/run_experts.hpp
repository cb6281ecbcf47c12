// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cassert>
#include <span>

#include <moe/core/buffer.hpp>
#include <moe/core/executor.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/routing/check_routing.hpp>

// Experts on their rows, forward and backward.
namespace moe {

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
