// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// ERNIE-4.5-21B-A3B (Baidu 2025): a bias added to probabilities for selection alone, gates renormalised,
/// two shared experts stored as one.
inline constexpr Model<SwiGLU> ernie_4_5_21b_a3b = {
    .name = "ERNIE-4.5-21B-A3B",
    .source = "github.com/PaddlePaddle/ERNIE",
    .router = {.d_model = 2560,
               .num_experts = 64,
               .top_k = 6,
               .renormalise = true,
               .renormalise_minimum = 1e-12,
               .selection_bias = true},
    .d_ff = 1536,
    .shared_experts = 1,
    .shared_d_ff = 2 * 1536,
    .around = {.layers = 28,
               .moe_layers = 27,
               .vocabulary = 103424,
               .tied_embeddings = true,
               .attention = attention_parameters(2560, 20, 4, 128),
               .dense_d_ff = 12288},
    .published = {21.8e9, 3e9},
    .tensors = {.prefix = "model.layers.{layer}.mlp.",
                .w_router = {"model.layers.{layer}.mlp.gate.weight"},
                .selection_bias = {"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"},
                .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"},
                            .w_up = {"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"},
                            .w_down = {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"}},
                .shared_expert = {.w_gate = {"model.layers.{layer}.mlp.shared_experts.gate_proj.weight"},
                                  .w_up = {"model.layers.{layer}.mlp.shared_experts.up_proj.weight"},
                                  .w_down = {"model.layers.{layer}.mlp.shared_experts.down_proj.weight"}},
                .gguf = "ernie4_5-moe"}};

}  // namespace moe
