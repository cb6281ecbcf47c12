// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// OLMoE-1B-7B (Muennighoff et al. 2024): the eight best of 64 experts, gates are probabilities as they
/// are. Losses as its authors train with, by MegaBlocks, which is normalised as ours but divides by layers.
inline constexpr Model<SwiGLU> olmoe_1b_7b = {
    .name = "OLMoE-1B-7B",
    .source = "arXiv:2409.02060",
    .router = {.d_model = 2048, .num_experts = 64, .top_k = 8},
    .d_ff = 1024,
    .losses = {.balance = 0.01, .z = 0.001, .over_layers = OverLayers::mean},
    .around = {.layers = 16,
               .moe_layers = 16,
               .vocabulary = 50304,
               .attention = attention_parameters(2048, 16, 16, 128) + 2 * 2048},
    .published = {6.9e9, 1.3e9},
    .tensors = {.prefix = "model.layers.{layer}.mlp.",
                .w_router = {"model.layers.{layer}.mlp.gate.weight"},
                .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"},
                            .w_up = {"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"},
                            .w_down = {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"}},
                .gguf = "olmoe"}};

}  // namespace moe
