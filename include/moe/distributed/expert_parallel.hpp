// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/distributed/communicator.hpp>
#include <moe/distributed/exchange.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/layer_workspace.hpp>

// The experts of a layer, spread over processes.
namespace moe {

/// The experts of a layer, each on one process of a communicator: process p of P holds those from
/// num_experts * p / P on. What MoELayer takes for GroupedExperts; forward and backward are then collective.
/// Each process gives the layer its own tokens. Where these are the parts of a batch one after the other, the
/// outputs, the gradients by x, gates and weights are, bit for bit, those of one process on the whole batch:
/// an expert's rows ascend by token, and a token's experts are added in ascending order where it came from.
///
/// Names are those of the whole layer: process 1 visits "experts.4.w_up". Every call is collective; what
/// throws std::invalid_argument on one process does so alone: see together().
template <Expert E>
class ExpertParallel {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;

  /// What a forward pass works in. Grow-only.
  struct Workspace {
    Exchange<S> exchange;        ///< of the plan
    RowBuffer<S> y_rows;         ///< of own experts
    ExpertWorkspace<S> experts;  ///< theirs

    template <class F>
    void for_each_array(const F& f) const {
      f(exchange);
      f(y_rows);
      f(experts);
    }
  };
  /// What a backward pass needs, and works in. Grow-only.
  struct Cache {
    Exchange<S> exchange;           ///< of the plan
    RowBuffer<S> y_rows, d_x_rows;  ///< of own experts
    ExpertCache<S> experts;         ///< theirs

    template <class F>
    void for_each_array(const F& f) const {
      f(exchange);
      f(y_rows);
      f(d_x_rows);
      f(experts);
    }
  };

  /// Of `count` experts those of this process, made by make(number): the same number on all processes. Throws
  /// DistributedError on all where one does, and where widths or numbers differ.
  template <class Make>
  ExpertParallel(Communicator comm, Index count, const Make& make) : comm_(std::move(comm)), size_(count) {
    comm_.agree({"ExpertParallel", {count}, "experts"}, [&] {
      require(count >= 1, "ExpertParallel: ", count, " experts, expected at least 1");
      begin_ = first_of_process(count, comm_.rank(), comm_.size());
      end_ = first_of_process(count, comm_.rank() + 1, comm_.size());
      std::vector<E> own;
      for (Index e = begin_; e < end_; ++e) own.push_back(make(e));
      own_ = GroupedExperts<E>(std::move(own));
    });
    // Process 0 may hold none; the last always does.
    Buffer<Index> widths;
    widths.resize(comm_.size());
    const Index own_width = own_.width();
    comm_.gather(&own_width, 1, widths.data());
    width_ = widths[comm_.size() - 1];
    comm_.agree({"ExpertParallel, width"}, [&] {
      require(own_.empty() || own_width == width_, "ExpertParallel: experts have d_model = ", own_width,
              ", expected ", width_);
    });
  }
  /// The same from all of them, of which those of other processes are dropped.
  ExpertParallel(Communicator comm, std::vector<E> experts)
      : ExpertParallel(std::move(comm), Index(experts.size()),
                       [&](Index e) { return std::move(experts[std::size_t(e)]); }) {}

  /// Number of experts, on all processes.
  Index size() const { return size_; }
  bool empty() const { return size_ == 0; }
  /// d_model of each expert.
  Index width() const { return width_; }
  /// The processes.
  const Communicator& communicator() const { return comm_; }
  /// The experts [first, first + own().size()) that this process holds.
  Index first() const { return begin_; }
  /// These.
  GroupedExperts<E>& own() { return own_; }
  /// The same, read-only.
  const GroupedExperts<E>& own() const { return own_; }
  /// Those of [begin, end) that this process holds.
  std::span<E> part(Index begin, Index end) { return own_.part(own_index(begin), own_index(end)); }
  /// The same, read-only.
  std::span<const E> part(Index begin, Index end) const {
    return own_.part(own_index(begin), own_index(end));
  }

  /// Throws std::invalid_argument unless the cache is of a forward pass of these experts, under a plan with
  /// such assignments.
  void check_cache(const Cache& cache, std::span<const Index> expert_begin, const char* where) const {
    cache.exchange.check(Index(expert_begin.size()) - 1, expert_begin.back(), where);
    own_.check_cache(cache.experts, cache.exchange.expert_begin(), where);
  }

  /// Visits the parameters of those of the experts [begin, end) that this process holds, as "part.0.w_up" and
  /// so on, counted from `begin`. Throws std::invalid_argument unless all hold the same.
  template <class F, class... Self>
  static void visit_range(std::string_view part, Index begin, Index end, F&& f, Self&... self) {
    const ExpertParallel& first = std::get<0>(std::tie(self...));
    (require(self.begin_ == first.begin_ && self.end_ == first.end_, "ExpertParallel::visit: experts ",
             self.begin_, " to ", self.end_, " beside ", first.begin_, " to ", first.end_),
     ...);
    if constexpr (requires(E & expert) { E::visit(f, expert); })
      for (Index e = (std::max)(begin, first.begin_); e < (std::min)(end, first.end_); ++e)
        visit_part({part, e - begin}, f, self.own_[e - first.begin_]...);
  }

 private:
  Index own_index(Index expert) const { return std::clamp(expert, begin_, end_) - begin_; }

  Communicator comm_;
  GroupedExperts<E> own_;
  Index size_ = 0, width_ = 0, begin_ = 0, end_ = 0;
};

/// The way of the data over processes: y [tokens, d_model] from x [tokens, d_model], this process's tokens
/// under its own plan over all experts. Collective.
template <class X, class S, Expert E, class W, class Kept, Executor Ex>
void apply_experts(const X& x, const CheckedPlan<S>& plan, const ExpertParallel<E>& experts, MatrixRef<S> y,
                   LayerWorkspace<S, W>& workspace, Kept& kept, const Ex& executor) {
  const Communicator& comm = experts.communicator();
  Exchange<S>& exchange = kept.exchange;
  exchange.prepare(*plan, experts.width(), comm);
  exchange.dispatch(x, plan->gate_side == GateSide::input, workspace.x_rows, comm, executor);
  const auto work = [&] {
    experts.own().forward(workspace.x_rows, exchange.expert_begin(), kept.y_rows, kept.experts, executor);
  };
  exchange.collect(work, kept.y_rows, workspace.y_rows, comm, executor);
  combine(workspace.y_rows, plan, x, y, executor);
}

/// The way back: see GroupedExperts' apply_experts_backward. Collective. Where an expert throws on one
/// process, `grad` is unspecified on all.
template <class Dy, class S, Expert E, class W, class C, Executor Ex>
void apply_experts_backward(const Dy& d_y, const CheckedPlan<S>& plan, const ExpertParallel<E>& experts,
                            LayerCache<S, W, C>& cache, MatrixRef<S> d_x, ExpertParallel<E>& grad,
                            const Ex& executor) {
  const Communicator& comm = experts.communicator();
  C& kept = cache.experts;
  Exchange<S>& exchange = kept.exchange;
  combine_backward(d_y, cache.y_rows, plan, cache.d_rows, cache.d_gate, executor);
  exchange.dispatch(d_y, plan->gate_side == GateSide::output, cache.d_rows, comm, executor);
  const auto work = [&] {
    experts.own().backward(cache.x_rows, exchange.expert_begin(), cache.d_rows, kept.experts, kept.d_x_rows,
                           grad.own(), executor);
  };
  exchange.collect(work, kept.d_x_rows, cache.d_x_rows, comm, executor);
  dispatch_backward(cache.d_x_rows, plan, cache.x, d_y, d_x, cache.d_gate, executor);
}

}  // namespace moe
