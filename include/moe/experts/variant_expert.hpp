// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>
#include <utility>
#include <variant>

#include <moe/core/check.hpp>
#include <moe/experts/expert.hpp>

namespace moe {

/// An expert that is one of several kinds, so that experts of one layer may differ:
/// MoELayer<VariantExpert<FeedForward<float>, GatedFeedForward<float>>, ...>. Built from any of them.
template <TrainableExpert First, TrainableExpert... Rest>
class VariantExpert {
 public:
  using Scalar = typename First::Scalar;
  static_assert((std::is_same_v<Scalar, typename Rest::Scalar> && ...),
                "all kinds of a VariantExpert must have the same Scalar");

  /// An expert of one of the kinds.
  template <class E>
  requires(std::is_same_v<E, First> || (std::is_same_v<E, Rest> || ...)) VariantExpert(E expert)
      : expert_(std::move(expert)) {}

  /// The expert, of whatever kind.
  std::variant<First, Rest...>& get() { return expert_; }
  /// The same, read-only.
  const std::variant<First, Rest...>& get() const { return expert_; }

  Index d_model() const {
    return std::visit([](const auto& e) { return Index(e.d_model()); }, expert_);
  }
  Index cache_cols() const {
    return std::visit([](const auto& e) { return Index(e.cache_cols()); }, expert_);
  }
  void forward(const ConstMatrixRef<Scalar>& x, MatrixRef<Scalar> y) const {
    std::visit([&](const auto& e) { e.forward(x, y); }, expert_);
  }
  void forward(const ConstMatrixRef<Scalar>& x, MatrixRef<Scalar> y, MatrixRef<Scalar> cache) const {
    std::visit([&](const auto& e) { e.forward(x, y, cache); }, expert_);
  }
  /// Throws std::invalid_argument when `grad` is of another kind.
  void backward(const ConstMatrixRef<Scalar>& x, const ConstMatrixRef<Scalar>& d_y, MatrixRef<Scalar> cache,
                MatrixRef<Scalar> d_x, VariantExpert& grad) const {
    std::visit(
        [&](const auto& e) {
          e.backward(x, d_y, cache, d_x, same_kind<std::remove_cvref_t<decltype(e)>>(*this, grad));
        },
        expert_);
  }

  /// Visits the parameters of the kind that all the given experts hold.
  template <class F, class Head, class... Tail>
  static void visit(F&& f, Head& head, Tail&... tail) {
    std::visit(
        [&](auto& e) {
          using E = std::remove_cvref_t<decltype(e)>;
          E::visit(f, e, same_kind<E>(head, tail)...);
        },
        head.expert_);
  }

 private:
  template <class E, class Self, class Other>
  static auto& same_kind(const Self& self, Other& other) {
    auto* const expert = std::get_if<E>(&other.expert_);
    require(expert != nullptr, "VariantExpert: kind ", other.expert_.index(), " where kind ",
            self.expert_.index(), " is expected");
    return *expert;
  }

  std::variant<First, Rest...> expert_;
};

}  // namespace moe
