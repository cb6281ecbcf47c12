// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>
#include <moe/models/published/deepseek.hpp>

namespace moe {

/// GLM-4.5 (Zeng et al. 2025): DeepSeek-V3's router without groups.
inline constexpr Model<SwiGLU> glm_4_5 = {
    .name = "GLM-4.5",
    .source = "arXiv:2508.06471",
    .router = {.d_model = 5120,
               .num_experts = 160,
               .top_k = 8,
               .score = Score::sigmoid,
               .renormalise = true,
               .renormalise_epsilon = 1e-20,
               .gate_scale = 2.5,
               .selection_bias = true},
    .d_ff = 1536,
    .shared_experts = 1,
    .shared_d_ff = 1536,
    .around = {.layers = 92,
               .moe_layers = 89,
               .vocabulary = 151552,
               .attention = attention_parameters(5120, 96, 8, 128) + 128 * (96 + 2 * 8 + 2),
               .dense_d_ff = 12288},
    .published = {355e9, 32e9},
    .tensors = deepseek_tensors("glm4moe", true)};

}  // namespace moe
