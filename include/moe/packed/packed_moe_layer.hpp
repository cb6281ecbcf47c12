// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/kernels/select.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/packed/packed_expert.hpp>

// A layer for inference: the router and the plan of a MoELayer, with the experts' weights laid out for
// kernels that are chosen for the processor while the program runs.
namespace moe {

struct PackOptions {
  /// Whose kernels to use; the best that the processor has, where it is not named.
  std::optional<InstructionSet> instruction_set{};
  /// Rounds activations to bfloat16 too, x and what stands between an expert's products, and multiplies by
  /// AMX or the dot product of AVX-512 BF16. Less exact. Of the peak of floats the latter has twice on AMD
  /// Zen 4 and 5, half on Intel Sapphire Rapids: measure. For weights in BF16 and experts with a packed form.
  bool bf16_dot_product = false;
};

/// What a packed layer has beside its experts, as MoELayer's members of these names.
template <Router R>
struct PackedParts {
  R router;
  Index num_shared_experts = 0;
  Matrix<float> w_shared_gate{};
  Vector<float> b_output{};
};

/// Buffers of a packed layer's forward. Reused, they allocate nothing.
struct PackedWorkspace : LayerWorkspace<float> {
  struct Task {
    Index expert, begin, rows, panel_begin, panel_end, cost;
  };
  Buffer<Task> tasks;
  Buffer<Index> touched;        ///< experts that have rows, ascending
  Buffer<Index> hidden_begin;   ///< first value of the hidden rows of an expert that has any [num_experts]
  Buffer<float> hidden;         ///< hidden rows, expert by expert
  Buffer<float> products;       ///< what a worker multiplies now
  Buffer<float> rows;           ///< the rows for that, side by side
  Buffer<std::uint16_t> parts;  ///< the same, where they are in bfloat16

  template <class F>
  void for_each_array(const F& f) const {
    LayerWorkspace<float>::for_each_array(f);
    for (const Buffer<float>* b : {&hidden, &products, &rows}) f(*b);
  }
};

/// The inference form of a MoELayer<E, R>: same router, same plan, same semantics; weights in `Format`
/// (F32 or BF16). Made by pack(). Experts without a packed form run as they are. The output of a token
/// does not depend, by a bit, on the executor or, where nothing is dropped, on the tokens beside it.
/// Beside the layer it was made from it differs in rounding alone. Every call takes
/// O(tokens * num_experts * d_model + assignments * d_model * d_ff) operations and throws
/// std::invalid_argument, before anything is written, where shapes do not fit.
template <class Format, Expert E, Router R>
class PackedMoELayer {
 public:
  using Scalar = float;
  using Workspace = PackedWorkspace;
  static_assert(std::is_same_v<typename E::Scalar, float>, "only layers of float can be packed");

  /// Takes the experts, routed and then shared, from expert(0), expert(1), ... one at a time: each may be
  /// freed before the next is made. Throws std::invalid_argument where the processor does not have what the
  /// options ask for, or where shapes do not fit.
  template <class Source>
  PackedMoELayer(PackedParts<R> parts, Source&& expert, const PackOptions& options = {})
      : set_(options.instruction_set.value_or(best_set())),
        kernels_(kernels::find(set_)),
        parts_(std::move(parts)) {
    require(kernels_ != nullptr, "pack: this processor does not have ", name_of(set_),
            ", the best that it has is ", name_of(best_instruction_set()));
    if (options.bf16_dot_product) {
      require(kHalf && PackableExpert<E>,
              "pack: bf16_dot_product = true, but the weights are not packed as BF16, expected false");
      require(kernels::find_dot(set_, true) != nullptr,
              "pack: bf16_dot_product = true, but this processor has none for ", name_of(set_),
              ", expected false");
    }
    if constexpr (kHalf) dot_ = kernels::find_dot(set_, options.bf16_dot_product);
    require(parts_.num_shared_experts >= 0, "pack: num_shared_experts = ", parts_.num_shared_experts,
            ", expected at least 0");
    if (parts_.w_shared_gate.size() > 0)
      require_shape(parts_.w_shared_gate, parts_.num_shared_experts, d_model(), "pack", "w_shared_gate");
    check_shared_gates(parts_.w_shared_gate.rows(), gate_side_of(parts_.router).value_or(GateSide::output),
                       "pack");
    require(parts_.b_output.size() == 0 || parts_.b_output.size() == d_model(), "pack: b_output has ",
            parts_.b_output.size(), " entries, expected d_model = ", d_model());
    const Index count = num_experts() + num_shared_experts();
    experts_.reserve(std::size_t(count));
    for (Index e = 0; e < count; ++e) add(e, expert(e));
  }

  Index d_model() const { return parts_.router.d_model(); }
  Index num_experts() const { return parts_.router.num_experts(); }
  Index num_shared_experts() const { return parts_.num_shared_experts; }
  const R& router() const { return parts_.router; }
  InstructionSet instruction_set() const { return set_; }

  /// What the packed experts take.
  std::size_t memory_bytes() const requires PackableExpert<E> {
    std::size_t bytes = 0;
    for (const Held& expert : experts_) bytes += expert.memory_bytes();
    return bytes;
  }

  /// The routing of x [tokens, d_model] for inference, by the router.
  template <Executor Ex = DefaultExecutor>
  Routing<float> route(const ConstMatrixRef<float>& x, const BatchInfo& info = {},
                       const Ex& executor = {}) const {
    check_input(x);
    Routing<float> routing;
    route_with(parts_.router, x, info, routing, executor);
    return routing;
  }

  /// Output [tokens, d_model] for x [tokens, d_model].
  template <Executor Ex = DefaultExecutor>
  Matrix<float> forward(const ConstMatrixRef<float>& x, const BatchInfo& info = {},
                        const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<float> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// The same. Allocates nothing when y and the workspace were last used with a batch of this shape. x, y
  /// and the workspace lie apart.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<float>& x, Matrix<float>& y, Workspace& workspace,
               const BatchInfo& info = {}, const Ex& executor = {}) const {
    check_input(x);
    check_apart(x, y, workspace);
    route_with(parts_.router, x, info, workspace.routing, executor);
    check_plan(workspace.routing.plan, x.rows(), num_experts(), "PackedMoELayer::forward");
    run(x, workspace.routing.plan, y, workspace, executor);
  }

  /// Output under a routing of these tokens that was made before.
  template <std::same_as<Routing<float>> Made, Executor Ex = DefaultExecutor>
  Matrix<float> forward(const ConstMatrixRef<float>& x, const Made& routing, const Ex& executor = {}) const {
    check_input(x);
    check_plan(routing.plan, x.rows(), num_experts(), "PackedMoELayer::forward");
    Workspace workspace;
    Matrix<float> y;
    run(x, routing.plan, y, workspace, executor);
    return y;
  }

  /// The same. Allocates nothing when y and the workspace were last used with a batch of this shape. The
  /// routing may be workspace.routing; y lies apart from all others.
  template <std::same_as<Routing<float>> Made, Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<float>& x, const Made& routing, Matrix<float>& y, Workspace& workspace,
               const Ex& executor = {}) const {
    check_input(x);
    check_apart(x, y, workspace);
    require_apart("PackedMoELayer::forward", "y", y, "routing", routing);
    check_plan(routing.plan, x.rows(), num_experts(), "PackedMoELayer::forward");
    run(x, routing.plan, y, workspace, executor);
  }

 private:
  static constexpr bool kHalf = std::is_same_v<Format, BF16>;
  static constexpr Index kMostPanels = 8;  // that a task takes
  static constexpr Index kFewRows = 3;     // for which, with streams, all of the depth is brought at once
  using Weight = typename Format::Weight;
  using Held = std::conditional_t<PackableExpert<E>, PackedExpert<Format>, E>;

  // AMX is asked for only where it is used: leave to use its tiles changes what signal stacks Linux accepts.
  static InstructionSet best_set() {
    const bool amx = kHalf && PackableExpert<E> && is_available(InstructionSet::amx);
    return amx ? InstructionSet::amx : best_instruction_set();
  }

  void add(Index e, const E& expert) {
    require(expert.d_model() == d_model(), "pack: expert ", e, " has d_model = ", expert.d_model(),
            ", but the router has ", d_model());
    if constexpr (PackableExpert<E>) {
      experts_.emplace_back(expert, *kernels_);
      widest_ = (std::max)(widest_, hidden_rows(experts_.back()).size());
      most_panels_ = (std::max)(most_panels_, experts_.back().up_panels());
    } else {
      experts_.push_back(expert);
    }
  }

  void check_input(const ConstMatrixRef<float>& x) const {
    require(x.cols() == d_model(), "PackedMoELayer::forward: x has ", x.cols(),
            " columns, expected d_model = ", d_model(), "; tokens are rows");
  }

  // Throws unless what a forward pass writes, y and the workspace, lies apart from the rest.
  static void check_apart(const ConstMatrixRef<float>& x, const Matrix<float>& y,
                          const Workspace& workspace) {
    require_apart("PackedMoELayer::forward", "y", y, "x", x, "the workspace", workspace);
    require_apart("PackedMoELayer::forward", "the workspace", workspace, "x", x);
  }

  template <class Ex>
  void run(const ConstMatrixRef<float>& x, const DispatchPlan<float>& routed, Matrix<float>& y,
           Workspace& workspace, const Ex& executor) const {
    const DispatchPlan<float>& plan =
        add_shared_experts(x, routed, num_shared_experts(), parts_.w_shared_gate, workspace.all_experts,
                           workspace.shared_gate, executor);
    y.resize(x.rows(), d_model());
    if constexpr (PackableExpert<E>) {
      if (plan.gate_side == GateSide::input) dispatch(x, plan, workspace.x_rows, executor);
      list_tasks(plan, executor.concurrency(), workspace);
      first_products(plan.gate_side == GateSide::input ? Rows{workspace.x_rows.row(0), d_model(), nullptr}
                                                       : Rows{x.data(), x.outerStride(), plan.token.data()},
                     plan, workspace, executor);
      second_products(x, plan, y, workspace, executor);
    } else {
      dispatch(x, plan, workspace.x_rows, executor);
      run_experts(std::span<const E>(experts_), plan, workspace.x_rows, workspace.y_rows, workspace.scratch,
                  executor);
      moe::combine(workspace.y_rows, plan, x, y, executor);
      for (Index t = 0; parts_.b_output.size() > 0 && t < y.rows(); ++t)
        if (plan.token_state[t] == TokenState::valid) y.row(t) += parts_.b_output.transpose();
    }
  }

  // Rows of activations: row i begins at data + stride * (index ? index[i] : i).
  struct Rows {
    const float* data;
    Index stride;
    const Index* index;

    const float* row(Index i) const { return data + stride * (index ? index[i] : i); }
    Rows from(Index i) const { return index ? Rows{data, stride, index + i} : Rows{row(i), stride, nullptr}; }
  };

  // Calls f with the product that this layer multiplies by and the buffer for its rows.
  template <class F>
  void with_product(Workspace& w, const F& f) const {
    if constexpr (kHalf)
      dot_ ? f(*dot_, w.parts) : f(kernels_->halves, w.rows);
    else
      f(kernels_->floats, w.rows);
  }

  // Rows that a product takes at most, and those that a task does. A token is with an expert once, as a rule.
  Index product_rows() const { return dot_ ? dot_->rows : kernels_->floats.rows; }
  Index most_rows(const DispatchPlan<float>& plan) const {
    return std::clamp<Index>(plan.num_tokens, 1, product_rows());
  }

  // Lists the tasks of the first product (expert, block of its rows, some of its panels), the dearest first,
  // and makes room for all that they need.
  void list_tasks(const DispatchPlan<float>& plan, Index concurrency, Workspace& w) const {
    const Index most = most_rows(plan);
    const auto blocks_of = [&](Index e) { return (plan.rows_of(e) + most - 1) / most; };
    Index units = 0, hidden = 0;
    w.hidden_begin.resize(plan.num_experts());
    w.touched.reserve(plan.num_experts());
    w.touched.clear();
    for (Index e = 0; e < plan.num_experts(); ++e) {
      if (plan.rows_of(e) == 0) continue;
      const PackedExpert<Format>& expert = experts_[std::size_t(e)];
      w.touched.push_back(e);
      units += blocks_of(e) * expert.up_panels();
      w.hidden_begin[e] = hidden;
      hidden += plan.rows_of(e) * hidden_rows(expert).size();
    }
    w.hidden.reserve(plan.token.capacity() * widest_);
    w.hidden.resize(hidden);
    w.products.resize(concurrency * products_size(most));
    with_product(w, [&](const auto& product, auto& buffer) {
      const Index blocks = (d_model() + product.depth - 1) / product.depth;  // of few rows all are kept
      buffer.resize(concurrency * (std::max)(most, kFewRows * blocks) *
                    row_stride(product, (std::max)(d_model(), widest_)));
    });
    w.tasks.reserve((plan.num_experts() + plan.token.capacity() / product_rows()) * most_panels_);
    const Index group = panels_of_task(units, 16 * concurrency);
    w.tasks.clear();
    for (const Index e : w.touched) {
      const PackedExpert<Format>& expert = experts_[std::size_t(e)];
      const Index blocks = blocks_of(e);
      for (Index panel = 0; panel < expert.up_panels(); panel += group)
        for (Index block = 0; block < blocks; ++block) {
          const Index begin = block * plan.rows_of(e) / blocks;
          const Index rows = (block + 1) * plan.rows_of(e) / blocks - begin;
          const Index end = (std::min)(expert.up_panels(), panel + group);
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

  // How an expert's hidden rows lie. Dot products, which bring them into bfloat16, take them whole.
  kernels::RowBlocks hidden_rows(const PackedExpert<Format>& expert) const {
    const Index columns = expert.up_panels() * expert.hidden_columns();
    if (dot_) return {columns, columns, columns};
    return {columns, kernels::block_depth(expert.d_ff(), kernels::kDepth), kernels::kRowStride<float>};
  }
  float* hidden_at(Index e, Index row, Index column, const DispatchPlan<float>& plan, Workspace& w) const {
    const kernels::RowBlocks rows = hidden_rows(experts_[std::size_t(e)]);
    return w.hidden.data() + w.hidden_begin[e] + rows.at(plan.rows_of(e), row, column);
  }
  // Floats of a worker's products.
  Index products_size(Index rows) const { return kMostPanels * rows * kernels_->columns; }
  // From one row of a product to the next.
  template <class X>
  static Index row_stride(const kernels::Product<X, Weight>& product, Index depth) {
    if (product.parts == 1) return kernels::kRowStride<X>;
    constexpr Index kLine = 64 / sizeof(X);
    const Index lines = product.parts * part_width((std::min)(depth, product.depth)) / kLine;
    return kLine * (lines + 1 - lines % 2);
  }
  static Index part_width(Index depth) { return (depth + 31) / 32 * 32; }

  // Multiplies rows by panels that lie one behind the other, `at_once` of them at a time, and calls use(nth,
  // c) with every product c [rows, columns]. bring(product, p, deep, own, first) gives columns [p, p + deep)
  // of the rows as Parts, for which it may use `own`; `first` says that it has not yet. `next` is the panel
  // that this worker will read after these.
  template <class Bring, class Use>
  void multiply(Index rows, Index depth, const Bring& bring, const Weight* panel, Index panels, Index at_once,
                const Weight* next, Index worker, Index concurrency, Workspace& w, const Use& use) const {
    const Index columns = kernels_->columns, wide = columns / kernels_->streams;
    const Index packed_depth = detail::packed_depth<Weight>(depth);
    float* const products = w.products.data() + worker * (w.products.size() / concurrency);
    with_product(w, [&]<class X>(const kernels::Product<X, Weight>& product, Buffer<X>& buffer) {
      X* const own = buffer.data() + worker * (buffer.size() / concurrency);
      const Index block = kernels::block_depth(depth, product.depth);
      for (Index i = 0; i < panels; i += at_once) {
        const Index count = (std::min)(at_once, panels - i);
        const Weight* const first = panel + i * packed_depth * columns;
        for (Index p = 0; p < depth; p += block) {
          const Index deep = (std::min)(block, depth - p), after = p + deep;
          product.multiply(rows, deep, bring(product, p, deep, own, i == 0), first + p * wide,
                           packed_depth * wide, count, products, p > 0,
                           after < depth        ? first + after * wide
                           : i + count < panels ? first + count * packed_depth * columns
                                                : next);
        }
        for (Index j = 0; j < count; ++j) use(i + j, products + j * rows * columns);
      }
    });
  }
  // Panels of a task, for that many tasks or some fewer: even where there are enough and one row may take
  // two.
  Index panels_of_task(Index panels, Index tasks) const {
    const Index share = panels / tasks;
    return std::clamp<Index>(kernels_->streams > 1 ? share + share % 2 : share, 1, kMostPanels);
  }
  // Panels that are taken together: all, where their rows must be brought; else as many as a product takes.
  Index panels_at_once(Index rows, bool there) const {
    return !there ? kMostPanels : rows == 1 && kernels_->streams > 1 ? 2 : 1;
  }
  // Columns [p, p + deep) of rows, brought side by side: row(i) is where row i begins.
  template <class X, class Row>
  static kernels::Parts<X> split(const kernels::Product<X, Weight>& product, Index rows, Index p, Index deep,
                                 const Row& row, X* to) {
    const kernels::Parts<X> parts{to, row_stride(product, deep), part_width(deep)};
    for (Index i = 0; i < rows; ++i) product.split(deep, row(i) + p, to + i * parts.stride, parts.width);
    return parts;
  }

  // hidden = activation(x * up + bias); x holds a row for every assignment.
  template <class Ex>
  void first_products(const Rows& x, const DispatchPlan<float>& plan, Workspace& w,
                      const Ex& executor) const {
    const Index workers = executor.concurrency();
    executor.for_each(w.tasks.size(), [&](Index i, Index worker) {
      const auto& task = w.tasks[i];
      const PackedExpert<Format>& expert = experts_[std::size_t(task.expert)];
      const Rows from = x.from(plan.expert_begin[task.expert] + task.begin);
      // Workers take tasks in turn, so the one after next is probably this worker's.
      const auto& after = w.tasks[(std::min)(i + workers, w.tasks.size() - 1)];
      const bool few = kernels_->streams > 1 && task.rows <= kFewRows;
      multiply(
          task.rows, d_model(),
          [&]<class X>(const kernels::Product<X, Weight>& product, Index p, Index deep, X* own, bool first) {
            // Few rows are brought once, all blocks of them.
            const Index block = few ? p / kernels::block_depth(d_model(), product.depth) : 0;
            return split(
                product, first || !few ? task.rows : 0, p, deep, [&](Index row) { return from.row(row); },
                own + block * task.rows * row_stride(product, deep));
          },
          expert.up_panel(task.panel_begin), task.panel_end - task.panel_begin,
          panels_at_once(task.rows, few), experts_[std::size_t(after.expert)].up_panel(after.panel_begin),
          worker, workers, w,
          [&](Index nth, const float* c) {
            const Index panel = task.panel_begin + nth;
            kernels_->activate(expert.activation(), task.rows, c, expert.up_bias(panel),
                               hidden_at(task.expert, task.begin, panel * expert.hidden_columns(), plan, w),
                               hidden_rows(expert).stride);
          });
    });
  }

  // y = the sum over experts, ascending, of gate * (hidden * down + bias). A task owns some columns of
  // the output for some tokens, so it adds without asking anybody.
  template <class Ex>
  void second_products(const ConstMatrixRef<float>& x, const DispatchPlan<float>& plan, Matrix<float>& y,
                       Workspace& w, const Ex& executor) const {
    const Index workers = executor.concurrency(), most = most_rows(plan);
    const Index columns = kernels_->columns, panels = (d_model() + columns - 1) / columns;
    // Every task brings all of its rows into bfloat16, so there are not many where there are many rows.
    const Index wanted = (dot_ && plan.num_tokens > kernels::kMaxDotRows ? 2 : 8) * workers;
    const Index group = panels_of_task(panels, wanted);
    const Index groups = (panels + group - 1) / group;
    const Index blocks = std::clamp<Index>(plan.num_tokens / 256, 1, std::max<Index>(1, wanted / groups));
    const Index block = (plan.num_tokens + blocks - 1) / blocks;
    executor.for_each(plan.num_tokens > 0 ? groups * blocks : 0, [&](Index task, Index worker) {
      const Index token_begin = task / groups * block;
      const Index token_end = (std::min)(plan.num_tokens, token_begin + block);
      const Index panel_begin = task % groups * group;
      const Index panel_end = (std::min)(panels, panel_begin + group);
      begin_output(x, plan, token_begin, token_end, panel_begin * columns,
                   (std::min)(d_model(), panel_end * columns), y);
      const Index* const token = plan.token.data();
      for (Index i = 0; i < w.touched.size(); ++i) {
        const Index e = w.touched[i];
        const Index expert_begin = plan.expert_begin[e], expert_end = plan.expert_begin[e + 1];
        const Index begin = std::lower_bound(token + expert_begin, token + expert_end, token_begin) - token;
        const Index end = std::lower_bound(token + begin, token + expert_end, token_end) - token;
        const PackedExpert<Format>& expert = experts_[std::size_t(e)];
        const Index after = w.touched[i + 1 < w.touched.size() ? i + 1 : 0];
        for (Index a = begin; a < end; a += most) {
          const Index rows = (std::min)(most, end - a);
          const PackedExpert<Format>& then = a + most < end ? expert : experts_[std::size_t(after)];
          multiply(
              rows, expert.d_ff(),
              [&]<class X>(const kernels::Product<X, Weight>& product, Index p, Index deep, X* own, bool) {
                const auto hidden = [&](Index row, Index column) {
                  return hidden_at(e, a - expert_begin + row, column, plan, w);
                };
                if constexpr (std::is_same_v<X, float>)
                  return kernels::Parts<X>{hidden(0, p), kernels::kRowStride<X>, deep};
                else
                  return split(
                      product, rows, p, deep, [&](Index row) { return hidden(row, 0); }, own);
              },
              expert.down_panel(panel_begin), panel_end - panel_begin, panels_at_once(rows, !dot_),
              then.down_panel(panel_begin), worker, workers, w,
              [&](Index nth, const float* c) {
                const Index panel = panel_begin + nth;
                kernels_->combine(rows, (std::min)(columns, d_model() - panel * columns), c,
                                  expert.down_bias(panel), token + a,
                                  plan.gate_side == GateSide::output ? plan.gate.data() + a : nullptr,
                                  y.data() + panel * columns, y.outerStride());
              });
        }
      }
      for (Index t = token_begin; parts_.b_output.size() > 0 && t < token_end; ++t)
        if (plan.token_state[t] == TokenState::valid)
          for (Index j = panel_begin * columns; j < (std::min)(d_model(), panel_end * columns); ++j)
            y(t, j) += parts_.b_output[j];
    });
  }

  // What stands in y before experts are added: x where a token is passed through, NaN where it is
  // poisoned, else zero.
  static void begin_output(const ConstMatrixRef<float>& x, const DispatchPlan<float>& plan, Index token_begin,
                           Index token_end, Index column_begin, Index column_end, Matrix<float>& y) {
    const Index columns = column_end - column_begin;
    for (Index t = token_begin; t < token_end; ++t)
      std::fill_n(
          &y(t, column_begin), columns,
          plan.token_state[t] == TokenState::poisoned ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
    const Index* const last = plan.passed_through.end();
    for (const Index* t = std::lower_bound(plan.passed_through.begin(), last, token_begin);
         t != last && *t < token_end; ++t)
      std::copy_n(&x.coeffRef(*t, column_begin), columns, &y(*t, column_begin));
  }

  InstructionSet set_;
  const kernels::Kernels* kernels_;
  const kernels::DotProduct* dot_ = nullptr;  // multiplies, where it is there, in place of kernels_
  PackedParts<R> parts_;
  std::vector<Held> experts_;           // routed, then shared
  Index widest_ = 0, most_panels_ = 0;  // of the largest expert: a hidden row, up_panels
};

/// The inference form of a layer. O(parameters). Throws std::invalid_argument where the processor does
/// not have the instruction set that the options name.
/// Example: auto fast = moe::pack<moe::BF16>(layer); y = fast.forward(x);
template <class Format, Expert E, Router R>
PackedMoELayer<Format, E, R> pack(const MoELayer<E, R>& layer, const PackOptions& options = {}) {
  const auto expert = [&](Index e) -> const E& {
    const Index routed = layer.num_experts();
    return e < routed ? layer.experts()[std::size_t(e)] : layer.shared_experts()[std::size_t(e - routed)];
  };
  return {{layer.router(), layer.num_shared_experts(), layer.w_shared_gate, layer.b_output}, expert, options};
}

/// The same from experts that are made one at a time: expert(0), ..., routed and then shared. At any
/// time there is one of them beside the packed ones.
/// Example: pack<BF16>(PackedParts{router}, [&](Index e) { return read_expert(file, e); })
template <class Format, Router R, std::invocable<Index> Source>
auto pack(PackedParts<R> parts, Source&& expert, const PackOptions& options = {}) {
  using E = std::remove_cvref_t<std::invoke_result_t<Source, Index>>;
  return PackedMoELayer<Format, E, R>(std::move(parts), std::forward<Source>(expert), options);
}

}  // namespace moe

#if defined(MOE_COMPILED) && MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES
#include <moe/packed/compiled.inc>
#endif
