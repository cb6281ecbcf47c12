// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

#include <moe/models/model.hpp>

namespace moe {

/// The names of DeepSeek's tensors, which other models have taken over; `gguf` is the architecture in GGUF
/// files.
constexpr LayerTensors deepseek_tensors(std::string_view gguf, bool selection_bias) {
  LayerTensors tensors = {
      .prefix = "model.layers.{layer}.mlp.",
      .w_router = {"model.layers.{layer}.mlp.gate.weight"},
      .experts = {.w_gate = {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"},
                  .w_up = {"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"},
                  .w_down = {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"}},
      .shared_expert = {.w_gate = {"model.layers.{layer}.mlp.shared_experts.gate_proj.weight"},
                        .w_up = {"model.layers.{layer}.mlp.shared_experts.up_proj.weight"},
                        .w_down = {"model.layers.{layer}.mlp.shared_experts.down_proj.weight"}},
      .gguf = gguf};
  if (selection_bias) tensors.selection_bias = {"model.layers.{layer}.mlp.gate.e_score_correction_bias"};
  return tensors;
}

/// DeepSeekMoE 16B (Dai et al. 2024): fine-grained experts; its two shared experts of width 1408 are
/// stored, and computed, as one of twice that.
inline constexpr Model<SwiGLU> deepseek_moe_16b = {
    .name = "DeepSeekMoE 16B",
    .source = "arXiv:2401.06066",
    .router = {.d_model = 2048, .num_experts = 64, .top_k = 6},
    .d_ff = 1408,
    .shared_experts = 1,
    .shared_d_ff = 2 * 1408,
    .losses = {.balance = 0.001, .balance_of = BalanceOf::sequences},
    .around = {.layers = 28,
               .moe_layers = 27,
               .vocabulary = 102400,
               .attention = attention_parameters(2048, 16, 16, 128),
               .dense_d_ff = 10944},
    .published = {16.4e9, 2.8e9},
    .tensors = deepseek_tensors("deepseek", false)};

/// DeepSeek-V2 (DeepSeek-AI 2024): the three best of eight groups by their best expert; gates are
/// probabilities times 16, not renormalised. In training its authors
/// also drop tokens of full devices, those with the smallest gates first, and balance communication with a
/// coefficient of 0.02; neither is here.
inline constexpr Model<SwiGLU> deepseek_v2 = {
    .name = "DeepSeek-V2",
    .source = "arXiv:2405.04434",
    .router = {.d_model = 5120,
               .num_experts = 160,
               .top_k = 6,
               .gate_scale = 16,
               .group_limit = {.groups = 8, .kept = 3, .score = GroupScore::max}},
    .d_ff = 1536,
    .shared_experts = 1,
    .shared_d_ff = 2 * 1536,
    .losses = {.balance = 0.003, .balance_of = BalanceOf::sequences, .device = 0.05, .devices = 8},
    .around = {.layers = 60,
               .moe_layers = 59,
               .vocabulary = 102400,
               .attention = latent_attention_parameters(5120, 128, 1536, 512, 128, 64, 128),
               .dense_d_ff = 12288},
    .published = {236e9, 21e9},
    .tensors = deepseek_tensors("deepseek2", false)};

/// DeepSeek-V3 (DeepSeek-AI 2024): sigmoid scores, a bias for selection alone, the four best of eight
/// groups by their two best experts; gates are renormalised and multiplied by 2.5.
inline constexpr Model<SwiGLU> deepseek_v3 = {
    .name = "DeepSeek-V3",
    .source = "arXiv:2412.19437",
    .router = {.d_model = 7168,
               .num_experts = 256,
               .top_k = 8,
               .score = Score::sigmoid,
               .renormalise = true,
               .renormalise_epsilon = 1e-20,
               .gate_scale = 2.5,
               .selection_bias = true,
               .group_limit = {.groups = 8, .kept = 4, .score = GroupScore::top_two_sum}},
    .d_ff = 2048,
    .shared_experts = 1,
    .shared_d_ff = 2048,
    .losses = {.balance = 1e-4, .balance_of = BalanceOf::sequence_scores},
    .around = {.layers = 61,
               .moe_layers = 58,
               .vocabulary = 129280,
               .embedding_is_active = false,
               .attention = latent_attention_parameters(7168, 128, 1536, 512, 128, 64, 128),
               .dense_d_ff = 18432},
    .published = {671e9, 37e9},
    .tensors = deepseek_tensors("deepseek2", true)};

}  // namespace moe
