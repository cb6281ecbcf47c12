// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

// A packed layer behind C functions, for bench_flags: compiled into two libraries, with flags for this
// processor and with plain -O2. Nothing of the standard library or of Eigen crosses from one to the other.
namespace moe::bench {

struct PackedStep {
  void* (*make)(std::ptrdiff_t d_model, std::ptrdiff_t d_ff, std::ptrdiff_t num_experts);
  /// Makes a batch of so many tokens, with experts in turn.
  void (*set_tokens)(void* layer, std::ptrdiff_t tokens, std::ptrdiff_t top_k);
  void (*forward)(void* layer, int threads);
  const float* (*output)(void* layer);  ///< [tokens, d_model]
  void (*destroy)(void* layer);
};

}  // namespace moe::bench
