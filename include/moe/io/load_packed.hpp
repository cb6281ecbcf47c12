// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <utility>

#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/gguf_names.hpp>
#include <moe/io/layer_names.hpp>
#include <moe/io/layer_reader.hpp>
#include <moe/models/model.hpp>
#include <moe/packed/block_matrix.hpp>
#include <moe/packed/expert_formats.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/pack_options.hpp>
#include <moe/packed/packed_moe_layer.hpp>

// A published model's layer out of its checkpoint, packed on the way.
namespace moe {

namespace io {

// What experts are read into before they are packed.
template <class F, class E>
struct PackedFrom {
  using Storage = Owned;
};
template <InBlocks F, PackableExpert E>
struct PackedFrom<F, E> {
  using Storage = Quantised<F>;
};

// See load_packed below.
template <Format... F, class Unit, template <class> class R>
auto load_packed(const ExpertFormats<F...>& formats, const Model<Unit, R>& model,
                 const Checkpoint& checkpoint, Index layer, const PackOptions& options) {
  using Expert = typename Model<Unit, R>::template Expert<float>;
  require(options.importance.empty(), "load_packed: importance of ", options.importance.size(),
          " experts is given, expected none: pack the layer that load_layer makes");
  const LayerTensors tensors = tensors_in(checkpoint, model, layer, "load_packed");
  LayerReader<float> reader(checkpoint, find_names(model, tensors.w_router, checkpoint, layer, "load_packed"),
                            "load_packed");
  PackedParts<R<float>> parts{.router = read_router(reader, model, tensors),
                              .num_shared_experts = model.shared_experts};
  if (model.gated_shared_experts) parts.w_shared_gate.resize(model.shared_experts, model.d_model());
  if (model.output_bias) parts.b_output.resize(model.d_model());
  reader.read(tensors.w_shared_gate, 0, 0, parts.w_shared_gate);
  reader.read(tensors.b_output, 0, 0, parts.b_output);
  const auto expert = [&]<Format Of>(Index e, Of) {
    using Storage = typename PackedFrom<Of, Expert>::Storage;
    const Index routed = model.num_experts();
    if (e < routed) return read_expert<Storage>(reader, model, tensors.experts, e, model.d_ff, routed);
    return read_expert<Storage>(reader, model, tensors.shared_expert, e - routed, model.shared_d_ff, 0);
  };
  PackedMoELayer<Expert, R<float>> packed(formats, std::move(parts), expert, options);
  if (options.keep_experts.empty()) check_all_read(reader, tensors);
  return packed;
}

}  // namespace io

/// Layer `layer` of a model for inference, packed in a format: pack<F>(load_layer<float>(...)) with one
/// expert at a time beside the packed ones. Matrices that the checkpoint stores in the format's own way are
/// packed as they are, and give the bits of pack<F32> of the layer that load_layer makes: MXFP4, FP8,
/// integers with scales that Int4, Int4Offset or Int8 can hold (see docs/models.md), of GGUF files Q8_0 in
/// Int8, Q4_0 in Int4, Q4_1 and Q4_K in Int4Offset, MXFP4 in MXFP4, infinite scales apart. Others, and
/// transposed ones, are rounded to the format. O(parameters). Throws as load_layer and pack, and for a scale
/// of FP8 of 2^120 or more. Example: load_packed<FP8>(deepseek_v3, Checkpoint::open("DeepSeek-V3"), 3).
template <Format F, class Unit, template <class> class R>
auto load_packed(const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer,
                 const PackOptions& options = {}) {
  return io::load_packed(ExpertFormats<F>{}, model, checkpoint, layer, options);
}

/// The same with experts in several formats: format_of(e) is the position in the list, from 0, of expert e's,
/// see pack. Example: load_packed<FP8, Int4>(deepseek_v3, checkpoint, 3, [](Index e) { return e < 256 ? 0 :
/// 1; }).
template <Format... F, class Unit, template <class> class R, std::invocable<Index> FormatOf>
auto load_packed(const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer, FormatOf&& format_of,
                 const PackOptions& options = {}) {
  return io::load_packed(ExpertFormats<F...>{std::forward<FormatOf>(format_of)}, model, checkpoint, layer,
                         options);
}

}  // namespace moe
