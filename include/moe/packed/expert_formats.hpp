// SPDX-License-Identifier: MIT
#pragma once

#include <functional>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/packed/format.hpp>

// Which format each of a layer's experts is packed in.
namespace moe {

/// Of each expert one of some formats.
template <Format... F>
struct ExpertFormats {
  static_assert(sizeof...(F) > 0, "ExpertFormats has at least one format");

  /// The position in F, from 0, of the format of expert e, routed and then shared; asked as often as needed.
  std::function<Index(Index)> position = [](Index) { return Index(0); };

  /// Calls use(format) with expert e's format. Throws std::invalid_argument where its position is not one.
  template <class Use>
  void visit(Index e, const Use& use) const {
    const Index at = position(e);
    require(at >= 0 && at < Index(sizeof...(F)), "pack: the format of expert ", e, " is at position ", at,
            ", expected 0 to ", sizeof...(F) - 1);
    Index i = 0;
    ((i++ == at ? use(F()) : void()), ...);
  }
};

}  // namespace moe
