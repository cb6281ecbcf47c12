// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include <moe/math/init.hpp>
#include <moe/routing/token_choice.hpp>

namespace moe {

/// Options of TopKRouter; the same for every scalar.
struct TopKOptions {
  Index d_model = 0;
  Index num_experts = 0;
  Index top_k = 2;
  /// Below 1: a token chooses only until the router_probs of its choices sum to more than this, top_k
  /// at most (top-p routing, Huang et al. 2024, "Harder Tasks Need More Experts", eq. 4: 0.4 and
  /// top_k = num_experts).
  double top_p = 1;
  /// A token takes an expert after its first only where its gate among all top_k is above this (ST-MoE,
  /// Zoph et al. 2022: 0.2). Gates stay what they are among all top_k.
  double second_threshold = 0;
  /// Above 0: in training a token takes an expert after its first with probability
  /// min(1, gate / random_second_threshold) instead (random routing; GShard, Lepikhin et al. 2021,
  /// algorithm 1: 0.5; ST-MoE: 0.2).
  double random_second_threshold = 0;
  /// What gates are made of. With relu, a token chooses the experts with positive logits, top_k at most
  /// (ReMoE, Wang et al. 2024: top_k = num_experts).
  Score score = Score::softmax;
  /// Softmax over all experts before selection (true), or over the selected ones after it.
  bool softmax_before_selection = true;
  /// Whether gates of a token are divided by their sum. After selection a softmax always has a sum of 1.
  bool renormalise = false;
  /// Added to that sum. The authors' value where they publish one (DeepSeek-V3: 1e-20); it matters
  /// where all scores of a token underflow.
  double renormalise_epsilon = 0;
  /// The least that renormalised gates are divided by (ERNIE-4.5: 1e-12).
  double renormalise_minimum = 0;
  /// Every gate is multiplied by this, after renormalising (DeepSeek-V3: 2.5).
  double gate_scale = 1;
  /// What gates multiply: outputs, or inputs (Llama-4).
  GateSide gate_side = GateSide::output;
  bool bias = false;
  /// Whether there is a selection_bias, added to scores for selection alone: see
  /// update_selection_bias.
  bool selection_bias = false;
  GroupLimit group_limit{};
  /// In training logits get Gaussian noise of this standard deviation (V-MoE: 1 / num_experts).
  double noise_stddev = 0;
  /// In training x is multiplied by a draw from [1 - jitter, 1 + jitter], for the router only.
  double jitter = 0;
  /// Capacity factor of inference, see expert_capacity; none: dropless.
  std::optional<double> capacity{};
  /// Capacity factor of training; none: dropless.
  std::optional<double> training_capacity{};
  CapacityRule capacity_rule{};  ///< of both
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
  /// Whether gates that sum to 1 do so over the experts that kept the token, not over those that it
  /// chose. Gates that do not sum to 1 are what they are either way.
  bool renormalise_after_drop = false;
  /// Allows training where every gate is 1 and the router learns nothing from the task.
  bool allow_constant_gate = false;
};

/// Options of top-p routing, in which a token chooses experts until their router_probs sum to more than
/// top_p, however many these are (Huang et al. 2024, eq. 4).
inline TopKOptions top_p_options(Index d_model, Index num_experts, double top_p = 0.4) {
  return {.d_model = d_model, .num_experts = num_experts, .top_k = num_experts, .top_p = top_p};
}

/// Options of ReLU routing, in which a token chooses every expert with a positive logit, which is its gate
/// (ReMoE, Wang et al. 2024, eq. 5). Train with relu_balance_loss.
inline TopKOptions relu_options(Index d_model, Index num_experts) {
  return {.d_model = d_model, .num_experts = num_experts, .top_k = num_experts, .score = Score::relu};
}

/// Each token takes its top_k experts by a linear layer's logits, z = x w_router^T (+ b_router).
/// With its options: Switch (top_k 1), GShard, GLaM, V-MoE, Mixtral, Grok-1, DBRX, OLMoE, Qwen, DeepSeek,
/// gpt-oss, Llama-4, top-p routing, ReMoE, ... Selection is by the logits, or by scores plus a bias; ties to
/// the lower expert.
template <class S>
class TopKRouter {
 public:
  using Scalar = S;

  using Options = TopKOptions;

  /// All parameters are zero, to be filled from elsewhere. Throws std::invalid_argument for options out
  /// of range.
  explicit TopKRouter(const Options& options) : options_(options) {
    require(options.d_model > 0, "TopKRouter: d_model = ", options.d_model, ", expected at least 1");
    require(options.num_experts > 0, "TopKRouter: num_experts = ", options.num_experts,
            ", expected at least 1");
    check_token_choice(options, "TopKRouter");
    require(number_kind(options.jitter) == NumberKind::finite && options.jitter >= 0 && options.jitter < 1,
            "TopKRouter: jitter = ", options.jitter, " is not in [0, 1)");
    const auto at_least_0 = [](double value, const char* what) {
      require(number_kind(value) == NumberKind::finite && value >= 0, "TopKRouter: ", what, " = ", value,
              ", expected a finite number of at least 0");
    };
    at_least_0(options.renormalise_epsilon, "renormalise_epsilon");
    at_least_0(options.renormalise_minimum, "renormalise_minimum");
    const auto check_threshold = [&](double threshold, const char* what) {
      at_least_0(threshold, what);
      require(is_equal(threshold, 0.0) || (!options.selection_bias && !options.group_limit.applies() &&
                                           is_equal(options.top_p, 1.0) && options.score != Score::relu),
              "TopKRouter: ", what, " = ", threshold,
              " beside a selection bias, a group limit, top_p or relu, expected 0");
    };
    check_threshold(options.second_threshold, "second_threshold");
    check_threshold(options.random_second_threshold, "random_second_threshold");
    require(options.top_p > 0 && options.top_p <= 1, "TopKRouter: top_p = ", options.top_p,
            " is not in (0, 1]");
    at_least_0(options.noise_stddev, "noise_stddev");
    at_least_0(options.gate_scale, "gate_scale");
    require(options.gate_scale > 0, "TopKRouter: gate_scale = ", options.gate_scale,
            ", expected more than 0");
    require(options.score == Score::softmax || options.softmax_before_selection,
            "TopKRouter: a softmax after selection beside another score, expected one of the two");
    check_group_limit(options.group_limit, options.num_experts, options.top_k, "TopKRouter");
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
             const E& executor = {}) const {
    require_shape(x, x.rows(), d_model(), "TopKRouter::route", "x");
    require_apart("TopKRouter::route", "routing", routing, "x", x);
    begin_routing(x.rows(), num_experts(), info, routing, "TopKRouter::route");
    logits(x, routing.router_logits, executor);
    route_by_logits(rule(options_.capacity), selection_bias, info, routing, executor);
  }

  /// Routing for training: jitter, noise, random second experts, drawn in this order for all tokens, masked
  /// ones too; capacity `options.training_capacity`. Throws when gates would be constant (see
  /// Options::allow_constant_gate).
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng& rng, const BatchInfo& info, Routing<S>& routing,
             const E& executor = {}) const {
    require_shape(x, x.rows(), d_model(), "TopKRouter::route", "x");
    require_apart("TopKRouter::route", "routing", routing, "x", x);
    require_trainable(options_, rule({}), num_experts(), "TopKRouter::route");
    begin_routing(x.rows(), num_experts(), info, routing, "TopKRouter::route");
    if (options_.jitter > 0) {
      routing.has_input_factor = true;
      routing.input_factor.resize(x.rows(), x.cols());
      fill_uniform(routing.input_factor, 1 - options_.jitter, 1 + options_.jitter, rng);
      Matrix<S>& jittered = routing.scratch.input;
      jittered = x.cwiseProduct(routing.input_factor);
      logits(jittered, routing.router_logits, executor);
    } else {
      logits(x, routing.router_logits, executor);
    }
    if (options_.noise_stddev > 0) {
      RoutingNoise<S>& noise = routing.noise;
      noise.top_k = options_.top_k;
      noise.draws.resize(x.rows(), num_experts());
      fill_normal(noise.draws, 1.0, rng);
      noise.stddev.setConstant(x.rows(), num_experts(), S(options_.noise_stddev));
      noise.noisy_logits = routing.router_logits + S(options_.noise_stddev) * noise.draws;
    }
    SeatingRule seating = rule(options_.training_capacity);
    if (options_.random_second_threshold > 0) {
      Buffer<double>& draws = routing.scratch.second_draws;
      draws.resize(x.rows() * (options_.top_k - 1));
      for (double& draw : draws) draw = rng.uniform();
      seating.second_threshold = options_.random_second_threshold;
      seating.second_draws = draws.data();
    }
    route_by_logits(seating, selection_bias, info, routing, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's parameters. `x` has zeros in rows of tokens that are
  /// not valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, TopKRouter& grad, const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, "TopKRouter::backward");
    Matrix<S>& d_logits = routing.scratch.d_logits;
    SeatingRule seating = rule({});
    seating.second_threshold = (std::max)(options_.second_threshold, options_.random_second_threshold);
    selection_backward(seating, routing, gradient, d_logits);
    add_valid_rows(routing, gradient.d_router_logits, d_logits);
    if (b_router.size() > 0) bias_backward(d_logits, grad.b_router);
    if (!routing.has_input_factor) {
      router_linear_backward(x, w_router, d_logits, grad.w_router, d_x, executor);
    } else {
      Matrix<S>&input = routing.scratch.input, &d_input = routing.scratch.d_input;
      input = x.cwiseProduct(routing.input_factor);
      d_input.setZero(x.rows(), x.cols());
      router_linear_backward(input, w_router, d_logits, grad.w_router, d_input, executor);
      d_x += d_input.cwiseProduct(routing.input_factor);
    }
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
  void logits(const X& x, Matrix<S>& z, const E& executor) const {
    z.resize(x.rows(), num_experts());
    router_linear(x, w_router, z, executor);
    if (b_router.size() > 0) add_bias(b_router, z);
  }

  Options options_;
};

}  // namespace moe
