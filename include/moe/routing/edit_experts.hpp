// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// What happens to the weights of a router when experts come and go.
namespace moe {

/// Appends the row `w` to a router's weight [experts, d_model].
template <class S>
Matrix<S> with_row(const Matrix<S>& weight, const Vector<S>& w, const char* where) {
  require(w.size() == weight.cols(), where, ": w has ", w.size(),
          " entries, expected d_model = ", weight.cols());
  Matrix<S> larger(weight.rows() + 1, weight.cols());
  larger << weight, w.transpose();
  return larger;
}

/// The experts that are left of num_experts without those that `removed` names in any order, ascending.
/// Throws std::invalid_argument unless all of these exist, each is named once, and at least `at_least` others
/// are left. O(num_experts + removed).
inline std::vector<Index> experts_without(const std::vector<Index>& removed, Index num_experts,
                                          Index at_least, const char* where) {
  std::vector<bool> goes(std::size_t(num_experts), false);
  for (const Index e : removed) {
    require(e >= 0 && e < num_experts, where, ": expert ", e, " of ", num_experts);
    require(!goes[std::size_t(e)], where, ": expert ", e, " is twice among the ", removed.size(),
            " to remove");
    goes[std::size_t(e)] = true;
  }
  const Index left = num_experts - Index(removed.size());
  require(removed.empty() || left >= at_least, where, ": ", left, " of ", num_experts,
          " experts, and at least ", at_least, " must be left");
  std::vector<Index> kept;
  kept.reserve(std::size_t(left));
  for (Index e = 0; e < num_experts; ++e)
    if (!goes[std::size_t(e)]) kept.push_back(e);
  return kept;
}

/// A copy of some rows of a matrix or vector of num_experts rows, an empty one of an empty one. Throws
/// std::invalid_argument when it has another number of rows.
template <class M>
M take_rows(const M& m, const std::vector<Index>& rows, Index num_experts, const char* where,
            const char* what) {
  if (m.size() == 0) return m;
  require_shape(m, num_experts, m.cols(), where, what);
  M taken(Index(rows.size()), m.cols());
  for (std::size_t i = 0; i < rows.size(); ++i) taken.row(Index(i)) = m.row(rows[i]);
  return taken;
}

}  // namespace moe
