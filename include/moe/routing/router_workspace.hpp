// SPDX-License-Identifier: MIT
#pragma once

#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// The memory that routers work in, beside the routings that they fill. It holds no results.
namespace moe {

/// What apply_capacity works in.
template <class S>
struct CapacityWorkspace {
  Buffer<Index> order;  ///< a group's choices in order of priority
  Buffer<Index> token;  ///< a group's tokens, likewise
  Buffer<S> value;      ///< what its tokens are ordered by, if not by their place
  Buffer<Index> load;   ///< seats that are taken [num_experts]
  Buffer<Index> seat;   ///< the expert at which a choice is seated, or -1 [choices]

  template <class F>
  void for_each_array(const F& f) const {
    f(value);
  }
};

/// What for_each_final_set works in.
struct FinalSetWorkspace {
  Buffer<Index> assignment;  ///< of a choice, or -1 [choices]
  Buffer<Index> set;         ///< one token's experts, then their assignments
};

/// What route_by_logits and selection_backward work in.
template <class S>
struct TokenChoiceWorkspace {
  ReusedMatrix<S> ranking;       ///< what ranks experts where logits do not [tokens, num_experts]
  Buffer<S> group_score;         ///< [workers, groups]
  Buffer<Index> kept_group;      ///< [workers, kept groups]
  Buffer<double> second_draws;   ///< a router's, see SelectionInputs
  FinalSetWorkspace final_sets;  ///< of for_each_final_set
  Buffer<Index> best;            ///< all top_k of a token
  Buffer<S> gate;                ///< of one token, then its gradient
  Buffer<S> d_gate;              ///< [choices]

  template <class F>
  void for_each_array(const F& f) const {
    f(ranking);
    for (const Buffer<S>* b : {&group_score, &gate, &d_gate}) f(*b);
  }
};

/// What ExpertChoiceRouter works in.
struct ExpertChoiceWorkspace {
  Buffer<Index> candidates;  ///< tokens that an expert may take [workers, tokens]
  Buffer<Index> taken;       ///< tokens that it took [num_experts, most that one takes]
  Buffer<Index> count;       ///< how many these are [num_experts]
};

/// What SinkhornRouter works in.
template <class S>
struct SinkhornWorkspace {
  ReusedMatrix<S> plan{};  ///< [tokens, num_experts]
  Buffer<S> factors{};     ///< of experts, now and before, and of a group's tokens
  Buffer<double> sums{};   ///< [num_experts]

  template <class F>
  void for_each_array(const F& f) const {
    f(plan);
    f(factors);
  }
};

/// What SparseMixerRouter works in.
template <class S>
struct SparseMixerWorkspace {
  ReusedMatrix<S> draws;   ///< [tokens, 2 * (num_experts + 1)]
  ReusedMatrix<S> shares;  ///< of one pick of every token [tokens, num_experts]
  Buffer<Index> picked;    ///< [tokens, 2]
  Buffer<S> gate;          ///< [tokens, 2]
  Buffer<S> d_gate;        ///< [choices], then the shares of one pick

  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&draws, &shares}) f(*m);
    for (const Buffer<S>* b : {&gate, &d_gate}) f(*b);
  }
};

template <class S>
struct RouterWorkspace;

/// What HierarchicalRouter works in.
template <class S>
struct HierarchyWorkspace {
  std::vector<RouterWorkspace<S>> levels;  ///< as Routing::levels
  BatchInfo info;                          ///< what it tells its levels
  Buffer<Index> leaf, rank;                ///< in the order of the levels' choices [choices]
  Buffer<S> gate;                          ///< likewise
  Buffer<S> d_gate;                        ///< by the leaves' gates [choices]
  RoutingGradient<S> d_parent, d_child;    ///< of the level whose turn it is

  template <class F>
  void for_each_array(const F& f) const {
    for (const RouterWorkspace<S>& level : levels) f(level);
    for (const Buffer<S>* b : {&gate, &d_gate}) f(*b);
    for (const RoutingGradient<S>* d : {&d_parent, &d_child}) f(*d);
  }
};

/// What the library's routers work in: one type for all, so that a layer's workspace does not depend on its
/// router. Reused, it allocates nothing; a default-constructed one is ready for use. Calls that run at once
/// need one each, also where they share a routing.
template <class S>
struct RouterWorkspace {
  Reused<IndexVector> capacity;  ///< seats of an expert [groups]
  ReusedMatrix<S> input;     ///< what logits are of, where that is not x: jittered, or a child's tokens alone
  ReusedMatrix<S> d_input;   ///< [tokens, d_model]
  ReusedMatrix<S> d_logits;  ///< [tokens, num_experts]
  ReusedMatrix<S> d_noise;   ///< by the noise's logits [tokens, num_experts]
  CapacityWorkspace<S> seating;          ///< of apply_capacity
  TokenChoiceWorkspace<S> token_choice;  ///< of route_by_logits and selection_backward
  ExpertChoiceWorkspace expert_choice;   ///< of ExpertChoiceRouter
  SinkhornWorkspace<S> sinkhorn;         ///< of SinkhornRouter
  SparseMixerWorkspace<S> sparse_mixer;  ///< of SparseMixerRouter
  HierarchyWorkspace<S> hierarchy;       ///< of HierarchicalRouter

  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&input, &d_input, &d_logits, &d_noise}) f(*m);
    f(seating);
    f(token_choice);
    f(sinkhorn);
    f(sparse_mixer);
    f(hierarchy);
  }
};

}  // namespace moe
