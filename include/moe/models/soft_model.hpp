// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/core/storage.hpp>
#include <moe/layers/soft_moe_layer.hpp>
#include <moe/models/model.hpp>

namespace moe {

/// Where a checkpoint holds a Soft MoE layer's parameters.
struct SoftTensors {
  std::string_view prefix{};  ///< what the names of all tensors of a layer begin with
  TensorSource w_slots{};     ///< [num_experts, slots_per_expert, d_model]; transposed: d_model is first
  TensorSource scale{};       ///< without dimensions
  ExpertTensors experts{};
};

/// A published model with Soft MoE layers: what Model is to layers with a router. `Unit` is the activation or
/// gated unit of its experts.
template <class Unit>
struct SoftModel {
  /// The type of its experts.
  template <class S, class Storage = Owned>
  using Expert = typename ExpertOf<Unit>::template Type<S, Storage>;
  /// The type of its layers.
  template <class S>
  using Layer = SoftMoELayer<Expert<S>>;

  std::string_view name{};
  std::string_view source{};  ///< paper or repository
  SoftMoEOptions layer{};     ///< with d_model, num_experts and slots_per_expert
  Index d_ff = 0;
  bool expert_bias = false;
  Unit unit{};
  Surroundings around{};
  PublishedSize published{};
  SoftTensors tensors{};

  constexpr Index d_model() const { return layer.d_model; }
  constexpr Index num_experts() const { return layer.num_experts; }

  /// The same layer in another size, without what stands around those of the published size.
  constexpr SoftModel scaled_to(Index new_d_model, Index new_d_ff, Index new_num_experts) const {
    SoftModel scaled = *this;
    if (new_d_model == d_model() && new_d_ff == d_ff && new_num_experts == num_experts()) return scaled;
    scaled.around = {};
    scaled.published = {};
    scaled.layer.d_model = new_d_model;
    scaled.layer.num_experts = new_num_experts;
    scaled.d_ff = new_d_ff;
    return scaled;
  }

  /// Trained parameters of one Soft MoE layer: experts, slots and the scale.
  constexpr Index layer_parameters() const {
    return num_experts() * ExpertOf<Unit>::parameters(d_model(), d_ff, expert_bias) +
           num_experts() * layer.slots_per_expert * d_model() + (layer.normalise ? 1 : 0);
  }
  /// Parameters of the whole model. None where `around` does not say what stands around its layers.
  constexpr std::optional<Index> total_parameters() const {
    if (!around.known()) return {};
    return surrounding_parameters(around, d_model()) + around.moe_layers * layer_parameters();
  }
  /// The same: every token has a share in every slot.
  constexpr std::optional<Index> active_parameters() const { return total_parameters(); }
  /// Operations (a multiply-add is two) of one layer's products for one token of a sequence of `tokens`,
  /// forward: logits, inputs and outputs of slots; a slot's expert works once a sequence, whatever its
  /// length. Throws std::invalid_argument for no tokens.
  double flops_per_token(Index tokens) const {
    require(tokens >= 1, "flops_per_token: tokens = ", tokens, ", expected at least 1");
    constexpr Index kMatrices = ExpertOf<Unit>::kUpWidths + 1;
    const Index slots = num_experts() * layer.slots_per_expert;
    return 2.0 * double(slots * d_model()) * (3.0 + double(kMatrices * d_ff) / double(tokens));
  }
};

namespace detail {

template <class S, class Unit, class... More>
typename SoftModel<Unit>::template Layer<S> build_layer(const SoftModel<Unit>& model, More&... more) {
  using Expert = typename SoftModel<Unit>::template Expert<S>;
  const auto options = expert_options<Expert>(model, model.d_ff);
  std::vector<Expert> experts;
  for (Index e = 0; e < model.num_experts(); ++e) experts.emplace_back(options, more...);
  return {std::move(experts), model.layer, more...};
}

}  // namespace detail

/// A layer of the model without weights: every parameter is zero, but that the scale is 1. Throws
/// std::invalid_argument where the model's sizes do not fit each other.
template <class S, class Unit>
typename SoftModel<Unit>::template Layer<S> make_empty_layer(const SoftModel<Unit>& model) {
  return detail::build_layer<S>(model);
}

/// A new layer of the model, with weights as its experts draw them, then its slots. Throws as
/// make_empty_layer.
/// Example: make_layer<float>(soft_moe_b16.scaled_to(64, 256, 8), rng).
template <class S, class Unit>
typename SoftModel<Unit>::template Layer<S> make_layer(const SoftModel<Unit>& model, Rng& rng) {
  return detail::build_layer<S>(model, rng);
}

}  // namespace moe
