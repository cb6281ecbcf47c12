// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/buffer.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/routing.hpp>

// What a SoftRouter is told and what it makes of a batch: data alone.
namespace moe {

/// Options of SoftRouter and SoftMoELayer; the same for every scalar.
struct SoftMoEOptions {
  Index d_model = 0;
  Index num_experts = 0;
  /// Mixtures of tokens that an expert works on, in every group.
  Index slots_per_expert = 1;
  /// Whether tokens and slots are divided by their lengths, and a trained scale multiplies the
  /// logits (section 2.3 of the paper). Off: plain dot products (section 2.1).
  bool normalise = true;
};

/// A block of the tokens of one group.
struct GroupTokens {
  /// The group, the first token, and the one after the last.
  Index group, begin, end;
};

/// What a SoftRouter made of a batch, and its buffers. Reused, they allocate nothing; a default-constructed
/// one is ready for use. Rows of tokens that are not valid are zero in every matrix here.
template <class S>
struct SoftRouting {
  Buffer<TokenState> token_state;  ///< [tokens]
  ReusedMatrix<S> logits;          ///< [tokens, slots]; slot e * slots_per_expert + p is expert e's
  ReusedMatrix<S> dispatch;    ///< share of a token in a slot of its group: columns of a group add up to 1
                               ///< [tokens, slots]
  ReusedMatrix<S> combine;     ///< share of a slot in a token's output: rows add up to 1 [tokens, slots]
  Buffer<Index> expert_begin;  ///< first of an expert's rows among those of all [num_experts + 1]

  ReusedMatrix<S> x;                 ///< input [tokens, d_model]
  ReusedMatrix<S> x_unit;            ///< where normalised [tokens, d_model]
  ReusedMatrix<S> w_unit, w_scaled;  ///< where normalised [slots, d_model]
  Buffer<Index> group_begin;         ///< [groups + 1]
  Buffer<Index> live;                ///< groups that have a valid token
  Buffer<GroupTokens> token_blocks;  ///< all tokens, in blocks of at most kTokenBlock
  RowBuffer<S> slots;  ///< inputs, later outputs, of the slots of every group [groups * slots, d_model]

  Index num_tokens() const { return token_state.size(); }
  Index num_groups() const { return std::max<Index>(group_begin.size() - 1, 0); }
  Index num_experts() const { return std::max<Index>(expert_begin.size() - 1, 0); }
  bool is_valid(Index token) const { return token_state[token] == TokenState::valid; }
  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&logits, &dispatch, &combine, &x, &x_unit, &w_unit, &w_scaled}) f(*m);
    f(slots);
  }
};

/// Buffers of a SoftRouter's backward pass. Reused, they allocate nothing.
template <class S>
struct SoftRoutingGradient {
  ReusedMatrix<S> d_y;         ///< with zeros in rows of tokens that are not valid [tokens, d_model]
  ReusedMatrix<S> d_combine;   ///< [tokens, slots]
  ReusedMatrix<S> d_logits;    ///< by dispatch, then by the logits [tokens, slots]
  ReusedMatrix<S> d_x_unit;    ///< where normalised [tokens, d_model]
  ReusedMatrix<S> d_w_scaled;  ///< where normalised [slots, d_model]
  Buffer<S> d_scale;           ///< where normalised, by slot [slots]
  RowBuffer<S> d_slots;        ///< by outputs, later by inputs, of slots [groups * slots, d_model]

  template <class F>
  void for_each_array(const F& f) const {
    for (const ReusedMatrix<S>* m : {&d_y, &d_combine, &d_logits, &d_x_unit, &d_w_scaled}) f(*m);
    f(d_scale);
    f(d_slots);
  }
};

}  // namespace moe
