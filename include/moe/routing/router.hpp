// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <optional>
#include <type_traits>

#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// The concepts that a router satisfies, and how a layer calls one.
namespace moe {

/// A router for inference. Its route() fills a Routing for x [tokens, d_model]; begin_routing and
/// dispatch_all or apply_capacity do most of it. Overloads with more arguments are used where there are some:
/// a RouterWorkspace to work in, an Executor, or both in this order. A token that can not be routed must be
/// marked as poisoned in plan.token_state; a router that does not look at x at all does so where x is not
/// finite (mark_poisoned_rows).
template <class R>
concept Router = requires(const R& router, const ConstMatrixRef<typename R::Scalar>& x, const BatchInfo& info,
                          Routing<typename R::Scalar>& routing) {
  typename R::Scalar;
  { router.d_model() } -> std::convertible_to<Index>;
  { router.num_experts() } -> std::convertible_to<Index>;
  router.route(x, info, routing);
};

/// A router with a backward pass: adds to d_x [tokens, d_model] and to the gradient's parameters.
/// x is what route() saw, with zeros in the rows of tokens that are not valid. A router that acts
/// otherwise in training has an overload route(x, rng, info, routing). One whose backward may throw has
/// check_backward(x, routing, grad), which throws the same before anything is added to a gradient. More
/// arguments as route() has them. Threads may share a routing here, where each has a workspace of its own.
template <class R>
concept TrainableRouter = Router<R> &&
    requires(const R& router, R& grad, const ConstMatrixRef<typename R::Scalar>& x,
             const Routing<typename R::Scalar>& routing, const RoutingGradient<typename R::Scalar>& gradient,
             MatrixRef<typename R::Scalar> d_x) {
  router.backward(x, routing, gradient, d_x, grad);
  R::visit([](const ParameterInfo&, auto&...) {}, grad);
};

/// What a router's gates multiply, where it says so before it routes: by gate_side() or by its options.
/// DispatchPlan::gate_side says it for certain.
template <class R>
std::optional<GateSide> gate_side_of(const R& router) {
  if constexpr (requires { std::optional<GateSide>(router.gate_side()); })
    return router.gate_side();
  else if constexpr (requires { GateSide(router.options().gate_side); })
    return router.options().gate_side;
  else
    return std::nullopt;
}

namespace detail {

// Calls f with the most of workspace and executor that it takes. A router may take anything for an executor:
// a workspace is passed alone only where an executor is not taken.
template <class F, class W, class E>
void call_with_most(const F& f, W& workspace, const E& executor) {
  if constexpr (std::is_invocable_v<F, W&, const E&>)
    f(workspace, executor);
  else if constexpr (std::is_invocable_v<F, const E&>)
    f(executor);
  else if constexpr (std::is_invocable_v<F, W&>)
    f(workspace);
  else
    f();
}

}  // namespace detail

/// Calls router.route for inference, with the workspace and the executor where the router takes them.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, RouterWorkspace<typename R::Scalar>& workspace,
                const E& executor) {
  const auto route = [&](auto&... rest) -> decltype(router.route(x, info, routing, rest...)) {
    return router.route(x, info, routing, rest...);
  };
  detail::call_with_most(route, workspace, executor);
}

/// The same for training; a router without a way of its own for training routes as in inference.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, Rng& rng, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, RouterWorkspace<typename R::Scalar>& workspace,
                const E& executor) {
  const auto route = [&](auto&... rest) -> decltype(router.route(x, rng, info, routing, rest...)) {
    return router.route(x, rng, info, routing, rest...);
  };
  constexpr bool kTrains = requires { router.route(x, rng, info, routing); }
  || requires { router.route(x, rng, info, routing, executor); }
  || requires { router.route(x, rng, info, routing, workspace); }
  || requires { router.route(x, rng, info, routing, workspace, executor); };
  if constexpr (kTrains)
    detail::call_with_most(route, workspace, executor);
  else
    route_with(router, x, info, routing, workspace, executor);
}

/// Throws std::invalid_argument, before anything is written, where router.backward would. A router without
/// backward takes no gradient.
template <Router R, class S>
void check_backward_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x,
                         const Routing<S>& routing, const RoutingGradient<S>& gradient, const R& grad,
                         const char* where) {
  if constexpr (requires { router.check_backward(x, routing, grad); })
    router.check_backward(x, routing, grad);
  constexpr bool kHasParameters = requires(R & own) {
    R::visit([](const ParameterInfo&, auto&...) {}, own);
  };
  static_assert(TrainableRouter<R> || !kHasParameters,
                "a router with visit() must satisfy TrainableRouter: see its backward()");
  if constexpr (!TrainableRouter<R>)
    require(gradient.empty(), where, ": a routing gradient of ", routing.num_tokens(),
            " tokens for a router without backward, expected none");
}

/// Calls router.backward, with the workspace and the executor where the router takes them.
template <TrainableRouter R, Executor E>
void route_backward_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x,
                         const Routing<typename R::Scalar>& routing,
                         const RoutingGradient<typename R::Scalar>& gradient,
                         MatrixRef<typename R::Scalar> d_x, R& grad,
                         RouterWorkspace<typename R::Scalar>& workspace, const E& executor) {
  const auto backward =
      [&](auto&... rest) -> decltype(router.backward(x, routing, gradient, d_x, grad, rest...)) {
    return router.backward(x, routing, gradient, d_x, grad, rest...);
  };
  detail::call_with_most(backward, workspace, executor);
}

}  // namespace moe
