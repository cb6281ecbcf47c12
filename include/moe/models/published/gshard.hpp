// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// GShard 600B (Lepikhin et al. 2021): every second layer of 36 has 2,048 experts; two of them a token, gates
/// with a sum of 1. Seats: 2 * tokens / num_experts in each group, made whole as lingvo does it. Its loss
/// counts first choices.
/// In training the second expert is drawn with a probability of twice its gate (algorithm 1); in inference
/// it is always taken.
inline constexpr Model<ReLU> gshard_600b = {
    .name = "GShard 600B",
    .source = "arXiv:2006.16668",
    .router = {.d_model = 1024,
               .num_experts = 2048,
               .top_k = 2,
               .random_second_threshold = 0.5,
               .renormalise = true,
               .renormalise_epsilon = 1e-9,
               .capacity = 1.0,
               .training_capacity = 1.0,
               .capacity_rule = {Rounding::down, 4, 4}},
    .d_ff = 8192,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::first_choices},
    .published = {600e9, 0}};

/// GLaM 64B/64E (Du et al. 2022): GShard's router in every second layer, but that the second expert is always
/// taken (praxis), dense layers gated.
inline constexpr Model<ReLU> glam_64b_64e = {
    .name = "GLaM 64B/64E",
    .source = "arXiv:2112.06905",
    .router = {.d_model = 8192,
               .num_experts = 64,
               .top_k = 2,
               .renormalise = true,
               .renormalise_epsilon = 1e-9,
               .capacity = 1.0,
               .training_capacity = 1.0,
               .capacity_rule = {Rounding::down, 4, 4}},
    .d_ff = 32768,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::first_choices},
    .around = {.layers = 64,
               .moe_layers = 32,
               .vocabulary = 256000,
               .tied_embeddings = true,
               .attention = attention_parameters(8192, 128, 128, 128),
               .dense_d_ff = 32768},
    .published = {1.2e12, 96.6e9}};

/// ST-MoE-32B (Zoph et al. 2022): two experts a token, the second where its gate is above 0.2, in training
/// with a probability of its gate / 0.2. Its authors used two libraries: second experts, gates with a sum of
/// 1 and a loss of first choices are mesh's (which draws in inference, too), seats are flaxformer's: 1.25 *
/// tokens / num_experts in training and 2 in inference, to the nearest. Its z-loss is the paper's. A layer
/// with experts, every fourth, has a dense feed-forward, too.
inline constexpr Model<GEGLUTanh> st_moe_32b = {
    .name = "ST-MoE-32B",
    .source = "arXiv:2202.08906",
    .router = {.d_model = 5120,
               .num_experts = 64,
               .top_k = 2,
               .second_threshold = 0.2,
               .random_second_threshold = 0.2,
               .renormalise = true,
               .renormalise_epsilon = 1e-9,
               .capacity = 1.0,
               .training_capacity = 0.625,
               .capacity_rule = {Rounding::nearest_even, 4}},
    .d_ff = 20480,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::first_choices, .z = 0.001},
    .around = {.layers = 48,
               .moe_layers = 12,
               .vocabulary = 32128,
               .attention = encoder_decoder_attention(attention_parameters(5120, 64, 64, 128)),
               .dense_d_ff = 20480,
               .dense_beside_experts = true},
    .published = {269e9, 0}};

}  // namespace moe
