// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>
#include <moe/routers/expert_choice_router.hpp>

namespace moe {

/// Expert Choice 8B/64E (Zhou et al. 2022): every expert takes the tokens that it likes best, two experts a
/// token on average, rounded as flaxformer does it and at least 4 tokens an expert. The router has no bias,
/// as in the paper (flaxformer's has one). Every second layer; the others are GLaM's.
inline constexpr Model<ReLU, ExpertChoiceRouter> expert_choice_8b_64e = {
    .name = "Expert Choice 8B/64E",
    .source = "arXiv:2202.09368",
    .router = {.d_model = 4096,
               .num_experts = 64,
               .capacity = 2.0,
               .capacity_rule = {Rounding::nearest_even, 4}},
    .d_ff = 16384,
    .around = {.layers = 32,
               .moe_layers = 16,
               .vocabulary = 256000,
               .tied_embeddings = true,
               .attention = attention_parameters(4096, 32, 32, 128),
               .dense_d_ff = 16384},
    .published = {143e9, 0}};

}  // namespace moe
