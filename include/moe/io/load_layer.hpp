// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/find_matrix.hpp>
#include <moe/io/gguf_names.hpp>
#include <moe/io/layer_names.hpp>
#include <moe/io/layer_reader.hpp>
#include <moe/io/stored_matrix.hpp>
#include <moe/models/model.hpp>
#include <moe/models/soft_model.hpp>

// A published model's layer out of its checkpoint.
namespace moe {

namespace io {

// The width of experts from a matrix [d_model, width] of one, or of `stacked` where its name does not say
// whose it is.
inline Index find_width(const TensorSource& source, const Checkpoint& checkpoint, const LayerNames& names,
                        Index stacked, Index d_model) {
  const StoredMatrix matrix = find_matrix(checkpoint, names(source.name, 0), "sized_as");
  if (source.name.find("{expert}") == std::string_view::npos) d_model *= stacked;
  if (matrix.size() == 0 || matrix.size() % d_model != 0)
    throw CheckpointError("sized_as: " + matrix.values.name + " has " + std::to_string(matrix.size()) +
                          " values, expected a multiple of " + std::to_string(d_model));
  return matrix.size() / d_model;
}

[[noreturn]] inline void fail_sized_as(const TensorView& tensor, const char* expected) {
  throw CheckpointError("sized_as: " + tensor.name + " has shape " + text_of(tensor.shape) + ", expected " +
                        expected);
}

}  // namespace io

/// The model in the size that a checkpoint's layer has: d_model, the number of experts and the widths are
/// read off the shapes of the router's and the down projections' tensors, which are found as by load_layer;
/// everything else changes as in scaled_to.
/// Throws CheckpointError where those tensors are missing or have no such shapes, and
/// std::invalid_argument for a model whose tensor names are not known.
template <class Unit, template <class> class R>
Model<Unit, R> sized_as(const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer) {
  const LayerTensors tensors = io::tensors_in(checkpoint, model, layer, "sized_as");
  const auto names = io::find_names(model, tensors.w_router, checkpoint, layer, "sized_as");
  const TensorView& router = checkpoint.at(names(tensors.w_router.name, 0));
  const bool transposed = tensors.w_router.transposed;
  if (router.shape.size() != 2 || router.size() == 0)
    io::fail_sized_as(router, transposed ? "[d_model, num_experts]" : "[num_experts, d_model]");
  const Index experts = router.shape[transposed ? 1 : 0], d_model = router.shape[transposed ? 0 : 1];
  const auto width = [&](const TensorSource& source, Index stacked) {
    return io::find_width(source, checkpoint, names, stacked, d_model);
  };
  Model<Unit, R> sized = model.scaled_to(d_model, width(tensors.experts.w_down, experts), experts);
  if (model.shared_experts > 0) sized.shared_d_ff = width(tensors.shared_expert.w_down, 1);
  return sized;
}

/// The same for a layer of Soft MoE; its slots' tensor tells how many each expert has, too.
template <class Unit>
SoftModel<Unit> sized_as(const SoftModel<Unit>& model, const Checkpoint& checkpoint, Index layer) {
  const SoftTensors& tensors = model.tensors;
  const auto names = io::find_names(model, tensors.w_slots, checkpoint, layer, "sized_as");
  const TensorView& slots = checkpoint.at(names(tensors.w_slots.name, 0));
  const bool transposed = tensors.w_slots.transposed;
  if (slots.shape.size() != 3 || slots.size() == 0)
    io::fail_sized_as(slots, transposed ? "[d_model, num_experts, slots_per_expert]"
                                        : "[num_experts, slots_per_expert, d_model]");
  const Index d_model = slots.shape[transposed ? 0 : 2], experts = slots.shape[transposed ? 1 : 0];
  SoftModel<Unit> sized = model.scaled_to(
      d_model, io::find_width(tensors.experts.w_down, checkpoint, names, experts, d_model), experts);
  sized.layer.slots_per_expert = slots.shape[transposed ? 2 : 1];
  return sized;
}

/// Layer `layer` of a model, from its published checkpoint: tensors of any type are converted to S,
/// fused ones taken apart, transposed ones turned, scaled 8-bit and 4-bit ones multiplied out. Every
/// value of every tensor of the layer is used exactly once. A checkpoint without any layer under the model's
/// names may have it below other modules, e.g. model.language_model.layers.0 for model.layers.0, if there is
/// one such place. A GGUF file has it under llama.cpp's names, and says of which architecture it is; blocks
/// are multiplied out. O(parameters). Throws CheckpointError for a tensor that is missing, of another shape,
/// or left over, for one of 8 bits without its scale, for several places (see Checkpoint::below), for a GGUF
/// file of another architecture, and std::invalid_argument for a model whose tensor names are not known.
/// Example: load_layer<float>(mixtral_8x7b, Checkpoint::open("Mixtral-8x7B-v0.1"), 0).
template <class S, class Unit, template <class> class R>
typename Model<Unit, R>::template Layer<S> load_layer(const Model<Unit, R>& model,
                                                      const Checkpoint& checkpoint, Index layer) {
  return io::read_layer<S, Owned>(model, checkpoint, layer).layer;
}

/// The same for a layer of Soft MoE.
/// Example: load_layer<float>(sized_as(soft_moe_s16, checkpoint, 6), checkpoint, 6).
template <class S, class Unit>
typename SoftModel<Unit>::template Layer<S> load_layer(const SoftModel<Unit>& model,
                                                       const Checkpoint& checkpoint, Index layer) {
  const SoftTensors& tensors = model.tensors;
  io::LayerReader<S> reader(
      checkpoint, io::find_names(model, tensors.w_slots, checkpoint, layer, "load_layer"), "load_layer");
  typename SoftModel<Unit>::template Layer<S> loaded(
      io::read_experts<Owned>(reader, model, tensors.experts, model.num_experts(), model.d_ff,
                              model.num_experts()),
      model.layer);
  const Index experts = model.num_experts(), slots = model.layer.slots_per_expert;
  using Shape = std::vector<Index>;
  reader.read(tensors.w_slots, 0, 0, loaded.router().w_slots,
              tensors.w_slots.transposed ? Shape{model.d_model(), experts, slots}
                                         : Shape{experts, slots, model.d_model()});
  reader.read(tensors.scale, 0, 0, loaded.router().scale, Shape{});
  reader.check_all_read(tensors.prefix);
  return loaded;
}

/// Layer `layer` for inference, with the outputs of load_layer to the bit, that reads its experts' matrices
/// where the checkpoint holds them: O(1) for such a matrix, whose pages the system reads when tokens
/// need them and shares with other processes. A matrix is copied where it is transposed, misaligned,
/// scaled in blocks, not of type S, or where its rows alternate with another's; halves and experts of
/// larger tensors are not. `tensors` says what became of each. The layer keeps the files mapped: they
/// may be deleted or replaced, as write_safetensors does, but not be written to or cut while it lives.
/// Throws as load_layer.
/// Example: const auto [layer, tensors] = load_mapped_layer<float>(mixtral_8x7b, checkpoint, 0).
template <class S, class Unit, template <class> class R>
LoadedLayer<typename Model<Unit, R>::template Layer<S, Mapped>> load_mapped_layer(
    const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer) {
  return io::read_layer<S, Mapped>(model, checkpoint, layer);
}

}  // namespace moe
