// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

// What kind of number a value is, read from its exponent bits: -ffast-math does not see through that.
namespace moe {

/// What kind of number a value is.
enum class NumberKind {
  finite,    ///< neither of the others
  infinite,  ///< of either sign
  nan        ///< not a number
};

/// Whether the bit pattern of S is known: numbers are told apart by it, which -ffast-math leaves alone.
template <class S>
inline constexpr bool kHasBits = std::is_same_v<S, float> || std::is_same_v<S, double>;

/// The bits of a number. Signed integers compare as numbers of the same sign do.
template <class S>
using Bits = std::conditional_t<sizeof(S) == 4, std::int32_t, std::int64_t>;
/// The bits of `value`.
template <class S>
Bits<S> bits_of(S value) {
  return std::bit_cast<Bits<S>>(value);
}

namespace detail {

template <class S>
inline constexpr Bits<S> kInfinityBits = std::bit_cast<Bits<S>>(std::numeric_limits<S>::infinity());
// Of the same number without its sign.
template <class S>
Bits<S> magnitude_bits(S value) {
  return bits_of(value) & (std::numeric_limits<Bits<S>>::max)();
}

}  // namespace detail

/// Kind of `value`; O(1). Types without a known bit pattern use the <cmath> functions.
template <class S>
NumberKind number_kind(S value) {
  if constexpr (kHasBits<S>) {
    const auto magnitude = detail::magnitude_bits(value);
    if (magnitude < detail::kInfinityBits<S>) return NumberKind::finite;
    return magnitude == detail::kInfinityBits<S> ? NumberKind::infinite : NumberKind::nan;
  } else {
    if (std::isnan(value)) return NumberKind::nan;
    return std::isinf(value) ? NumberKind::infinite : NumberKind::finite;
  }
}

/// Whether `value` is minus infinity: the logit of an expert that a token can not use.
template <class S>
bool is_unavailable(S value) {
  return number_kind(value) == NumberKind::infinite && std::signbit(value);
}

/// What sums over tokens are made in.
template <class S>
using Sum = std::common_type_t<S, double>;

/// Whether a number is NaN, under -ffast-math too, as far as number_kind.
template <class S>
bool is_nan(S value) {
  if constexpr (kHasBits<S>)
    return detail::magnitude_bits(value) > detail::kInfinityBits<S>;
  else
    return std::isnan(value);
}

}  // namespace moe
