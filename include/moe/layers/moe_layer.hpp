// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/output.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/apply_experts.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/layer_workspace.hpp>
#include <moe/layers/shared_experts.hpp>
#include <moe/math/activation.hpp>
#include <moe/math/init.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/edit_experts.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/router_workspace.hpp>

// The layer that joins a router and experts. Read forward() first.
namespace moe {

/// Experts that see every token, whatever the router says (DeepSeekMoE; Dai et al. 2024, eq. 9).
template <class E>
struct SharedExperts {
  /// The experts; they may have another d_ff than the routed ones.
  std::vector<E> experts{};
  /// Whether their outputs are scaled by sigmoid(x w^T) with a trained w (Qwen2-MoE).
  bool gated = false;
};

/// A Mixture-of-Experts layer (Shazeer et al. 2017, eq. 1):
///   y_t = sum over the experts e of token t of gate_te * expert_e(x_t)
///         (+ sum of shared experts) (+ output bias)
/// x and y are [tokens, d_model]. `info` says more about the batch, `executor` runs the tasks;
/// results are bitwise the same for every executor. A layer is a value; forward is const and may run
/// on several threads at once, each with a workspace or cache of its own. Experts holds the experts:
/// GroupedExperts, or what has its interface and its apply_experts.
///
/// Every call throws std::invalid_argument when shapes do not fit; nothing is changed then but the
/// output arguments, workspaces and caches. Cost: that of the products, O(tokens * top_k * d_model *
/// d_ff) and O(tokens * num_experts * d_model) for routing.
/// @code
/// moe::Rng rng(1);
/// const moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
///                           moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
/// const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8);
/// const moe::Matrix<float> y = layer.forward(x);
/// assert(y.rows() == 3 && y.cols() == 8);
/// @endcode
template <Expert E, Router R, class Experts = GroupedExperts<E>>
class MoELayer {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;
  using Workspace = LayerWorkspace<S, typename Experts::Workspace>;
  using Cache = LayerCache<S, typename Experts::Workspace, typename Experts::Cache>;
  static_assert(std::is_same_v<S, typename R::Scalar>,
                "the experts and the router of a layer must have the same Scalar");

  /// Throws std::invalid_argument unless widths and the number of experts fit the router, and for gated
  /// shared experts beside a router whose gates scale inputs.
  MoELayer(std::vector<E> experts, R router, SharedExperts<E> shared = {}, bool output_bias = false)
      : num_shared_(Index(shared.experts.size())), router_(std::move(router)) {
    require(!experts.empty(), "MoELayer: 0 experts, expected at least 1");
    require(Index(experts.size()) == router_.num_experts(), "MoELayer: ", experts.size(),
            " experts, but the router has num_experts = ", router_.num_experts());
    for (E& expert : shared.experts) experts.push_back(std::move(expert));
    experts_ = Experts(std::move(experts), d_model(), "MoELayer");
    require(!shared.gated || num_shared_ > 0,
            "MoELayer: gated shared experts, but 0 of them, expected at least 1");
    check_shared_gates(shared.gated ? num_shared_ : 0, gate_side_of(router_).value_or(GateSide::output),
                       "MoELayer");
    if (shared.gated) w_shared_gate.setZero(num_shared_, d_model());
    if (output_bias) b_output.setZero(d_model());
  }
  /// The same with experts that are together already, the last `num_shared` of them shared.
  template <std::same_as<Experts> G>
  MoELayer(G experts, R router, Index num_shared = 0)
      : experts_(std::move(experts)), num_shared_(num_shared), router_(std::move(router)) {
    require(num_shared >= 0, "MoELayer: num_shared = ", num_shared, ", expected at least 0");
    require(num_experts() == router_.num_experts(), "MoELayer: ", num_experts(),
            " experts, but the router has num_experts = ", router_.num_experts());
    require(experts_.width() == d_model(), "MoELayer: the experts have d_model = ", experts_.width(),
            ", expected ", d_model());
  }

  Index d_model() const { return router_.d_model(); }
  Index num_experts() const { return experts_.size() - num_shared_; }
  Index num_shared_experts() const { return num_shared_; }
  std::span<E> experts() { return experts_.part(0, num_experts()); }
  std::span<const E> experts() const { return experts_.part(0, num_experts()); }
  std::span<E> shared_experts() { return experts_.part(num_experts(), experts_.size()); }
  std::span<const E> shared_experts() const { return experts_.part(num_experts(), experts_.size()); }
  R& router() { return router_; }
  const R& router() const { return router_; }

  // ---- Inference: const, no noise.

  /// The routing of x [tokens, d_model], as forward makes it.
  template <Executor Ex = DefaultExecutor>
  Routing<S> route(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Routing<S> routing;
    RouterWorkspace<S> router;
    checked_route(x, info, routing, router, executor);
    return routing;
  }

  /// y [tokens, d_model] for x [tokens, d_model]. Allocates y and its buffers.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// y is a Matrix<S>, which is resized, or a view of the right shape: see Output. But for that nothing is
  /// allocated once the workspace has had such a call with as many tokens and groups. x, y and the workspace
  /// lie apart. So it is in all that follows: no argument that is written overlaps another.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, const Output<S>& y, Workspace& workspace,
               const BatchInfo& info = {}, const Ex& executor = {}) const {
    check_written(x, y, workspace, "the workspace");
    const CheckedPlan<S> routed = checked_route(x, info, workspace.routing, workspace.router, executor);
    run(x, routed, y, workspace, workspace.expert_workspace, executor);
  }

  /// Makes room in a workspace for batches of up to so many tokens, in as many groups as `info` has: by a
  /// forward pass of that many zeros. A router of your own may still need more for other tokens.
  template <Executor Ex = DefaultExecutor>
  void reserve(Workspace& workspace, Index max_tokens, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    require(max_tokens >= 0, "reserve: max_tokens = ", max_tokens, ", expected 0 or more");
    Matrix<S> y;
    forward(Matrix<S>::Zero(max_tokens, d_model()), y, workspace, info, executor);
  }

  /// Output under a routing made before: by route(), stored, edited or made by hand.
  template <std::same_as<Routing<S>> Made, Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const Made& routing, const Ex& executor = {}) const {
    check_input(x);
    const CheckedPlan<S> routed(routing.plan, x.rows(), num_experts(), "MoELayer::forward");
    Workspace workspace;
    Matrix<S> y(x.rows(), d_model());
    run(x, routed, y, workspace, workspace.expert_workspace, executor);
    return y;
  }

  // ---- Differentiable forward: the same values, and a cache for backward.

  /// y [tokens, d_model]; `cache` is what backward needs. Without noise and with the capacity of inference.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, cache, info, executor);
    return y;
  }

  /// The same into y.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, const Output<S>& y, Cache& cache, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    check_written(x, y, cache, "the cache");
    forward_routed(x, checked_route(x, info, cache.routing, cache.router, executor), y, cache, executor);
  }

  /// Training: with the router's noise, jitter and training capacity. An Rng means training.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Rng& rng, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, rng, y, cache, info, executor);
    return y;
  }

  /// The same into y.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Rng& rng, const Output<S>& y, Cache& cache,
               const BatchInfo& info = {}, const Ex& executor = {}) const {
    check_input(x);
    check_written(x, y, cache, "the cache");
    route_with(router_, x, rng, info, cache.routing, cache.router, executor);
    const auto routed = CheckedPlan<S>::of_router(cache.routing, x.rows(), num_experts(), "MoELayer::route");
    forward_routed(x, routed, y, cache, executor);
  }

  /// Differentiable, with a routing made before, which may be cache.routing. Gradients are exact where it
  /// is the routing that this layer's router makes of x.
  template <std::same_as<Routing<S>> Made, Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const Made& routing, Cache& cache,
                    const Ex& executor = {}) const {
    check_input(x);
    check_plan(routing.plan, x.rows(), num_experts(), "MoELayer::forward");
    if (routing.chosen.token_begin.size() > 0) check_choices(routing, "MoELayer::forward");
    Matrix<S> y(x.rows(), d_model());
    check_written(x, y, cache, "the cache");
    if (&routing != &cache.routing) {
      require_apart("MoELayer::forward", "the cache", cache, "routing", routing);
      cache.routing = routing;
    }
    forward_routed(x, CheckedPlan<S>::trusted(cache.routing.plan), y, cache, executor);
    return y;
  }

  // ---- What is none of these: one error of the compiler's in place of a list of all.

  /// Does not compile: x is not a matrix of the layer's scalar.
  template <NotAMatrixOf<S> X, class... Rest>
  Matrix<S> forward(X&&, Rest&&...) const {
    static_assert(kNever<X>, "MoELayer::forward: x is not a matrix of the layer's scalar");
    return {};
  }
  /// Does not compile: these are not arguments of a forward pass.
  template <class Layer = MoELayer>
  Matrix<S> forward(...) const {
    static_assert(kNever<Layer>,
                  "MoELayer::forward takes (x), (x, y, workspace), (x, routing), (x, cache), "
                  "(x, y, cache), (x, rng, cache), (x, rng, y, cache), (x, routing, cache), "
                  "each with info and executor behind them");
    return {};
  }
  /// Does not compile: these are not arguments of a backward pass.
  template <class Layer = MoELayer>
  Matrix<S> backward(...) const {
    static_assert(kNever<Layer>,
                  "MoELayer::backward takes (d_y, cache, grad), (d_y, cache, grad, routing_gradient), "
                  "(d_y, cache, grad, routing_gradient, d_x), each with an executor behind them");
    return {};
  }

  // ---- Backward.

  /// d_x [tokens, d_model] from d_y; adds the parameters' gradients to `grad`, a layer made by
  /// zeros_like(layer). `routing_gradient` is the gradient of losses on cache.routing, e.g.
  /// 0.01f * load_balancing_loss(cache.routing).gradient. May be called again on the same cache.
  /// @code
  /// moe::Rng rng(1);
  /// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
  ///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
  /// const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8), d_y = x;
  /// decltype(layer)::Cache cache;
  /// const moe::Matrix<float> y = layer.forward(x, rng, cache);
  /// auto grad = moe::zeros_like(layer);
  /// const moe::Matrix<float> d_x =
  ///     layer.backward(d_y, cache, grad, 0.01f * moe::load_balancing_loss(cache.routing).gradient);
  /// assert(d_x.rows() == y.rows() && d_x.cols() == y.cols());
  /// @endcode
  template <Executor Ex = DefaultExecutor>
  Matrix<S> backward(const ConstMatrixRef<S>& d_y, Cache& cache, MoELayer& grad,
                     const RoutingGradient<S>& routing_gradient = {}, const Ex& executor = {}) const {
    Matrix<S> d_x(d_y.rows(), d_y.cols());
    backward(d_y, cache, grad, routing_gradient, d_x, executor);
    return d_x;
  }

  /// The same into `output`, d_x [tokens, d_model]. Allocates only when shapes grow.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& d_y, Cache& cache, MoELayer& grad,
                const RoutingGradient<S>& routing_gradient, const Output<S>& output,
                const Ex& executor = {}) const {
    const CheckedPlan<S> plan = check_backward(d_y, cache, grad, routing_gradient, output);
    MatrixRef<S> d_x = output.of_shape(d_y.rows(), d_model(), "MoELayer::backward", "d_x");
    apply_experts_backward(d_y, plan, experts_, cache, d_x, grad.experts_, executor);
    if constexpr (TrainableRouter<R>) {
      add_gate_gradient(routing_gradient, cache.d_gate, cache.routing.plan, cache.routing_gradient);
      route_backward_with(router_, cache.x, cache.routing, cache.routing_gradient, d_x, grad.router_,
                          cache.router, executor);
    }
    if (w_shared_gate.size() > 0) {
      shared_gate_backward(*plan, cache.shared_gate, cache.d_gate, cache.d_shared_gate);
      router_linear_backward(cache.x, w_shared_gate, cache.d_shared_gate, grad.w_shared_gate, d_x, executor);
    }
    if (b_output.size() > 0)
      bias_backward(d_y, grad.b_output, [&](Index t) { return cache.routing.is_valid(t); });
  }

  // ---- Experts come and go.

  /// Appends a routed expert; `w` [d_model] is its row of the router's weights. Throws, and changes
  /// nothing, when a width does not fit.
  /// @code
  /// moe::Rng rng(1);
  /// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
  ///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
  /// layer.add_expert({{.d_model = 8, .d_ff = 16}, rng}, moe::Vector<float>::Zero(8));
  /// layer.remove_experts({0, 1});
  /// assert(layer.num_experts() == 3);
  /// @endcode
  void add_expert(E expert, const Vector<S>& w) requires requires(R& r) { r.add_expert(w); }
  {
    require(expert.d_model() == d_model(),
            "MoELayer::add_expert: the expert has d_model = ", expert.d_model(), ", expected ", d_model());
    R router = router_;
    router.add_expert(w);
    experts_.insert(num_experts(), std::move(expert));
    router_ = std::move(router);
  }

  /// Removes routed experts, named in any order, and their rows of the router. Throws, and changes nothing,
  /// when one does not exist or is named twice, or the router could not work with those that are left. All at
  /// once, because a router with a group limit works with some numbers of experts only.
  void remove_experts(const std::vector<Index>& experts) requires requires(R& r) {
    r.remove_experts(experts);
  }
  {
    remove(experts, [&](R& router) { router.remove_experts(experts); });
  }
  /// The same for one expert.
  void remove_expert(Index expert) requires requires(R& r) { r.remove_expert(expert); }
  {
    remove({expert}, [&](R& router) { router.remove_expert(expert); });
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    const MoELayer& first = std::get<0>(std::tie(self...));
    (require(self.num_experts() == first.num_experts() && self.num_shared_ == first.num_shared_,
             "MoELayer::visit: a layer of ", self.num_experts(), " + ", self.num_shared_,
             " experts beside one of ", first.num_experts(), " + ", first.num_shared_),
     ...);
    if constexpr (requires { R::visit(f, self.router_...); }) visit_part("router", f, self.router_...);
    const Index routed = first.num_experts(), all = routed + first.num_shared_;
    Experts::visit_range("experts", 0, routed, f, self.experts_...);
    Experts::visit_range("shared_experts", routed, all, f, self.experts_...);
    if (((self.w_shared_gate.size() > 0) || ...)) visit_array(f, {"w_shared_gate"}, self.w_shared_gate...);
    if (((self.b_output.size() > 0) || ...)) visit_array(f, {"b_output"}, self.b_output...);
  }

  Matrix<S> w_shared_gate;  ///< [shared experts, d_model], empty unless they are gated
  Vector<S> b_output;       ///< [d_model], empty without output bias

 private:
  // Throws unless y can have its shape, and what a forward pass writes, y and its buffers, lies apart from
  // the rest.
  template <class Buffers>
  void check_written(const ConstMatrixRef<S>& x, const Output<S>& y, const Buffers& buffers,
                     const char* what) const {
    y.check(x.rows(), d_model(), "MoELayer::forward", "y");
    require_apart("MoELayer::forward", "y", y, "x", x, what, buffers);
    require_apart("MoELayer::forward", what, buffers, "x", x);
  }

  void check_input(const ConstMatrixRef<S>& x) const {
    require(x.cols() == d_model(), "MoELayer::forward: x has ", x.cols(),
            " columns, expected d_model = ", d_model(), "; tokens are rows");
    require(b_output.size() == 0 || b_output.size() == d_model(), "MoELayer::forward: b_output has ",
            b_output.size(), " entries, expected d_model = ", d_model());
    if (w_shared_gate.size() > 0)
      require_shape(w_shared_gate, num_shared_, d_model(), "MoELayer::forward", "w_shared_gate");
  }

  template <class Ex>
  CheckedPlan<S> checked_route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
                               RouterWorkspace<S>& workspace, const Ex& executor) const {
    check_input(x);
    route_with(router_, x, info, routing, workspace, executor);
    return CheckedPlan<S>::of_router(routing, x.rows(), num_experts(), "MoELayer::route");
  }

  // The way of the data, once for all overloads. `kept` is where experts keep what they need: of the
  // workspace or, for a backward pass, of the cache.
  template <class Kept, class Ex>
  void run(const ConstMatrixRef<S>& x, const CheckedPlan<S>& routed, const Output<S>& output,
           Workspace& workspace, Kept& kept, const Ex& executor) const {
    MatrixRef<S> y = output.of_shape(x.rows(), d_model(), "MoELayer::forward", "y");
    const auto plan = CheckedPlan<S>::trusted(add_shared_experts(
        x, *routed, num_shared_, w_shared_gate, workspace.all_experts, workspace.shared_gate, executor));
    apply_experts(x, plan, experts_, y, workspace, kept, executor);
    if (b_output.size() > 0)
      add_bias(b_output, y, [&](Index t) { return plan->token_state[t] == TokenState::valid; });
  }

  template <class Ex>
  void forward_routed(const ConstMatrixRef<S>& x, const CheckedPlan<S>& routed, const Output<S>& y,
                      Cache& cache, const Ex& executor) const {
    static_assert(TrainableExpert<E>, "a differentiable forward pass needs a TrainableExpert");
    cache.x = x;
    for (Index t = 0; t < x.rows(); ++t)
      if (!cache.routing.is_valid(t)) cache.x.row(t).setZero();
    run(cache.x, routed, y, cache, cache.experts, executor);
  }

  // The plan that the forward pass followed.
  CheckedPlan<S> check_backward(const ConstMatrixRef<S>& d_y, const Cache& cache, const MoELayer& grad,
                                const RoutingGradient<S>& routing_gradient, const Output<S>& d_x) const {
    constexpr const char* kWhere = "MoELayer::backward";
    require(cache.x.cols() == d_model() && cache.routing.num_experts() == num_experts() &&
                (num_shared_ == 0 || cache.all_experts.num_experts() == experts_.size()),
            kWhere, ": the cache is of a layer with d_model = ", cache.x.cols(), " and ",
            cache.routing.num_experts(), " experts, expected ", d_model(), " and ", num_experts(),
            cache.routing.num_experts() == 0 ? " (no forward pass filled this cache)" : "");
    require(cache.x.rows() == cache.routing.num_tokens(), kWhere, ": the cache holds ", cache.x.rows(),
            " tokens, but its routing is of ", cache.routing.num_tokens());
    require_shape(d_y, cache.x.rows(), d_model(), kWhere, "d_y");
    require(&grad != this, kWhere, ": grad is the layer of ", num_experts(),
            " experts itself, expected another one");
    require(
        grad.d_model() == d_model() && grad.num_experts() == num_experts() && grad.num_shared_ == num_shared_,
        kWhere, ": grad is a layer with d_model = ", grad.d_model(), ", ", grad.num_experts(), " + ",
        grad.num_shared_, " experts, expected ", d_model(), ", ", num_experts(), " + ", num_shared_);
    require_apart(kWhere, "d_x", d_x, "d_y", d_y, "routing_gradient", routing_gradient, "the cache", cache);
    require_apart(kWhere, "the cache", cache, "d_y", d_y, "routing_gradient", routing_gradient);
    visit([&](const ParameterInfo&, const auto&,
              const auto& g) { require_apart(kWhere, "grad", g, "d_y", d_y, "d_x", d_x); },
          *this, grad);  // throws where shapes differ, before anything is added to grad
    check_plan_arrays(cache.routing.plan, kWhere);
    if (num_shared_ > 0) check_shared_plan(cache.routing.plan, cache.all_experts, kWhere);
    const CheckedPlan<S> plan(num_shared_ > 0 ? cache.all_experts : cache.routing.plan, cache.x.rows(),
                              experts_.size(), kWhere);
    experts_.check_cache(cache.experts, plan->expert_begin, kWhere);
    check_routing_gradient(routing_gradient, cache.routing, kWhere);
    check_backward_with(router_, cache.x, cache.routing, routing_gradient, grad.router_, kWhere);
    return plan;
  }

  // Removes experts here and, by from_router(copy of the router), there.
  template <class F>
  void remove(const std::vector<Index>& experts, const F& from_router) {
    R router = router_;
    from_router(router);
    std::vector<Index> left =
        experts_without(experts, num_experts(), router.num_experts(), "MoELayer::remove_experts");
    for (Index e = num_experts(); e < experts_.size(); ++e) left.push_back(e);  // the shared ones stay
    experts_.keep(left);
    router_ = std::move(router);
  }

  Experts experts_;  // routed, then shared
  Index num_shared_ = 0;
  R router_;
};

}  // namespace moe

#if defined(MOE_COMPILED) && MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES && !defined(_GLIBCXX_DEBUG)
#include <moe/layers/compiled.inc>
#endif
