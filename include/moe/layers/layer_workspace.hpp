// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/buffer.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// What a layer writes on the way: memory that is used again, and what backward needs of forward.
namespace moe {

/// Buffers of forward. Reused, they allocate nothing; a default-constructed one is ready for use. W is what
/// the layer's experts work in.
template <class S, class W = ExpertWorkspace<S>>
struct LayerWorkspace {
  Routing<S> routing;           ///< what the router decided
  RouterWorkspace<S> router;    ///< what it works in
  DispatchPlan<S> all_experts;  ///< its plan with the shared experts after the routed ones
  ReusedMatrix<S> shared_gate;  ///< logits of the shared experts' gates [tokens, shared experts]
  RowBuffer<S> x_rows, y_rows;  ///< [assignments, d_model]
  W expert_workspace;           ///< what experts work in

  template <class F>
  void for_each_array(const F& f) const {
    f(routing);
    f(router);
    f(all_experts);
    f(shared_gate);
    for (const RowBuffer<S>* rows : {&x_rows, &y_rows}) f(*rows);
    f(expert_workspace);
  }
};

/// What backward needs of a forward pass, and the buffers of both. Owns everything it needs: x may
/// be destroyed after forward. C is where the layer's experts keep what they need.
template <class S, class W = ExpertWorkspace<S>, class C = ExpertCache<S>>
struct LayerCache : LayerWorkspace<S, W> {
  ReusedMatrix<S> x;  ///< input, with zeros in rows of tokens that are not valid [tokens, d_model]
  C experts;          ///< what experts keep
  RowBuffer<S> d_rows, d_x_rows;        ///< [assignments, d_model]
  RoutingGradient<S> routing_gradient;  ///< of the losses and of the output together
  Buffer<S> d_gate;                     ///< [assignments]
  ReusedMatrix<S> d_shared_gate;        ///< [tokens, shared experts]

  template <class F>
  void for_each_array(const F& f) const {
    LayerWorkspace<S, W>::for_each_array(f);
    for (const ReusedMatrix<S>* m : {&x, &d_shared_gate}) f(*m);
    f(experts);
    for (const RowBuffer<S>* rows : {&d_rows, &d_x_rows}) f(*rows);
    f(routing_gradient);
    f(d_gate);
  }
};

}  // namespace moe
