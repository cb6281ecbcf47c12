// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/run_experts.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/softmax.hpp>
#include <moe/routing/router.hpp>

// The layer in which nothing is chosen: experts work on mixtures of tokens. Read forward() first.
namespace moe {

/// Options of SoftMoELayer; the same for every scalar.
struct SoftMoEOptions {
  Index d_model = 0;
  Index num_experts = 0;
  /// Mixtures of tokens that an expert works on, in every group.
  Index slots_per_expert = 1;
  /// Whether tokens and slots are divided by their lengths, and a trained scale multiplies the
  /// logits (section 2.3 of the paper). Off: plain dot products (section 2.1).
  bool normalise = true;
};

namespace detail {

inline constexpr double kSoftMoEEpsilon = 1e-6;  // under the root, as the authors have it

// A block of the tokens of one group.
struct GroupTokens {
  Index group, begin, end;
};

// 1 / sqrt(sum of squares + epsilon). Squares that overflow are added up again as parts of the
// largest entry, so that a finite row gives a finite result.
template <class S>
S inverse_length(Index n, const S* x) {
  const S sum = dot(n, x, x);
  if (number_kind(sum) == NumberKind::finite) return S(1) / std::sqrt(sum + S(kSoftMoEEpsilon));
  S largest = 0, parts = 0;
  for (Index j = 0; j < n; ++j) largest = (std::max)(largest, std::abs(x[j]));
  for (Index j = 0; j < n; ++j) parts += (x[j] / largest) * (x[j] / largest);
  return S(1) / largest / std::sqrt(parts);
}

// to [n] = x / length of x.
template <class S>
void make_unit(Index n, const S* x, S* to) {
  const S inverse = inverse_length(n, x);
  for (Index j = 0; j < n; ++j) to[j] = inverse * x[j];
}

// d_x [n] += scale * the gradient by x of make_unit: (d_unit - unit <unit, d_unit>) / length.
template <class S>
void make_unit_backward(Index n, const S* x, const S* unit, const S* d_unit, S scale, S* d_x) {
  const S factor = scale * inverse_length(n, x), along = dot(n, unit, d_unit);
  for (Index j = 0; j < n; ++j) d_x[j] += factor * (d_unit[j] - along * unit[j]);
}

template <class S>
bool all_finite(Index n, const S* x) {
  return std::all_of(x, x + n, [](S v) { return number_kind(v) == NumberKind::finite; });
}

}  // namespace detail

/// What forward computed, and its buffers. Reused, they allocate nothing; a default-constructed one
/// is ready for use. Rows of tokens that are not valid are zero in every matrix here.
template <class S>
struct SoftMoEWorkspace {
  Buffer<TokenState> token_state;  ///< [tokens]
  Matrix<S> logits;                ///< [tokens, slots]; slot e * slots_per_expert + p is expert e's
  Matrix<S> dispatch;  ///< share of a token in a slot of its group: columns of a group add up to 1
                       ///< [tokens, slots]
  Matrix<S> combine;   ///< share of a slot in a token's output: rows add up to 1 [tokens, slots]

  Matrix<S> x;                 ///< input [tokens, d_model]
  Matrix<S> x_unit;            ///< where normalised [tokens, d_model]
  Matrix<S> w_unit, w_scaled;  ///< where normalised [slots, d_model]
  Buffer<Index> group_begin;   ///< [groups + 1]
  Buffer<Index> live;          ///< groups that have a valid token
  Buffer<detail::GroupTokens> token_blocks;
  DispatchPlan<S> plan;         ///< from the slots of all live groups to their experts
  RowBuffer<S> slots;           ///< inputs, later outputs, of slots [groups * slots, d_model]
  RowBuffer<S> x_rows, y_rows;  ///< the same in the order of experts [live slots, d_model]
  ExpertScratch<S> scratch;

  Index num_tokens() const { return token_state.size(); }
  Index num_groups() const { return std::max<Index>(group_begin.size() - 1, 0); }
  bool is_valid(Index token) const { return token_state[token] == TokenState::valid; }
  template <class F>
  void for_each_array(const F& f) const {
    for (const Matrix<S>* m : {&logits, &dispatch, &combine, &x, &x_unit, &w_unit, &w_scaled}) f(*m);
    f(plan);
    for (const RowBuffer<S>* rows : {&slots, &x_rows, &y_rows}) f(*rows);
    f(scratch);
  }
};

/// What backward needs of a forward pass, and the buffers of both. Owns everything it needs: x may
/// be destroyed after forward.
template <class S>
struct SoftMoECache : SoftMoEWorkspace<S> {
  ExpertCache<S> experts;
  Matrix<S> d_y;                  ///< with zeros in rows of tokens that are not valid
  Matrix<S> d_combine;            ///< [tokens, slots]
  Matrix<S> d_logits;             ///< by dispatch, then by the logits [tokens, slots]
  Matrix<S> d_x_unit;             ///< [tokens, d_model]
  Matrix<S> d_w_scaled;           ///< [slots, d_model]
  Buffer<S> d_scale;              ///< by slot [slots]
  RowBuffer<S> d_slots;           ///< [groups * slots, d_model]
  RowBuffer<S> d_rows, d_x_rows;  ///< [live slots, d_model]

  template <class F>
  void for_each_array(const F& f) const {
    SoftMoEWorkspace<S>::for_each_array(f);
    f(experts);
    for (const Matrix<S>* m : {&d_y, &d_combine, &d_logits, &d_x_unit, &d_w_scaled}) f(*m);
    f(d_scale);
    for (const RowBuffer<S>* rows : {&d_slots, &d_rows, &d_x_rows}) f(*rows);
  }
};

/// Soft Mixture of Experts (Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts",
/// section 2). Every slot is a mixture of all tokens, every token's output a mixture of all slots:
///   z_ts = scale * <x_t / |x_t|, w_s / |w_s|>      |v| = sqrt(sum of v_j^2 + 1e-6), section 2.3
///   D = softmax of z over tokens, for every slot   C = softmax of z over slots, for every token
///   X~ = D^T x    Y~_s = expert_e(s)(X~_s)    y = C Y~
/// x and y are [tokens, d_model]; slots = num_experts * slots_per_expert. Without `normalise`,
/// z = x w_slots^T. The authors' code multiplies the smaller of tokens and slots by the scale; here
/// it is always the slots, which is the same but for rounding.
///
/// Every group of `info` has slots of its own and knows nothing of other groups. A masked token has
/// no share in any slot; its output row and d_x are zero. So it is with a poisoned token, one whose
/// row of x or of logits is not finite, but that its output row is NaN. A group without valid
/// tokens runs no expert. There are no losses, no capacity, no noise, and nothing is dropped. An
/// output depends on all tokens of its group, also on later ones: not for autoregressive decoding.
///
/// Results are bitwise the same for every executor. A layer is a value; forward is const and may
/// run on several threads at once, each with a workspace or cache of its own. Every call throws
/// std::invalid_argument when shapes do not fit; nothing is changed then but the output arguments,
/// workspaces and caches. Cost: O(tokens * slots * d_model), and experts on groups * slots rows.
///
/// Example:
///   SoftMoELayer layer(make_experts<FeedForward<float>>(8, {.d_model = 64, .d_ff = 256}, rng),
///                      {.d_model = 64, .num_experts = 8, .slots_per_expert = 4}, rng);
template <Expert E>
class SoftMoELayer {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;
  using Options = SoftMoEOptions;
  using Workspace = SoftMoEWorkspace<S>;
  using Cache = SoftMoECache<S>;

  /// w_slots is zero, to be filled from elsewhere, and the scale 1. Throws std::invalid_argument
  /// for sizes that are not positive, and unless the experts are as the options say.
  SoftMoELayer(std::vector<E> experts, const SoftMoEOptions& options)
      : options_(options), experts_(std::move(experts)) {
    const auto positive = [](Index v, const char* what) {
      require(v > 0, "SoftMoELayer: ", what, " = ", v, ", expected at least 1");
    };
    positive(options.d_model, "d_model");
    positive(options.num_experts, "num_experts");
    positive(options.slots_per_expert, "slots_per_expert");
    require(Index(experts_.size()) == options.num_experts, "SoftMoELayer: ", experts_.size(),
            " experts, expected num_experts = ", options.num_experts);
    for (std::size_t e = 0; e < experts_.size(); ++e)
      require(experts_[e].d_model() == d_model(), "SoftMoELayer: expert ", e,
              " has d_model = ", experts_[e].d_model(), ", expected ", d_model());
    w_slots.setZero(num_slots(), d_model());
    if (options.normalise) scale.setOnes(1);
  }
  /// w_slots is normal with variance 1 / d_model.
  SoftMoELayer(std::vector<E> experts, const SoftMoEOptions& options, Rng& rng)
      : SoftMoELayer(std::move(experts), options) {
    w_slots = lecun_normal<S>(num_slots(), d_model(), rng);
  }

  Index d_model() const { return options_.d_model; }
  Index num_experts() const { return options_.num_experts; }
  Index slots_per_expert() const { return options_.slots_per_expert; }
  Index num_slots() const { return options_.num_experts * options_.slots_per_expert; }
  const Options& options() const { return options_; }
  std::span<E> experts() { return experts_; }
  std::span<const E> experts() const { return experts_; }

  // ---- Inference: const.

  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// Allocates nothing when y and the workspace were last used with a batch of this shape, groups
  /// included. The workspace shows logits, dispatch and combine. x, y and the workspace lie apart, here and
  /// in all that follows: no argument that is written overlaps another.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Matrix<S>& y, Workspace& workspace, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    make_slots(x, y, workspace, info, executor);
    run_experts(experts(), workspace.plan, workspace.x_rows, workspace.y_rows, workspace.scratch, executor);
    mix_slots(y, workspace, executor);
  }

  // ---- Differentiable forward: the same values, and a cache for backward.

  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, cache, info, executor);
    return y;
  }

  /// Allocates nothing when y and the cache were last used with a batch of this shape, groups
  /// included.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Matrix<S>& y, Cache& cache, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    static_assert(TrainableExpert<E>, "a differentiable forward pass needs a TrainableExpert");
    make_slots(x, y, cache, info, executor);
    run_experts(experts(), cache.plan, cache.x_rows, cache.y_rows, cache.experts, cache.scratch, executor);
    mix_slots(y, cache, executor);
  }

  // ---- Backward.

  /// d_x [tokens, d_model] from d_y; adds the parameters' gradients to `grad`, a layer made by
  /// zeros_like(layer). May be called again on the same cache. Exact: nothing here is discrete.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> backward(const ConstMatrixRef<S>& d_y, Cache& cache, SoftMoELayer& grad,
                     const Ex& executor = {}) const {
    Matrix<S> d_x(d_y.rows(), d_y.cols());
    backward(d_y, cache, grad, d_x, executor);
    return d_x;
  }

  /// Allocates nothing when d_x and the cache were last used with a batch of this shape.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& d_y, Cache& cache, SoftMoELayer& grad, Matrix<S>& d_x,
                const Ex& executor = {}) const {
    check_backward(d_y, cache, grad, d_x);
    d_x.resize(d_y.rows(), d_model());
    if (cache.live.empty()) {  // no valid token
      d_x.setZero();
      return;
    }
    mix_slots_backward(d_y, cache, executor);
    dispatch(cache.d_slots.matrix(), cache.plan, cache.d_rows, executor);
    run_experts_backward(experts(), cache.plan, cache.x_rows, cache.d_rows, cache.experts, cache.d_x_rows,
                         grad.experts(), executor);
    combine(cache.d_x_rows, cache.plan, cache.d_slots.matrix(), cache.d_slots.matrix(), executor);
    make_slots_backward(cache, d_x, executor);
    logits_backward(cache, grad, d_x, executor);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    const SoftMoELayer& first = std::get<0>(std::tie(self...));
    (require(self.num_experts() == first.num_experts(), "SoftMoELayer::visit: a layer of ",
             self.num_experts(), " experts beside one of ", first.num_experts()),
     ...);
    visit_array(f, {"w_slots"}, self.w_slots...);
    if (((self.scale.size() > 0) || ...)) visit_array(f, {"scale"}, self.scale...);
    constexpr bool kHaveParameters = requires { E::visit(f, std::get<0>(std::tie(self...)).experts_[0]); };
    for (std::size_t e = 0; kHaveParameters && e < first.experts_.size(); ++e)
      if constexpr (kHaveParameters) visit_part("experts." + std::to_string(e), f, self.experts_[e]...);
  }

  Matrix<S> w_slots;  ///< row e * slots_per_expert + p is slot p of expert e [slots, d_model]
  Vector<S> scale;    ///< of the logits [1], empty unless normalised

 private:
  using Sum = moe::Sum<S>;  // of terms over tokens or slots

  // Slots and columns that one task takes.
  static constexpr Index kSlotBlock = 64, kColBlock = 128;

  static Index blocks(Index n, Index size) { return (n + size - 1) / size; }

  void check_parameters(const char* where) const {
    require_shape(w_slots, num_slots(), d_model(), where, "w_slots");
    require(scale.size() == (options_.normalise ? 1 : 0), where, ": scale has ", scale.size(),
            " entries, expected ", options_.normalise ? 1 : 0);
  }

  // Operands of the logits.
  const Matrix<S>& left(const Workspace& w) const { return options_.normalise ? w.x_unit : w.x; }
  const Matrix<S>& right(const Workspace& w) const { return options_.normalise ? w.w_scaled : w_slots; }

  // Calls f(group, slot, slots, column, columns) for tiles of a matrix [groups * slots, d_model].
  template <class Ex, class F>
  void for_each_tile(Index groups, const Ex& executor, const F& f) const {
    const Index down = blocks(num_slots(), kSlotBlock), across = blocks(d_model(), kColBlock);
    executor.for_each(groups * down * across, [&](Index task, Index) {
      const Index s = task / across % down * kSlotBlock, j = task % across * kColBlock;
      f(task / across / down, s, (std::min)(kSlotBlock, num_slots() - s), j,
        (std::min)(kColBlock, d_model() - j));
    });
  }

  // slots [groups * slots, d_model] = for every group the transpose of its rows of `weights`
  // [tokens, slots] times its rows of x [tokens, d_model].
  template <class Ex>
  void sum_tokens(const Workspace& w, const Matrix<S>& weights, const Matrix<S>& x, RowBuffer<S>& slots,
                  const Ex& executor) const {
    slots.resize(w.num_groups() * num_slots(), d_model());
    for_each_tile(w.num_groups(), executor, [&](Index g, Index s, Index high, Index j, Index wide) {
      const Index begin = w.group_begin[g], count = w.group_begin[g + 1] - begin;
      auto out = slots.matrix().block(g * num_slots() + s, j, high, wide);
      out.setZero();
      linear_backward_weight(weights.block(begin, s, count, high), x.block(begin, j, count, wide), out);
    });
  }

  // Calls f(begin, count, rows) for blocks of tokens, `rows` being their group's part of `slots`.
  template <class Rows, class Ex, class F>
  void for_each_token_block(const Workspace& w, Rows& slots, const Ex& executor, const F& f) const {
    executor.for_each(w.token_blocks.size(), [&](Index task, Index) {
      const auto [group, begin, end] = w.token_blocks[task];
      f(begin, end - begin, slots.block(group * num_slots(), num_slots()));
    });
  }

  // The way of a batch up to the rows of experts.
  template <std::derived_from<Workspace> Buffers, class Ex>
  void make_slots(const ConstMatrixRef<S>& x, Matrix<S>& y, Buffers& w, const BatchInfo& info,
                  const Ex& executor) const {
    constexpr const char* kBuffers = std::is_same_v<Buffers, Cache> ? "the cache" : "the workspace";
    require(x.cols() == d_model(), "SoftMoELayer::forward: x has ", x.cols(),
            " columns, expected d_model = ", d_model());
    require_apart("SoftMoELayer::forward", "y", y, "x", x, kBuffers, w);
    require_apart("SoftMoELayer::forward", kBuffers, w, "x", x);
    check_parameters("SoftMoELayer::forward");
    begin_batch(x.rows(), info, w);
    y.resize(x.rows(), d_model());
    make_logits(x, w, executor);
    softmax_over_tokens(w, executor);
    sum_tokens(w, w.dispatch, w.x, w.slots, executor);
    plan_slots(w);
    dispatch(w.slots.matrix(), w.plan, w.x_rows, executor);
  }

  // The way back from the rows of experts.
  template <class Ex>
  void mix_slots(Matrix<S>& y, Workspace& w, const Ex& executor) const {
    combine(w.y_rows, w.plan, w.slots.matrix(), w.slots.matrix(), executor);
    for_each_token_block(w, w.slots, executor, [&](Index begin, Index count, const auto& slots) {
      linear_backward_input(w.combine.middleRows(begin, count), slots, y.middleRows(begin, count));
      for (Index t = begin; t < begin + count; ++t) {
        if (w.token_state[t] == TokenState::masked) y.row(t).setZero();
        if (w.token_state[t] == TokenState::poisoned)
          y.row(t).setConstant(std::numeric_limits<S>::quiet_NaN());
      }
    });
  }

  void begin_batch(Index tokens, const BatchInfo& info, Workspace& w) const {
    check_batch_info(info, tokens, "SoftMoELayer::forward");
    w.token_state.assign(tokens, TokenState::valid);
    for (Index t = 0; t < info.mask.size(); ++t)
      if (!info.mask[t]) w.token_state[t] = TokenState::masked;
    const Index groups = info.num_groups();
    w.group_begin.resize(groups + 1);
    w.token_blocks.reserve(groups + tokens / kTokenBlock);
    w.token_blocks.clear();
    w.group_begin[0] = 0;
    for (Index g = 0; g < groups; ++g) {
      const Index end = w.group_begin[g + 1] = info.end_of(g, tokens);
      for (Index t = w.group_begin[g]; t < end; t += kTokenBlock)
        w.token_blocks.push_back({g, t, (std::min)(t + kTokenBlock, end)});
    }
    w.x.resize(tokens, d_model());
    w.logits.resize(tokens, num_slots());
    w.dispatch.resize(tokens, num_slots());
    w.combine.resize(tokens, num_slots());
    if (!options_.normalise) return;
    w.x_unit.resize(tokens, d_model());
    w.w_unit.resize(num_slots(), d_model());
    w.w_scaled.resize(num_slots(), d_model());
  }

  // Logits, combine weights, and who is poisoned. Rows of x that are not valid become zeros here,
  // so that no sum over tokens needs to look at a token's state: 0 times NaN would be NaN.
  template <class Ex>
  void make_logits(const ConstMatrixRef<S>& x, Workspace& w, const Ex& executor) const {
    const Index d = d_model(), slots = num_slots();
    if (options_.normalise) {
      for_each_block(slots, executor, [&](Index begin, Index end, Index) {
        for (Index s = begin; s < end; ++s) {
          detail::make_unit(d, &w_slots(s, 0), &w.w_unit(s, 0));
          for (Index j = 0; j < d; ++j) w.w_scaled(s, j) = scale[0] * w.w_unit(s, j);
        }
      });
    }
    for_each_block(x.rows(), executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        const S* const from = &x.coeffRef(t, 0);
        TokenState& state = w.token_state[t];
        if (state == TokenState::valid && !detail::all_finite(d, from)) state = TokenState::poisoned;
        if (state == TokenState::valid)
          std::copy_n(from, d, &w.x(t, 0));
        else
          w.x.row(t).setZero();
        if (options_.normalise) detail::make_unit(d, &w.x(t, 0), &w.x_unit(t, 0));
      }
      linear(left(w).middleRows(begin, end - begin), right(w), w.logits.middleRows(begin, end - begin));
      for (Index t = begin; t < end; ++t) {
        S* const z = &w.logits(t, 0);
        if (w.is_valid(t) && !detail::all_finite(slots, z)) {
          w.token_state[t] = TokenState::poisoned;
          w.x.row(t).setZero();
          if (options_.normalise) w.x_unit.row(t).setZero();
        }
        if (w.is_valid(t)) {
          softmax(slots, z, &w.combine(t, 0));
        } else {
          w.logits.row(t).setZero();
          w.combine.row(t).setZero();
          w.dispatch.row(t).setZero();
        }
      }
    });
  }

  // dispatch = softmax of every column over the valid tokens of each group.
  template <class Ex>
  void softmax_over_tokens(Workspace& w, const Ex& executor) const {
    for_each_columns(w, executor, [&](Index first, Index last, Index s, Index count) {
      std::array<S, kSlotBlock> largest;
      std::array<Sum, kSlotBlock> sum;
      largest.fill(std::numeric_limits<S>::lowest());
      sum.fill(0);
      const auto for_each_share = [&](const auto& g) {
        for (Index t = first; t < last; ++t)
          for (Index i = 0; w.is_valid(t) && i < count; ++i)
            g(w.logits(t, s + i), w.dispatch(t, s + i), largest[std::size_t(i)], sum[std::size_t(i)]);
      };
      for_each_share([](S z, S&, S& most, Sum&) { most = (std::max)(most, z); });
      for_each_share([](S z, S& share, S& most, Sum& all) { all += Sum(share = std::exp(z - most)); });
      for_each_share([](S, S& share, S&, Sum& all) { share /= S(all); });
    });
  }

  // d_logits, on entry the gradient by dispatch, becomes what that makes of the logits.
  template <class Ex>
  void softmax_over_tokens_backward(Cache& c, const Ex& executor) const {
    for_each_columns(c, executor, [&](Index first, Index last, Index s, Index count) {
      std::array<S, kSlotBlock> origin;  // as in softmax_backward
      std::array<Sum, kSlotBlock> mean;
      origin.fill(S(0));
      mean.fill(0);
      const auto for_each_share = [&](const auto& g) {
        for (Index t = first; t < last; ++t)
          for (Index i = 0; i < count; ++i) g(c.dispatch(t, s + i), c.d_logits(t, s + i), std::size_t(i));
      };
      for_each_share([&](S share, S d, std::size_t i) { origin[i] = share > S(0.5) ? d : origin[i]; });
      for_each_share([&](S share, S d, std::size_t i) { mean[i] += Sum(share * (d - origin[i])); });
      for_each_share([&](S share, S& d, std::size_t i) { d = share * ((d - origin[i]) - S(mean[i])); });
    });
  }

  // Calls f(first token, last token, slot, slots) for the tokens of each group and blocks of slots.
  template <class Ex, class F>
  void for_each_columns(const Workspace& w, const Ex& executor, const F& f) const {
    const Index across = blocks(num_slots(), kSlotBlock);
    executor.for_each(w.num_groups() * across, [&](Index task, Index) {
      const Index g = task / across, s = task % across * kSlotBlock;
      f(w.group_begin[g], w.group_begin[g + 1], s, (std::min)(kSlotBlock, num_slots() - s));
    });
  }

  // To the experts, slots are what tokens are elsewhere: row (group, slot) of `slots` goes to the
  // slot's expert, with a gate of 1. Slots of groups without valid tokens go nowhere.
  void plan_slots(Workspace& w) const {
    const Index groups = w.num_groups(), rows = groups * num_slots(), each = slots_per_expert();
    w.live.reserve(groups);
    w.live.clear();
    for (Index g = 0; g < groups; ++g)
      if (std::find(w.token_state.begin() + w.group_begin[g], w.token_state.begin() + w.group_begin[g + 1],
                    TokenState::valid) != w.token_state.begin() + w.group_begin[g + 1])
        w.live.push_back(g);
    DispatchPlan<S>& plan = w.plan;
    plan.num_tokens = rows;
    plan.token_state.assign(rows, TokenState::valid);
    plan.expert_begin.assign(num_experts() + 1, 0);
    plan.token.reserve(rows);
    plan.token.clear();
    for (Index e = 0; e < num_experts(); ++e) {
      for (const Index g : w.live)
        for (Index p = 0; p < each; ++p) plan.token.push_back(g * num_slots() + e * each + p);
      plan.expert_begin[e + 1] = plan.token.size();
    }
    plan.gate.reserve(rows);
    plan.gate.assign(plan.token.size(), S(1));
  }

  void check_backward(const ConstMatrixRef<S>& d_y, const Cache& c, const SoftMoELayer& grad,
                      const Matrix<S>& d_x) const {
    const char* const where = "SoftMoELayer::backward";
    check_parameters(where);
    require(
        c.x.cols() == d_model() && c.logits.cols() == num_slots() && c.plan.num_experts() == num_experts(),
        where, ": the cache is of a layer with d_model = ", c.x.cols(), ", ", c.plan.num_experts(),
        " experts and ", c.logits.cols(), " slots, expected ", d_model(), ", ", num_experts(), " and ",
        num_slots());
    const Index tokens = c.x.rows();
    require(c.num_tokens() == tokens && c.group_begin.size() >= 2 &&
                c.group_begin[c.num_groups()] == tokens && c.slots.rows() == c.num_groups() * num_slots(),
            where, ": the cache holds ", tokens, " tokens and ", c.slots.rows(),
            " slots, but its state is of ", c.num_tokens(), " tokens in ", c.num_groups(), " groups");
    if (options_.normalise) {
      require_shape(c.x_unit, tokens, d_model(), where, "the cache's x_unit");
      require_shape(c.w_unit, num_slots(), d_model(), where, "the cache's w_unit");
      require_shape(c.w_scaled, num_slots(), d_model(), where, "the cache's w_scaled");
    }
    require_shape(c.dispatch, tokens, num_slots(), where, "the cache's dispatch");
    require_shape(c.combine, tokens, num_slots(), where, "the cache's combine");
    require_shape(d_y, tokens, d_model(), where, "d_y");
    require(&grad != this, where, ": grad is the layer of ", num_experts(),
            " experts itself, expected another one");
    require(grad.d_model() == d_model() && grad.num_experts() == num_experts(), where,
            ": grad is a layer with d_model = ", grad.d_model(), " and ", grad.num_experts(),
            " experts, expected ", d_model(), " and ", num_experts());
    // Before anything is added to grad. Not by visit(), whose names need memory.
    const auto same_shape = [&](const ParameterInfo& info, const auto& p, const auto& g) {
      if (info.kind != Kind::buffer)
        require_shape(g, p.rows(), p.cols(), "SoftMoELayer::backward: grad", info.name);
      require_apart(where, "grad", g, "d_y", d_y, "d_x", d_x);
    };
    require_apart(where, "d_x", d_x, "d_y", d_y, "the cache", c);
    require_apart(where, "the cache", c, "d_y", d_y);
    visit_array(same_shape, {"w_slots"}, w_slots, grad.w_slots);
    visit_array(same_shape, {"scale"}, scale, grad.scale);
    for (std::size_t e = 0; e < experts_.size(); ++e) E::visit(same_shape, experts_[e], grad.experts_[e]);
    c.experts.check(experts(), c.plan, where);
    detail::require_rows(c.x_rows, c.plan, where, "the cache's x_rows");
  }

  // From d_y to the gradients by combine and by the outputs of slots.
  template <class Ex>
  void mix_slots_backward(const ConstMatrixRef<S>& d_y, Cache& c, const Ex& executor) const {
    c.d_y.resize(d_y.rows(), d_model());
    c.d_combine.resize(d_y.rows(), num_slots());
    for_each_token_block(c, c.slots, executor, [&](Index begin, Index count, const auto& slots) {
      for (Index t = begin; t < begin + count; ++t) {
        if (c.is_valid(t))
          std::copy_n(&d_y.coeffRef(t, 0), d_model(), &c.d_y(t, 0));
        else
          c.d_y.row(t).setZero();
      }
      linear(c.d_y.middleRows(begin, count), slots, c.d_combine.middleRows(begin, count));
    });
    sum_tokens(c, c.combine, c.d_y, c.d_slots, executor);
  }

  // From the gradient by the inputs of slots to those by dispatch and by x, and on to the logits.
  template <class Ex>
  void make_slots_backward(Cache& c, Matrix<S>& d_x, const Ex& executor) const {
    c.d_logits.resize(d_x.rows(), num_slots());
    for_each_token_block(c, c.d_slots, executor, [&](Index begin, Index count, const auto& slots) {
      linear(c.x.middleRows(begin, count), slots, c.d_logits.middleRows(begin, count));
      linear_backward_input(c.dispatch.middleRows(begin, count), slots, d_x.middleRows(begin, count));
    });
    softmax_over_tokens_backward(c, executor);
    for_each_block(d_x.rows(), executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t)
        softmax_backward(num_slots(), &c.combine(t, 0), &c.d_combine(t, 0), &c.d_logits(t, 0));
    });
  }

  // From the logits to x, w_slots and the scale.
  template <class Ex>
  void logits_backward(Cache& c, SoftMoELayer& grad, Matrix<S>& d_x, const Ex& executor) const {
    const Index d = d_model();
    if (options_.normalise) c.d_x_unit.resize(d_x.rows(), d);
    for_each_block(d_x.rows(), executor, [&](Index begin, Index end, Index) {
      const auto d_z = c.d_logits.middleRows(begin, end - begin);
      if (options_.normalise)
        linear_backward_input(d_z, right(c), c.d_x_unit.middleRows(begin, end - begin));
      else
        linear_backward_input(d_z, right(c), d_x.middleRows(begin, end - begin), Write::add);
      for (Index t = begin; t < end; ++t) {
        if (!c.is_valid(t))
          d_x.row(t).setZero();
        else if (options_.normalise)
          detail::make_unit_backward(d, &c.x(t, 0), &c.x_unit(t, 0), &c.d_x_unit(t, 0), S(1), &d_x(t, 0));
      }
    });
    if (options_.normalise) c.d_w_scaled.setZero(num_slots(), d);
    Matrix<S>& d_w = options_.normalise ? c.d_w_scaled : grad.w_slots;
    for_each_tile(1, executor, [&](Index, Index s, Index high, Index j, Index wide) {
      linear_backward_weight(c.d_logits.middleCols(s, high), left(c).middleCols(j, wide),
                             d_w.block(s, j, high, wide));
    });
    if (!options_.normalise) return;
    c.d_scale.resize(num_slots());
    for_each_block(num_slots(), executor, [&](Index begin, Index end, Index) {
      for (Index s = begin; s < end; ++s) {
        c.d_scale[s] = dot(d, &c.w_unit(s, 0), &c.d_w_scaled(s, 0));
        detail::make_unit_backward(d, &w_slots(s, 0), &c.w_unit(s, 0), &c.d_w_scaled(s, 0), scale[0],
                                   &grad.w_slots(s, 0));
      }
    });
    Sum d_scale = 0;
    for (const S part : c.d_scale) d_scale += Sum(part);
    grad.scale[0] += S(d_scale);
  }

  Options options_;
  std::vector<E> experts_;
};

}  // namespace moe
