// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/math/softmax.hpp>

// Balance without a loss: a bias for selection alone, moved towards experts with too little load.
namespace moe {

/// Auxiliary-loss-free balancing (Wang et al. 2024, algorithm 1; DeepSeek-V3): bias_e += rate *
/// sign(mean load - load of e). Once per optimiser step, with the tokens per expert [num_experts] of the
/// whole batch, whatever it was split into; e.g. the sum of demand_per_expert(cache.routing).
/// DeepSeek-V3 trains with a rate of 1e-3. O(num_experts). Throws when sizes differ, for negative counts
/// and for a rate that is not finite.
/// @code
/// moe::Vector<float> bias = moe::Vector<float>::Zero(3);
/// const moe::IndexVector tokens_per_expert{{10, 2, 6}};
/// moe::update_selection_bias(bias, tokens_per_expert, 1e-3);
/// assert(bias[0] < 0 && bias[1] > 0 && bias[2] == 0);
/// @endcode
template <class S>
void update_selection_bias(Vector<S>& bias, const IndexVector& tokens_per_expert, double rate) {
  require(bias.size() == tokens_per_expert.size(), "update_selection_bias: bias has ", bias.size(),
          " entries, expected one for each of ", tokens_per_expert.size(), " counts");
  require(number_kind(rate) == NumberKind::finite, "update_selection_bias: rate = ", rate,
          ", expected a finite number");
  Index total = 0;
  for (Index e = 0; e < bias.size(); ++e) {
    require(tokens_per_expert[e] >= 0, "update_selection_bias: tokens_per_expert[", e,
            "] = ", tokens_per_expert[e], ", expected at least 0");
    total += tokens_per_expert[e];
  }
  for (Index e = 0; e < bias.size(); ++e) {
    const Index load = tokens_per_expert[e] * bias.size();  // beside total, without a division
    if (load < total)
      bias[e] += S(rate);
    else if (load > total)
      bias[e] -= S(rate);
  }
}

}  // namespace moe
