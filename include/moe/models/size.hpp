// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/types.hpp>

// How large a published model is, as far as its parameters are counted.
namespace moe {

/// What stands around the Mixture-of-Experts layers of a model, as far as parameters are counted.
struct Surroundings {
  Index layers = 0;                   ///< of attention and feed-forward
  Index moe_layers = 0;               ///< those among them with experts
  Index vocabulary = 0;               ///< rows of an embedding
  bool tied_embeddings = false;       ///< whether input and output embedding are one matrix
  bool embedding_is_active = true;    ///< whether the authors count the input embedding as active
  Index attention = 0;                ///< parameters of one layer's attention
  Index dense_d_ff = 0;               ///< width of the feed-forward of the other layers
  int dense_matrices = 3;             ///< 3 where it is gated, else 2
  bool dense_beside_experts = false;  ///< whether layers with experts have that feed-forward, too
  Index idle_attention = 0;           ///< of `attention`, what one token does not use

  /// Whether anything is said here.
  constexpr bool known() const { return layers > 0; }
};

/// Parameters of attention with grouped queries: query and output of `heads`, key and value of
/// `kv_heads`, all of width `head_dim`.
constexpr Index attention_parameters(Index d_model, Index heads, Index kv_heads, Index head_dim) {
  return 2 * d_model * head_dim * (heads + kv_heads);
}

/// The same of multi-head latent attention (DeepSeek-AI 2024, V2, section 2.1): low-rank queries and
/// key-values, heads of a part with and a part without position, and of values.
constexpr Index latent_attention_parameters(Index d_model, Index heads, Index query_rank, Index kv_rank,
                                            Index plain_dim, Index rotary_dim, Index value_dim) {
  return d_model * query_rank + query_rank * heads * (plain_dim + rotary_dim) +
         d_model * (kv_rank + rotary_dim) + kv_rank * heads * (plain_dim + value_dim) +
         heads * value_dim * d_model + query_rank + kv_rank;
}

/// The mean over the layers of an encoder and a decoder of equal depth: the decoder's attend twice.
constexpr Index encoder_decoder_attention(Index attention) { return attention * 3 / 2; }

/// What a model's authors and its report say, in parameters; 0 where they do not.
struct PublishedSize {
  /// All, and those that work on one token.
  double total = 0, active = 0;
};

/// Parameters of embeddings, attention, dense feed-forwards and norms around the layers of a model.
constexpr Index surrounding_parameters(const Surroundings& around, Index d_model) {
  const Index norms = (2 * around.layers + 1) * d_model;
  const Index dense = around.dense_matrices * d_model * around.dense_d_ff;
  const Index dense_layers = around.layers - (around.dense_beside_experts ? 0 : around.moe_layers);
  return (around.tied_embeddings ? 1 : 2) * around.vocabulary * d_model + around.layers * around.attention +
         dense_layers * dense + norms;
}

}  // namespace moe
