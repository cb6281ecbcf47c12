// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/check_routing.hpp>
#include <moe/routing/routing.hpp>

// What a routing did, as numbers: for dashboards, tests and people. Nothing here is differentiated.
namespace moe {

/// Number of tokens that chose each expert, before capacity [num_experts]. O(choices). Throws when a
/// choice is of no expert.
/// @code
/// moe::Rng rng(1);
/// moe::Matrix<float> x(16, 8);
/// moe::fill_normal(x, 1.0, rng);
/// moe::Routing<float> routing;
/// moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng).route(x, {}, routing);
/// assert(moe::demand_per_expert(routing).sum() == 16 * 2);
/// @endcode
template <class S>
IndexVector demand_per_expert(const Routing<S>& routing) {
  IndexVector demand = IndexVector::Zero(routing.num_experts());
  for (const Index e : routing.chosen.expert) {
    require(e >= 0 && e < demand.size(), "demand_per_expert: a choice is expert ", e, " of ", demand.size());
    ++demand[e];
  }
  return demand;
}

/// The same, of each token's first `choices` choices only: the f of losses that look at the best expert
/// alone (GShard, ST-MoE, NLLB). O(tokens * choices). Throws for a negative number of choices.
template <class S>
IndexVector demand_per_expert(const Routing<S>& routing, Index choices) {
  require(choices >= 0, "demand_per_expert: choices = ", choices, ", expected at least 0");
  check_choices(routing.chosen, routing.num_tokens(), routing.num_experts(), "demand_per_expert");
  IndexVector demand = IndexVector::Zero(routing.num_experts());
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    const Index begin = routing.chosen.token_begin[t], end = routing.chosen.token_begin[t + 1];
    for (Index c = begin; c < (std::min)(begin + choices, end); ++c) ++demand[routing.chosen.expert[c]];
  }
  return demand;
}

/// Number of tokens that each expert processes, after capacity [num_experts]. O(num_experts).
template <class S>
IndexVector tokens_per_expert(const Routing<S>& routing) {
  IndexVector load(routing.num_experts());
  for (Index e = 0; e < load.size(); ++e) load[e] = routing.plan.rows_of(e);
  return load;
}

namespace detail {

inline void check_load(const IndexVector& load, const char* where) {
  for (Index e = 0; e < load.size(); ++e)
    require(load[e] >= 0, where, ": load[", e, "] = ", load[e], ", expected at least 0");
}

}  // namespace detail

/// Standard deviation over mean of a load (population); 0 at perfect balance and for no load. Throws
/// for a negative load.
inline double coefficient_of_variation(const IndexVector& load) {
  detail::check_load(load, "coefficient_of_variation");
  if (load.size() == 0 || load.sum() == 0) return 0;
  const auto values = load.cast<double>().array();
  const double mean = values.mean();
  return std::sqrt((values - mean).square().mean()) / mean;
}

/// Largest load over mean load: 1 at perfect balance, num_experts when one takes all; 0 for no load.
/// Throws for a negative load.
/// @code
/// assert(moe::max_over_mean(moe::IndexVector{{6, 1, 1, 0}}) == 3);
/// @endcode
inline double max_over_mean(const IndexVector& load) {
  detail::check_load(load, "max_over_mean");
  if (load.size() == 0 || load.sum() == 0) return 0;
  return double(load.maxCoeff()) * double(load.size()) / double(load.sum());
}

/// Mean over valid tokens of the entropy of router_probs, in nats: 0 when the router is sure of one
/// expert, log(num_experts) when it does not care. O(tokens * num_experts). Throws when router_probs
/// do not fit the plan.
template <class S>
double routing_entropy(const Routing<S>& routing) {
  check_plan_arrays(routing.plan, "routing_entropy");
  require_shape(routing.router_probs, routing.num_tokens(), routing.num_experts(), "routing_entropy",
                "router_probs");
  double sum = 0;
  Index valid = 0;
  for (Index t = 0; t < routing.num_tokens(); ++t) {
    if (!routing.is_valid(t)) continue;
    ++valid;
    for (Index e = 0; e < routing.router_probs.cols(); ++e) {
      const double p = double(routing.router_probs(t, e));
      if (p > 0) sum -= p * std::log(p);
    }
  }
  return valid > 0 ? sum / double(valid) : 0;
}

/// Share of the choices that found no seat; 0 when nothing was chosen. With Overflow::next_best a
/// choice that another expert took is not counted: assignment a of expert e is one where
/// chosen.expert[plan.choice[a]] != e.
template <class S>
double dropped_fraction(const Routing<S>& routing) {
  const Index chosen = routing.chosen.size();
  return chosen > 0 ? double(routing.plan.dropped.size()) / double(chosen) : 0;
}

/// Number of valid tokens that no routed expert processes: all their choices were dropped, or, in
/// expert choice, nobody took them. O(tokens + assignments). Throws when the plan is not one that can
/// be followed.
template <class S>
Index unserved_tokens(const Routing<S>& routing) {
  const DispatchPlan<S>& plan = routing.plan;
  check_plan(plan, plan.num_tokens, plan.num_experts(), "unserved_tokens");
  Mask served = Mask::Constant(plan.num_tokens, false);
  for (const Index t : plan.token) served[t] = true;
  Index count = 0;
  for (Index t = 0; t < plan.num_tokens; ++t) count += routing.is_valid(t) && !served[t];
  return count;
}

/// One expert that worked on a token.
template <class S>
struct UsedExpert {
  Index expert;  ///< its index among the routed ones
  S gate;        ///< what scales its output, or its input where the plan says so
};

/// The routed experts that a token's output is made of, in ascending order, with their gates. Empty for a
/// token that goes nowhere. O(num_experts * log tokens). Throws when there is no such token.
/// @code
/// moe::Rng rng(1);
/// moe::Matrix<float> x(16, 8);
/// moe::fill_normal(x, 1.0, rng);
/// moe::Routing<float> routing;
/// moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng).route(x, {}, routing);
/// for (const auto& used : moe::trace(routing, 0))
///   std::printf("expert %td, gate %.2f\n", used.expert, used.gate);
/// assert(moe::trace(routing, 0).size() == 2);
/// @endcode
template <class S>
std::vector<UsedExpert<S>> trace(const Routing<S>& routing, Index token) {
  const DispatchPlan<S>& plan = routing.plan;
  require(token >= 0 && token < plan.num_tokens, "trace: token ", token, " of ", plan.num_tokens);
  check_plan_arrays(plan, "trace");
  std::vector<UsedExpert<S>> used;
  for (Index e = 0; e < plan.num_experts(); ++e) {
    const Index* const end = plan.token.data() + plan.expert_begin[e + 1];
    const Index* const t = std::lower_bound(plan.token.data() + plan.expert_begin[e], end, token);
    if (t != end && *t == token) used.push_back({e, plan.gate[t - plan.token.data()]});
  }
  return used;
}

}  // namespace moe
