// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/routing.hpp>

// What losses say of a routing, as a value that can be added and scaled.
namespace moe {

/// Gradient of a loss by what a routing shows. An empty member means zero. Made by the losses, added
/// and scaled by the user, taken by the router's backward pass.
template <class S>
struct RoutingGradient {
  ReusedMatrix<S> d_router_logits{};  ///< [tokens, num_experts]
  ReusedMatrix<S> d_router_probs{};   ///< [tokens, num_experts]
  ReusedMatrix<S> d_noise_stddev{};   ///< [tokens, num_experts]
  Buffer<S> d_chosen_gate{};          ///< by Routing::chosen.gate [choices]
  Buffer<S> d_gate{};                 ///< by Routing::plan.gate [assignments]

  /// Whether every member is absent: the gradient is zero.
  bool empty() const {
    return d_router_logits.size() == 0 && d_router_probs.size() == 0 && d_noise_stddev.size() == 0 &&
           d_chosen_gate.empty() && d_gate.empty();
  }

  /// Throws std::invalid_argument, and changes nothing, where shapes differ.
  RoutingGradient& operator+=(const RoutingGradient& other) {
    check(d_router_logits, other.d_router_logits, "d_router_logits");
    check(d_router_probs, other.d_router_probs, "d_router_probs");
    check(d_noise_stddev, other.d_noise_stddev, "d_noise_stddev");
    check(d_chosen_gate, other.d_chosen_gate, "d_chosen_gate");
    check(d_gate, other.d_gate, "d_gate");
    add(d_router_logits, other.d_router_logits);
    add(d_router_probs, other.d_router_probs);
    add(d_noise_stddev, other.d_noise_stddev);
    add(d_chosen_gate, other.d_chosen_gate);
    add(d_gate, other.d_gate);
    return *this;
  }
  /// Scales every member.
  RoutingGradient& operator*=(S factor) {
    d_router_logits *= factor;
    d_router_probs *= factor;
    d_noise_stddev *= factor;
    for (S& d : d_chosen_gate) d *= factor;
    for (S& d : d_gate) d *= factor;
    return *this;
  }
  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&d_router_logits, &d_router_probs, &d_noise_stddev}) f(*m);
    for (const Buffer<S>* b : {&d_chosen_gate, &d_gate}) f(*b);
  }
  /// The sum. Throws as +=.
  friend RoutingGradient operator+(RoutingGradient a, const RoutingGradient& b) { return a += b; }
  /// Every member scaled.
  friend RoutingGradient operator*(S factor, RoutingGradient a) { return a *= factor; }
  /// Every member scaled.
  friend RoutingGradient operator*(RoutingGradient a, S factor) { return a *= factor; }

 private:
  static void check(const ReusedMatrix<S>& to, const ReusedMatrix<S>& from, const char* what) {
    if (to.size() > 0 && from.size() > 0)
      require_shape(from, to.rows(), to.cols(), "RoutingGradient: sum", what);
  }
  static void check(const Buffer<S>& to, const Buffer<S>& from, const char* what) {
    if (!to.empty() && !from.empty())
      require(from.size() == to.size(), "RoutingGradient: sum: ", what, " has ", from.size(),
              " entries, expected ", to.size());
  }
  static void add(ReusedMatrix<S>& to, const ReusedMatrix<S>& from) {
    if (to.size() == 0)
      to = from;
    else if (from.size() > 0)
      to += from;
  }
  static void add(Buffer<S>& to, const Buffer<S>& from) {
    if (to.empty())
      to = from;
    else
      for (Index i = 0; i < from.size(); ++i) to[i] += from[i];
  }
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

}  // namespace moe
