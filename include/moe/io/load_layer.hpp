// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/check.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/models/model.hpp>
#include <moe/moe_layer.hpp>
#include <moe/types.hpp>

// A published model's layer out of its checkpoint.
namespace moe {

namespace detail {

inline std::string replaced(std::string text, std::string_view what, Index number) {
  const std::size_t at = text.find(what);
  if (at != std::string::npos) text.replace(at, what.size(), std::to_string(number));
  return text;
}

// Reads the parameters of one layer, and counts what it read of every tensor.
template <class S>
class LayerReader {
 public:
  LayerReader(const Checkpoint& checkpoint, Index layer) : checkpoint_(checkpoint), layer_(layer) {}

  // Reads a parameter of an expert, or of the layer where num_experts is 0. One without values needs no
  // source.
  template <class M>
  void read(const TensorSource& source, Index expert, Index num_experts, M& out) {
    if (out.size() == 0 && source.empty()) return;
    constexpr bool kVector = M::ColsAtCompileTime == 1;
    const bool is_stacked = num_experts > 0 && source.name.find("{expert}") == std::string_view::npos;
    const std::string name =
        replaced(replaced(std::string(source.name), "{layer}", layer_), "{expert}", expert);
    const bool is_half = source.part != TensorPart::all;
    const Index out_rows = out.rows() * (is_half ? 2 : 1);
    // What is stored of one expert: [outer, inner].
    bool transposed = source.transposed;
    if (is_mxfp4(name)) transposed = false;  // blocks of 32 go along a row [in]
    const Index outer = transposed ? out.cols() : out_rows, inner = transposed ? out_rows : out.cols();
    read_values(name, outer, inner, kVector, expert, is_stacked ? num_experts : 0);
    const S* const from = values_.data();
    const auto row_of = [&](Index i) {
      switch (source.part) {
        case TensorPart::all: return i;
        case TensorPart::first_half: return i;
        case TensorPart::second_half: return out.rows() + i;
        case TensorPart::even_rows: return 2 * i;
        case TensorPart::odd_rows: return 2 * i + 1;
      }
      return i;
    };
    for (Index i = 0; i < out.rows(); ++i)
      for (Index j = 0; j < out.cols(); ++j)
        out(i, j) = transposed ? from[j * inner + row_of(i)] : from[row_of(i) * inner + j];
    used_[name] += out.size();
  }

  // Throws unless every value of every tensor whose name begins with `prefix` was read once.
  void check_all_read(std::string_view prefix) const {
    const std::string begin = replaced(std::string(prefix), "{layer}", layer_);
    for (const std::string& name : checkpoint_.names()) {
      if (name.rfind(begin, 0) != 0 || is_scale(name)) continue;
      const std::string plain = without_suffix(name, "_blocks");
      const auto used = used_.find(plain);
      const Index read = used == used_.end() ? 0 : used->second;
      const Index size = checkpoint_.at(name).size() * (plain == name ? 1 : 2);  // 2 values a byte
      if (read != size)
        throw CheckpointError("load_layer: " + std::to_string(read) + " of the " +
                              std::to_string(size) + " values of " + name + " belong to layer " +
                              std::to_string(layer_) + " of this model, expected all");
    }
  }

 private:
  static bool ends_with(std::string_view name, std::string_view end) {
    return name.size() >= end.size() && name.substr(name.size() - end.size()) == end;
  }
  static std::string without_suffix(const std::string& name, std::string_view end) {
    return ends_with(name, end) ? name.substr(0, name.size() - end.size()) : name;
  }
  // Scales are read with the tensor that they belong to.
  bool is_scale(const std::string& name) const {
    return (ends_with(name, "_scale_inv") &&
            checkpoint_.contains(without_suffix(name, "_scale_inv"))) ||
           (ends_with(name, "_scales") &&
            checkpoint_.contains(without_suffix(name, "_scales") + "_blocks"));
  }

  // The bytes of slice `index` of `count` equal slices along the first dimensions, as [shape].
  static TensorView slice(const TensorView& tensor, Index index, Index count,
                          std::vector<Index> shape) {
    const std::size_t size = tensor.bytes.size() / std::size_t(count);
    return {tensor.name, tensor.dtype, std::move(shape),
            tensor.bytes.subspan(std::size_t(index) * size, size)};
  }

  // values_ [outer, inner] = the tensor, or what it holds of one expert where it holds `stacked`.
  void read_values(const std::string& name, Index outer, Index inner, bool vector, Index expert,
                   Index stacked) {
    const bool mxfp4 = is_mxfp4(name);
    const TensorView& tensor = checkpoint_.at(mxfp4 ? name + "_blocks" : name);
    std::vector<Index> shape = tensor.shape;
    if (mxfp4 && shape.size() >= 2) {  // [..., blocks, 16] bytes of two values
      shape.pop_back();
      shape.back() *= 32;
    }
    std::vector<std::vector<Index>> expected;
    if (stacked == 0 && vector) expected = {{outer}, {1, outer}};
    else if (stacked == 0) expected = {{outer, inner}};
    else if (vector) expected = {{stacked, outer}};
    else expected = {{stacked, outer, inner}, {stacked * outer, inner}};
    if (std::find(expected.begin(), expected.end(), shape) == expected.end())
      throw CheckpointError("load_layer: " + tensor.name + " has shape " + text_of(shape) +
                            ", expected " + text_of(expected.front()));
    const Index count = std::max<Index>(stacked, 1), index = stacked > 0 ? expert : 0;
    values_.resize(std::size_t(outer * inner));
    if (mxfp4) {
      const TensorView& scales = checkpoint_.at(name + "_scales");
      std::vector<float> values(values_.size());
      require_mxfp4_scales(tensor, scales);
      read_mxfp4(slice(tensor, index, count, {outer, inner / 32, 16}),
                 slice(scales, index, count, {outer, inner / 32}), values.data());
      std::copy(values.begin(), values.end(), values_.begin());
    } else if (checkpoint_.contains(name + "_scale_inv")) {
      std::vector<float> values(values_.size());
      read_block_scaled_fp8(tensor, checkpoint_.at(name + "_scale_inv"), values.data());
      std::copy(values.begin(), values.end(), values_.begin());
    } else {
      read_tensor(slice(tensor, index, count, {outer, inner}), values_.data());
    }
  }

  bool is_mxfp4(const std::string& name) const {
    return !checkpoint_.contains(name) && checkpoint_.contains(name + "_blocks");
  }
  static void require_mxfp4_scales(const TensorView& blocks, const TensorView& scales) {
    if (std::vector<Index>(blocks.shape.begin(), blocks.shape.end() - 1) != scales.shape)
      throw CheckpointError("load_layer: " + scales.name + " has shape " + text_of(scales.shape) +
                            ", expected " + text_of(blocks.shape) + " without the last");
  }

  const Checkpoint& checkpoint_;
  Index layer_;
  std::map<std::string, Index> used_;
  std::vector<S> values_;
};

}  // namespace detail

/// The model in the size that a checkpoint's layer has: d_model, the number of experts and the widths are
/// read off the shapes of the router's and the down projections' tensors. top_k and the group limit stay.
/// Throws CheckpointError where those tensors are missing or have no such shapes.
template <class Unit, template <class> class R>
Model<Unit, R> sized_as(const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer) {
  const auto find = [&](const TensorSource& source) -> std::pair<const TensorView*, Index> {
    const std::string name = detail::replaced(
        detail::replaced(std::string(source.name), "{layer}", layer), "{expert}", 0);
    const bool mxfp4 = !checkpoint.contains(name) && checkpoint.contains(name + "_blocks");
    const TensorView& tensor = checkpoint.at(mxfp4 ? name + "_blocks" : name);
    return {&tensor, tensor.size() * (mxfp4 ? 2 : 1)};
  };
  const TensorView& router = *find(model.tensors.w_router).first;
  if (router.shape.size() != 2 || router.size() == 0)
    throw CheckpointError("sized_as: " + router.name + " has shape " +
                          detail::text_of(router.shape) + ", expected [num_experts, d_model]");
  const Index experts = router.shape[0], d_model = router.shape[1];
  const auto width = [&](const TensorSource& source, Index count) {
    const auto [tensor, size] = find(source);
    if (size == 0 || size % (count * d_model) != 0)
      throw CheckpointError("sized_as: " + tensor->name + " has " + std::to_string(size) +
                            " values, expected a multiple of " + std::to_string(count * d_model));
    return size / (count * d_model);
  };
  const TensorSource& down = model.tensors.experts.w_down;
  const bool stacked = down.name.find("{expert}") == std::string_view::npos;
  Model<Unit, R> sized =
      model.scaled_to(d_model, width(down, stacked ? experts : 1), experts);
  if (model.shared_experts > 0) sized.shared_d_ff = width(model.tensors.shared_expert.w_down, 1);
  return sized;
}

/// Layer `layer` of a model, from its published checkpoint: tensors of any type are converted to S,
/// fused ones taken apart, transposed ones turned, scaled 8-bit and 4-bit ones multiplied out. Every
/// value of every tensor of the layer is used exactly once. Throws CheckpointError for a tensor that is missing, of another shape, or left over,
/// and std::invalid_argument for a model whose tensor names are not known.
/// Example: load_layer<float>(mixtral_8x7b, Checkpoint::open("Mixtral-8x7B-v0.1"), 0).
template <class S, class Unit, template <class> class R>
typename Model<Unit, R>::template Layer<S> load_layer(const Model<Unit, R>& model,
                                                      const Checkpoint& checkpoint, Index layer) {
  require(layer >= 0, "load_layer: layer = ", layer, ", expected at least 0");
  require(!model.tensors.w_router.empty(), "load_layer: the tensor names of ", model.name,
          " are not known");
  auto loaded = make_empty_layer<S>(model);
  const LayerTensors& tensors = model.tensors;
  detail::LayerReader<S> reader(checkpoint, layer);
  auto& router = loaded.router();
  reader.read(tensors.w_router, 0, 0, router.w_router);
  if constexpr (requires { router.b_router; }) reader.read(tensors.b_router, 0, 0, router.b_router);
  if constexpr (requires { router.selection_bias; })
    reader.read(tensors.selection_bias, 0, 0, router.selection_bias);
  const auto read_experts = [&](auto experts, const ExpertTensors& from, Index stacked) {
    for (std::size_t e = 0; e < experts.size(); ++e) {
      auto& expert = experts[e];
      if constexpr (requires { expert.w_gate; })
        reader.read(from.w_gate, Index(e), stacked, expert.w_gate);
      reader.read(from.w_up, Index(e), stacked, expert.w_up);
      reader.read(from.w_down, Index(e), stacked, expert.w_down);
      if constexpr (requires { expert.b_gate; })
        reader.read(from.b_gate, Index(e), stacked, expert.b_gate);
      if constexpr (requires { expert.b_up; }) reader.read(from.b_up, Index(e), stacked, expert.b_up);
      if constexpr (requires { expert.b_down; })
        reader.read(from.b_down, Index(e), stacked, expert.b_down);
    }
  };
  read_experts(loaded.experts(), tensors.experts, loaded.num_experts());
  read_experts(loaded.shared_experts(), tensors.shared_expert, 0);
  reader.read(tensors.w_shared_gate, 0, 0, loaded.w_shared_gate);
  reader.read(tensors.b_output, 0, 0, loaded.b_output);
  reader.check_all_read(tensors.prefix);
  return loaded;
}

}  // namespace moe
