// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include <moe/core/random.hpp>
#include <moe/core/reused.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/check_router.hpp>
#include <moe/routing/router_workspace.hpp>

namespace moe {

/// A table [vocabulary] that gives every token id an expert drawn at random (Roller et al. 2021, "Hash
/// Layers for Large Sparse Models", section 3.1). Throws std::invalid_argument for counts out of range.
inline IndexVector random_hash_table(Index vocabulary, Index num_experts, Rng& rng) {
  require(vocabulary >= 0, "random_hash_table: vocabulary = ", vocabulary, ", expected at least 0");
  require(num_experts > 0, "random_hash_table: num_experts = ", num_experts, ", expected at least 1");
  IndexVector table(vocabulary);
  for (Index& expert : table) expert = rng.index(num_experts);
  return table;
}

/// A table [vocabulary] that gives experts nearly the same number of occurrences: ids by falling count,
/// each to the expert with the fewest so far (the balanced assignment of Roller et al. 2021). Ties go to the
/// lower id and the lower expert. O(vocabulary * (log(vocabulary) + num_experts)). Throws for negative
/// counts and without experts.
inline IndexVector balanced_hash_table(const IndexVector& counts, Index num_experts) {
  require(num_experts > 0, "balanced_hash_table: num_experts = ", num_experts, ", expected at least 1");
  for (Index i = 0; i < counts.size(); ++i)
    require(counts[i] >= 0, "balanced_hash_table: counts[", i, "] = ", counts[i], ", expected at least 0");
  IndexVector order(counts.size()), load = IndexVector::Zero(num_experts), table(counts.size());
  for (Index i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](Index a, Index b) { return counts[a] != counts[b] ? counts[a] > counts[b] : a < b; });
  for (const Index id : order) {
    const Index expert = std::min_element(load.begin(), load.end()) - load.begin();
    table[id] = expert;
    load[expert] += counts[id];
  }
  return table;
}

/// Options of HashRouter; the same for every scalar.
struct HashOptions {
  Index d_model = 0;
  Index num_experts = 0;
  IndexVector table{};  ///< the expert of every token id [vocabulary]
  /// Capacity factor, see expert_capacity, in training and in inference; none: dropless.
  std::optional<double> capacity{};
  CapacityRule capacity_rule{};
  Overflow overflow = Overflow::drop;  ///< or pass_through; there is no next best expert here
};

/// Hash routing (Roller et al. 2021): a token goes to the expert that a table names for its id
/// (BatchInfo::token_ids), with a gate of 1. It has nothing to learn and balances as well as its table
/// does. router_probs are 1 at that expert; there are no logits.
template <class S>
class HashRouter {
 public:
  using Scalar = S;
  using Options = HashOptions;

  /// Throws std::invalid_argument for options out of range, a table with a number that is no expert's
  /// included.
  explicit HashRouter(Options options) : options_(std::move(options)) {
    require(options_.d_model > 0, "HashRouter: d_model = ", options_.d_model, ", expected at least 1");
    require(options_.num_experts > 0, "HashRouter: num_experts = ", options_.num_experts,
            ", expected at least 1");
    for (Index i = 0; i < options_.table.size(); ++i)
      require(options_.table[i] >= 0 && options_.table[i] < options_.num_experts, "HashRouter: table[", i,
              "] is expert ", options_.table[i], " of ", options_.num_experts);
    require(options_.overflow != Overflow::next_best,
            "HashRouter: overflow is next_best, but a table names one expert: expected drop or "
            "pass_through");
    if (options_.capacity) expert_capacity(0, options_.num_experts, 1, *options_.capacity);
    check_capacity_rule(options_.capacity_rule, "HashRouter");
  }

  Index d_model() const { return options_.d_model; }
  Index num_experts() const { return options_.num_experts; }
  const Options& options() const { return options_; }

  /// Routing, the same in training and in inference. A valid token with a NaN or an infinity in its row of
  /// x is poisoned. O(tokens * (d_model + num_experts)). Throws std::invalid_argument without token_ids, and
  /// for the id of a token that is not masked beyond the table.
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing,
             RouterWorkspace<S>& workspace) const {
    begin_route(*this, x, info, routing, workspace, "HashRouter::route", {.router_probs = true});
    require(info.token_ids.size() == x.rows(), "HashRouter::route: token_ids has ", info.token_ids.size(),
            " entries, expected ", x.rows(), " tokens");
    DispatchPlan<S>& plan = routing.plan;
    const IndexVector& table = options_.table;
    for (Index t = 0; t < x.rows(); ++t)
      require(plan.token_state[t] != TokenState::valid ||
                  (info.token_ids[t] >= 0 && info.token_ids[t] < table.size()),
              "HashRouter::route: token ", t, " has id ", info.token_ids[t], ", expected one of a table of ",
              table.size());
    mark_poisoned_rows(x, plan);
    Choices<S>& chosen = routing.chosen;
    chosen.expert.reserve(x.rows());
    chosen.gate.reserve(x.rows());
    routing.router_probs.setZero(x.rows(), num_experts());
    for (Index t = 0; t < x.rows(); ++t) {
      if (routing.is_valid(t)) {
        const Index expert = table[info.token_ids[t]];
        chosen.expert.push_back(expert);
        chosen.gate.push_back(S(1));
        routing.router_probs(t, expert) = S(1);
      }
      chosen.token_begin[t + 1] = chosen.size();
    }
    if (!options_.capacity) return dispatch_all(chosen, plan);
    Reused<IndexVector>& capacity = workspace.capacity;
    count_valid_tokens(plan, info, capacity);
    for (Index& seats : capacity)
      seats = expert_capacity(seats, num_experts(), 1, *options_.capacity, options_.capacity_rule);
    apply_capacity(chosen, routing.router_probs, capacity, {.overflow = options_.overflow}, info, plan,
                   workspace.seating);
  }
  /// The same with a workspace of its own: it allocates.
  void route(const ConstMatrixRef<S>& x, const BatchInfo& info, Routing<S>& routing) const {
    RouterWorkspace<S> workspace;
    route(x, info, routing, workspace);
  }

 private:
  Options options_;
};

}  // namespace moe
