// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/experts/expert.hpp>
#include <moe/layers/dispatch.hpp>
#include <moe/layers/run_experts.hpp>
#include <moe/layers/shared_experts.hpp>
#include <moe/math/activation.hpp>
#include <moe/math/init.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/token_choice.hpp>

// The layer that joins a router and experts. Read forward() first.
namespace moe {

/// Experts that see every token, whatever the router says (DeepSeekMoE; Dai et al. 2024, eq. 9).
template <class E>
struct SharedExperts {
  std::vector<E> experts{};
  /// Whether their outputs are scaled by sigmoid(x w^T) with a trained w (Qwen2-MoE).
  bool gated = false;
};

/// Buffers of forward. Reused, they allocate nothing; a default-constructed one is ready for use.
template <class S>
struct LayerWorkspace {
  Routing<S> routing;           ///< what the router decided
  DispatchPlan<S> all_experts;  ///< its plan with the shared experts after the routed ones
  Matrix<S> shared_gate;        ///< logits of the shared experts' gates [tokens, shared experts]
  RowBuffer<S> x_rows, y_rows;  ///< [assignments, d_model]
  ExpertScratch<S> scratch;

  template <class F>
  void for_each_array(const F& f) const {
    f(routing);
    f(all_experts);
    f(shared_gate);
    for (const RowBuffer<S>* rows : {&x_rows, &y_rows}) f(*rows);
    f(scratch);
  }
};

/// What backward needs of a forward pass, and the buffers of both. Owns everything it needs: x may
/// be destroyed after forward.
template <class S>
struct LayerCache : LayerWorkspace<S> {
  Matrix<S> x;  ///< input, with zeros in rows of tokens that are not valid [tokens, d_model]
  ExpertCache<S> experts;
  RowBuffer<S> d_rows, d_x_rows;  ///< [assignments, d_model]
  RoutingGradient<S> routing_gradient;
  Buffer<S> d_gate;         ///< [assignments]
  Matrix<S> d_shared_gate;  ///< [tokens, shared experts]

  template <class F>
  void for_each_array(const F& f) const {
    LayerWorkspace<S>::for_each_array(f);
    for (const Matrix<S>* m : {&x, &d_shared_gate}) f(*m);
    f(experts);
    for (const RowBuffer<S>* rows : {&d_rows, &d_x_rows}) f(*rows);
    f(routing_gradient);
    f(d_gate);
  }
};

/// A Mixture-of-Experts layer (Shazeer et al. 2017, eq. 1):
///   y_t = sum over the experts e of token t of gate_te * expert_e(x_t)
///         (+ sum of shared experts) (+ output bias)
/// x and y are [tokens, d_model]. `info` says more about the batch, `executor` runs the tasks;
/// results are bitwise the same for every executor. A layer is a value; forward is const and may run
/// on several threads at once, each with a workspace or cache of its own.
///
/// Every call throws std::invalid_argument when shapes do not fit; nothing is changed then but the
/// output arguments, workspaces and caches. Cost: that of the products, O(tokens * top_k * d_model *
/// d_ff) and O(tokens * num_experts * d_model) for routing.
template <Expert E, Router R>
class MoELayer {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;
  using Workspace = LayerWorkspace<S>;
  using Cache = LayerCache<S>;
  static_assert(std::is_same_v<S, typename R::Scalar>,
                "the experts and the router of a layer must have the same Scalar");

  /// Throws std::invalid_argument unless widths and the number of experts fit the router, and for gated
  /// shared experts beside a router whose gates scale inputs.
  MoELayer(std::vector<E> experts, R router, SharedExperts<E> shared = {}, bool output_bias = false)
      : experts_(std::move(experts)), num_shared_(Index(shared.experts.size())), router_(std::move(router)) {
    require(!experts_.empty(), "MoELayer: 0 experts, expected at least 1");
    require(Index(experts_.size()) == router_.num_experts(), "MoELayer: ", experts_.size(),
            " experts, but the router has num_experts = ", router_.num_experts());
    for (E& expert : shared.experts) experts_.push_back(std::move(expert));
    for (std::size_t e = 0; e < experts_.size(); ++e)
      require(experts_[e].d_model() == d_model(), "MoELayer: expert ", e,
              " has d_model = ", experts_[e].d_model(), ", but the router has ", d_model());
    require(!shared.gated || num_shared_ > 0,
            "MoELayer: gated shared experts, but 0 of them, expected at least 1");
    check_shared_gates(shared.gated ? num_shared_ : 0, gate_side_of(router_).value_or(GateSide::output),
                       "MoELayer");
    if (shared.gated) w_shared_gate.setZero(num_shared_, d_model());
    if (output_bias) b_output.setZero(d_model());
  }

  Index d_model() const { return router_.d_model(); }
  Index num_experts() const { return Index(experts_.size()) - num_shared_; }
  Index num_shared_experts() const { return num_shared_; }
  std::span<E> experts() { return {experts_.data(), std::size_t(num_experts())}; }
  std::span<const E> experts() const { return {experts_.data(), std::size_t(num_experts())}; }
  std::span<E> shared_experts() { return std::span<E>(experts_).subspan(std::size_t(num_experts())); }
  std::span<const E> shared_experts() const {
    return std::span<const E>(experts_).subspan(std::size_t(num_experts()));
  }
  R& router() { return router_; }
  const R& router() const { return router_; }

  // ---- Inference: const, no noise.

  template <Executor Ex = DefaultExecutor>
  Routing<S> route(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Routing<S> routing;
    route(x, info, routing, executor);
    return routing;
  }

  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// Allocates nothing when y and the workspace were last used with a batch of this shape. x, y and the
  /// workspace lie apart, here and in all that follows: no argument that is written overlaps another.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Matrix<S>& y, Workspace& workspace, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    check_apart(x, y, workspace, "the workspace");
    route(x, info, workspace.routing, executor);
    y.resize(x.rows(), d_model());
    const DispatchPlan<S>& plan = all_experts(x, workspace.routing.plan, workspace, executor);
    dispatch(x, plan, workspace.x_rows, executor);
    run_experts(all(), plan, workspace.x_rows, workspace.y_rows, workspace.scratch, executor);
    combine(workspace.y_rows, plan, x, y, executor);
    add_output_bias(plan, y);
  }

  /// Output under a routing made before: by route(), stored, edited or made by hand.
  template <std::same_as<Routing<S>> Made, Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const Made& routing, const Ex& executor = {}) const {
    check_input(x);
    check_plan(routing.plan, x.rows(), num_experts(), "MoELayer::forward");
    Workspace workspace;
    Matrix<S> y(x.rows(), d_model());
    const DispatchPlan<S>& plan = all_experts(x, routing.plan, workspace, executor);
    dispatch(x, plan, workspace.x_rows, executor);
    run_experts(all(), plan, workspace.x_rows, workspace.y_rows, workspace.scratch, executor);
    combine(workspace.y_rows, plan, x, y, executor);
    add_output_bias(plan, y);
    return y;
  }

  // ---- Differentiable forward: the same values, and a cache for backward.

  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, cache, info, executor);
    return y;
  }

  /// Allocates nothing when y and the cache were last used with a batch of this shape.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Matrix<S>& y, Cache& cache, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    check_apart(x, y, cache, "the cache");
    route(x, info, cache.routing, executor);
    forward_routed(x, y, cache, executor);
  }

  /// Training: with the router's noise, jitter and training capacity. An Rng means training.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Rng& rng, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, rng, y, cache, info, executor);
    return y;
  }

  /// Allocates nothing when y and the cache were last used with a batch of this shape.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, Rng& rng, Matrix<S>& y, Cache& cache, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    check_input(x);
    check_apart(x, y, cache, "the cache");
    route_with(router_, x, rng, info, cache.routing, executor);
    check_routed(cache.routing, x.rows());
    forward_routed(x, y, cache, executor);
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
    check_apart(x, y, cache, "the cache");
    if (&routing != &cache.routing) {
      require_apart("MoELayer::forward", "the cache", cache, "routing", routing);
      cache.routing = routing;
    }
    forward_routed(x, y, cache, executor);
    return y;
  }

  // ---- Backward.

  /// d_x [tokens, d_model] from d_y; adds the parameters' gradients to `grad`, a layer made by
  /// zeros_like(layer). `routing_gradient` is the gradient of losses on cache.routing, e.g.
  /// 0.01f * load_balancing_loss(cache.routing).gradient. May be called again on the same cache.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> backward(const ConstMatrixRef<S>& d_y, Cache& cache, MoELayer& grad,
                     const RoutingGradient<S>& routing_gradient = {}, const Ex& executor = {}) const {
    Matrix<S> d_x(d_y.rows(), d_y.cols());
    backward(d_y, cache, grad, routing_gradient, d_x, executor);
    return d_x;
  }

  /// Allocates nothing when d_x and the cache were last used with a batch of this shape.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& d_y, Cache& cache, MoELayer& grad,
                const RoutingGradient<S>& routing_gradient, Matrix<S>& d_x, const Ex& executor = {}) const {
    check_backward(d_y, cache, grad, routing_gradient, d_x);
    const DispatchPlan<S>& routed = cache.routing.plan;
    const DispatchPlan<S>& plan = num_shared_ > 0 ? cache.all_experts : routed;
    d_x.resize(d_y.rows(), d_model());
    combine_backward(d_y, cache.y_rows, plan, cache.d_rows, cache.d_gate, executor);
    run_experts_backward(all(), plan, cache.x_rows, cache.d_rows, cache.experts, cache.d_x_rows,
                         std::span<E>(grad.experts_), executor);
    dispatch_backward(cache.d_x_rows, plan, cache.x, d_y, d_x, cache.d_gate, executor);
    backward_router(cache, grad, routing_gradient, d_x, executor);
    backward_shared_gate(cache, grad, d_x, executor);
    if (b_output.size() > 0)
      bias_backward(d_y, grad.b_output, [&](Index t) { return cache.routing.is_valid(t); });
  }

  // ---- Experts come and go.

  /// Appends a routed expert; `w` [d_model] is its row of the router's weights. Throws, and changes
  /// nothing, when a width does not fit.
  void add_expert(E expert, const Vector<S>& w) requires requires(R& r) { r.add_expert(w); }
  {
    require(expert.d_model() == d_model(),
            "MoELayer::add_expert: the expert has d_model = ", expert.d_model(), ", expected ", d_model());
    R router = router_;
    router.add_expert(w);
    experts_.insert(experts_.begin() + num_experts(), std::move(expert));
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
    (require(self.experts_.size() == first.experts_.size() && self.num_shared_ == first.num_shared_,
             "MoELayer::visit: a layer of ", self.num_experts(), " + ", self.num_shared_,
             " experts beside one of ", first.num_experts(), " + ", first.num_shared_),
     ...);
    if constexpr (requires { R::visit(f, self.router_...); }) visit_part("router", f, self.router_...);
    constexpr bool kExpertsHaveParameters = requires {
      E::visit(f, std::get<0>(std::tie(self...)).experts_[0]);
    };
    for (std::size_t e = 0; kExpertsHaveParameters && e < first.experts_.size(); ++e) {
      const std::size_t routed = std::size_t(first.num_experts());
      const std::string name =
          e < routed ? "experts." + std::to_string(e) : "shared_experts." + std::to_string(e - routed);
      if constexpr (kExpertsHaveParameters) visit_part(name, f, self.experts_[e]...);
    }
    if (((self.w_shared_gate.size() > 0) || ...)) visit_array(f, {"w_shared_gate"}, self.w_shared_gate...);
    if (((self.b_output.size() > 0) || ...)) visit_array(f, {"b_output"}, self.b_output...);
  }

  Matrix<S> w_shared_gate;  ///< [shared experts, d_model], empty unless they are gated
  Vector<S> b_output;       ///< [d_model], empty without output bias

 private:
  std::span<const E> all() const { return experts_; }

  // Throws unless what a forward pass writes, y and its buffers, lies apart from the rest.
  template <class Buffers>
  static void check_apart(const ConstMatrixRef<S>& x, const Matrix<S>& y, const Buffers& buffers,
                          const char* what) {
    require_apart("MoELayer::forward", "y", y, "x", x, what, buffers);
    require_apart("MoELayer::forward", what, buffers, "x", x);
  }

  // Throws unless what a router made is of this batch and of these experts.
  void check_routed(const Routing<S>& routing, Index tokens) const {
    require(routing.num_tokens() == tokens && routing.num_experts() == num_experts(),
            "MoELayer::route: the router made a plan of ", routing.num_tokens(), " tokens and ",
            routing.num_experts(), " experts, expected ", tokens, " and ", num_experts());
    check_plan_arrays(routing.plan, "MoELayer::route");
    const DispatchPlan<S>& plan = routing.plan;
    require(routing.chosen.size() == 0 || plan.num_assignments() > 0 || !plan.dropped.empty() ||
                !plan.passed_through.empty(),
            "MoELayer::route: the router made ", routing.chosen.size(),
            " choices, but its plan has no assignment of them and none is dropped: a router ends "
            "with dispatch_all or apply_capacity");
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
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             const Ex& executor) const {
    check_input(x);
    route_with(router_, x, info, routing, executor);
    check_routed(routing, x.rows());
  }

  template <class Ex>
  const DispatchPlan<S>& all_experts(const ConstMatrixRef<S>& x, const DispatchPlan<S>& routed,
                                     Workspace& workspace, const Ex& executor) const {
    return add_shared_experts(x, routed, num_shared_, w_shared_gate, workspace.all_experts,
                              workspace.shared_gate, executor);
  }

  template <class Ex>
  void forward_routed(const ConstMatrixRef<S>& x, Matrix<S>& y, Cache& cache, const Ex& executor) const {
    static_assert(TrainableExpert<E>, "a differentiable forward pass needs a TrainableExpert");
    cache.x = x;
    for (Index t = 0; t < x.rows(); ++t)
      if (!cache.routing.is_valid(t)) cache.x.row(t).setZero();
    y.resize(x.rows(), d_model());
    const DispatchPlan<S>& plan = all_experts(cache.x, cache.routing.plan, cache, executor);
    dispatch(cache.x, plan, cache.x_rows, executor);
    run_experts(all(), plan, cache.x_rows, cache.y_rows, cache.experts, cache.scratch, executor);
    combine(cache.y_rows, plan, cache.x, y, executor);
    add_output_bias(plan, y);
  }

  void add_output_bias(const DispatchPlan<S>& plan, Matrix<S>& y) const {
    if (b_output.size() == 0) return;
    for (Index t = 0; t < y.rows(); ++t)
      if (plan.token_state[t] == TokenState::valid) add_scaled(d_model(), S(1), b_output.data(), &y(t, 0));
  }

  void check_backward(const ConstMatrixRef<S>& d_y, const Cache& cache, const MoELayer& grad,
                      const RoutingGradient<S>& routing_gradient, const Matrix<S>& d_x) const {
    constexpr const char* kWhere = "MoELayer::backward";
    require(cache.x.cols() == d_model() && cache.routing.num_experts() == num_experts() &&
                (num_shared_ == 0 || cache.all_experts.num_experts() == Index(experts_.size())),
            "MoELayer::backward: the cache is of a layer with d_model = ", cache.x.cols(), " and ",
            cache.routing.num_experts(), " experts, expected ", d_model(), " and ", num_experts(),
            cache.routing.num_experts() == 0 ? " (no forward pass filled this cache)" : "");
    require(cache.x.rows() == cache.routing.num_tokens(), "MoELayer::backward: the cache holds ",
            cache.x.rows(), " tokens, but its routing is of ", cache.routing.num_tokens());
    require_shape(d_y, cache.x.rows(), d_model(), "MoELayer::backward", "d_y");
    require(&grad != this, "MoELayer::backward: grad is the layer of ", num_experts(),
            " experts itself, expected another one");
    require(
        grad.d_model() == d_model() && grad.num_experts() == num_experts() && grad.num_shared_ == num_shared_,
        "MoELayer::backward: grad is a layer with d_model = ", grad.d_model(), ", ", grad.num_experts(),
        " + ", grad.num_shared_, " experts, expected ", d_model(), ", ", num_experts(), " + ", num_shared_);
    // Before anything is added to grad. Not by visit(), whose names need memory.
    const auto same_shape = [&](const ParameterInfo& info, const auto& p, const auto& g) {
      if (info.kind != Kind::buffer)
        require_shape(g, p.rows(), p.cols(), "MoELayer::backward: grad", info.name);
      require_apart(kWhere, "grad", g, "d_y", d_y, "d_x", d_x);
    };
    require_apart(kWhere, "d_x", d_x, "d_y", d_y, "routing_gradient", routing_gradient, "the cache", cache);
    require_apart(kWhere, "the cache", cache, "d_y", d_y, "routing_gradient", routing_gradient);
    visit_array(same_shape, {"w_shared_gate"}, w_shared_gate, grad.w_shared_gate);
    visit_array(same_shape, {"b_output"}, b_output, grad.b_output);
    for (std::size_t e = 0; e < experts_.size(); ++e) E::visit(same_shape, experts_[e], grad.experts_[e]);
    if constexpr (requires { R::visit(same_shape, router_, grad.router_); })
      R::visit(same_shape, router_, grad.router_);
    check_plan_arrays(cache.routing.plan, "MoELayer::backward");
    if (num_shared_ > 0) {
      const Buffer<Index>&all = cache.all_experts.expert_begin, &routed = cache.routing.plan.expert_begin;
      require(cache.all_experts.num_tokens == cache.x.rows() &&
                  std::equal(routed.begin(), routed.end(), all.begin()),
              "MoELayer::backward: the cache's routing of ", cache.routing.plan.num_assignments(),
              " assignments is not the one of its forward pass, which had ", all[num_experts()]);
    }
    cache.experts.check(all(), num_shared_ > 0 ? cache.all_experts : cache.routing.plan,
                        "MoELayer::backward");
    check_routing_gradient(routing_gradient, cache.routing, "MoELayer::backward");
    if constexpr (requires { router_.check_backward(cache.x, cache.routing, grad.router_); })
      router_.check_backward(cache.x, cache.routing, grad.router_);
    constexpr bool kHasParameters = requires { R::visit(same_shape, router_, grad.router_); };
    static_assert(TrainableRouter<R> || !kHasParameters,
                  "a router with visit() must satisfy TrainableRouter: see its backward()");
    if constexpr (!TrainableRouter<R>)
      require(routing_gradient.empty(), "MoELayer::backward: a routing gradient of ",
              cache.routing.num_tokens(), " tokens for a router without backward, expected none");
  }

  // The router's gradient is that of the losses plus that of the gates which the output used.
  template <class Ex>
  void backward_router(Cache& cache, MoELayer& grad, const RoutingGradient<S>& routing_gradient,
                       Matrix<S>& d_x, const Ex& executor) const {
    if constexpr (TrainableRouter<R>) {
      RoutingGradient<S>& gradient = cache.routing_gradient;
      gradient = routing_gradient;
      const Index assignments = cache.routing.plan.num_assignments();
      gradient.d_gate.reserve(cache.routing.plan.token.capacity());
      if (gradient.d_gate.empty()) gradient.d_gate.assign(assignments, S(0));
      for (Index a = 0; a < assignments; ++a) gradient.d_gate[a] += cache.d_gate[a];
      route_backward_with(router_, cache.x, cache.routing, gradient, d_x, grad.router_, executor);
    }
  }

  // Removes experts here and, by from_router(copy of the router), there.
  template <class F>
  void remove(const std::vector<Index>& experts, const F& from_router) {
    R router = router_;
    from_router(router);
    const std::vector<Index> left =
        experts_without(experts, num_experts(), router.num_experts(), "MoELayer::remove_experts");
    std::vector<E> kept;
    kept.reserve(left.size() + std::size_t(num_shared_));
    for (const Index e : left) kept.push_back(std::move_if_noexcept(experts_[std::size_t(e)]));
    for (E& expert : shared_experts()) kept.push_back(std::move_if_noexcept(expert));
    experts_ = std::move(kept);
    router_ = std::move(router);
  }

  template <class Ex>
  void backward_shared_gate(Cache& cache, MoELayer& grad, Matrix<S>& d_x, const Ex& executor) const {
    if (w_shared_gate.size() == 0) return;
    const DispatchPlan<S>& plan = cache.all_experts;
    cache.d_shared_gate.setZero(d_x.rows(), num_shared_);
    for (Index s = 0; s < num_shared_; ++s) {
      const Index e = num_experts() + s;
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
        cache.d_shared_gate(plan.token[a], s) =
            cache.d_gate[a] * detail::sigmoid_slope(cache.shared_gate(plan.token[a], s));
    }
    router_linear_backward(cache.x, w_shared_gate, cache.d_shared_gate, grad.w_shared_gate, d_x, executor);
  }

  std::vector<E> experts_;  // routed, then shared
  Index num_shared_ = 0;
  R router_;
};

}  // namespace moe

#if defined(MOE_COMPILED) && MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES
#include <moe/layers/compiled.inc>
#endif
