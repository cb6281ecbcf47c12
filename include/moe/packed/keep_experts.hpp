// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/packed/pack_options.hpp>

namespace moe {

/// Makes the experts that PackOptions::keep_experts does not name unavailable to a router, and says of each
/// expert, routed and then shared, whether it is packed. Throws std::invalid_argument for an expert that does
/// not exist or is named twice, and where the router cannot do without experts. O(num_experts).
template <class R>
std::vector<bool> keep_experts(const PackOptions& options, R& router, Index num_shared_experts) {
  const auto& keep = options.keep_experts;
  const Index routed = router.num_experts();
  std::vector<bool> kept(std::size_t(routed + num_shared_experts), keep.empty());
  for (const Index e : keep) {
    require(e >= 0 && e < routed, "pack: keep_experts has expert ", e, " of ", routed);
    require(!kept[std::size_t(e)], "pack: keep_experts has expert ", e, " twice among ", keep.size());
    kept[std::size_t(e)] = true;
  }
  std::fill(kept.begin() + routed, kept.end(), true);
  std::vector<Index> others;
  for (Index e = 0; e < routed; ++e)
    if (!kept[std::size_t(e)]) others.push_back(e);
  if (others.empty()) return kept;
  if constexpr (requires { router.make_unavailable(others, true); })
    router.make_unavailable(others, options.renormalise_over_kept);
  else
    fail("pack: keep_experts leaves out ", others.size(), " of ", routed,
         " experts, but the router has no make_unavailable, expected 0");
  return kept;
}

}  // namespace moe
