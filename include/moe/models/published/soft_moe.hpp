// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/size.hpp>
#include <moe/models/soft_model.hpp>

namespace moe {

namespace detail {

// Transformers for images of 224 x 224 (Dosovitskiy et al. 2021), with the head of JFT-4B's 29,593 classes in
// place of an embedding; experts in the second half of the layers.
constexpr Surroundings vision_transformer(Index d_model, Index layers, Index heads) {
  return {.layers = layers,
          .moe_layers = layers / 2,
          .vocabulary = 29593,
          .tied_embeddings = true,
          .attention = attention_parameters(d_model, heads, heads, d_model / heads) + 4 * d_model,
          .dense_d_ff = 4 * d_model,
          .dense_matrices = 2};
}

// The authors' parameters in Flax; matrices stand as [in, out].
inline constexpr SoftTensors kSoftMoETensors = {
    .prefix = "Encoder/encoderblock_{layer}/Moe/",
    .w_slots = {"Encoder/encoderblock_{layer}/Moe/Router/mu", TensorPart::all, true},
    .scale = {"Encoder/encoderblock_{layer}/Moe/Router/scale"},
    .experts = {.w_up = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_0/kernel", TensorPart::all, true},
                .w_down = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_1/kernel", TensorPart::all, true},
                .b_up = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_0/bias"},
                .b_down = {"Encoder/encoderblock_{layer}/Moe/Mlp/Dense_1/bias"}}};

}  // namespace detail

/// Soft MoE S/16 (Puigcerver et al. 2023): 128 experts with one slot each, in the second half of the layers.
/// Its weights were not published. Tensor names are those of the parameters of its authors' code (Flax),
/// joined by '/'.
inline constexpr SoftModel<GELUTanh> soft_moe_s16 = {
    .name = "Soft MoE S/16",
    .source = "arXiv:2308.00951",
    .layer = {.d_model = 384, .num_experts = 128, .slots_per_expert = 1},
    .d_ff = 1536,
    .expert_bias = true,
    .around = detail::vision_transformer(384, 12, 6),
    .published = {933e6, 0},
    .tensors = detail::kSoftMoETensors};

/// Soft MoE B/16.
inline constexpr SoftModel<GELUTanh> soft_moe_b16 = {
    .name = "Soft MoE B/16",
    .source = "arXiv:2308.00951",
    .layer = {.d_model = 768, .num_experts = 128, .slots_per_expert = 1},
    .d_ff = 3072,
    .expert_bias = true,
    .around = detail::vision_transformer(768, 12, 12),
    .published = {3.7e9, 0},
    .tensors = detail::kSoftMoETensors};

/// Soft MoE L/16.
inline constexpr SoftModel<GELUTanh> soft_moe_l16 = {
    .name = "Soft MoE L/16",
    .source = "arXiv:2308.00951",
    .layer = {.d_model = 1024, .num_experts = 128, .slots_per_expert = 1},
    .d_ff = 4096,
    .expert_bias = true,
    .around = detail::vision_transformer(1024, 24, 16),
    .published = {13.1e9, 0},
    .tensors = detail::kSoftMoETensors};

/// Soft MoE H/14, with the 128 experts of the paper (its authors' configuration has 256).
inline constexpr SoftModel<GELUTanh> soft_moe_h14 = {
    .name = "Soft MoE H/14",
    .source = "arXiv:2308.00951",
    .layer = {.d_model = 1280, .num_experts = 128, .slots_per_expert = 1},
    .d_ff = 5120,
    .expert_bias = true,
    .around = detail::vision_transformer(1280, 32, 16),
    .published = {27.3e9, 0},
    .tensors = detail::kSoftMoETensors};

}  // namespace moe
