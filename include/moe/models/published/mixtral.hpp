// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

namespace detail {

inline constexpr LayerTensors kMixtralTensors = {
    .prefix = "model.layers.{layer}.block_sparse_moe.",
    .w_router = {"model.layers.{layer}.block_sparse_moe.gate.weight"},
    .experts = {.w_gate = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"},
                .w_up = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"},
                .w_down = {"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"}},
    .gguf = "llama"};

}  // namespace detail

/// Mixtral of Experts (Jiang et al. 2024): the two best of eight experts, softmax over the two.
/// Hugging Face's loss is 2 times ours (top_k), and its coefficient 0.001.
inline constexpr Model<SwiGLU> mixtral_8x7b = {
    .name = "Mixtral 8x7B",
    .source = "arXiv:2401.04088",
    .router = {.d_model = 4096, .num_experts = 8, .top_k = 2, .renormalise = true},
    .d_ff = 14336,
    .losses = {.balance = 0.001 * 2, .over_layers = OverLayers::mean},
    .around = {.layers = 32,
               .moe_layers = 32,
               .vocabulary = 32000,
               .attention = attention_parameters(4096, 32, 8, 128)},
    .published = {46.7e9, 12.9e9},
    .tensors = detail::kMixtralTensors};

/// The larger one (Mistral AI, April 2024).
inline constexpr Model<SwiGLU> mixtral_8x22b = {
    .name = "Mixtral 8x22B",
    .source = "mistral.ai/news/mixtral-8x22b",
    .router = {.d_model = 6144, .num_experts = 8, .top_k = 2, .renormalise = true},
    .d_ff = 16384,
    .losses = {.balance = 0.001 * 2, .over_layers = OverLayers::mean},
    .around = {.layers = 56,
               .moe_layers = 56,
               .vocabulary = 32768,
               .attention = attention_parameters(6144, 48, 8, 128)},
    .published = {141e9, 39e9},
    .tensors = detail::kMixtralTensors};

}  // namespace moe
