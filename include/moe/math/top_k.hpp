// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/math/softmax.hpp>

// Selection, with one written order: larger first, equal ones by lower index, NaN last.
namespace moe {

/// Whether entry i of `values` goes before entry j in the library's order of selection.
template <class S>
bool selected_before(const S* values, Index i, Index j) {
  const bool nan_i = number_kind(values[i]) == NumberKind::nan;
  const bool nan_j = number_kind(values[j]) == NumberKind::nan;
  if (nan_i != nan_j) return nan_j;
  if (!nan_i && !is_equal(values[i], values[j])) return values[i] > values[j];
  return i < j;
}

/// Writes the indices of the k entries of values[0, n) that come first in the order of selection,
/// best first. 0 <= k <= n. O(n * k) by insertion for the small k of routing, without allocating.
template <class S>
void top_k(Index n, const S* values, Index k, Index* chosen) {
  Index count = 0;
  for (Index i = 0; i < n; ++i) {
    if (count == k && (k == 0 || !selected_before(values, i, chosen[k - 1]))) continue;
    Index place = count < k ? count++ : k - 1;
    for (; place > 0 && selected_before(values, i, chosen[place - 1]); --place)
      chosen[place] = chosen[place - 1];
    chosen[place] = i;
  }
}

/// The k largest entries of a vector, best first. Throws when k is not in [0, size].
/// @code
/// const moe::IndexVector best = moe::top_k(moe::Vector<float>{{1, 3, 3, 0}}, 2);
/// assert(best[0] == 1 && best[1] == 2);
/// @endcode
template <class S>
IndexVector top_k(const Vector<S>& values, Index k) {
  require(k >= 0 && k <= values.size(), "top_k: k = ", k, " is not between 0 and the ", values.size(),
          " values");
  IndexVector chosen(k);
  top_k(values.size(), values.data(), k, chosen.data());
  return chosen;
}

}  // namespace moe
