// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/output.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/layers/soft_logits.hpp>
#include <moe/layers/soft_routing.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/numbers.hpp>
#include <moe/math/softmax.hpp>
#include <moe/routing/check_routing.hpp>

// The router that chooses nothing: it mixes tokens into slots, and the outputs of slots into those of tokens.
// Read mix() and unmix() first, then their backward.
namespace moe {

namespace detail {

template <class S>
bool all_finite(Index n, const S* x) {
  return std::all_of(x, x + n, [](S v) { return number_kind(v) == NumberKind::finite; });
}

}  // namespace detail

/// The router of Soft Mixture of Experts (Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts",
/// section 2), in which nothing is chosen. Every slot is a mixture of all tokens, every token's output one of
/// the outputs of all slots:
///   z_ts = scale * <x_t / |x_t|, w_s / |w_s|>      |v| = sqrt(sum of v_j^2 + 1e-6), section 2.3
///   D = softmax of z over tokens, for every slot   C = softmax of z over slots, for every token
///   mix: X~ = D^T x                                unmix: y = C Y~
/// x and y are [tokens, d_model]; slots = num_experts * slots_per_expert. Without `normalise`,
/// z = x w_slots^T. The authors' code multiplies the smaller of tokens and slots by the scale; here
/// it is always the slots, which is the same but for rounding.
///
/// Every group of `info` has slots of its own and knows nothing of other groups. Rows of slots stand by
/// expert, then by group, as routing.expert_begin says: [num_experts, groups with a valid token,
/// slots_per_expert], each of d_model. A token that is masked, or poisoned by a row of x or of logits that is
/// not finite, has no share in any slot.
///
/// Results are bitwise the same for every executor. What mix, unmix and their backward work on is what the
/// two checks let pass; they check no more of it. Cost of each: O(tokens * slots * d_model).
template <class S>
class SoftRouter {
 public:
  using Scalar = S;
  using Options = SoftMoEOptions;
  using Routing = SoftRouting<S>;           ///< what mix makes of a batch
  using Gradient = SoftRoutingGradient<S>;  ///< the buffers of backward

  /// w_slots is zero, to be filled from elsewhere, and the scale 1. Throws std::invalid_argument for sizes
  /// that are not positive.
  explicit SoftRouter(const Options& options) : options_(options) {
    const auto positive = [](Index v, const char* what) {
      require(v > 0, "SoftRouter: ", what, " = ", v, ", expected at least 1");
    };
    positive(options.d_model, "d_model");
    positive(options.num_experts, "num_experts");
    positive(options.slots_per_expert, "slots_per_expert");
    w_slots.setZero(num_slots(), d_model());
    scale.setOnes(num_scales());
  }
  /// w_slots is normal with variance 1 / d_model.
  SoftRouter(const Options& options, Rng& rng) : SoftRouter(options) {
    w_slots = lecun_normal<S>(num_slots(), d_model(), rng);
  }

  Index d_model() const { return options_.d_model; }
  Index num_experts() const { return options_.num_experts; }
  Index slots_per_expert() const { return options_.slots_per_expert; }
  Index num_slots() const { return options_.num_experts * options_.slots_per_expert; }
  const Options& options() const { return options_; }

  /// Throws std::invalid_argument unless the parameters have their shapes, x is [tokens, d_model] and `info`
  /// fits. O(tokens + groups).
  void check_forward(const ConstMatrixRef<S>& x, const BatchInfo& info, const char* where) const {
    require(x.cols() == d_model(), where, ": x has ", x.cols(), " columns, expected d_model = ", d_model());
    check_parameters(where);
    check_batch_info(info, x.rows(), where);
  }

  /// rows [rows of all experts, d_model]: what every slot mixes of the tokens of its group.
  template <Executor Ex = DefaultExecutor>
  void mix(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing& routing, RowBuffer<S>& rows,
           const Ex& executor = {}) const {
    begin_batch(x.rows(), info, routing);
    with_logits([&](const auto& kind) { make_logits(x, kind, routing, executor); });
    softmax_over_tokens(routing, executor);
    sum_tokens(routing, routing.dispatch, routing.x, routing.slots, executor);
    lay_out_rows(routing);
    to_rows(routing, routing.slots, rows, executor);
  }

  /// y [tokens, d_model] from the experts' outputs in place of the rows that mix made: what every token mixes
  /// of the slots of its group; zero for a masked token, NaN for a poisoned one.
  template <Executor Ex = DefaultExecutor>
  void unmix(const RowBuffer<S>& rows, Routing& routing, const Output<S>& output,
             const Ex& executor = {}) const {
    MatrixRef<S> y = output.of_shape(routing.num_tokens(), d_model(), "SoftRouter::unmix", "y");
    from_rows(routing, rows, routing.slots, executor);
    for_each_token_block(routing, routing.slots, executor, [&](Index begin, Index count, const auto& slots) {
      linear_backward_input(routing.combine.middleRows(begin, count), slots, y.middleRows(begin, count));
      for (Index t = begin; t < begin + count; ++t) {
        if (routing.token_state[t] == TokenState::masked) y.row(t).setZero();
        if (routing.token_state[t] == TokenState::poisoned)
          y.row(t).setConstant(std::numeric_limits<S>::quiet_NaN());
      }
    });
  }

  /// Throws std::invalid_argument unless the parameters have their shapes and `routing` is one that mix made
  /// with them. O(1).
  void check_backward(const Routing& routing, const char* where) const {
    check_parameters(where);
    require(routing.x.cols() == d_model() && routing.logits.cols() == num_slots() &&
                routing.num_experts() == num_experts(),
            where, ": the cache is of a layer with d_model = ", routing.x.cols(), ", ", routing.num_experts(),
            " experts and ", routing.logits.cols(), " slots, expected ", d_model(), ", ", num_experts(),
            " and ", num_slots());
    const Index tokens = routing.x.rows(), groups = routing.num_groups();
    require(routing.num_tokens() == tokens && groups >= 1 && routing.group_begin[groups] == tokens &&
                routing.slots.rows() == groups * num_slots(),
            where, ": the cache holds ", tokens, " tokens and ", routing.slots.rows(),
            " slots, but its state is of ", routing.num_tokens(), " tokens in ", groups, " groups");
    with_logits([&](const auto& kind) { kind.check(routing, where); });
    require_shape(routing.dispatch, tokens, num_slots(), where, "the cache's dispatch");
    require_shape(routing.combine, tokens, num_slots(), where, "the cache's combine");
  }

  /// Backward of unmix: rows as those of the experts' outputs, from d_y [tokens, d_model].
  template <Executor Ex = DefaultExecutor>
  void unmix_backward(const ConstMatrixRef<S>& d_y, const Routing& routing, Gradient& g, RowBuffer<S>& rows,
                      const Ex& executor = {}) const {
    g.d_y.resize(d_y.rows(), d_model());
    g.d_combine.resize(d_y.rows(), num_slots());
    for_each_token_block(routing, routing.slots, executor, [&](Index begin, Index count, const auto& slots) {
      for (Index t = begin; t < begin + count; ++t) {
        if (routing.is_valid(t))
          std::copy_n(&d_y.coeffRef(t, 0), d_model(), &g.d_y(t, 0));
        else
          g.d_y.row(t).setZero();
      }
      linear(g.d_y.middleRows(begin, count), slots, g.d_combine.middleRows(begin, count));
    });
    sum_tokens(routing, routing.combine, g.d_y, g.d_slots, executor);
    to_rows(routing, g.d_slots, rows, executor);
  }

  /// Backward of mix and of the shares of both, after unmix_backward: d_x [tokens, d_model] from the gradient
  /// by the experts' inputs, in their rows; adds to the parameters of `grad`.
  template <Executor Ex = DefaultExecutor>
  void mix_backward(const RowBuffer<S>& rows, const Routing& routing, Gradient& g, SoftRouter& grad,
                    const Output<S>& output, const Ex& executor = {}) const {
    MatrixRef<S> d_x = output.of_shape(routing.num_tokens(), d_model(), "SoftRouter::mix_backward", "d_x");
    from_rows(routing, rows, g.d_slots, executor);
    g.d_logits.resize(d_x.rows(), num_slots());
    for_each_token_block(routing, g.d_slots, executor, [&](Index begin, Index count, const auto& slots) {
      linear(routing.x.middleRows(begin, count), slots, g.d_logits.middleRows(begin, count));
      linear_backward_input(routing.dispatch.middleRows(begin, count), slots, d_x.middleRows(begin, count));
    });
    softmax_over_tokens_backward(routing, g.d_logits, executor);
    for_each_block(d_x.rows(), executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t)
        softmax_backward(num_slots(), &routing.combine(t, 0), &g.d_combine(t, 0), &g.d_logits(t, 0));
    });
    with_logits([&](const auto& kind) { logits_backward(kind, routing, g, grad, d_x, executor); });
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_slots"}, self.w_slots...);
    if (((self.scale.size() > 0) || ...)) visit_array(f, {"scale"}, self.scale...);
  }

  Matrix<S> w_slots;  ///< row e * slots_per_expert + p is slot p of expert e [slots, d_model]
  Vector<S> scale;    ///< of the logits [1], empty unless normalised

 private:
  using Sum = moe::Sum<S>;  // of terms over tokens

  // Slots and columns that one task takes.
  static constexpr Index kSlotBlock = 64, kColBlock = 128;

  static Index blocks(Index n, Index size) { return (n + size - 1) / size; }

  Index num_scales() const { return options_.normalise ? 1 : 0; }

  // Calls f with the kind of logits that the options ask for.
  template <class F>
  void with_logits(const F& f) const {
    if (options_.normalise)
      f(CosineLogits<S>{w_slots, scale});
    else
      f(DotLogits<S>{w_slots});
  }

  void check_parameters(const char* where) const {
    require_shape(w_slots, num_slots(), d_model(), where, "w_slots");
    require(scale.size() == num_scales(), where, ": scale has ", scale.size(), " entries, expected ",
            num_scales());
  }

  // ---- Tasks.

  // Calls f(group, slot, slots, column, columns) for tiles of a matrix [groups * slots, cols].
  template <class Ex, class F>
  void for_each_tile(Index groups, Index cols, const Ex& executor, const F& f) const {
    const Index down = blocks(num_slots(), kSlotBlock), across = blocks(cols, kColBlock);
    executor.for_each(groups * down * across, [&](Index task, Index) {
      const Index s = task / across % down * kSlotBlock, j = task % across * kColBlock;
      f(task / across / down, s, (std::min)(kSlotBlock, num_slots() - s), j, (std::min)(kColBlock, cols - j));
    });
  }

  // Calls f(begin, count, rows) for blocks of tokens, `rows` being their group's part of `slots`.
  template <class Rows, class Ex, class F>
  void for_each_token_block(const Routing& routing, Rows& slots, const Ex& executor, const F& f) const {
    executor.for_each(routing.token_blocks.size(), [&](Index task, Index) {
      const auto [group, begin, end] = routing.token_blocks[task];
      f(begin, end - begin, slots.block(group * num_slots(), num_slots()));
    });
  }

  // ---- From tokens to slots.

  void begin_batch(Index tokens, const BatchInfo& info, Routing& routing) const {
    routing.token_state.assign(tokens, TokenState::valid);
    for (Index t = 0; t < info.mask.size(); ++t)
      if (!info.mask[t]) routing.token_state[t] = TokenState::masked;
    const Index groups = info.num_groups();
    routing.group_begin.resize(groups + 1);
    routing.token_blocks.reserve(groups + tokens / kTokenBlock);
    routing.token_blocks.clear();
    routing.group_begin[0] = 0;
    for (Index g = 0; g < groups; ++g) {
      const Index end = routing.group_begin[g + 1] = info.end_of(g, tokens);
      for (Index t = routing.group_begin[g]; t < end; t += kTokenBlock)
        routing.token_blocks.push_back({g, t, (std::min)(t + kTokenBlock, end)});
    }
    routing.x.resize(tokens, d_model());
    for (ReusedMatrix<S>* m : {&routing.logits, &routing.dispatch, &routing.combine})
      m->resize(tokens, num_slots());
  }

  // Logits, combine weights, and who is poisoned. Rows of x that are not valid become zeros here,
  // so that no sum over tokens needs to look at a token's state: 0 times NaN would be NaN.
  template <class Kind, class Ex>
  void make_logits(const ConstMatrixRef<S>& x, const Kind& kind, Routing& routing, const Ex& executor) const {
    kind.make_slots(routing, executor);
    for_each_block(x.rows(), executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        take_token(&x.coeffRef(t, 0), t, routing);
        kind.make_token(t, routing);
      }
      linear(kind.tokens(routing).middleRows(begin, end - begin), kind.slots(routing),
             routing.logits.middleRows(begin, end - begin));
      for (Index t = begin; t < end; ++t) {
        if (routing.is_valid(t) && !detail::all_finite(num_slots(), &routing.logits(t, 0))) {
          routing.token_state[t] = TokenState::poisoned;
          routing.x.row(t).setZero();
          kind.make_token(t, routing);
        }
        if (routing.is_valid(t)) {
          softmax(num_slots(), &routing.logits(t, 0), &routing.combine(t, 0));
        } else {
          for (ReusedMatrix<S>* m : {&routing.logits, &routing.dispatch, &routing.combine})
            m->row(t).setZero();
        }
      }
    });
  }

  void take_token(const S* from, Index t, Routing& routing) const {
    TokenState& state = routing.token_state[t];
    if (state == TokenState::valid && !detail::all_finite(d_model(), from)) state = TokenState::poisoned;
    if (state == TokenState::valid)
      std::copy_n(from, d_model(), &routing.x(t, 0));
    else
      routing.x.row(t).setZero();
  }

  // dispatch = softmax of every column over the valid tokens of each group.
  template <class Ex>
  void softmax_over_tokens(Routing& routing, const Ex& executor) const {
    for_each_tile(routing.num_groups(), 1, executor, [&](Index g, Index s, Index count, Index, Index) {
      const Index first = routing.group_begin[g], last = routing.group_begin[g + 1];
      std::array<S, kSlotBlock> largest;
      std::array<Sum, kSlotBlock> sum;
      largest.fill(std::numeric_limits<S>::lowest());
      sum.fill(0);
      const auto for_each_share = [&](const auto& f) {
        for (Index t = first; t < last; ++t)
          for (Index i = 0; routing.is_valid(t) && i < count; ++i)
            f(routing.logits(t, s + i), routing.dispatch(t, s + i), largest[std::size_t(i)],
              sum[std::size_t(i)]);
      };
      for_each_share([](S z, S&, S& most, Sum&) { most = (std::max)(most, z); });
      for_each_share([](S z, S& share, S& most, Sum& all) { all += Sum(share = std::exp(z - most)); });
      for_each_share([](S, S& share, S&, Sum& all) { share /= S(all); });
    });
  }

  // slots [groups * slots, d_model] = for every group the transpose of its rows of `shares`
  // [tokens, slots] times its rows of x [tokens, d_model].
  template <class Ex>
  void sum_tokens(const Routing& routing, const ReusedMatrix<S>& shares, const ReusedMatrix<S>& x,
                  RowBuffer<S>& slots, const Ex& executor) const {
    slots.resize(routing.num_groups() * num_slots(), d_model());
    for_each_tile(
        routing.num_groups(), d_model(), executor, [&](Index g, Index s, Index high, Index j, Index wide) {
          const Index begin = routing.group_begin[g], count = routing.group_begin[g + 1] - begin;
          auto out = slots.matrix().block(g * num_slots() + s, j, high, wide);
          out.setZero();
          linear_backward_weight(shares.block(begin, s, count, high), x.block(begin, j, count, wide), out);
        });
  }

  // ---- From slots to the rows of experts, and back.

  // Which groups have rows, and where those of each expert begin.
  void lay_out_rows(Routing& routing) const {
    routing.live.reserve(routing.num_groups());
    routing.live.clear();
    const TokenState* const state = routing.token_state.data();
    for (Index g = 0; g < routing.num_groups(); ++g) {
      const TokenState* const last = state + routing.group_begin[g + 1];
      if (std::find(state + routing.group_begin[g], last, TokenState::valid) != last)
        routing.live.push_back(g);
    }
    routing.expert_begin.resize(num_experts() + 1);
    for (Index e = 0; e <= num_experts(); ++e)
      routing.expert_begin[e] = e * routing.live.size() * slots_per_expert();
  }

  // Calls f(slot, row) for the first slot of every expert in every live group: its place in a matrix
  // [groups, experts, slots_per_expert] and in one [experts, live groups, slots_per_expert].
  template <class Ex, class F>
  void for_each_place(const Routing& routing, const Ex& executor, const F& f) const {
    const Index each = slots_per_expert(), live = routing.live.size(), places = live * num_experts();
    const Index step = std::max<Index>(1, kSlotBlock / each);
    executor.for_each(blocks(places, step), [&](Index task, Index) {
      for (Index i = task * step; i < (std::min)(places, (task + 1) * step); ++i)
        f(routing.live[i % live] * num_slots() + i / live * each, i * each);
    });
  }

  template <class Ex>
  void to_rows(const Routing& routing, const RowBuffer<S>& slots, RowBuffer<S>& rows,
               const Ex& executor) const {
    rows.resize(routing.live.size() * num_slots(), d_model(), routing.num_groups() * num_slots());
    for_each_place(routing, executor, [&](Index slot, Index row) {
      std::copy_n(slots.row(slot), slots_per_expert() * d_model(), rows.row(row));
    });
  }

  // Slots of other groups stay as they are: zero.
  template <class Ex>
  void from_rows(const Routing& routing, const RowBuffer<S>& rows, RowBuffer<S>& slots,
                 const Ex& executor) const {
    for_each_place(routing, executor, [&](Index slot, Index row) {
      std::copy_n(rows.row(row), slots_per_expert() * d_model(), slots.row(slot));
    });
  }

  // ---- Backward of the shares.

  // d_shares, on entry the gradient by dispatch, becomes what that makes of the logits.
  template <class Ex>
  void softmax_over_tokens_backward(const Routing& routing, ReusedMatrix<S>& d_shares,
                                    const Ex& executor) const {
    for_each_tile(routing.num_groups(), 1, executor, [&](Index g, Index s, Index count, Index, Index) {
      const Index first = routing.group_begin[g], last = routing.group_begin[g + 1];
      std::array<S, kSlotBlock> origin;  // as in softmax_backward
      std::array<Sum, kSlotBlock> mean;
      origin.fill(S(0));
      mean.fill(0);
      const auto for_each_share = [&](const auto& f) {
        for (Index t = first; t < last; ++t)
          for (Index i = 0; i < count; ++i) f(routing.dispatch(t, s + i), d_shares(t, s + i), std::size_t(i));
      };
      for_each_share([&](S share, S d, std::size_t i) { origin[i] = share > S(0.5) ? d : origin[i]; });
      for_each_share([&](S share, S d, std::size_t i) { mean[i] += Sum(share * (d - origin[i])); });
      for_each_share([&](S share, S& d, std::size_t i) { d = share * ((d - origin[i]) - S(mean[i])); });
    });
  }

  // From the logits to x, w_slots and the scale.
  template <class Kind, class Ex>
  void logits_backward(const Kind& kind, const Routing& routing, Gradient& g, SoftRouter& grad,
                       MatrixRef<S>& d_x, const Ex& executor) const {
    MatrixRef<S> d_slots = kind.begin_backward(g, grad.w_slots);
    for_each_block(d_x.rows(), executor, [&](Index begin, Index end, Index) {
      kind.tokens_backward(begin, end - begin, routing, g, d_x);
      for (Index t = begin; t < end; ++t)
        if (!routing.is_valid(t)) d_x.row(t).setZero();
    });
    for_each_tile(1, d_model(), executor, [&](Index, Index s, Index high, Index j, Index wide) {
      linear_backward_weight(g.d_logits.middleCols(s, high), kind.tokens(routing).middleCols(j, wide),
                             d_slots.block(s, j, high, wide));
    });
    kind.slots_backward(routing, g, grad.w_slots, grad.scale, executor);
  }

  Options options_;
};

}  // namespace moe
