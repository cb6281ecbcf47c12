// SPDX-License-Identifier: MIT
#pragma once

#include <vector>

#include <moe/moe.hpp>

// Experts of the kinds that MoE++ has in one layer.
namespace moe {

using MixedExpert =
    VariantExpert<GatedFeedForward<float>, ZeroExpert<float>, CopyExpert<float>, ConstantExpert<float>>;

// Eight experts: two of every kind.
inline std::vector<MixedExpert> make_mixed_experts(Index d_model, Index d_ff, Rng& rng) {
  std::vector<MixedExpert> experts;
  for (int i = 0; i < 2; ++i) {
    experts.push_back(GatedFeedForward<float>({.d_model = d_model, .d_ff = d_ff}, rng));
    experts.push_back(ZeroExpert<float>({.d_model = d_model}));
    experts.push_back(CopyExpert<float>({.d_model = d_model}));
    experts.push_back(ConstantExpert<float>({.d_model = d_model}, rng));
  }
  return experts;
}

}  // namespace moe
