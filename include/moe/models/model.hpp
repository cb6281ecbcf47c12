// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/storage.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/models/size.hpp>
#include <moe/models/training_losses.hpp>
#include <moe/routers/top_k_router.hpp>
#include <moe/routing/group_limit.hpp>

// What a published model says about its Mixture-of-Experts layers: one readable aggregate, from which
// follow a layer of any size, the numbers of parameters and operations, and where a checkpoint holds
// what. The models themselves are in the other headers of this folder.
namespace moe {

/// Which rows of a tensor are a parameter, where gate and up projection are one tensor of 2 * d_ff rows.
enum class TensorPart {
  all,          ///< the tensor is one parameter
  first_half,   ///< the first d_ff rows
  second_half,  ///< the last d_ff rows
  even_rows,    ///< rows 0, 2, ...
  odd_rows      ///< rows 1, 3, ...
};

/// Where a checkpoint holds a parameter.
struct TensorSource {
  /// {layer} and {expert} stand for numbers. A parameter of routed experts whose name has no {expert}
  /// is one tensor with the experts one after the other.
  std::string_view name{};
  TensorPart part = TensorPart::all;  ///< which of its rows
  bool transposed = false;            ///< [in, out] in place of [out, in]

  /// Whether the checkpoint does not hold it.
  constexpr bool empty() const { return name.empty(); }
};

/// Where a checkpoint holds an expert's parameters.
struct ExpertTensors {
  /// Weights; w_gate is of gated experts.
  TensorSource w_gate{}, w_up{}, w_down{};
  /// Biases, empty for none.
  TensorSource b_gate{}, b_up{}, b_down{};
};

/// Where a checkpoint holds a layer's parameters.
struct LayerTensors {
  std::string_view prefix{};                        ///< what the names of all tensors of a layer begin with
  std::array<std::string_view, 3> more_prefixes{};  ///< or else with one of these; empty for none
  /// The router's parameters.
  TensorSource w_router{}, b_router{}, selection_bias{};
  /// Those of a routed expert and of a shared one.
  ExpertTensors experts{}, shared_expert{};
  /// Those of the layer itself.
  TensorSource w_shared_gate{}, b_output{};
  /// general.architecture of its GGUF files, whose names are llama.cpp's; empty where there are none.
  std::string_view gguf{};
};

/// Whether an activation is a gated unit, one with two arguments.
template <class Unit>
concept GatedUnit = requires(const Unit& unit, float v) {
  unit.forward(v, v);
};

/// What experts with the unit `Unit` are. An expert of a kind of its own has a tag as unit and a
/// specialisation, whose Type has a constructor from mapped weights (see models/published/openmoe.hpp).
template <class Unit>
struct ExpertOf {
  /// The type of an expert.
  template <class S, class Storage = Owned>
  using Type =
      std::conditional_t<GatedUnit<Unit>, GatedFeedForward<S, Unit, Storage>, FeedForward<S, Unit, Storage>>;
  /// Rows of the matrices before the activation, in d_ff.
  static constexpr Index kUpWidths = GatedUnit<Unit> ? 2 : 1;

  /// Parameters of one expert.
  static constexpr Index parameters(Index d_model, Index d_ff, bool bias) {
    return (kUpWidths + 1) * d_model * d_ff + (bias ? kUpWidths * d_ff + d_model : 0);
  }
};

namespace detail {

// The limit with the most groups, at most as many as it has, that `num_experts` fill evenly with at least
// two each, and the same share of them kept.
constexpr GroupLimit scaled_limit(const GroupLimit& limit, Index num_experts) {
  GroupLimit scaled = limit;
  scaled.groups = std::max<Index>(1, (std::min)(limit.groups, num_experts / 2));
  while (num_experts % scaled.groups != 0) --scaled.groups;
  scaled.kept = (limit.kept * scaled.groups + limit.groups - 1) / limit.groups;
  return scaled;
}

}  // namespace detail

/// A published model. `Unit` is the activation or gated unit of its experts, `R` its router.
template <class Unit, template <class> class R = TopKRouter>
struct Model {
  /// The options of its router.
  using RouterOptions = typename R<float>::Options;
  /// The type of its experts.
  template <class S, class Storage = Owned>
  using Expert = typename ExpertOf<Unit>::template Type<S, Storage>;
  /// The type of its layers.
  template <class S, class Storage = Owned>
  using Layer = MoELayer<Expert<S, Storage>, R<S>>;

  std::string_view name{};
  std::string_view source{};  ///< paper or repository
  RouterOptions router{};     ///< with d_model and num_experts
  Index d_ff = 0;             ///< of a routed expert
  bool expert_bias = false;
  Unit unit{};
  Index shared_experts = 0;           ///< how many
  Index shared_d_ff = 0;              ///< of a shared expert
  bool gated_shared_experts = false;  ///< see SharedExperts::gated
  bool output_bias = false;           ///< whether a layer has b_output
  Losses losses{};                    ///< in training, see routing_loss
  Surroundings around{};
  PublishedSize published{};
  LayerTensors tensors{};

  constexpr Index d_model() const { return router.d_model; }
  constexpr Index num_experts() const { return router.num_experts; }

  /// The same layer in another size: shared experts shrink as the routed ones do, noise is in proportion
  /// to 1 / num_experts (V-MoE). A group limit becomes one of fewer groups where the experts do not fill
  /// its own with two each, and keeps its share of them. top_k is at most the experts that are left.
  /// What stands around the layers of the published size is left out.
  constexpr Model scaled_to(Index new_d_model, Index new_d_ff, Index new_num_experts) const {
    Model scaled = *this;
    if (new_d_model == d_model() && new_d_ff == d_ff && new_num_experts == num_experts()) return scaled;
    scaled.around = {};
    scaled.published = {};
    scaled.router.d_model = new_d_model;
    scaled.router.num_experts = new_num_experts;
    Index available = new_num_experts;
    if constexpr (requires { scaled.router.group_limit; }) {
      GroupLimit& limit = scaled.router.group_limit;
      limit = detail::scaled_limit(limit, new_num_experts);
      available = limit.kept * (new_num_experts / limit.groups);
    }
    if constexpr (requires { scaled.router.top_k = Index(1); })
      scaled.router.top_k = (std::min)(router.top_k, available);
    if constexpr (requires { scaled.router.noise_stddev; })
      scaled.router.noise_stddev *= double(num_experts()) / double(std::max<Index>(1, new_num_experts));
    scaled.d_ff = new_d_ff;
    if (shared_experts > 0)
      scaled.shared_d_ff = std::max<Index>(1, shared_d_ff * new_d_ff / std::max<Index>(1, d_ff));
    return scaled;
  }

  /// Parameters of one expert of width `width`.
  constexpr Index expert_parameters(Index width) const {
    return ExpertOf<Unit>::parameters(d_model(), width, expert_bias);
  }
  /// Parameters of one layer's router (with those of its noise), shared experts, their gates and the
  /// output bias.
  constexpr Index common_parameters() const {
    Index count = d_model() * num_experts() + shared_experts * expert_parameters(shared_d_ff);
    if constexpr (requires { router.noise_epsilon; }) count += d_model() * num_experts();
    if constexpr (requires { router.bias; }) count += router.bias ? num_experts() : 0;
    if (gated_shared_experts) count += shared_experts * d_model();
    return count + (output_bias ? d_model() : 0);
  }
  /// Trained parameters of one Mixture-of-Experts layer.
  constexpr Index layer_parameters() const {
    return common_parameters() + num_experts() * expert_parameters(d_ff);
  }
  /// Those that one token uses.
  constexpr Index active_layer_parameters() const {
    return common_parameters() + experts_per_token() * expert_parameters(d_ff);
  }
  /// Operations (a multiply-add is two) of one layer's products for one token, forward,
  /// in inference.
  constexpr Index flops_per_token() const {
    constexpr Index kMatrices = ExpertOf<Unit>::kUpWidths + 1;
    return 2 * d_model() *
           (num_experts() + kMatrices * (experts_per_token() * d_ff + shared_experts * shared_d_ff) +
            (gated_shared_experts ? shared_experts : 0));
  }
  /// Parameters of the whole model: embeddings, attention, feed-forward layers and norms. None where
  /// `around` does not say what stands around its layers.
  constexpr std::optional<Index> total_parameters() const {
    if (!around.known()) return {};
    return surrounding_parameters(around, d_model()) + around.moe_layers * layer_parameters();
  }
  /// Those that one token uses; the input embedding as its authors count it.
  constexpr std::optional<Index> active_parameters() const {
    if (!around.known()) return {};
    return surrounding_parameters(around, d_model()) + around.moe_layers * active_layer_parameters() -
           around.layers * around.idle_attention -
           (around.embedding_is_active ? 0 : around.vocabulary * d_model());
  }
  /// Routed experts that a token uses; on average, where experts choose.
  constexpr Index experts_per_token() const {
    if constexpr (requires { router.top_k; })
      return router.top_k;
    else
      return Index(router.capacity);  // on average, where experts choose
  }
};

/// The options of the model's experts of width d_ff, routed or shared.
template <class Expert, class M>
typename Expert::Options expert_options(const M& model, Index d_ff) {
  typename Expert::Options options{};
  options.d_model = model.d_model();
  options.d_ff = d_ff;
  if constexpr (requires { options.bias; }) options.bias = model.expert_bias;
  if constexpr (requires { options.glu; })
    options.glu = model.unit;
  else if constexpr (requires { options.activation; })
    options.activation = model.unit;
  return options;
}

namespace detail {

// A layer of the model; `more` is what constructors of experts and routers take beside their options: an
// Rng or nothing.
template <class S, class Unit, template <class> class R, class... More>
typename Model<Unit, R>::template Layer<S> build_layer(const Model<Unit, R>& model, More&... more) {
  using Expert = typename Model<Unit, R>::template Expert<S>;
  const auto experts = [&](Index count, Index d_ff) {
    const auto options = expert_options<Expert>(model, d_ff);
    std::vector<Expert> list;
    list.reserve(std::size_t(count));
    for (Index e = 0; e < count; ++e) list.emplace_back(options, more...);
    return list;
  };
  auto routed = experts(model.num_experts(), model.d_ff);
  auto shared = experts(model.shared_experts, model.shared_d_ff);
  return {std::move(routed), R<S>(model.router, more...),
          SharedExperts<Expert>{std::move(shared), model.gated_shared_experts}, model.output_bias};
}

}  // namespace detail

/// A layer of the model without weights: every parameter is zero. Throws std::invalid_argument where the
/// model's sizes do not fit each other.
template <class S, class Unit, template <class> class R>
typename Model<Unit, R>::template Layer<S> make_empty_layer(const Model<Unit, R>& model) {
  return detail::build_layer<S>(model);
}

/// A new layer of the model, with weights as its experts and its router draw them: experts, shared
/// experts, router. Throws as make_empty_layer.
/// Example: make_layer<float>(mixtral_8x7b.scaled_to(64, 128, 8), rng).
template <class S, class Unit, template <class> class R>
typename Model<Unit, R>::template Layer<S> make_layer(const Model<Unit, R>& model, Rng& rng) {
  return detail::build_layer<S>(model, rng);
}

}  // namespace moe
