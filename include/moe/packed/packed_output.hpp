// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>

#include <moe/core/types.hpp>
#include <moe/packed/packed_experts.hpp>
#include <moe/routing/routing.hpp>

namespace moe {

/// What stands in a block of the output beside what experts add: before them x where a token is passed
/// through, NaN where it is poisoned, else zero; after them, of a valid token, also the bias.
struct PackedOutput {
  const ConstMatrixRef<float>& x;   ///< [tokens, d_model]
  const DispatchPlan<float>& plan;  ///< of the tokens
  const Vector<float>& bias;        ///< empty for none
  MatrixRef<float> y;               ///< [tokens, d_model]

  /// Writes what stands in a block before experts add to it.
  void begin(const OutputBlock& block) const {
    const Index column = block.column_begin, columns = block.column_end - column;
    MatrixRef<float> to = y;
    for (Index t = block.token_begin; t < block.token_end; ++t)
      std::fill_n(
          &to(t, column), columns,
          plan.token_state[t] == TokenState::poisoned ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
    const Index* const last = plan.passed_through.end();
    for (const Index* t = std::lower_bound(plan.passed_through.begin(), last, block.token_begin);
         t != last && *t < block.token_end; ++t)
      std::copy_n(&x.coeffRef(*t, column), columns, &to(*t, column));
  }
  /// Adds the bias.
  void end(const OutputBlock& block) const {
    MatrixRef<float> to = y;
    for (Index t = block.token_begin; bias.size() > 0 && t < block.token_end; ++t)
      if (plan.token_state[t] == TokenState::valid)
        for (Index j = block.column_begin; j < block.column_end; ++j) to(t, j) += bias[j];
  }
};

}  // namespace moe
