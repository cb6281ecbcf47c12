// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>
#include <moe/routers/sparse_mixer_router.hpp>

namespace moe {

/// Phi-3.5-MoE (Abdin et al. 2024): two picks by SparseMixer, see SparseMixerRouter. Hugging Face's loss is
/// 2 times ours (top_k), and its coefficient 0.001.
inline constexpr Model<SwiGLU, SparseMixerRouter> phi_3_5_moe = {
    .name = "Phi-3.5-MoE",
    .source = "arXiv:2404.14219",
    .router = {.d_model = 4096, .num_experts = 16, .jitter = 0.01},
    .d_ff = 6400,
    .losses = {.balance = 0.001 * 2, .over_layers = OverLayers::mean},
    .around = {.layers = 32,
               .moe_layers = 32,
               .vocabulary = 32064,
               .attention = attention_parameters(4096, 32, 8, 128) + 128 * (32 + 2 * 8) + 4096},
    .published = {41.9e9, 6.6e9},
    .tensors = {.prefix = "model.layers.{layer}.block_sparse_moe.",
                .w_router = {"model.layers.{layer}.block_sparse_moe.gate.weight"},
                .experts = {.w_gate = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"},
                            .w_up = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"},
                            .w_down = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"}},
                .gguf = "phimoe"}};

}  // namespace moe
