// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/softmax.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/token_choice_backward.hpp>

namespace moe {

/// Options of SparseMixerRouter; the same for every scalar.
struct SparseMixerOptions {
  Index d_model = 0;
  Index num_experts = 0;
  /// A pick's gate is a softmax over the experts whose logits are within 2 * jitter of the best, relative
  /// to the larger of their size and the best.
  double jitter = 0.01;

  static constexpr Index top_k = 2;  ///< picks of a token
};

/// SparseMixer-v2 (Liu et al. 2023 and 2024, GRIN), the router of Phi-3.5-MoE, as its published code
/// computes it: two picks one after the other, the second among the other experts, if there are any. Each
/// pick's gate is its share of the experts that nearly tie with the best, so that gates are often 1 and do
/// not sum to 1. In training a pick is drawn (Gumbel) from those experts, its gate is multiplied by 1 or
/// 0.3333, and backward is the authors' estimator: the gradient of the gate without that factor. In inference
/// it is the exact derivative. Dropless. router_probs are the softmax of the logits, for balance losses.
template <class S>
class SparseMixerRouter {
 public:
  using Scalar = S;
  using Options = SparseMixerOptions;

  /// w_router is zero, to be filled from elsewhere. Throws std::invalid_argument for options out of range.
  explicit SparseMixerRouter(const Options& options) : options_(options) {
    require(options.d_model > 0, "SparseMixerRouter: d_model = ", options.d_model, ", expected at least 1");
    require(options.num_experts > 0, "SparseMixerRouter: num_experts = ", options.num_experts,
            ", expected at least 1");
    require(number_kind(options.jitter) == NumberKind::finite && options.jitter >= 0,
            "SparseMixerRouter: jitter = ", options.jitter, ", expected a finite number of at least 0");
    w_router.setZero(options.num_experts, options.d_model);
  }
  /// w_router is normal with variance 1 / d_model.
  SparseMixerRouter(const Options& options, Rng& rng) : SparseMixerRouter(options) {
    w_router = lecun_normal<S>(options.num_experts, options.d_model, rng);
  }

  Index d_model() const { return w_router.cols(); }
  Index num_experts() const { return w_router.rows(); }
  const Options& options() const { return options_; }

  /// Routing for inference: the two picks are the best of what is left.
  /// O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin(x, info, routing, workspace, executor);
    pick_all(routing, workspace.sparse_mixer, executor, [](Index, int, const S*, Index, Index best) {
      return Pick{best, S(1)};
    });
  }

  /// Routing for training: picks are drawn. Draws 2 * tokens * (num_experts + 1) numbers.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin(x, info, routing, workspace, executor);
    ReusedMatrix<S>& draws = workspace.sparse_mixer.draws;
    draws.resize(x.rows(), 2 * (num_experts() + 1));
    fill_uniform(draws, 0, 1, rng);
    pick_drawn(draws, routing, workspace.sparse_mixer, executor);
  }

  /// Routing for training under given uniform draws from [0, 1) [tokens, 2 * (num_experts + 1)]: for the
  /// first pick one for every expert and one for the gate's factor, then the same for the second.
  template <Executor E = DefaultExecutor>
  void route_with_draws(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& draws, const BatchInfo& info,
                        Routing<S>& routing, RouterWorkspace<S>& workspace, const E& executor = {}) const {
    require_shape(draws, x.rows(), 2 * (num_experts() + 1), "SparseMixerRouter::route_with_draws", "draws");
    require_apart("SparseMixerRouter::route_with_draws", "routing", routing, "draws", draws);
    require_apart("SparseMixerRouter::route_with_draws", "the workspace", workspace, "draws", draws);
    begin(x, info, routing, workspace, executor);
    pick_drawn(draws, routing, workspace.sparse_mixer, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's w_router. `x` has zeros in rows of tokens that are not
  /// valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, SparseMixerRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, "SparseMixerRouter::backward");
    check_routing_gradient(gradient, routing, "SparseMixerRouter::backward");
    ReusedMatrix<S>& d_logits = workspace.d_logits;
    d_logits.setZero(x.rows(), num_experts());
    Buffer<S>& d_gate = workspace.sparse_mixer.d_gate;
    const Index choices = routing.chosen.size();
    d_gate.reserve(routing.chosen.gate.capacity() + num_experts());
    d_gate.assign(choices + num_experts(), S(0));
    for (Index c = 0; c < gradient.d_chosen_gate.size(); ++c) d_gate[c] = gradient.d_chosen_gate[c];
    for (Index a = 0; a < gradient.d_gate.size(); ++a) d_gate[routing.plan.choice[a]] += gradient.d_gate[a];
    S* const shares = d_gate.data() + choices;
    for (Index t = 0; t < x.rows(); ++t) {
      if (!routing.is_valid(t)) continue;
      const S* const z = &routing.router_logits(t, 0);
      const Index begin = routing.chosen.token_begin[t];
      for (Index c = begin; c < routing.chosen.token_begin[t + 1]; ++c) {
        const Index expert = routing.chosen.expert[c];
        find_shares(z, c == begin ? Index(-1) : routing.chosen.expert[begin], shares);
        const S d = d_gate[c] * shares[expert];
        S others = 0;  // 1 - shares[expert], where that rounds to 1 too
        for (Index e = 0; e < num_experts(); ++e) {
          if (e == expert) continue;
          others += shares[e];
          d_logits(t, e) -= shares[e] * d;
        }
        d_logits(t, expert) += others * d;
      }
      if (gradient.d_router_probs.size() > 0)
        softmax_backward(num_experts(), &routing.router_probs(t, 0), &gradient.d_router_probs(t, 0),
                         &d_logits(t, 0));
    }
    add_valid_rows(routing, gradient.d_router_logits, d_logits);
    router_linear_backward(x, w_router, d_logits, grad.w_router, d_x, executor);
  }

  /// The same with a workspace of its own, here and below: it allocates.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, info, routing, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route(x, rng, info, routing, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, SparseMixerRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }
  template <Executor E = DefaultExecutor>
  void route_with_draws(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& draws, const BatchInfo& info,
                        Routing<S>& routing, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    route_with_draws(x, draws, info, routing, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const SparseMixerRouter& grad) const {
    check_router_backward(*this, x, routing, grad, "SparseMixerRouter::backward");
    check_choices(routing, "SparseMixerRouter::backward");
  }

  /// Appends an expert whose logits come from `w` [d_model].
  void add_expert(const Vector<S>& w) {
    w_router = with_row(w_router, w, "SparseMixerRouter::add_expert");
    options_.num_experts = num_experts();
  }

  /// Removes experts, named in any order. Throws, and changes nothing, when one does not exist or is named
  /// twice, or none would be left.
  void remove_experts(const std::vector<Index>& experts) {
    constexpr const char* kWhere = "SparseMixerRouter::remove_experts";
    const std::vector<Index> kept = experts_without(experts, num_experts(), 1, kWhere);
    w_router = take_rows(w_router, kept, num_experts(), kWhere, "w_router");
    options_.num_experts = num_experts();
  }
  /// The same for one expert.
  void remove_expert(Index expert) { remove_experts({expert}); }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_router"}, self.w_router...);
  }

  Matrix<S> w_router;  ///< [num_experts, d_model]

 private:
  static constexpr S kSmallest = (std::numeric_limits<S>::min)();

  struct Pick {
    Index expert;
    S factor;  // of its gate
  };

  // shares [num_experts] = softmax over the experts that nearly tie with the best, `without` (the first
  // pick, or -1) left out; 0 for the others. Returns the best, or -1 where nobody is left.
  Index find_shares(const S* z, Index without, S* shares) const {
    Index best = -1;
    for (Index e = 0; e < num_experts(); ++e)
      if (e != without && !is_unavailable(z[e]) && (best < 0 || z[e] > z[best])) best = e;
    S sum = 0;
    for (Index e = 0; e < num_experts(); ++e) {
      shares[e] = 0;
      if (best < 0 || e == without || is_unavailable(z[e])) continue;
      if (!is_equal(z[e], z[best]) &&
          (z[best] - z[e]) / (std::max)(std::abs(z[e]), z[best]) > S(2 * options_.jitter))
        continue;
      sum += shares[e] = std::exp(z[e] - z[best]);
    }
    for (Index e = 0; e < num_experts() && best >= 0; ++e) shares[e] /= sum;
    return best;
  }

  template <class E>
  void begin(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const RouterWorkspace<S>& workspace, const E& executor) const {
    begin_route(*this, x, info, routing, workspace, "SparseMixerRouter::route",
                {.router_logits = true, .router_probs = true});
    routing.router_logits.resize(x.rows(), num_experts());
    routing.router_probs.resize(x.rows(), num_experts());
    router_linear(x, w_router, routing.router_logits, executor);
  }

  // Draws the picks of training.
  template <class E>
  void pick_drawn(const ConstMatrixRef<S>& draws, Routing<S>& routing, SparseMixerWorkspace<S>& workspace,
                  const E& executor) const {
    pick_all(routing, workspace, executor, [&](Index t, int pick, const S* shares, Index n, Index best) {
      const S* const u = &draws.coeffRef(t, pick * (num_experts() + 1));
      Index drawn = -1;
      S largest = 0;
      for (Index e = 0; e < n; ++e) {  // argmax of log share + Gumbel, as log(share) - log(-log(u))
        if (!(shares[e] > S(0))) continue;
        const S value = std::log(shares[e]) - std::log(-std::log((std::max)(u[e], kSmallest)));
        if (drawn < 0 || value > largest) {
          drawn = e;
          largest = value;
        }
      }
      return Pick{drawn, drawn == best || u[n] > S(0.75) ? S(1) : S(0.3333)};
    });
  }

  // pick(token, 0 or 1, shares, num_experts, best) picks one of the experts with shares.
  template <class E, class PickOne>
  void pick_all(Routing<S>& routing, SparseMixerWorkspace<S>& workspace, const E& executor,
                const PickOne& pick) const {
    const Index tokens = routing.num_tokens(), experts = num_experts();
    Choices<S>& chosen = routing.chosen;
    Buffer<Index>& picked = workspace.picked;
    Buffer<S>& gate = workspace.gate;
    workspace.shares.resize(tokens, experts);
    picked.assign(2 * tokens, -1);
    gate.assign(2 * tokens, S(0));
    for_each_block(tokens, executor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        const S* const z = &routing.router_logits(t, 0);
        TokenState& state = routing.plan.token_state[t];
        check_logits(experts, z, state);
        if (state != TokenState::valid) {
          routing.router_probs.row(t).setZero();
          continue;
        }
        softmax(experts, z, &routing.router_probs(t, 0));
        S* const shares = &workspace.shares(t, 0);
        for (const int i : {0, 1}) {
          const Index best = find_shares(z, i == 0 ? Index(-1) : picked[2 * t], shares);
          if (best < 0) break;
          const Pick one = pick(t, i, shares, experts, best);
          picked[2 * t + i] = one.expert;
          gate[2 * t + i] = one.factor * shares[one.expert];
        }
      }
    });
    chosen.expert.reserve(2 * tokens);
    chosen.gate.reserve(2 * tokens);
    for (Index t = 0; t < tokens; ++t) {
      for (Index c = 2 * t; c < 2 * t + 2; ++c) {
        if (picked[c] < 0) continue;
        chosen.expert.push_back(picked[c]);
        chosen.gate.push_back(gate[c]);
      }
      chosen.token_begin[t + 1] = chosen.size();
    }
    dispatch_all(chosen, routing.plan);
  }

  Options options_;
};

}  // namespace moe
