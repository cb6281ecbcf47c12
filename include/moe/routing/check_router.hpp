// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/check.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/router.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// What the library's routers check of their arguments.
namespace moe {

/// begin_routing, after throwing std::invalid_argument unless x [tokens, d_model] fits the router and what
/// route writes lies apart from x. The library's routers begin with this. O(tokens + num_experts).
template <class R, class S>
void begin_route(const R& router, const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
                 const RouterWorkspace<S>& workspace, const char* where, const RoutingParts& fills) {
  require_shape(x, x.rows(), router.d_model(), where, "x");
  require_apart(where, "routing", routing, "x", x);
  require_apart(where, "the workspace", workspace, "x", x);
  begin_routing(x.rows(), router.num_experts(), info, routing, where, fills);
}

/// Throws std::invalid_argument unless the arguments of a router's backward pass fit the router and
/// each other. What selection_backward checks is left to it. O(tokens + choices).
template <class R, class S>
void check_router_backward(const R& router, const ConstMatrixRef<S>& x, const Routing<S>& routing,
                           const R& grad, const char* where) {
  require(routing.num_tokens() == x.rows() && routing.num_experts() == router.num_experts(), where,
          ": the routing is of ", routing.num_tokens(), " tokens and ", routing.num_experts(),
          " experts, expected ", x.rows(), " and ", router.num_experts());
  require_shape(x, x.rows(), router.d_model(), where, "x");
  check_plan_arrays(routing.plan, where);
  check_choices(routing, where);
  if (routing.input_factor.size() > 0)
    require_shape(routing.input_factor, x.rows(), x.cols(), where, "input_factor");
  if (const RoutingNoise<S>& noise = routing.noise; !noise.empty()) {
    require_shape(noise.draws, x.rows(), router.num_experts(), where, "noise.draws");
    require_shape(noise.stddev, x.rows(), router.num_experts(), where, "noise.stddev");
  }
  require(&grad != &router, where, ": grad is the router of ", router.num_experts(),
          " experts itself, expected another one");
  R::visit([](const ParameterInfo&, const auto&...) {}, router, grad);  // throws if shapes differ
}

/// Throws std::invalid_argument unless what a router's backward pass writes, d_x, grad and the workspace,
/// lies apart from each other and from what it reads, and d_x has the shape of x. O(1).
template <class R, class S>
void check_router_operands(const ConstMatrixRef<S>& x, const Routing<S>& routing,
                           const RoutingGradient<S>& gradient, const MatrixRef<S>& d_x, const R& grad,
                           const RouterWorkspace<S>& workspace, const char* where) {
  require_shape(d_x, x.rows(), x.cols(), where, "d_x");
  require_apart(where, "d_x", d_x, "x", x, "gradient", gradient, "routing", routing, "the workspace",
                workspace);
  require_apart(where, "the workspace", workspace, "x", x, "gradient", gradient);
  R::visit([&](const ParameterInfo&, const auto& g) { require_apart(where, "grad", g, "x", x, "d_x", d_x); },
           grad);
}

}  // namespace moe
