// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <ostream>
#include <string>
#include <string_view>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>

// How code outside a layer reaches its parameters. A type with parameters has
//   template <class F, class... Self> static void visit(F&& f, Self&... self)
// which calls f(info, self.p...) for every parameter p of any number of objects in lockstep: a layer,
// its gradient, an optimiser's moments. Names are dotted ("experts.3.w_up"). f sees a const ParameterInfo,
// and const arrays of const objects: auto& takes them all. A model of your own does the same with
// visit_array, visit_part and visit_parts, and is then visited, zeroed, counted, saved and checked as one
// thing.
namespace moe {

/// What a visited array is for. Optimisers, norms and counts look at parameters; files hold all.
enum class Kind {
  parameter,  ///< trained by gradient
  buffer,     ///< part of the state but not trained by gradient (a selection bias)
  frozen,     ///< a parameter that is not to be trained
};

/// The dotted name of a parameter, written out where it is needed: no memory until then. Refers to what it is
/// made of, which lives while f runs: a std::string of it may be kept.
class Name {
 public:
  /// A name of one part.
  constexpr Name(const char* part) : part_(part) {}
  /// The same.
  constexpr Name(std::string_view part) : part_(part) {}
  /// The same.
  constexpr Name(const std::string& part) : part_(part) {}
  /// One of several parts of this name: {"experts", 3} is "experts.3".
  constexpr Name(std::string_view part, Index number) : part_(part), number_(number) {}
  /// The name of a part of what `whole` names. Either may be empty.
  constexpr Name(const Name& whole, const Name& part) : whole_(&whole), rest_(&part) {}
  Name(const Name&&, const Name&) = delete;
  Name(const Name&, const Name&&) = delete;

  /// Written out, with a dot between parts.
  std::string str() const {
    std::string text(whole_ ? whole_->str() : std::string(part_));
    const std::string rest = rest_ ? rest_->str() : number_ >= 0 ? std::to_string(number_) : "";
    if (!text.empty() && !rest.empty()) text += '.';
    return text += rest;
  }
  /// The same.
  operator std::string() const { return str(); }
  /// Writes it out.
  friend std::ostream& operator<<(std::ostream& out, const Name& name) { return out << name.str(); }
  friend bool operator==(const Name& name, std::string_view text) { return name.str() == text; }

 private:
  std::string_view part_{};
  Index number_ = -1;                              // of the part, where there are several
  const Name *whole_ = nullptr, *rest_ = nullptr;  // in place of these
};

/// What visit() says of an array.
struct ParameterInfo {
  Name name;                    ///< valid only during the call of f: make a std::string of it to keep it
  Kind kind = Kind::parameter;  ///< what it is for
};

/// Calls f(info, arrays...) for one array of each of the objects that a visit() visits. Throws
/// std::invalid_argument unless all have the shape of the first. Buffers may differ: those of a
/// gradient are empty. Example: visit_array(f, {"w_up"}, self.w_up...).
template <class F, class First, class... Rest>
void visit_array(F&& f, const ParameterInfo& info, First& first, Rest&... rest) {
  if (info.kind != Kind::buffer) (require_shape(rest, first.rows(), first.cols(), "visit", info.name), ...);
  f(info, first, rest...);
}

/// Visits the parameters of parts under a name of their own: visit_part("router", f, a, b) calls f
/// with names "router.w_router" and so on, visit_part({"experts", 3}, f, a, b) with "experts.3.w_up".
template <class F, class Part, class... Parts>
void visit_part(const Name& prefix, F&& f, Part& part, Parts&... parts) {
  Part::visit(
      [&](const ParameterInfo& info, auto&... arrays) {
        const ParameterInfo whole{{prefix, info.name}, info.kind};
        f(whole, arrays...);
      },
      part, parts...);
}

/// The same for all parts of vectors or arrays, each with its number: visit_parts("layers", f, a, b) calls f
/// with names "layers.0.router.w_router" and so on. Throws std::invalid_argument unless all have as many
/// parts.
template <class F, class Parts, class... Others>
void visit_parts(std::string_view name, F&& f, Parts& parts, Others&... others) {
  (require(others.size() == parts.size(), "visit: ", others.size(), " of ", name, " beside ", parts.size()),
   ...);
  for (std::size_t i = 0; i < parts.size(); ++i) visit_part({name, Index(i)}, f, parts[i], others[i]...);
}

namespace detail {

template <class Array>
void require_writable(const Array&) {
  static_assert(
      requires(Array & array) { array.setZero(); },
      "a read-only parameter, as that of a mapped expert, has no gradient");
}

}  // namespace detail

/// A copy with the same configuration in which every parameter is zero and buffers are empty: the
/// gradient of `thing`, or a moment of its optimiser.
/// @code
/// moe::Rng rng(1);
/// const moe::FeedForward<float> expert({.d_model = 4, .d_ff = 8}, rng);
/// const moe::FeedForward<float> grad = moe::zeros_like(expert);
/// assert(grad.w_up.rows() == 8 && grad.w_up.isZero());
/// @endcode
template <class Thing>
Thing zeros_like(const Thing& thing) {
  Thing zeros = thing;
  Thing::visit(
      [](const ParameterInfo& info, auto& array) {
        detail::require_writable(array);
        if (info.kind == Kind::buffer)
          array.resize(0, array.cols());
        else
          array.setZero();
      },
      zeros);
  return zeros;
}

/// Sets every parameter to zero, e.g. of a gradient before the next step.
template <class Thing>
void set_zero(Thing& thing) {
  Thing::visit(
      [](const ParameterInfo& info, auto& array) {
        detail::require_writable(array);
        if (info.kind != Kind::buffer) array.setZero();
      },
      thing);
}

/// Number of trained scalars.
template <class Thing>
Index num_parameters(const Thing& thing) {
  Index count = 0;
  Thing::visit(
      [&](const ParameterInfo& info, const auto& array) {
        if (info.kind == Kind::parameter) count += array.size();
      },
      thing);
  return count;
}

}  // namespace moe
