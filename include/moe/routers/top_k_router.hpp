// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/routers/top_k_options.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/token_choice.hpp>
#include <moe/routing/token_choice_backward.hpp>

namespace moe {

/// Each token takes its top_k experts by a linear layer's logits, z = x w_router^T (+ b_router).
/// With its options: Switch (top_k 1), GShard, GLaM, V-MoE, Mixtral, Grok-1, DBRX, OLMoE, Qwen, DeepSeek,
/// gpt-oss, Llama-4, top-p routing, ReMoE, ... Selection is by the logits, or by scores plus a bias; ties to
/// the lower expert.
/// @code
/// moe::Rng rng(1);
/// const moe::TopKRouter<float> router({.d_model = 8, .num_experts = 4, .top_k = 2, .capacity = 1.25}, rng);
/// const moe::Matrix<float> x = moe::Matrix<float>::Ones(16, 8);
/// moe::Routing<float> routing;
/// router.route(x, {}, routing);
/// assert(routing.chosen.size() == 32);               // before capacity
/// assert(routing.plan.num_assignments() == 2 * 10);  // equal tokens want the same two experts
/// @endcode
template <class S>
class TopKRouter {
 public:
  using Scalar = S;

  using Options = TopKOptions;

  /// All parameters are zero, to be filled from elsewhere. Throws std::invalid_argument for options out
  /// of range.
  explicit TopKRouter(const Options& options) : options_(options) {
    check_top_k_options(options);
    w_router.setZero(options.num_experts, options.d_model);
    if (options.bias) b_router.setZero(options.num_experts);
    if (options.selection_bias) selection_bias.setZero(options.num_experts);
  }
  /// w_router is normal with variance 1 / d_model, biases are zero.
  TopKRouter(const Options& options, Rng& rng) : TopKRouter(options) {
    w_router = lecun_normal<S>(options.num_experts, options.d_model, rng);
  }

  Index d_model() const { return w_router.cols(); }
  Index num_experts() const { return w_router.rows(); }
  const Options& options() const { return options_; }

  /// Routing for inference: no jitter, no noise, capacity `options.capacity`.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin_route(*this, x, info, routing, workspace, "TopKRouter::route",
                {.router_logits = true, .router_probs = true});
    logits(x, routing.router_logits, executor);
    route_by_logits(rule(options_.capacity), {.bias = &selection_bias}, info, routing, workspace, executor);
  }

  /// Routing for training: jitter, noise, random second experts, drawn in this order for all tokens, masked
  /// ones too; capacity `options.training_capacity`. Throws when gates would be constant (see
  /// Options::allow_constant_gate).
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    require_trainable(options_, rule({}), num_experts(), "TopKRouter::route");
    const bool jitters = options_.jitter > 0, is_noisy = options_.noise_stddev > 0;
    begin_route(*this, x, info, routing, workspace, "TopKRouter::route",
                {.router_logits = true, .router_probs = true, .noise = is_noisy, .input_factor = jitters});
    if (jitters) {
      routing.input_factor.resize(x.rows(), x.cols());
      fill_uniform(routing.input_factor, 1 - options_.jitter, 1 + options_.jitter, rng);
      workspace.input = x.cwiseProduct(routing.input_factor);
      logits(workspace.input, routing.router_logits, executor);
    } else {
      logits(x, routing.router_logits, executor);
    }
    if (is_noisy) {
      RoutingNoise<S>& noise = routing.noise;
      noise.top_k = options_.top_k;
      noise.draws.resize(x.rows(), num_experts());
      fill_normal(noise.draws, 1.0, rng);
      noise.stddev.setConstant(x.rows(), num_experts(), S(options_.noise_stddev));
      noise.noisy_logits = routing.router_logits + S(options_.noise_stddev) * noise.draws;
    }
    SeatingRule seating = rule(options_.training_capacity);
    SelectionInputs<S> inputs{.bias = &selection_bias};
    if (options_.random_second_threshold > 0) {
      Buffer<double>& draws = workspace.token_choice.second_draws;
      draws.resize(x.rows() * (options_.top_k - 1));
      for (double& draw : draws) draw = rng.uniform();
      seating.second_threshold = options_.random_second_threshold;
      inputs.second_draws = {draws.begin(), draws.end()};
    }
    route_by_logits(seating, inputs, info, routing, workspace, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's parameters. `x` has zeros in rows of tokens that are
  /// not valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, TopKRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, "TopKRouter::backward");
    ReusedMatrix<S>& d_logits = workspace.d_logits;
    SeatingRule seating = rule({});
    seating.second_threshold = (std::max)(options_.second_threshold, options_.random_second_threshold);
    selection_backward(seating, routing, gradient, workspace.token_choice, d_logits);
    add_valid_rows(routing, gradient.d_router_logits, d_logits);
    if (b_router.size() > 0) bias_backward(d_logits, grad.b_router);
    if (routing.input_factor.size() == 0) {
      router_linear_backward(x, w_router, d_logits, grad.w_router, d_x, executor);
    } else {
      ReusedMatrix<S>&input = workspace.input, &d_input = workspace.d_input;
      input = x.cwiseProduct(routing.input_factor);
      d_input.setZero(x.rows(), x.cols());
      router_linear_backward(input, w_router, d_logits, grad.w_router, d_input, executor);
      d_x += d_input.cwiseProduct(routing.input_factor);
    }
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
                MatrixRef<S> d_x, TopKRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const TopKRouter& grad) const {
    require_trainable(options_, rule({}), num_experts(), "TopKRouter::backward");
    check_router_backward(*this, x, routing, grad, "TopKRouter::backward");
  }

  /// Appends an expert whose logits come from `w` [d_model] (and biases 0). Throws when the group limit
  /// cannot work with one more.
  void add_expert(const Vector<S>& w) {
    check_group_limit(options_.group_limit, num_experts() + 1, options_.top_k, "TopKRouter::add_expert");
    Matrix<S> router = with_row(w_router, w, "TopKRouter::add_expert");
    Vector<S> bias = b_router, selection = selection_bias;
    for (Vector<S>* b : {&bias, &selection})
      if (b->size() > 0) {
        b->conservativeResize(b->size() + 1);
        (*b)[b->size() - 1] = 0;
      }
    w_router = std::move(router);
    b_router = std::move(bias);
    selection_bias = std::move(selection);
    options_.num_experts = num_experts();
  }

  /// Removes experts, named in any order. Throws, and changes nothing, when one does not exist or is named
  /// twice, or fewer than top_k would be left, or a number with which the group limit cannot work. Those that
  /// are left form the groups anew: remove as many of each to keep the others of a group together.
  void remove_experts(const std::vector<Index>& experts) {
    constexpr const char* kWhere = "TopKRouter::remove_experts";
    const std::vector<Index> kept = experts_without(experts, num_experts(), options_.top_k, kWhere);
    check_group_limit(options_.group_limit, Index(kept.size()), options_.top_k, kWhere);
    Matrix<S> router = take_rows(w_router, kept, num_experts(), kWhere, "w_router");
    Vector<S> bias = take_rows(b_router, kept, num_experts(), kWhere, "b_router");
    Vector<S> selection = take_rows(selection_bias, kept, num_experts(), kWhere, "selection_bias");
    w_router = std::move(router);
    b_router = std::move(bias);
    selection_bias = std::move(selection);
    options_.num_experts = num_experts();
  }
  /// The same for one expert.
  void remove_expert(Index expert) { remove_experts({expert}); }

  /// From now on no token chooses these experts, named in any order. Where `renormalise`, their logits are
  /// minus infinity, and scores are as if they were not there; else their selection bias is, and scores stay
  /// what they are among all. A token takes fewer experts where fewer than top_k are left. Throws, and
  /// changes nothing, when one does not exist or is named twice, when none would be left, and for options
  /// that exclude a selection bias where that is needed.
  void make_unavailable(const std::vector<Index>& experts, bool renormalise) {
    experts_without(experts, num_experts(), 1, "TopKRouter::make_unavailable");
    Options options = options_;
    (renormalise ? options.bias : options.selection_bias) = true;
    check_top_k_options(options);
    Vector<S>& bias = renormalise ? b_router : selection_bias;
    if (bias.size() == 0) bias.setZero(num_experts());
    for (const Index e : experts) bias[e] = -std::numeric_limits<S>::infinity();
    options_ = options;
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_router"}, self.w_router...);
    if (((self.b_router.size() > 0) || ...)) visit_array(f, {"b_router"}, self.b_router...);
    if (((self.selection_bias.size() > 0) || ...))
      visit_array(f, {"selection_bias", Kind::buffer}, self.selection_bias...);
  }

  Matrix<S> w_router;        ///< [num_experts, d_model]
  Vector<S> b_router;        ///< [num_experts], empty without bias
  Vector<S> selection_bias;  ///< [num_experts], empty without; a buffer: no gradient reaches it

 private:
  SeatingRule rule(std::optional<double> capacity_factor) const {
    return {.gate = {.score = options_.score,
                     .renormalise = options_.renormalise || !options_.softmax_before_selection,
                     .epsilon = options_.renormalise_epsilon,
                     .minimum = options_.renormalise_minimum,
                     .scale = options_.gate_scale},
            .gate_side = options_.gate_side,
            .top_k = options_.top_k,
            .top_p = options_.top_p,
            .second_threshold = options_.second_threshold,
            .group_limit = options_.group_limit,
            .capacity_factor = capacity_factor,
            .capacity_rule = options_.capacity_rule,
            .overflow = options_.overflow,
            .priority = options_.priority,
            .renormalise_after_drop = options_.renormalise_after_drop};
  }

  template <class X, class E>
  void logits(const X& x, ReusedMatrix<S>& z, const E& executor) const {
    z.resize(x.rows(), num_experts());
    router_linear(x, w_router, z, executor);
    if (b_router.size() > 0) add_bias(b_router, z);
  }

  Options options_;
};

}  // namespace moe
