// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// DBRX (Databricks 2024): the four best of 16 experts, gates divided by their sum. Its checkpoint
/// stacks the experts' rows, and holds w_down [d_ff, d_model]. Its loss is
/// 4 times ours (top_k), and its coefficient 0.05.
inline constexpr Model<SwiGLU> dbrx = {
    .name = "DBRX",
    .source = "github.com/databricks/dbrx",
    .router = {.d_model = 6144, .num_experts = 16, .top_k = 4, .renormalise = true},
    .d_ff = 10752,
    .losses = {.balance = 0.05 * 4, .over_layers = OverLayers::mean},
    .around = {.layers = 40,
               .moe_layers = 40,
               .vocabulary = 100352,
               .attention = attention_parameters(6144, 48, 8, 128)},
    .published = {132e9, 36e9},
    .tensors = {
        .prefix = "transformer.blocks.{layer}.ffn.",
        .w_router = {"transformer.blocks.{layer}.ffn.router.layer.weight"},
        .experts = {.w_gate = {"transformer.blocks.{layer}.ffn.experts.mlp.w1"},
                    .w_up = {"transformer.blocks.{layer}.ffn.experts.mlp.v1"},
                    .w_down = {.name = "transformer.blocks.{layer}.ffn.experts.mlp.w2", .transposed = true}},
        .gguf = "dbrx"}};

}  // namespace moe
