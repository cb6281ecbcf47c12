// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <optional>

#include <moe/core/executor.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// The concepts that a router satisfies, and how a layer calls one.
namespace moe {

/// A router for inference. Its route() fills a Routing for x [tokens, d_model]; begin_routing and
/// dispatch_all or apply_capacity do most of it. An overload with an executor as the last argument
/// is used where there is one. A token that can not be routed must be marked as poisoned in
/// plan.token_state; a router that does not look at x at all does so where x is not finite
/// (mark_poisoned_rows).
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
/// check_backward(x, routing, grad), which throws the same before anything is added to a gradient.
/// backward may use routing.scratch: two threads must not share a routing there.
template <class R>
concept TrainableRouter = Router<R> &&
    requires(const R& router, R& grad, const ConstMatrixRef<typename R::Scalar>& x,
             const Routing<typename R::Scalar>& routing, const RoutingGradient<typename R::Scalar>& gradient,
             MatrixRef<typename R::Scalar> d_x) {
  router.backward(x, routing, gradient, d_x, grad);
  R::visit([](const ParameterInfo&, auto&...) {}, grad);
};

/// sum = `of_losses`, with d_gate [assignments], the gradient by the gates that the output used, added to it.
/// Allocates only when shapes grow.
template <class S>
void add_gate_gradient(const RoutingGradient<S>& of_losses, const Buffer<S>& d_gate,
                       const DispatchPlan<S>& plan, RoutingGradient<S>& sum) {
  sum = of_losses;
  sum.d_gate.reserve(plan.token.capacity());
  if (sum.d_gate.empty()) sum.d_gate.assign(plan.num_assignments(), S(0));
  for (Index a = 0; a < plan.num_assignments(); ++a) sum.d_gate[a] += d_gate[a];
}

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

/// Calls router.route for inference, with the executor where the router takes one.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, const E& executor) {
  if constexpr (requires { router.route(x, info, routing, executor); })
    router.route(x, info, routing, executor);
  else
    router.route(x, info, routing);
}

/// The same for training; a router without a way of its own for training routes as in inference.
template <Router R, Executor E>
void route_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x, Rng& rng, const BatchInfo& info,
                Routing<typename R::Scalar>& routing, const E& executor) {
  if constexpr (requires { router.route(x, rng, info, routing, executor); })
    router.route(x, rng, info, routing, executor);
  else if constexpr (requires { router.route(x, rng, info, routing); })
    router.route(x, rng, info, routing);
  else
    route_with(router, x, info, routing, executor);
}

/// Calls router.backward, with the executor where the router takes one.
template <TrainableRouter R, Executor E>
void route_backward_with(const R& router, const ConstMatrixRef<typename R::Scalar>& x,
                         const Routing<typename R::Scalar>& routing,
                         const RoutingGradient<typename R::Scalar>& gradient,
                         MatrixRef<typename R::Scalar> d_x, R& grad, const E& executor) {
  if constexpr (requires { router.backward(x, routing, gradient, d_x, grad, executor); })
    router.backward(x, routing, gradient, d_x, grad, executor);
  else
    router.backward(x, routing, gradient, d_x, grad);
}

}  // namespace moe
