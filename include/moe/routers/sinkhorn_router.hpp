// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <moe/core/reused.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/token_choice.hpp>
#include <moe/routing/token_choice_backward.hpp>

namespace moe {

/// Options of SinkhornRouter; the same for every scalar.
struct SinkhornOptions {
  Index d_model = 0;
  Index num_experts = 0;
  Index top_k = 1;
  /// Balancing ends when the experts' factors change by less than this on average.
  double tolerance = 1e-4;
  Index max_iterations = 1000;  ///< balancing ends after these at the latest
  /// Capacity factor of inference, see expert_capacity; none: dropless.
  std::optional<double> capacity{};
  /// Capacity factor of training; none: dropless.
  std::optional<double> training_capacity{};
  CapacityRule capacity_rule{};  ///< of both
  Overflow overflow = Overflow::drop;
  Priority priority = Priority::token_order;
};

namespace detail {

// workspace.plan [tokens, experts] = d0_t * exp(z_te) * d1_e for the valid tokens [begin, end), whose rows
// sum to 1 / tokens and whose columns to 1 / experts, about; minus infinity where an expert is unavailable.
template <class S>
void balance_by_sinkhorn(const std::type_identity_t<ConstMatrixRef<S>>& z, const Buffer<TokenState>& state,
                         Index begin, Index end, const SinkhornOptions& options,
                         SinkhornWorkspace<S>& workspace) {
  auto& [plan, factors, sums] = workspace;
  const Index experts = z.cols();
  constexpr S kEpsilon = S(1e-8);
  Index tokens = 0;
  for (Index t = begin; t < end; ++t) {
    if (state[t] != TokenState::valid) continue;
    ++tokens;
    // d0_t absorbs the factor of a row, so that the plan is the same, but for kEpsilon. Every row has a 1
    // then, however far its logits are from those of other tokens.
    const S largest = max_finite(experts, &z.coeffRef(t, 0));
    for (Index e = 0; e < experts; ++e)
      plan(t, e) = is_unavailable(z(t, e)) ? S(0) : std::exp(z(t, e) - largest);
  }
  if (tokens == 0) return;
  factors.reserve(2 * experts + z.rows());  // for the largest group
  factors.resize(2 * experts + (end - begin));
  sums.resize(experts);
  S* const d1 = factors.data();
  S* const before = d1 + experts;
  S* const d0 = before + experts;  // of token begin + i
  double* const sum = sums.data();
  std::fill(d1, d1 + experts, S(1));
  for (Index iteration = 0; iteration < options.max_iterations; ++iteration) {
    std::copy(d1, d1 + experts, before);
    std::fill(sum, sum + experts, 0.0);
    for (Index t = begin; t < end; ++t) {
      if (state[t] != TokenState::valid) continue;
      S row = 0;
      for (Index e = 0; e < experts; ++e) row += d1[e] * plan(t, e);
      d0[t - begin] = S(1) / (S(tokens) * (row + kEpsilon));
      for (Index e = 0; e < experts; ++e) sum[e] += double(d0[t - begin] * plan(t, e));
    }
    S change = 0;
    for (Index e = 0; e < experts; ++e) {
      d1[e] = S(1) / (S(experts) * (S(sum[e]) + kEpsilon));
      change += std::abs(d1[e] - before[e]);
    }
    if (!(change / S(experts) > S(options.tolerance))) break;
  }
  for (Index t = begin; t < end; ++t)
    for (Index e = 0; e < experts && state[t] == TokenState::valid; ++e)
      plan(t, e) = is_unavailable(z(t, e)) ? z(t, e) : d1[e] * plan(t, e) * d0[t - begin];
}

}  // namespace detail

/// Balanced assignment by Sinkhorn's algorithm (S-BASE; Clark et al. 2022, appendix B; as Megatron-LM
/// computes it). In training the plan that makes tokens and experts even selects each token's top_k
/// experts; in inference its logits do. Gates are the sigmoid of the logit for top_k = 1, else the softmax
/// over all experts: the plan only selects, and no gradient goes through it. In training an assignment
/// depends on all tokens of the group. Ties go to the lower expert.
template <class S>
class SinkhornRouter {
 public:
  using Scalar = S;
  using Options = SinkhornOptions;

  /// w_router is zero, to be filled from elsewhere. Throws std::invalid_argument for options out of range.
  explicit SinkhornRouter(const Options& options) : options_(options) {
    require(options.d_model > 0, "SinkhornRouter: d_model = ", options.d_model, ", expected at least 1");
    require(options.num_experts > 0, "SinkhornRouter: num_experts = ", options.num_experts,
            ", expected at least 1");
    check_token_choice(options, "SinkhornRouter");
    require(number_kind(options.tolerance) == NumberKind::finite && options.tolerance >= 0,
            "SinkhornRouter: tolerance = ", options.tolerance, ", expected a finite number of at least 0");
    require(options.max_iterations > 0, "SinkhornRouter: max_iterations = ", options.max_iterations,
            ", expected at least 1");
    w_router.setZero(options.num_experts, options.d_model);
  }
  /// w_router is normal with variance 1 / d_model.
  SinkhornRouter(const Options& options, Rng& rng) : SinkhornRouter(options) {
    w_router = lecun_normal<S>(options.num_experts, options.d_model, rng);
  }

  Index d_model() const { return w_router.cols(); }
  Index num_experts() const { return w_router.rows(); }
  const Options& options() const { return options_; }

  /// Routing for inference: by the logits, capacity `options.capacity`.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin(x, info, routing, workspace, executor);
    route_by_logits(rule(options_.capacity), {}, info, routing, workspace, executor);
  }

  /// Routing for training: balanced, capacity `options.training_capacity`. Draws nothing from the Rng.
  /// O(iterations * tokens * num_experts) beside the logits.
  template <Executor E = DefaultExecutor>
  void route(const ConstMatrixRef<S>& x, Rng&, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace, const E& executor = {}) const {
    begin(x, info, routing, workspace, executor);
    const auto& z = routing.router_logits;
    Buffer<TokenState>& state = routing.plan.token_state;
    for (Index t = 0; t < x.rows(); ++t) check_logits(num_experts(), &z(t, 0), state[t]);
    workspace.sinkhorn.plan.resize(x.rows(), num_experts());
    for (Index g = 0; g < info.num_groups(); ++g)
      detail::balance_by_sinkhorn(z, state, info.begin_of(g), info.end_of(g, x.rows()), options_,
                                  workspace.sinkhorn);
    route_by_logits(rule(options_.training_capacity), {.ranking = &workspace.sinkhorn.plan}, info, routing,
                    workspace, executor);
  }

  /// Adds to d_x [tokens, d_model] and to grad's w_router. `x` has zeros in rows of tokens that are not
  /// valid. O(tokens * num_experts * d_model).
  template <Executor E = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& x, const Routing<S>& routing, const RoutingGradient<S>& gradient,
                MatrixRef<S> d_x, SinkhornRouter& grad, RouterWorkspace<S>& workspace,
                const E& executor = {}) const {
    check_backward(x, routing, grad);
    check_router_operands(x, routing, gradient, d_x, grad, workspace, "SinkhornRouter::backward");
    ReusedMatrix<S>& d_logits = workspace.d_logits;
    selection_backward(rule({}), routing, gradient, workspace.token_choice, d_logits);
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
                MatrixRef<S> d_x, SinkhornRouter& grad, const E& executor = {}) const {
    RouterWorkspace<S> workspace;
    backward(x, routing, gradient, d_x, grad, workspace, executor);
  }

  /// Throws what backward would throw for its arguments, and changes nothing.
  void check_backward(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                      const SinkhornRouter& grad) const {
    check_router_backward(*this, x, routing, grad, "SinkhornRouter::backward");
  }

  /// Appends an expert whose logits come from `w` [d_model].
  void add_expert(const Vector<S>& w) {
    w_router = with_row(w_router, w, "SinkhornRouter::add_expert");
    options_.num_experts = num_experts();
  }

  /// Removes experts, named in any order. Throws, and changes nothing, when one does not exist or is named
  /// twice, or fewer than top_k would be left.
  void remove_experts(const std::vector<Index>& experts) {
    constexpr const char* kWhere = "SinkhornRouter::remove_experts";
    const std::vector<Index> kept = experts_without(experts, num_experts(), options_.top_k, kWhere);
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
  SeatingRule rule(std::optional<double> capacity_factor) const {
    return {.gate = {.score = options_.top_k == 1 ? Score::sigmoid : Score::softmax},
            .top_k = options_.top_k,
            .capacity_factor = capacity_factor,
            .capacity_rule = options_.capacity_rule,
            .overflow = options_.overflow,
            .priority = options_.priority};
  }

  template <class E>
  void begin(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const RouterWorkspace<S>& workspace, const E& executor) const {
    begin_route(*this, x, info, routing, workspace, "SinkhornRouter::route",
                {.router_logits = true, .router_probs = true});
    routing.router_logits.resize(x.rows(), num_experts());
    router_linear(x, w_router, routing.router_logits, executor);
  }

  Options options_;
};

}  // namespace moe
