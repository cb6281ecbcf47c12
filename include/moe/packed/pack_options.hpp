// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <span>

#include <moe/core/types.hpp>
#include <moe/kernels/instruction_set.hpp>
#include <moe/packed/importance.hpp>

namespace moe {

/// Options of pack and PackedMoELayer.
struct PackOptions {
  /// Whose kernels to use; the best that the processor has, where it is not named.
  std::optional<InstructionSet> instruction_set{};
  /// Rounds activations to bfloat16 too, x and what stands between an expert's products, and multiplies by
  /// AMX or the dot product of AVX-512 BF16. Less exact. Of the peak of floats the latter has twice on AMD
  /// Zen 4 and 5, half on Intel Sapphire Rapids: measure. For experts with a packed form whose weights are in
  /// BF16, of which there must be one; others stay as they are.
  bool bf16_dot_product = false;
  /// Rounds activations to 8 bits too, x and what stands between an expert's products: blocks of 32 numbers
  /// of a row, the largest magnitude of which becomes 127, or zero where it is below 2^-119. Products
  /// are then sums of integers, by the dot products of VNNI where there are any. Less exact: the output
  /// differs by about 0.01 of its magnitude, more where a few activations are far larger than the others. For
  /// experts with a packed form whose weights are in Int8, Int4, Int4Offset or MXFP4, of which there must be
  /// one; others stay as they are. Weights beyond 1e33 may overflow.
  bool int8_activations = false;
  /// By what weights are rounded, see importance_of: nothing, or one for each expert, routed and then shared;
  /// of a list that outlives the call. Of experts packed in Int8 or Int4, of which there must be one, from
  /// matrices of floats.
  std::span<const ExpertImportance> importance{};
  /// The routed experts to pack, in any order; empty: all. The others are left out, which takes a TopKRouter
  /// or one that has its make_unavailable: no token chooses them, and a token takes fewer experts where fewer
  /// than top_k are left. Shared experts are packed in any case.
  std::span<const Index> keep_experts{};
  /// Whether scores are made of the experts that are kept, as if the others were not there; else they are
  /// what they are among all. See TopKRouter::make_unavailable.
  bool renormalise_over_kept = true;
};

}  // namespace moe
