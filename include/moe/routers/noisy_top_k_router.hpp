// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/math/sigmoid.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/token_choice.hpp>
#include <moe/routing/token_choice_backward.hpp>

namespace moe {

/// Options of NoisyTopKRouter; the same for every scalar.
struct NoisyTopKOptions {
  Index d_model = 0;
  Index num_experts = 0;
  Index top_k = 2;
  double noise_epsilon = 1e-2;  ///< added to the noise's standard deviation
  /// Capacity factor of inference, see expert_capacity; none: dropless.
  std::optional<double> capacity{};
  /// Capacity factor of training; none: dropless.
  std::optional<double> training_capacity{};
  CapacityRule capacity_rule{};  ///< of both
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
  /// Whether gates sum to 1 over the experts that kept the token, not over those that it chose.
  bool renormalise_after_drop = false;
  /// Allows training where every gate is 1 and the router learns nothing from the task.
  bool allow_constant_gate = false;
};

/// Noisy top-k gating with trainable noise (Shazeer et al. 2017, eq. 3 to 5):
///   H(x) = x w_router^T + N(0, 1) * stddev,  stddev = softplus(x w_noise^T) + noise_epsilon
///   G(x) = softmax(KeepTopK(H(x), k))
/// Noise is drawn in training only. As in the authors' code (tensor2tensor) both weights start at
/// zero and noise_epsilon is 0.01. All logits of a new router are therefore equal: before training,
/// inference sends every token to the experts 0 to top_k - 1.
template <class S>
class NoisyTopKRouter {
 public:
  using Scalar = S;

  using Options = NoisyTopKOptions;

  /// Throws std::invalid_argument for options out of range.
  explicit NoisyTopKRouter(const Options& options) : options_(options) {
    require(options.d_model > 0, "NoisyTopKRouter: d_model = ", options.d_model, ", expected at least 1");
    require(options.num_experts > 0, "NoisyTopKRouter: num_experts = ", options.num_experts,
            ", expected at least 1");
    check_token_choice(options, "NoisyTopKRouter");
    require(number_kind(options.noise_epsilon) == NumberKind::finite && options.noise_epsilon >= 0,
            "NoisyTopKRouter: noise_epsilon = ", options.noise_epsilon,
            ", expected a finite number of at least 0");
    w_router.setZero(options.num_experts, options.d_model);
    w_noise.setZero(options.num_experts, options.d_model);
  }
  /// Draws nothing from the Rng: it is there so that all routers are made alike.
  NoisyTopKRouter(const Options& options, Rng&) : NoisyTopKRouter(options) {}

  Index d_model() const { return w_router.cols(); }
  Index num_experts() const { return w_router.rows(); }
  const Options& options() const { return options_; }

  /// Routing for inference: no noise, capacity `options.capacity`.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin_route(*this, x, info, routing, workspace, "NoisyTopKRouter::route",
                {.router_logits = true, .router_probs = true});
    logits(x, w_router, routing.router_logits, executor);
    route_by_logits(rule(options_.capacity), {}, info, routing, workspace, executor);
  }

  /// Routing for training: noise, capacity `options.training_capacity`. Throws when gates would be
  /// constant (see Options::allow_constant_gate).
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    require_trainable(options_, rule({}), num_experts(), "NoisyTopKRouter::route");
    require_shape(w_noise, num_experts(), d_model(), "NoisyTopKRouter::route", "w_noise");
    begin_route(*this, x, info, routing, workspace, "NoisyTopKRouter::route",
                {.router_logits = true, .router_probs = true, .noise = true});
    logits(x, w_router, routing.router_logits, executor);
    RoutingNoise<S>& noise = routing.noise;
    noise.top_k = options_.top_k;
    noise.draws.resize(x.rows(), num_experts());
    fill_normal(noise.draws, 1.0, rng);
    logits(x, w_noise, noise.stddev, executor);
    noise.noisy_logits.resize(x.rows(), num_experts());
    for (Index i = 0; i < noise.stddev.size(); ++i) {
      S& stddev = noise.stddev.data()[i];
      stddev = softplus(stddev) + S(options_.noise_epsilon);
      noise.noisy_logits.data()[i] = routing.router_logits.data()[i] + noise.draws.data()[i] * stddev;
    }
    route_by_logits(rule(options_.training_capacity), {}, info, routing, workspace, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's parameters. `x` has zeros in rows of tokens that are
  /// not valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, NoisyTopKRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, "NoisyTopKRouter::backward");
    const RoutingNoise<S>& noise = routing.noise;
    ReusedMatrix<S>& d_logits = workspace.d_logits;
    selection_backward(rule({}), routing, gradient, workspace.token_choice, d_logits);
    if (!noise.empty()) {
      // softplus'(a) = 1 - exp(-softplus(a)), and softplus(a) = stddev - noise_epsilon.
      ReusedMatrix<S>& d_noise = workspace.d_noise;
      d_noise.setZero(x.rows(), num_experts());
      for (Index t = 0; t < x.rows(); ++t) {
        if (!routing.is_valid(t)) continue;
        for (Index e = 0; e < num_experts(); ++e) {
          S d = d_logits(t, e) * noise.draws(t, e);
          if (gradient.d_noise_stddev.size() > 0) d += gradient.d_noise_stddev(t, e);
          d_noise(t, e) = -d * std::expm1(S(options_.noise_epsilon) - noise.stddev(t, e));
        }
      }
      router_linear_backward(x, w_noise, d_noise, grad.w_noise, d_x, executor);
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
                MatrixRef<S> d_x, NoisyTopKRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const NoisyTopKRouter& grad) const {
    require_trainable(options_, rule({}), num_experts(), "NoisyTopKRouter::backward");
    check_router_backward(*this, x, routing, grad, "NoisyTopKRouter::backward");
  }

  /// Appends an expert whose logits come from `w` [d_model]; its noise weights are zero.
  void add_expert(const Vector<S>& w) {
    Matrix<S> router = with_row(w_router, w, "NoisyTopKRouter::add_expert");
    w_noise = with_row(w_noise, Vector<S>(Vector<S>::Zero(d_model())), "NoisyTopKRouter::add_expert");
    w_router = std::move(router);
    options_.num_experts = num_experts();
  }

  /// Removes experts, named in any order. Throws, and changes nothing, when one does not exist or is named
  /// twice, or fewer than top_k would be left.
  void remove_experts(const std::vector<Index>& experts) {
    constexpr const char* kWhere = "NoisyTopKRouter::remove_experts";
    const std::vector<Index> kept = experts_without(experts, num_experts(), options_.top_k, kWhere);
    Matrix<S> router = take_rows(w_router, kept, num_experts(), kWhere, "w_router");
    w_noise = take_rows(w_noise, kept, num_experts(), kWhere, "w_noise");
    w_router = std::move(router);
    options_.num_experts = num_experts();
  }
  /// The same for one expert.
  void remove_expert(Index expert) { remove_experts({expert}); }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    visit_array(f, {"w_router"}, self.w_router...);
    visit_array(f, {"w_noise"}, self.w_noise...);
  }

  Matrix<S> w_router;  ///< [num_experts, d_model]
  Matrix<S> w_noise;   ///< [num_experts, d_model]

 private:
  SeatingRule rule(std::optional<double> capacity_factor) const {
    return {.gate = {.renormalise = true},
            .top_k = options_.top_k,
            .capacity_factor = capacity_factor,
            .capacity_rule = options_.capacity_rule,
            .overflow = options_.overflow,
            .priority = options_.priority,
            .renormalise_after_drop = options_.renormalise_after_drop};
  }

  template <class E>
  void logits(const ConstMatrixRef<S>& x, const Matrix<S>& w, ReusedMatrix<S>& z, const E& executor) const {
    z.resize(x.rows(), w.rows());
    router_linear(x, w, z, executor);
  }

  Options options_;
};

}  // namespace moe
