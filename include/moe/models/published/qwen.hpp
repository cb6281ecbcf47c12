// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

inline constexpr LayerTensors kQwen3Tensors = {
    .prefix = "model.layers.{layer}.mlp.",
    .w_router = {"model.layers.{layer}.mlp.gate.weight"},
    .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"},
                .w_up = {"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"},
                .w_down = {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"}},
    .gguf = "qwen3moe"};

inline constexpr LayerTensors kQwen2Tensors = {
    .prefix = kQwen3Tensors.prefix,
    .w_router = kQwen3Tensors.w_router,
    .experts = kQwen3Tensors.experts,
    .shared_expert = {.w_gate = {"model.layers.{layer}.mlp.shared_expert.gate_proj.weight"},
                      .w_up = {"model.layers.{layer}.mlp.shared_expert.up_proj.weight"},
                      .w_down = {"model.layers.{layer}.mlp.shared_expert.down_proj.weight"}},
    .w_shared_gate = {"model.layers.{layer}.mlp.shared_expert_gate.weight"},
    .gguf = "qwen2moe"};

}  // namespace detail

/// Qwen1.5-MoE-A2.7B (Qwen Team 2024): gates are probabilities as they are (norm_topk_prob is false), one
/// shared expert with a sigmoid gate. Hugging Face's loss is top_k times ours, and its coefficient 0.001, for
/// all models here but Qwen3-Coder.
inline constexpr Model<SwiGLU> qwen1_5_moe_a2_7b = {
    .name = "Qwen1.5-MoE-A2.7B",
    .source = "qwenlm.github.io/blog/qwen-moe",
    .router = {.d_model = 2048, .num_experts = 60, .top_k = 4},
    .d_ff = 1408,
    .shared_experts = 1,
    .shared_d_ff = 5632,
    .gated_shared_experts = true,
    .losses = {.balance = 0.001 * 4, .over_layers = OverLayers::mean},
    .around = {.layers = 24,
               .moe_layers = 24,
               .vocabulary = 151936,
               .attention = attention_parameters(2048, 16, 16, 128) + 3 * 2048},
    .published = {14.3e9, 2.7e9},
    .tensors = detail::kQwen2Tensors};

/// Qwen2-57B-A14B (Yang et al. 2024).
inline constexpr Model<SwiGLU> qwen2_57b_a14b = {
    .name = "Qwen2-57B-A14B",
    .source = "arXiv:2407.10671",
    .router = {.d_model = 3584, .num_experts = 64, .top_k = 8},
    .d_ff = 2560,
    .shared_experts = 1,
    .shared_d_ff = 20480,
    .gated_shared_experts = true,
    .losses = {.balance = 0.001 * 8, .over_layers = OverLayers::mean},
    .around = {.layers = 28,
               .moe_layers = 28,
               .vocabulary = 151936,
               .attention = attention_parameters(3584, 28, 4, 128) + 128 * (28 + 2 * 4)},
    .published = {57.4e9, 14.2e9},
    .tensors = detail::kQwen2Tensors};

/// Qwen3-30B-A3B (Yang et al. 2025): no shared expert, gates have a sum of 1 (norm_topk_prob is true).
inline constexpr Model<SwiGLU> qwen3_30b_a3b = {
    .name = "Qwen3-30B-A3B",
    .source = "arXiv:2505.09388",
    .router = {.d_model = 2048, .num_experts = 128, .top_k = 8, .renormalise = true},
    .d_ff = 768,
    .losses = {.balance = 0.001 * 8, .over_layers = OverLayers::mean},
    .around = {.layers = 48,
               .moe_layers = 48,
               .vocabulary = 151936,
               .attention = attention_parameters(2048, 32, 4, 128) + 2 * 128},
    .published = {30.5e9, 3.3e9},
    .tensors = detail::kQwen3Tensors};

/// Qwen3-235B-A22B.
inline constexpr Model<SwiGLU> qwen3_235b_a22b = {
    .name = "Qwen3-235B-A22B",
    .source = "arXiv:2505.09388",
    .router = {.d_model = 4096, .num_experts = 128, .top_k = 8, .renormalise = true},
    .d_ff = 1536,
    .losses = {.balance = 0.001 * 8, .over_layers = OverLayers::mean},
    .around = {.layers = 94,
               .moe_layers = 94,
               .vocabulary = 151936,
               .attention = attention_parameters(4096, 64, 4, 128) + 2 * 128},
    .published = {235e9, 22e9},
    .tensors = detail::kQwen3Tensors};

/// Qwen3-Coder-480B-A35B (Qwen Team 2025).
inline constexpr Model<SwiGLU> qwen3_coder_480b_a35b = {
    .name = "Qwen3-Coder-480B-A35B",
    .source = "qwenlm.github.io/blog/qwen3-coder",
    .router = {.d_model = 6144, .num_experts = 160, .top_k = 8, .renormalise = true},
    .d_ff = 2560,
    .around = {.layers = 62,
               .moe_layers = 62,
               .vocabulary = 151936,
               .attention = attention_parameters(6144, 96, 8, 128) + 2 * 128},
    .published = {480e9, 35e9},
    .tensors = detail::kQwen3Tensors};

}  // namespace moe
