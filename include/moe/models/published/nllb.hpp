// SPDX-License-Identifier: MIT
#pragma once

#include <moe/models/model.hpp>

namespace moe {

/// NLLB-MoE 54B (NLLB Team 2022): the two best experts, gates renormalised over those with a seat. Seats: 2 *
/// tokens / num_experts in training, the share of one choice rounded up, in token order; in inference no
/// token is dropped. The gate scale of 0.8 is that of inference: see nllb_moe_54b_in_training. Its loss
/// counts first choices. These, a coefficient of 0.01 and no z-loss are what the training script in fairseq
/// says (examples/nllb/modeling/sweep/sweep_mmt.py); Hugging Face's configuration has 0.001 for both losses.
/// Names of tensors are the encoder's; the decoder's: nllb_decoder_tensors.
inline constexpr Model<ReLU> nllb_moe_54b = {
    .name = "NLLB-MoE 54B",
    .source = "arXiv:2207.04672",
    .router = {.d_model = 2048,
               .num_experts = 128,
               .top_k = 2,
               .renormalise = true,
               .gate_scale = 0.8,
               .training_capacity = 1.0,
               .capacity_rule = {Rounding::up, 0, 2},
               .renormalise_after_drop = true},
    .d_ff = 8192,
    .expert_bias = true,
    .losses = {.balance = 0.01, .balance_of = BalanceOf::first_choices},
    .around = {.layers = 48,
               .moe_layers = 12,
               .vocabulary = 256206,
               .tied_embeddings = true,
               .attention = encoder_decoder_attention(attention_parameters(2048, 16, 16, 128)),
               .dense_d_ff = 8192,
               .dense_matrices = 2},
    .published = {54.5e9, 0},
    .tensors = {
        .prefix = "model.encoder.layers.{layer}.ffn.",
        .w_router = {"model.encoder.layers.{layer}.ffn.router.classifier.weight"},
        .experts = {.w_up = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.weight"},
                    .w_down = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.weight"},
                    .b_up = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.bias"},
                    .b_down = {"model.encoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.bias"}}}};

/// The tensor names of its decoder, for `tensors` of a copy of the model.
inline constexpr LayerTensors nllb_decoder_tensors = {
    .prefix = "model.decoder.layers.{layer}.ffn.",
    .w_router = {"model.decoder.layers.{layer}.ffn.router.classifier.weight"},
    .experts = {.w_up = {"model.decoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.weight"},
                .w_down = {"model.decoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.weight"},
                .b_up = {"model.decoder.layers.{layer}.ffn.experts.expert_{expert}.fc1.bias"},
                .b_down = {"model.decoder.layers.{layer}.ffn.experts.expert_{expert}.fc2.bias"}}};

/// The same as it is trained: gates have a sum of 1, and the caller sets the mixture of each token to zero
/// with probability 0.2, instead of which inference scales it by 0.8.
inline constexpr Model<ReLU> nllb_moe_54b_in_training = [] {
  Model<ReLU> model = nllb_moe_54b;
  model.router.gate_scale = 1;
  return model;
}();

}  // namespace moe
