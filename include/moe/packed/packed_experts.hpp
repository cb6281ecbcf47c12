// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/types.hpp>
#include <moe/layers/checked_plan.hpp>
#include <moe/packed/packed_expert.hpp>
#include <moe/packed/packed_product.hpp>
#include <moe/routing/routing.hpp>

// The packed experts of a layer as one thing.
namespace moe {

/// Buffers of packed experts. Reused, they allocate nothing.
struct PackedExpertsWorkspace {
  /// Rows of an expert, counted from its first, times some of its panels, and what that costs.
  struct Task {
    /// See Task.
    Index expert, begin, rows, panel_begin, panel_end, cost;
  };
  Buffer<Task> tasks;              ///< of the first product
  Buffer<Index> touched;           ///< experts that have rows, ascending
  Buffer<Index> hidden_begin;      ///< first value of the hidden rows of an expert that has any [num_experts]
  Buffer<float> hidden;            ///< hidden rows, expert by expert
  PackedProductWorkspace product;  ///< what products work in

  template <class F>
  void for_each_array(const F& f) const {
    f(hidden);
    f(product);
  }
};

/// What a task owns of the output.
struct OutputBlock {
  /// The first row and the one after the last, the first column and the one after the last.
  Index token_begin, token_end, column_begin, column_end;
};

/// The experts of a layer, each in a format of its own. Knows which rows are whose, not who decided it.
class PackedExperts {
 public:
  using Workspace = PackedExpertsWorkspace;
  /// Bytes of weights that may stay in the caches from one call to the next.
  static constexpr std::size_t kCachedBytes = std::size_t(1) << 24;

  /// None yet, for the kernels of a set. Throws std::invalid_argument where this processor does not have it.
  PackedExperts(InstructionSet set, Index d_model)
      : set_(set), kernels_(kernels::find(set)), d_model_(d_model) {
    require(kernels_, "PackedExperts: this processor does not have ", name_of(set));
  }

  /// Lays an expert out in a format. O(parameters). Throws std::invalid_argument for another d_model, and
  /// where the format has no such product.
  template <Format F, PackableExpert E>
  void add(F format, const E& expert, ActivationRounding rounding = {},
           const ExpertImportance& importance = {}) {
    require(expert.d_model() == d_model_, "PackedExperts::add: expert ", size(),
            " has d_model = ", expert.d_model(), ", expected ", d_model_);
    add(PackedExpert(format, expert, set_, rounding, importance));
  }
  /// Takes an expert that was laid out for the kernels of the set. Throws as above.
  void add(PackedExpert expert) {
    require(expert.d_model() == d_model_, "PackedExperts::add: expert ", size(),
            " has d_model = ", expert.d_model(), ", expected ", d_model_);
    require(&expert.product().kernels() == kernels_, "PackedExperts::add: expert ", size(),
            " is not laid out for ", name_of(set_), " as the others are");
    const PackedExpert& added = experts_.emplace_back(std::move(expert)).value();
    if (std::find(products_.begin(), products_.end(), added.product()) == products_.end())
      products_.push_back(added.product());
    widest_ = (std::max)(widest_, hidden_rows(added).size());
    most_panels_ = (std::max)(most_panels_, added.up_panels());
    bytes_ += added.memory_bytes();
  }

  /// The next expert is not there: no plan may have rows of it.
  void leave_out() { experts_.emplace_back(); }

  Index size() const { return Index(experts_.size()); }
  /// Whether expert e is there.
  bool has(Index e) const { return experts_[std::size_t(e)].has_value(); }
  /// Expert e, which is there.
  const PackedExpert& operator[](Index e) const { return *experts_[std::size_t(e)]; }
  /// Whose kernels they are laid out for.
  InstructionSet instruction_set() const { return set_; }
  Index d_model() const { return d_model_; }
  /// Bytes of all experts.
  std::size_t memory_bytes() const { return bytes_; }

  /// Adds to y [tokens, d_model] the sum over experts, ascending, of gate * expert(row of x); x has a row for
  /// every assignment of the plan, and the gates are 1 where they scale inputs.
  /// Tasks own blocks of y: output.begin(block) writes what stands there before, output.end(block) may change
  /// what stands there after. O(tokens * d_model + assignments * d_model * d_ff).
  template <class Beside, Executor Ex>
  void forward(const ActivationRows& x, const CheckedPlan<float>& checked, MatrixRef<float> y,
               const Beside& beside, Workspace& w, const Ex& executor) const {
    const DispatchPlan<float>& plan = *checked;
    require(plan.num_experts() == size(), "PackedExperts::forward: the plan is over ", plan.num_experts(),
            " experts, expected ", size());
    require_shape(y, plan.num_tokens, d_model_, "PackedExperts::forward", "y");
    make_room(plan, executor.concurrency(), w);
    list_tasks(plan, executor.concurrency(), w);
    first_products(x, plan, w, executor);
    second_products(plan, y, beside, w, executor);
  }

 private:
  const PackedExpert& expert(Index e) const { return (*this)[e]; }

  bool cached() const { return bytes_ <= kCachedBytes; }

  // Multiply-adds of a product, roughly.
  Index work_of(const DispatchPlan<float>& plan) const { return plan.num_assignments() * d_model_ * widest_; }

  // Rows that a task takes at most. A token is with an expert once, as a rule.
  static Index most_rows(const DispatchPlan<float>& plan, const PackedProduct& product) {
    return std::clamp<Index>(plan.num_tokens, 1, product.most_rows());
  }

  // Panels of a task, for that many tasks or fewer: even where there are enough, for one row takes two at
  // once, and with work for about a microsecond, if there is so much. `work` is the multiply-adds of a
  // column.
  Index panels_of_task(Index panels, Index tasks, Index work) const {
    constexpr Index kLeast = Index(1) << 15;  // multiply-adds
    const Index least = kLeast / std::max<Index>(1, work * kernels_->columns);
    const Index share = (std::max)(panels / tasks, least);
    const bool even = share > 1 || kernels_->streams > 1;
    return std::clamp<Index>(even ? share + share % 2 : share, 1, PackedProduct::kMostPanels);
  }

  // How an expert's hidden rows lie, and where they are, from the expert's row `row` on.
  static kernels::RowBlocks hidden_rows(const PackedExpert& expert) {
    return expert.product().row_blocks(expert.d_ff(), expert.up_panels() * expert.hidden_columns());
  }
  ActivationRows hidden(Index e, Index row, const DispatchPlan<float>& plan, const Workspace& w) const {
    const Index stride = hidden_rows(expert(e)).stride;
    return {w.hidden.data() + w.hidden_begin[e] + row * stride, stride, nullptr,
            expert(e).product().splits_rows() ? 0 : plan.rows_of(e) * stride};
  }

  void make_room(const DispatchPlan<float>& plan, Index workers, Workspace& w) const {
    Index hidden = 0;
    w.hidden_begin.resize(plan.num_experts());
    w.touched.reserve(plan.num_experts());
    w.touched.clear();
    for (Index e = 0; e < plan.num_experts(); ++e) {
      if (plan.rows_of(e) == 0) continue;
      require(has(e), "PackedExperts::forward: the plan has ", plan.rows_of(e), " rows of expert ", e,
              ", which was left out, expected 0");
      w.touched.push_back(e);
      w.hidden_begin[e] = hidden;
      hidden += plan.rows_of(e) * hidden_rows(expert(e)).size();
    }
    w.hidden.reserve(plan.token.capacity() * widest_);
    w.hidden.resize(hidden);
    w.product.begin(workers, d_model_);
    for (const PackedProduct& product : products_) {
      w.tasks.reserve((plan.num_experts() + plan.token.capacity() / product.most_rows()) * most_panels_);
      product.make_room(w.product, most_rows(plan, product), (std::max)(d_model_, widest_));
    }
  }

  // Lists the tasks of the first product (expert, block of its rows, some of its panels), the dearest first.
  void list_tasks(const DispatchPlan<float>& plan, Index workers, Workspace& w) const {
    const auto most_of = [&](Index e) { return most_rows(plan, expert(e).product()); };
    const auto blocks_of = [&](Index e) { return (plan.rows_of(e) + most_of(e) - 1) / most_of(e); };
    Index units = 0;
    for (const Index e : w.touched) units += blocks_of(e) * expert(e).up_panels();
    w.tasks.clear();
    for (const Index e : w.touched) {
      const Index group = panels_of_task(units, 16 * workers, most_of(e) * d_model_);
      const Index blocks = blocks_of(e), panels = expert(e).up_panels();
      for (Index panel = 0; panel < panels; panel += group)
        for (Index block = 0; block < blocks; ++block) {
          const Index begin = block * plan.rows_of(e) / blocks;
          const Index rows = (block + 1) * plan.rows_of(e) / blocks - begin;
          const Index end = (std::min)(panels, panel + group);
          w.tasks.push_back({e, begin, rows, panel, end, (end - panel) * std::max<Index>(rows, 8)});
        }
    }
    // Blocks of the same panels one after the other. With few tokens they are mostly in order.
    const auto before = [](const auto& a, const auto& b) {
      if (a.cost != b.cost) return a.cost > b.cost;
      if (a.expert != b.expert) return a.expert < b.expert;
      if (a.panel_begin != b.panel_begin) return a.panel_begin < b.panel_begin;
      return a.begin < b.begin;
    };
    if (!std::is_sorted(w.tasks.begin(), w.tasks.end(), before))
      std::sort(w.tasks.begin(), w.tasks.end(), before);
  }

  // hidden = activation(x * up + bias).
  template <class Ex>
  void first_products(const ActivationRows& x, const DispatchPlan<float>& plan, Workspace& w,
                      const Ex& executor) const {
    const Index workers = executor.concurrency();
    for_each_shared(w.tasks.size(), work_of(plan), executor, [&](Index i, Index worker) {
      const auto& task = w.tasks[i];
      const PackedExpert& expert = this->expert(task.expert);
      const kernels::RowBlocks blocks = hidden_rows(expert);
      float* const hidden = w.hidden.data() + w.hidden_begin[task.expert];
      // Workers take tasks in turn, so the one after next is probably this worker's.
      const auto& after = w.tasks[(std::min)(i + workers, w.tasks.size() - 1)];
      const PackedPanels panels{expert.up_panel(task.panel_begin), task.panel_end - task.panel_begin,
                                d_model_, this->expert(after.expert).up_panel(after.panel_begin), cached()};
      const PackedProduct& product = expert.product();
      product.multiply(
          task.rows, x.from(plan.expert_begin[task.expert] + task.begin), panels, worker, w.product,
          [&](Index nth, const float* c) {
            const Index panel = task.panel_begin + nth;
            float* const to =
                hidden + blocks.at(plan.rows_of(task.expert), task.begin, panel * expert.hidden_columns());
            kernels_->activate(expert.activation(), task.rows, c, expert.up_bias(panel), to, blocks.stride);
          });
    });
  }

  // y += hidden * down + bias, times gates. A task owns some columns of the output for some tokens, so it
  // adds without asking anybody.
  template <class Beside, class Ex>
  void second_products(const DispatchPlan<float>& plan, MatrixRef<float>& y, const Beside& beside,
                       Workspace& w, const Ex& executor) const {
    const Index workers = executor.concurrency(), columns = kernels_->columns;
    const Index panels = (d_model_ + columns - 1) / columns;
    // A task brings all of its rows into bfloat16, so there are not many tasks where there are many rows.
    const bool splits = std::any_of(products_.begin(), products_.end(),
                                    [](const PackedProduct& product) { return product.splits_rows(); });
    const Index wanted = (splits && plan.num_tokens > kernels::kMaxDotRows ? 2 : 8) * workers;
    const Index group = panels_of_task(panels, wanted, plan.num_assignments() * widest_);
    const Index groups = (panels + group - 1) / group;
    const Index blocks = std::clamp<Index>(plan.num_tokens / 256, 1, std::max<Index>(1, wanted / groups));
    const Index tokens = (plan.num_tokens + blocks - 1) / blocks;
    const Index tasks = plan.num_tokens > 0 ? groups * blocks : 0;
    for_each_shared(tasks, work_of(plan), executor, [&](Index task, Index worker) {
      const Index token_begin = task / groups * tokens, column_begin = task % groups * group * columns;
      const OutputBlock block{token_begin, (std::min)(plan.num_tokens, token_begin + tokens), column_begin,
                              (std::min)(d_model_, column_begin + group * columns)};
      beside.begin(block);
      for (Index i = 0; i < w.touched.size(); ++i)
        add_expert(w.touched[i], w.touched[i + 1 < w.touched.size() ? i + 1 : 0], plan, block, y, worker, w);
      beside.end(block);
    });
  }

  // Adds what an expert gives to a block of the output. `next` is the expert after it.
  void add_expert(Index e, Index next, const DispatchPlan<float>& plan, const OutputBlock& block,
                  MatrixRef<float>& y, Index worker, Workspace& w) const {
    const PackedProduct& product = expert(e).product();
    const Index columns = kernels_->columns, most = most_rows(plan, product);
    const Index first_panel = block.column_begin / columns;
    const Index panels = (block.column_end - block.column_begin + columns - 1) / columns;
    const Index* const token = plan.token.data();
    const Index expert_begin = plan.expert_begin[e], expert_end = plan.expert_begin[e + 1];
    const Index begin = std::lower_bound(token + expert_begin, token + expert_end, block.token_begin) - token;
    const Index end = std::lower_bound(token + begin, token + expert_end, block.token_end) - token;
    for (Index a = begin; a < end; a += most) {
      const Index rows = (std::min)(most, end - a);
      const float* const gate = plan.gate_side == GateSide::output ? plan.gate.data() + a : nullptr;
      product.multiply(rows, hidden(e, a - expert_begin, plan, w),
                       {expert(e).down_panel(first_panel), panels, expert(e).d_ff(),
                        expert(a + most < end ? e : next).down_panel(first_panel), cached()},
                       worker, w.product, [&](Index nth, const float* c) {
                         const Index panel = first_panel + nth, column = panel * columns;
                         kernels_->combine(rows, (std::min)(columns, d_model_ - column), c,
                                           expert(e).down_bias(panel), token + a, gate, y.data() + column,
                                           y.outerStride());
                       });
    }
  }

  InstructionSet set_;
  const kernels::Kernels* kernels_;  // of the set
  Index d_model_;
  std::vector<std::optional<PackedExpert>> experts_;  // none: left out
  std::vector<PackedProduct> products_;               // of the experts, each once
  Index widest_ = 0, most_panels_ = 0;                // of the largest expert: a hidden row, up_panels
  std::size_t bytes_ = 0;                             // of all
};

}  // namespace moe
