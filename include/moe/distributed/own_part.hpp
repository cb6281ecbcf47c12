// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/buffer.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_gradient.hpp>

// The part of a joined batch's routing that belongs to the tokens of one process.
namespace moe {

/// Tokens of a joined batch, one after the other.
struct TokenRange {
  Index first, count;  ///< the first, and how many
  /// The one behind the last.
  Index end() const { return first + count; }
};

namespace detail {

// The tokens' rows of a matrix [tokens, cols]; nothing of one that is not there.
template <class S>
void own_rows(const ReusedMatrix<S>& joined, Index tokens, TokenRange own, ReusedMatrix<S>& rows) {
  if (joined.rows() == tokens && joined.cols() > 0)
    rows = joined.middleRows(own.first, own.count);
  else
    rows.resize(0, 0);
}

template <class T>
void own_entries(const Buffer<T>& joined, Index first, Index count, Buffer<T>& entries) {
  if (joined.empty()) return entries.clear();
  entries.resize(count);
  std::copy_n(joined.begin() + first, count, entries.begin());
}

}  // namespace detail

/// Calls f(expert, begin, end) with the assignments [begin, end) of each expert that are of these tokens.
/// O(num_experts * log(tokens)).
template <class S, class F>
void for_each_own_block(const DispatchPlan<S>& plan, TokenRange own, const F& f) {
  const Index* const token = plan.token.data();
  for (Index e = 0; e < plan.num_experts(); ++e) {
    const Index *const first = token + plan.expert_begin[e], *const last = token + plan.expert_begin[e + 1];
    const Index* const begin = std::lower_bound(first, last, own.first);
    f(e, begin - token, std::lower_bound(begin, last, own.end()) - token);
  }
}

/// `part` becomes the choices of these tokens.
template <class S>
void own_part(const Choices<S>& joined, TokenRange own, Choices<S>& part) {
  if (joined.token_begin.empty()) {
    part.token_begin.clear();
    part.expert.clear();
    part.gate.clear();
    return;
  }
  const Index first = joined.token_begin[own.first], count = joined.token_begin[own.end()] - first;
  part.token_begin.resize(own.count + 1);
  for (Index t = 0; t <= own.count; ++t) part.token_begin[t] = joined.token_begin[own.first + t] - first;
  part.expert.resize(count);
  part.gate.resize(count);
  std::copy_n(joined.expert.begin() + first, count, part.expert.begin());
  std::copy_n(joined.gate.begin() + first, count, part.gate.begin());
}

/// `part` becomes the plan of these tokens, over all experts; `first_choice` is the first of their choices.
template <class S>
void own_part(const DispatchPlan<S>& joined, TokenRange own, Index first_choice, DispatchPlan<S>& part) {
  part.num_tokens = own.count;
  part.token_state.resize(own.count);
  std::copy_n(joined.token_state.begin() + own.first, own.count, part.token_state.begin());
  part.gate_side = joined.gate_side;
  part.expert_begin.assign(joined.num_experts() + 1, 0);
  for (Buffer<Index>* b : {&part.token, &part.choice, &part.passed_through}) b->clear();
  part.gate.clear();
  part.dropped.clear();
  for_each_own_block(joined, own, [&](Index e, Index begin, Index end) {
    for (Index a = begin; a < end; ++a) {
      part.token.push_back(joined.token[a] - own.first);
      part.gate.push_back(joined.gate[a]);
      if (!joined.choice.empty()) part.choice.push_back(joined.choice[a] - first_choice);
    }
    part.expert_begin[e + 1] = part.token.size();
  });
  const auto is_own = [&](Index token) { return token >= own.first && token < own.end(); };
  for (const Dropped& d : joined.dropped)
    if (is_own(d.token)) part.dropped.push_back({d.token - own.first, d.expert, d.choice});
  for (const Index t : joined.passed_through)
    if (is_own(t)) part.passed_through.push_back(t - own.first);
}

/// `part` becomes the routing of these tokens; its levels stay. O(own tokens * num_experts + dropped).
/// Allocates only when shapes grow.
template <class S>
void own_part(const Routing<S>& joined, TokenRange own, Routing<S>& part) {
  const Index tokens = joined.num_tokens();
  detail::own_rows(joined.router_logits, tokens, own, part.router_logits);
  detail::own_rows(joined.router_probs, tokens, own, part.router_probs);
  detail::own_rows(joined.input_factor, tokens, own, part.input_factor);
  detail::own_rows(joined.noise.draws, tokens, own, part.noise.draws);
  detail::own_rows(joined.noise.stddev, tokens, own, part.noise.stddev);
  detail::own_rows(joined.noise.noisy_logits, tokens, own, part.noise.noisy_logits);
  part.noise.top_k = joined.noise.top_k;
  own_part(joined.chosen, own, part.chosen);
  own_part(joined.plan, own, joined.chosen.token_begin.empty() ? 0 : joined.chosen.token_begin[own.first],
           part.plan);
}

/// `part` becomes what a gradient by the joined routing says of these tokens. Likewise.
template <class S>
void own_part(const RoutingGradient<S>& gradient, const Routing<S>& joined, TokenRange own,
              RoutingGradient<S>& part) {
  const Index tokens = joined.num_tokens();
  detail::own_rows(gradient.d_router_logits, tokens, own, part.d_router_logits);
  detail::own_rows(gradient.d_router_probs, tokens, own, part.d_router_probs);
  detail::own_rows(gradient.d_noise_stddev, tokens, own, part.d_noise_stddev);
  part.d_chosen_gate.clear();
  if (!gradient.d_chosen_gate.empty()) {
    const Index first = joined.chosen.token_begin[own.first];
    detail::own_entries(gradient.d_chosen_gate, first, joined.chosen.token_begin[own.end()] - first,
                        part.d_chosen_gate);
  }
  part.d_gate.clear();
  if (gradient.d_gate.empty()) return;
  for_each_own_block(joined.plan, own, [&](Index, Index begin, Index end) {
    for (Index a = begin; a < end; ++a) part.d_gate.push_back(gradient.d_gate[a]);
  });
}

}  // namespace moe
