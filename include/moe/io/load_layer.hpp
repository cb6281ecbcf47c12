// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/core/check.hpp>
#include <moe/core/storage.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/layers/moe_layer.hpp>
#include <moe/models/model.hpp>
#include <moe/models/published/soft_moe.hpp>

// A published model's layer out of its checkpoint.
namespace moe {

/// A tensor of a checkpoint as load_mapped_layer took it.
struct LoadedTensor {
  std::string name{};
  Index values = 0;      ///< how many numbers
  std::string copied{};  ///< why they were copied, e.g. "transposed"; empty where they are mapped
};

template <class Layer>
struct LoadedLayer {
  Layer layer;
  std::vector<LoadedTensor> tensors{};  ///< all of the layer, by name
};

namespace detail {

inline std::string replaced(std::string text, std::string_view what, Index number) {
  const std::size_t at = text.find(what);
  if (at != std::string::npos) text.replace(at, what.size(), std::to_string(number));
  return text;
}

// Whether the modules of one path, as "model." or "Encoder/", are modules of another, in their order.
inline bool is_within(std::string_view path, std::string_view longer) {
  const auto take = [](std::string_view& rest) {
    const std::string_view module = rest.substr(0, rest.find_first_of("./"));
    rest.remove_prefix((std::min)(module.size() + 1, rest.size()));
    return module;
  };
  while (!path.empty()) {
    const std::string_view module = take(path);
    do {
      if (longer.empty()) return false;
    } while (take(longer) != module);
  }
  return true;
}

// The names that a checkpoint gives to the tensors of one layer of a model. They are the model's own where
// the checkpoint has any layer under them. Else the model may be a part of a larger one, or lie there without
// what stood around it: "model.layers.0." is "language_model.model.layers.0.",
// "model.language_model.layers.0." or "layers.0.". What stands before "layers." is then the one path that has
// a router after it, and modules added to the model's or taken out of them; modules are not exchanged, so an
// encoder is no decoder.
class LayerNames {
 public:
  // `needed` is a tensor that every layer of the model has. Throws CheckpointError where there are several
  // paths.
  LayerNames(const Checkpoint& checkpoint, const TensorSource& needed, Index layer, const char* where)
      : layer_(layer) {
    constexpr std::string_view kLayer = "{layer}";
    const std::size_t at = needed.name.find(kLayer);
    if (at == std::string_view::npos) return;
    const std::string_view own = needed.name.substr(0, at), rest = needed.name.substr(at + kLayer.size());
    const std::size_t module = own.find_last_of("./", at < 2 ? 0 : at - 2) + 1;  // 0 where there is none
    const auto& names = checkpoint.names();
    const auto first = std::lower_bound(names.begin(), names.end(), own);
    if (first != names.end() && first->starts_with(own)) return;
    std::set<std::string, std::less<>> paths;
    for (std::string_view name : names) {
      if (!name.ends_with(rest)) continue;
      name.remove_suffix(rest.size());
      const std::size_t number = name.find_last_not_of("0123456789") + 1;
      if (number == name.size() || !name.substr(0, number).ends_with(own.substr(module))) continue;
      const std::string_view path = name.substr(0, number - (at - module));
      const bool whole = path.empty() || path.ends_with('.') || path.ends_with('/');
      if (whole && (is_within(own.substr(0, module), path) || is_within(path, own.substr(0, module))))
        paths.emplace(path);
    }
    if (paths.size() > 1) fail(checkpoint, own, paths, where);
    if (paths.empty()) return;
    own_path_ = own.substr(0, module);
    path_ = *paths.begin();
  }

  std::string operator()(std::string_view name, Index expert) const {
    std::string here(name);
    if (path_ && name.starts_with(own_path_)) here.replace(0, own_path_.size(), *path_);
    return replaced(replaced(std::move(here), "{layer}", layer_), "{expert}", expert);
  }

  Index layer() const { return layer_; }

 private:
  [[noreturn]] static void fail(const Checkpoint& checkpoint, std::string_view own,
                                const std::set<std::string, std::less<>>& paths, const char* where) {
    constexpr std::size_t kShown = 4;
    std::string list;
    std::size_t shown = 0;
    for (const std::string& path : paths)
      if (shown++ < kShown) list += (list.empty() ? "" : ", ") + in_quotes(path);
    fail_checkpoint(where, ": no name in ", checkpoint.path().string(), " begins with ", in_quotes(own),
                    ", and ", paths.size(), " other paths lead to such layers, expected 1: ", list,
                    shown > kShown ? ", ..." : "", "; Checkpoint::below takes one");
  }

  Index layer_;
  std::string_view own_path_{};
  std::optional<std::string> path_{};  // in place of own_path_
};

// The rows that a part leaves; nothing is left by `all`.
constexpr std::optional<TensorPart> rest_of(TensorPart part) {
  switch (part) {
    case TensorPart::all:
      break;
    case TensorPart::first_half:
      return TensorPart::second_half;
    case TensorPart::second_half:
      return TensorPart::first_half;
    case TensorPart::even_rows:
      return TensorPart::odd_rows;
    case TensorPart::odd_rows:
      return TensorPart::even_rows;
  }
  return {};
}

// Reads the parameters of one layer, each value once, and counts what it read of every tensor.
template <class S>
class LayerReader {
 public:
  LayerReader(const Checkpoint& checkpoint, LayerNames names)
      : checkpoint_(checkpoint), names_(std::move(names)) {}

  // Reads a parameter of an expert, or of the layer where num_experts is 0. One without values needs no
  // source. A `shape` is that of the tensor, where it is another than the parameter's.
  template <class M>
  void read(const TensorSource& source, Index expert, Index num_experts, M& out,
            const std::optional<std::vector<Index>>& shape = {}) {
    if (out.size() == 0 && source.empty()) return;
    const Stored stored =
        find(source, expert, num_experts, out.rows(), out.cols(), M::ColsAtCompileTime == 1, shape);
    copy(stored, out);
    note(stored, out.size(), "not an expert's matrix");
  }

  // A matrix [rows, cols] of an expert, where it lies if the tensor lets it, else as a copy.
  MappedMatrix<S> map(const TensorSource& source, Index expert, Index num_experts, Index rows, Index cols) {
    const Stored stored = find(source, expert, num_experts, rows, cols, false, {});
    const std::string obstacle = why_copied(stored);
    note(stored, rows * cols, obstacle);
    if (obstacle.empty()) {
      const auto* const values =
          reinterpret_cast<const S*>(stored.values.bytes.data()) + row_of(stored.part, rows, 0) * cols;
      return {{checkpoint_.owner(), values}, rows, cols};
    }
    Matrix<S> copied(rows, cols);
    copy(stored, copied);
    return MappedMatrix<S>(std::move(copied));
  }

  // Throws unless every value of every tensor whose name begins with `prefix` was read.
  void check_all_read(std::string_view prefix) const {
    const std::string begin = names_(prefix, 0);
    for (const std::string& name : checkpoint_.names()) {
      if (!name.starts_with(begin) || scales_.contains(name)) continue;
      const auto used = used_.find(name);
      const Index read = used == used_.end() ? 0 : used->second.values;
      const Index size = checkpoint_.at(name).size() * (name.ends_with("_blocks") ? 2 : 1);
      if (read != size)
        throw CheckpointError("load_layer: " + std::to_string(read) + " of the " + std::to_string(size) +
                              " values of " + name + " belong to layer " + std::to_string(names_.layer()) +
                              " of this model, expected all");
    }
  }

  // What was read, by name.
  std::vector<LoadedTensor> tensors() const {
    std::vector<LoadedTensor> list;
    for (const auto& [name, tensor] : used_) list.push_back(tensor);
    return list;
  }

 private:
  enum class Format { plain, block_scaled_fp8, mxfp4 };

  // Where a parameter is: in the rows `part` of a matrix [outer, inner], or of its transpose.
  struct Stored {
    Format format;
    TensorView values, scales;  // what the tensors hold of one expert
    Index outer, inner;
    TensorPart part;
    bool transposed;
    Index expert;  // whose part of a tensor of all experts it is, else 0
  };

  // Whether values of this type mean something only together with scales, or are scales. Read as they are
  // they would be wrong by orders of magnitude and still look like weights.
  static bool is_scaled(DType dtype) {
    return dtype == DType::F8_E4M3 || dtype == DType::F8_E5M2 || dtype == DType::F8_E8M0;
  }

  // The bytes of slice `index` of `count` equal slices along the first dimensions, as [shape].
  static TensorView slice(const TensorView& tensor, Index index, Index count, std::vector<Index> shape) {
    const std::size_t size = tensor.bytes.size() / std::size_t(count);
    return {tensor.name, tensor.dtype, std::move(shape),
            tensor.bytes.subspan(std::size_t(index) * size, size)};
  }

  Stored find(const TensorSource& source, Index expert, Index num_experts, Index rows, Index cols,
              bool vector, const std::optional<std::vector<Index>>& shape) {
    const std::string name = names_(source.name, expert);
    const bool mxfp4 = !checkpoint_.contains(name) && checkpoint_.contains(name + "_blocks");
    const std::string scale_name = name + (mxfp4 ? "_scales" : "_scale_inv");
    const bool fp8 = !mxfp4 && checkpoint_.contains(scale_name);
    const bool transposed = source.transposed && !mxfp4;  // blocks of 32 go along a row [in]
    const Index all_rows = rows * (source.part == TensorPart::all ? 1 : 2);
    const Index outer = transposed ? cols : all_rows, inner = transposed ? all_rows : cols;
    const TensorView& tensor = checkpoint_.at(mxfp4 ? name + "_blocks" : name);
    const bool stacked = num_experts > 0 && source.name.find("{expert}") == std::string_view::npos;
    check_shape(tensor, mxfp4, outer, inner, vector, stacked ? num_experts : 0, shape);
    if (!fp8 && is_scaled(tensor.dtype))
      throw CheckpointError("load_layer: " + tensor.name + " is " + std::string(name_of(tensor.dtype)) +
                            ", which is not read without its scale " + in_quotes(scale_name) +
                            hint(scale_name, checkpoint_.names()));
    if (mxfp4 || fp8) scales_.insert(scale_name);
    const Index count = stacked ? num_experts : 1, index = stacked ? expert : 0;
    Stored stored{Format::plain, {}, {}, outer, inner, source.part, transposed, index};
    if (mxfp4) {
      const TensorView& scales = checkpoint_.at(scale_name);
      require_mxfp4_scales(tensor, scales);
      stored.format = Format::mxfp4;
      stored.values = slice(tensor, index, count, {outer, inner / 32, 16});
      stored.scales = slice(scales, index, count, {outer, inner / 32});
    } else if (fp8) {
      if (stacked)
        throw CheckpointError("load_layer: " + tensor.name + " has block scales and holds " +
                              std::to_string(num_experts) + " experts, expected 1");
      stored.format = Format::block_scaled_fp8;
      stored.values = tensor;
      stored.scales = checkpoint_.at(scale_name);
    } else {
      stored.values = slice(tensor, index, count, {outer, inner});
    }
    return stored;
  }

  static void check_shape(const TensorView& tensor, bool mxfp4, Index outer, Index inner, bool vector,
                          Index stacked, const std::optional<std::vector<Index>>& given) {
    std::vector<Index> shape = tensor.shape;
    if (mxfp4 && shape.size() >= 2) {  // [..., blocks, 16] bytes of two values
      shape.pop_back();
      shape.back() *= 32;
    }
    std::vector<std::vector<Index>> expected;
    if (given)
      expected = {*given};
    else if (stacked == 0 && vector)
      expected = {{outer}, {1, outer}};
    else if (stacked == 0)
      expected = {{outer, inner}};
    else if (vector)
      expected = {{stacked, outer}};
    else
      expected = {{stacked, outer, inner}, {stacked * outer, inner}};
    if (std::find(expected.begin(), expected.end(), shape) == expected.end())
      throw CheckpointError("load_layer: " + tensor.name + " has shape " + text_of(tensor.shape) +
                            (mxfp4 ? ", of 4-bit values " + text_of(shape) : "") + ", expected " +
                            text_of(expected.front()));
  }
  static void require_mxfp4_scales(const TensorView& blocks, const TensorView& scales) {
    if (std::vector<Index>(blocks.shape.begin(), blocks.shape.end() - 1) != scales.shape)
      throw CheckpointError("load_layer: " + scales.name + " has shape " + text_of(scales.shape) +
                            ", expected " + text_of(blocks.shape) + " without the last");
  }

  // Where row i of a parameter of so many rows is in a tensor of which it is a part.
  static Index row_of(TensorPart part, Index rows, Index i) {
    switch (part) {
      case TensorPart::all:
      case TensorPart::first_half:
        return i;
      case TensorPart::second_half:
        return rows + i;
      case TensorPart::even_rows:
        return 2 * i;
      case TensorPart::odd_rows:
        return 2 * i + 1;
    }
    return i;
  }

  template <class M>
  void copy(const Stored& stored, M& out) {
    values_.resize(std::size_t(stored.outer * stored.inner));
    if (stored.format == Format::plain) {
      read_tensor(stored.values, values_.data());
    } else {
      std::vector<float> values(values_.size());
      if (stored.format == Format::mxfp4)
        read_mxfp4(stored.values, stored.scales, values.data());
      else
        read_block_scaled_fp8(stored.values, stored.scales, values.data());
      std::copy(values.begin(), values.end(), values_.begin());
    }
    for (Index i = 0; i < out.rows(); ++i) {
      const Index row = row_of(stored.part, out.rows(), i);
      for (Index j = 0; j < out.cols(); ++j)
        out(i, j) = values_[std::size_t(stored.transposed ? j * stored.inner + row : row * stored.inner + j)];
    }
  }

  // Why a matrix can not be read where it lies; empty where it can.
  static std::string why_copied(const Stored& stored) {
    const DType here = *dtype_of<S>();
    if (stored.format != Format::plain) return "scaled in blocks";
    if (stored.values.dtype != here)
      return std::string(name_of(stored.values.dtype)) + ", not " + std::string(name_of(here));
    if (stored.transposed) return "transposed";
    if (stored.part == TensorPart::even_rows || stored.part == TensorPart::odd_rows)
      return "its rows alternate with those of another";
    if (!is_readable_in_place<S>(stored.values)) return "misaligned";
    return "";
  }

  // Throws where some of these rows were read before.
  void note(const Stored& stored, Index values, const std::string& copied) {
    const std::string& name = stored.values.name;
    std::set<TensorPart>& parts = parts_[{name, stored.expert}];
    for (const TensorPart before : parts)
      if (rest_of(before) != stored.part)
        throw CheckpointError("load_layer: two parameters of this model take the same rows of " + name +
                              ", expected one");
    parts.insert(stored.part);
    LoadedTensor& tensor = used_[name];
    tensor = {name, tensor.values + values, copied};
  }

  const Checkpoint& checkpoint_;
  LayerNames names_;
  std::map<std::string, LoadedTensor, std::less<>> used_;
  std::map<std::pair<std::string, Index>, std::set<TensorPart>> parts_;  // read, by tensor and expert
  std::set<std::string, std::less<>> scales_;                            // read with their tensors
  std::vector<S> values_;
};

// `needed` is a parameter that every layer of the model has.
template <class M>
LayerNames find_names(const M& model, const TensorSource& needed, const Checkpoint& checkpoint, Index layer,
                      const char* where) {
  require(layer >= 0, where, ": layer = ", layer, ", expected at least 0");
  require(!needed.empty(), where, ": the tensor names of ", model.name, " are not known");
  return LayerNames(checkpoint, needed, layer, where);
}

// Experts of a layer, of width d_ff. A tensor whose name does not say which expert's it is holds
// `stacked`, or one where that is 0.
template <class Storage, class S, class M>
auto read_experts(LayerReader<S>& reader, const M& model, const ExpertTensors& from, Index count, Index d_ff,
                  Index stacked) {
  using Expert = typename M::template Expert<S, Storage>;
  const auto options = expert_options<Expert>(model, d_ff);
  const Index d_model = model.d_model();
  std::vector<Expert> experts;
  experts.reserve(std::size_t(count));
  for (Index e = 0; e < count; ++e) {
    const auto map = [&](const TensorSource& source, Index rows, Index cols) {
      return reader.map(source, e, stacked, rows, cols);
    };
    constexpr Index kGateWidths = ExpertOf<decltype(model.unit)>::kUpWidths - 1;
    if constexpr (std::same_as<Storage, Mapped> && kGateWidths > 0) {
      experts.push_back({options, map(from.w_gate, kGateWidths * d_ff, d_model),
                         map(from.w_up, d_ff, d_model), map(from.w_down, d_model, d_ff)});
    } else if constexpr (std::same_as<Storage, Mapped>) {
      experts.push_back({options, map(from.w_up, d_ff, d_model), map(from.w_down, d_model, d_ff)});
    } else {
      Expert& owner = experts.emplace_back(options);
      if constexpr (requires { owner.w_gate; }) reader.read(from.w_gate, e, stacked, owner.w_gate);
      reader.read(from.w_up, e, stacked, owner.w_up);
      reader.read(from.w_down, e, stacked, owner.w_down);
    }
    Expert& expert = experts.back();
    if constexpr (requires { expert.b_gate; }) reader.read(from.b_gate, e, stacked, expert.b_gate);
    if constexpr (requires { expert.b_up; }) {
      reader.read(from.b_up, e, stacked, expert.b_up);
      reader.read(from.b_down, e, stacked, expert.b_down);
    }
  }
  return experts;
}

// A layer and what it was read from; see load_layer and load_mapped_layer.
template <class S, class Storage, class Unit, template <class> class R>
LoadedLayer<typename Model<Unit, R>::template Layer<S, Storage>> read_layer(const Model<Unit, R>& model,
                                                                            const Checkpoint& checkpoint,
                                                                            Index layer) {
  using Expert = typename Model<Unit, R>::template Expert<S, Storage>;
  const LayerTensors& tensors = model.tensors;
  LayerReader<S> reader(checkpoint, find_names(model, tensors.w_router, checkpoint, layer, "load_layer"));
  R<S> router(model.router);
  reader.read(tensors.w_router, 0, 0, router.w_router);
  if constexpr (requires { router.b_router; }) reader.read(tensors.b_router, 0, 0, router.b_router);
  if constexpr (requires { router.selection_bias; })
    reader.read(tensors.selection_bias, 0, 0, router.selection_bias);
  auto routed = read_experts<Storage>(reader, model, tensors.experts, model.num_experts(), model.d_ff,
                                      model.num_experts());
  auto shared =
      read_experts<Storage>(reader, model, tensors.shared_expert, model.shared_experts, model.shared_d_ff, 0);
  MoELayer<Expert, R<S>> loaded(std::move(routed), std::move(router),
                                SharedExperts<Expert>{std::move(shared), model.gated_shared_experts},
                                model.output_bias);
  reader.read(tensors.w_shared_gate, 0, 0, loaded.w_shared_gate);
  reader.read(tensors.b_output, 0, 0, loaded.b_output);
  reader.check_all_read(tensors.prefix);
  if (!tensors.w_router.name.starts_with(tensors.prefix))  // Grok-1's
    reader.check_all_read(tensors.w_router.name.substr(0, tensors.w_router.name.rfind('.') + 1));
  return {std::move(loaded), reader.tensors()};
}

// The tensor of a parameter, of expert 0 where each has one of its own, and how many values it holds.
inline std::pair<const TensorView*, Index> find_tensor(const TensorSource& source,
                                                       const Checkpoint& checkpoint,
                                                       const LayerNames& names) {
  const std::string name = names(source.name, 0);
  const bool mxfp4 = !checkpoint.contains(name) && checkpoint.contains(name + "_blocks");
  const TensorView& tensor = checkpoint.at(mxfp4 ? name + "_blocks" : name);
  return {&tensor, tensor.size() * (mxfp4 ? 2 : 1)};
}

// The width of experts from a matrix [d_model, width] of one, or of `stacked` where its name does not say
// whose it is.
inline Index find_width(const TensorSource& source, const Checkpoint& checkpoint, const LayerNames& names,
                        Index stacked, Index d_model) {
  const auto [tensor, size] = find_tensor(source, checkpoint, names);
  if (source.name.find("{expert}") == std::string_view::npos) d_model *= stacked;
  if (size == 0 || size % d_model != 0)
    throw CheckpointError("sized_as: " + tensor->name + " has " + std::to_string(size) +
                          " values, expected a multiple of " + std::to_string(d_model));
  return size / d_model;
}

[[noreturn]] inline void fail_sized_as(const TensorView& tensor, const char* expected) {
  throw CheckpointError("sized_as: " + tensor.name + " has shape " + text_of(tensor.shape) + ", expected " +
                        expected);
}

}  // namespace detail

/// The model in the size that a checkpoint's layer has: d_model, the number of experts and the widths are
/// read off the shapes of the router's and the down projections' tensors, which are found as by load_layer;
/// everything else changes as in scaled_to.
/// Throws CheckpointError where those tensors are missing or have no such shapes, and
/// std::invalid_argument for a model whose tensor names are not known.
template <class Unit, template <class> class R>
Model<Unit, R> sized_as(const Model<Unit, R>& model, const Checkpoint& checkpoint, Index layer) {
  const LayerTensors& tensors = model.tensors;
  const auto names = detail::find_names(model, tensors.w_router, checkpoint, layer, "sized_as");
  const TensorView& router = *detail::find_tensor(tensors.w_router, checkpoint, names).first;
  const bool transposed = tensors.w_router.transposed;
  if (router.shape.size() != 2 || router.size() == 0)
    detail::fail_sized_as(router, transposed ? "[d_model, num_experts]" : "[num_experts, d_model]");
  const Index experts = router.shape[transposed ? 1 : 0], d_model = router.shape[transposed ? 0 : 1];
  const auto width = [&](const TensorSource& source, Index stacked) {
    return detail::find_width(source, checkpoint, names, stacked, d_model);
  };
  Model<Unit, R> sized = model.scaled_to(d_model, width(tensors.experts.w_down, experts), experts);
  if (model.shared_experts > 0) sized.shared_d_ff = width(tensors.shared_expert.w_down, 1);
  return sized;
}

/// The same for a layer of Soft MoE; its slots' tensor tells how many each expert has, too.
template <class Unit>
SoftModel<Unit> sized_as(const SoftModel<Unit>& model, const Checkpoint& checkpoint, Index layer) {
  const SoftTensors& tensors = model.tensors;
  const auto names = detail::find_names(model, tensors.w_slots, checkpoint, layer, "sized_as");
  const TensorView& slots = *detail::find_tensor(tensors.w_slots, checkpoint, names).first;
  const bool transposed = tensors.w_slots.transposed;
  if (slots.shape.size() != 3 || slots.size() == 0)
    detail::fail_sized_as(slots, transposed ? "[d_model, num_experts, slots_per_expert]"
                                            : "[num_experts, slots_per_expert, d_model]");
  const Index d_model = slots.shape[transposed ? 0 : 2], experts = slots.shape[transposed ? 1 : 0];
  SoftModel<Unit> sized = model.scaled_to(
      d_model, detail::find_width(tensors.experts.w_down, checkpoint, names, experts, d_model), experts);
  sized.layer.slots_per_expert = slots.shape[transposed ? 2 : 1];
  return sized;
}

/// Layer `layer` of a model, from its published checkpoint: tensors of any type are converted to S,
/// fused ones taken apart, transposed ones turned, scaled 8-bit and 4-bit ones multiplied out. Every
/// value of every tensor of the layer is used exactly once. A checkpoint without any layer under the model's
/// names may have it below other modules, e.g. model.language_model.layers.0 for model.layers.0, if there is
/// one such place. O(parameters). Throws CheckpointError for a
/// tensor that is missing, of another shape, or left over, for one of 8 bits without its scale, for several
/// places (see Checkpoint::below), and std::invalid_argument for a model whose tensor names are not known.
/// Example: load_layer<float>(mixtral_8x7b, Checkpoint::open("Mixtral-8x7B-v0.1"), 0).
template <class S, class Unit, template <class> class R>
typename Model<Unit, R>::template Layer<S> load_layer(const Model<Unit, R>& model,
                                                      const Checkpoint& checkpoint, Index layer) {
  return detail::read_layer<S, Owned>(model, checkpoint, layer).layer;
}

/// The same for a layer of Soft MoE.
/// Example: load_layer<float>(sized_as(soft_moe_s16, checkpoint, 6), checkpoint, 6).
template <class S, class Unit>
typename SoftModel<Unit>::template Layer<S> load_layer(const SoftModel<Unit>& model,
                                                       const Checkpoint& checkpoint, Index layer) {
  const SoftTensors& tensors = model.tensors;
  detail::LayerReader<S> reader(checkpoint,
                                detail::find_names(model, tensors.w_slots, checkpoint, layer, "load_layer"));
  typename SoftModel<Unit>::template Layer<S> loaded(
      detail::read_experts<Owned>(reader, model, tensors.experts, model.num_experts(), model.d_ff,
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
  return detail::read_layer<S, Mapped>(model, checkpoint, layer);
}

}  // namespace moe
