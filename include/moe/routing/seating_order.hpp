// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/math/numbers.hpp>
#include <moe/routing/router_workspace.hpp>
#include <moe/routing/routing.hpp>

// In which order choices ask for a seat.
namespace moe {

/// In which order assignments are seated.
enum class Priority {
  token_order,      ///< all first choices in token order, then all second choices, ... (GShard)
  token_max_gate,   ///< the same, with tokens in order of their largest gate, which may be
                    ///< renormalised (batch-prioritised routing; Riquelme et al. 2021, section 4; Tutel)
  assignment_gate,  ///< by gate: each expert keeps its largest
  token_max_prob,   ///< as token_max_gate, but in order of the largest of a token's router_probs,
                    ///< over all experts (fairseq's and Hugging Face's NLLB)
};

namespace detail {

// Sorts tokens [begin, end) by the largest gate or probability of each, the largest first.
template <class S>
void sort_tokens(const Choices<S>& chosen, const ReusedMatrix<S>* probs, Priority priority, Index begin,
                 CapacityWorkspace<S>& workspace) {
  const Index* const first = chosen.token_begin.data();
  const S* const gate = chosen.gate.data();
  workspace.value.reserve(chosen.num_tokens());
  workspace.value.resize(workspace.token.size());
  for (Index i = 0; i < workspace.value.size(); ++i) {
    const Index t = begin + i;
    S& value = workspace.value[i];
    if (first[t] == first[t + 1])
      value = 0;
    else if (priority == Priority::token_max_gate)
      value = *std::max_element(gate + first[t], gate + first[t + 1]);
    else
      value = probs->row(t).maxCoeff();
  }
  const S* const largest = workspace.value.data();
  std::sort(workspace.token.begin(), workspace.token.end(), [&](Index a, Index b) {
    const S of_a = largest[a - begin], of_b = largest[b - begin];
    return is_equal(of_a, of_b) ? a < b : of_a > of_b;
  });
}

}  // namespace detail

/// Writes the choices of the tokens [begin, end) in order of priority to workspace.order. `probs` are the
/// router_probs for token_max_prob, null otherwise. Gates and probabilities are not NaN.
/// O(choices log choices), and O(tokens * num_experts) more for token_max_prob.
template <class S>
void order_choices(const Choices<S>& chosen, const ReusedMatrix<S>* probs, Priority priority, Index begin,
                   Index end, CapacityWorkspace<S>& workspace) {
  const Index* const first = chosen.token_begin.data();
  Buffer<Index>&order = workspace.order, &tokens = workspace.token;
  order.reserve(chosen.expert.capacity());
  order.clear();
  if (priority == Priority::assignment_gate) {
    for (Index c = first[begin]; c < first[end]; ++c) order.push_back(c);
    // Choices are in token order, so the lower choice is the lower token.
    std::sort(order.begin(), order.end(), [gate = chosen.gate.data()](Index a, Index b) {
      return is_equal(gate[a], gate[b]) ? a < b : gate[a] > gate[b];
    });
    return;
  }
  tokens.reserve(chosen.num_tokens());
  tokens.resize(end - begin);
  Index most = 0;
  for (Index t = begin; t < end; ++t) {
    tokens[t - begin] = t;
    most = (std::max)(most, first[t + 1] - first[t]);
  }
  if (priority != Priority::token_order) detail::sort_tokens(chosen, probs, priority, begin, workspace);
  for (Index rank = 0; rank < most; ++rank)
    for (const Index t : tokens)
      if (first[t] + rank < first[t + 1]) order.push_back(first[t] + rank);
}

}  // namespace moe
