// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// NLLB-MoE 54B (NLLB Team 2022): the two best experts, gates renormalised over those with a seat. In
/// training each token's mixture is dropped with probability 0.2, which this layer leaves to its caller; in
/// inference it is scaled by 0.8, which is the gate scale here. Its loss counts first choices.
inline constexpr Model<ReLU> nllb_moe_54b = {
    .name = "NLLB-MoE 54B",
    .source = "arXiv:2207.04672",
    .router = {.d_model = 2048,
               .num_experts = 128,
               .top_k = 2,
               .renormalise = true,
               .gate_scale = 0.8,
               .renormalise_after_drop = true},
    .d_ff = 8192,
    .expert_bias = true,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::first_choices},
    .tensors = {
        .prefix = "model.encoder.layers.{layer}.ffn.",
        .w_router = {"model.encoder.layers.{layer}.ffn.router.classifier.weight"},
        .experts = {
            .w_up = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.weight"},
            .w_down = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.weight"},
            .b_up = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.bias"},
            .b_down = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.bias"}}}};

}  // namespace moe
