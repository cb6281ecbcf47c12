// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>

// What passes between a router, the rest of a layer and the losses: data alone.
namespace moe {

/// What a router may need to know about a batch beside x [tokens, d_model]. Empty members mean
/// "nothing special".
/// @code
/// moe::BatchInfo info;
/// info.mask = moe::Mask::Constant(4, true);
/// info.mask[3] = false;                            // padding
/// info.group_begin = moe::IndexVector{{0, 2, 4}};  // two sequences of two tokens
/// assert(info.num_groups() == 2 && info.begin_of(1) == 2);
/// @endcode
struct BatchInfo {
  /// True for a real token, false for padding, as attention masks have it [tokens]. A token that is
  /// masked out goes nowhere, uses no capacity, enters no loss; its output row and its d_x are zero.
  Reused<Mask> mask{};
  /// One id a token, for routers that look at ids (hash routing) [tokens].
  Reused<IndexVector> token_ids{};
  /// First token of every group, then the number of tokens [groups + 1]. Rules that couple tokens
  /// (capacity, expert choice) work within a group. Empty: one group.
  Reused<IndexVector> group_begin{};

  Index num_groups() const { return group_begin.size() > 0 ? group_begin.size() - 1 : 1; }
  /// First token of a group.
  Index begin_of(Index group) const { return group_begin.size() > 0 ? group_begin[group] : 0; }
  /// The token after the last of a group, in a batch of `tokens`.
  Index end_of(Index group, Index tokens) const {
    return group_begin.size() > 0 ? group_begin[group + 1] : tokens;
  }
};

/// Whether a token is routed.
enum class TokenState : std::uint8_t {
  valid,     ///< it is
  masked,    ///< padding: output row and d_x are zero
  poisoned,  ///< a logit is NaN or +inf, or all are -inf: output row is NaN, d_x is zero
};

/// What every token chose before capacity, as rows of a compressed sparse matrix.
template <class S>
struct Choices {
  Buffer<Index> token_begin;  ///< first choice of a token [tokens + 1]
  Buffer<Index> expert;       ///< chosen expert: a token's best first, ascending where experts
                              ///< choose [choices]
  Buffer<S> gate;             ///< its gate over the set that the token chose [choices]

  Index num_tokens() const { return std::max<Index>(token_begin.size() - 1, 0); }
  Index size() const { return expert.size(); }
  friend bool operator==(const Choices&, const Choices&) = default;
  template <class F>
  void for_each_array(const F& f) const {
    f(gate);
  }
};

/// An assignment that found no seat: a token's `choice`-th choice (0 is the first) was `expert`.
struct Dropped {
  /// The token, the expert that was full, and which of the token's choices it was.
  Index token, expert, choice;
  friend bool operator==(const Dropped&, const Dropped&) = default;
};

/// What a gate multiplies: the output of the expert (nearly always) or its input (Llama-4).
enum class GateSide {
  output,  ///< y_t is the sum of gate * expert(x_t)
  input    ///< y_t is the sum of expert(gate * x_t)
};

/// Who goes where: assignments of tokens to experts, as rows of a compressed sparse matrix. Within
/// an expert tokens ascend, and each appears at most once.
template <class S>
struct DispatchPlan {
  Index num_tokens = 0;
  Buffer<TokenState> token_state;         ///< [tokens]
  Buffer<Index> expert_begin;             ///< first assignment of an expert [num_experts + 1]
  Buffer<Index> token;                    ///< [assignments]
  Buffer<S> gate;                         ///< [assignments]
  Buffer<Index> choice;                   ///< the entry of Routing::chosen it stems from [assignments]
  GateSide gate_side = GateSide::output;  ///< what gates multiply
  Buffer<Dropped> dropped;                ///< in order of priority, group by group
  Buffer<Index> passed_through;           ///< tokens to whose sum x is added; a router lists those that no
                                          ///< expert of theirs had a seat for, ascending

  Index num_experts() const { return std::max<Index>(expert_begin.size() - 1, 0); }
  /// Number of assignments.
  Index num_assignments() const { return token.size(); }
  /// Number of assignments of an expert.
  Index rows_of(Index expert) const { return expert_begin[expert + 1] - expert_begin[expert]; }
  /// Number of tokens that are neither masked nor poisoned. O(tokens).
  Index num_valid_tokens() const {
    return Index(std::count(token_state.begin(), token_state.end(), TokenState::valid));
  }
  friend bool operator==(const DispatchPlan&, const DispatchPlan&) = default;
  template <class F>
  void for_each_array(const F& f) const {
    f(gate);
  }
};

/// The noise that a router added to its logits in training.
template <class S>
struct RoutingNoise {
  ReusedMatrix<S> draws;         ///< standard normal [tokens, num_experts]
  ReusedMatrix<S> stddev;        ///< [tokens, num_experts]
  ReusedMatrix<S> noisy_logits;  ///< router_logits + draws * stddev [tokens, num_experts]
  Index top_k = 0;               ///< how many experts a token chooses

  bool empty() const { return draws.size() == 0 && stddev.size() == 0 && noisy_logits.size() == 0; }
  /// Makes it empty; the memory stays.
  void clear() {
    for (ReusedMatrix<S>* m : {&draws, &stddev, &noisy_logits}) m->resize(0, 0);
    top_k = 0;
  }
  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&draws, &stddev, &noisy_logits}) f(*m);
  }
};

/// The parts of a routing that not every router fills. See begin_routing.
struct RoutingParts {
  /// Whether a router fills the member of Routing of this name.
  bool router_logits = false, router_probs = false, noise = false, input_factor = false, levels = false;
};

/// Everything that a router decided about a batch, and all that its backward pass needs. What a router does
/// not make is empty: a matrix without elements, no levels. A loss that needs it refuses.
template <class S>
struct Routing {
  ReusedMatrix<S> router_logits;  ///< before noise [tokens, num_experts]
  ReusedMatrix<S> router_probs;   ///< scores of the logits that selection looked at, with a sum of 1 (a
                                  ///< softmax, for most routers); rows of tokens that are not valid are
                                  ///< zero [tokens, num_experts]
  Choices<S> chosen;              ///< demand, before capacity
  DispatchPlan<S> plan;           ///< after capacity
  RoutingNoise<S> noise;          ///< in training, where the router is noisy
  ReusedMatrix<S> input_factor;   ///< what the router multiplied x by, where it jitters [tokens, d_model]
  /// The routings that this one is made of, where a router is made of routers (HierarchicalRouter:
  /// the parent's, then that of each child).
  std::vector<Routing> levels{};

  Index num_tokens() const { return plan.num_tokens; }
  Index num_experts() const { return plan.num_experts(); }
  bool is_valid(Index token) const { return plan.token_state[token] == TokenState::valid; }
  /// The logits that selection looked at: with noise where there is any.
  const ReusedMatrix<S>& selection_logits() const {
    return noise.empty() ? router_logits : noise.noisy_logits;
  }
  /// Calls f for every array of scalars that it consists of, or for parts that have this function: what a
  /// view of a matrix may reach. So it is with the other types that have it. See require_apart.
  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&router_logits, &router_probs, &input_factor}) f(*m);
    f(chosen);
    f(plan);
    f(noise);
    for (const Routing& level : levels) f(level);
  }
};

}  // namespace moe
