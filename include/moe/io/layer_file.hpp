// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/experts/zero_computation_experts.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/options.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/math/activation.hpp>
#include <moe/version.hpp>

// A layer of your own, saved and loaded: every array that Layer::visit shows, under its name.
namespace moe {

namespace io {

template <class Array>
std::vector<Index> shape_of(const Array& array) {
  if (Array::ColsAtCompileTime == 1) return {array.rows()};
  return {array.rows(), array.cols()};
}

// "2 x ReLU, 1 x GELU", or "none": the descriptions of several parts in their order.
template <class Parts>
std::string describe_each(const Parts& parts);

// What decides, beside the arrays, what a part of a layer computes: its kind and what it holds, in words
// that no compiler and no locale changes. Widths and biases are seen in the arrays. A type that is not
// of this library says it by `std::string describe() const`, or is just "own".
template <class T>
std::string describe_part(const T& part) {
  if constexpr (requires { std::string(part.describe()); })
    return part.describe();
  else if constexpr (requires {
                       part.parent();
                       part.children();
                     })  // a HierarchicalRouter
    return "parent(" + describe_part(part.parent()) + ") children(" + describe_each(part.children()) + ")";
  else if constexpr (requires { options_text(part.options()); })
    return options_text(part.options());
  else
    return "own";
}

inline constexpr std::string_view kClamped = "ClampedSwiGLU(";

inline std::string describe_part(const ReLU&) { return "ReLU"; }
inline std::string describe_part(const GELU&) { return "GELU"; }
inline std::string describe_part(const GELUTanh&) { return "GELUTanh"; }
inline std::string describe_part(const SiLU&) { return "SiLU"; }
template <class Activation>
std::string describe_part(const Glu<Activation>& glu) {
  return "Glu(" + describe_part(glu.activation) + ")";
}
inline std::string describe_part(const ClampedSwiGLU& glu) {
  return std::string(kClamped) + options_text(glu) + ")";
}

template <class S, class Activation, class Storage>
std::string describe_part(const FeedForward<S, Activation, Storage>& expert) {
  return "FeedForward(" + describe_part(expert.activation()) + ")";
}
template <class S, class Unit, class Storage>
std::string describe_part(const GatedFeedForward<S, Unit, Storage>& expert) {
  return "GatedFeedForward(" + describe_part(expert.glu()) + ")";
}
template <class S, class Storage>
std::string describe_part(const ThreeWayFeedForward<S, Storage>&) {
  return "ThreeWayFeedForward";
}
template <class S>
std::string describe_part(const ZeroExpert<S>&) {
  return "ZeroExpert";
}
template <class S>
std::string describe_part(const CopyExpert<S>&) {
  return "CopyExpert";
}
template <class S>
std::string describe_part(const ConstantExpert<S>&) {
  return "ConstantExpert";
}
template <class... Kinds>
std::string describe_part(const VariantExpert<Kinds...>& expert) {
  return std::visit([](const auto& kind) { return describe_part(kind); }, expert.get());
}

template <class Parts>
std::string describe_each(const Parts& parts) {
  std::vector<std::pair<std::size_t, std::string>> runs;
  for (const auto& part : parts) {
    std::string text = describe_part(part);
    if (runs.empty() || runs.back().second != text) runs.emplace_back(0, std::move(text));
    ++runs.back().first;
  }
  if (runs.empty()) return "none";
  std::string all;
  for (const auto& [count, text] : runs)
    all += (all.empty() ? "" : ", ") + std::to_string(count) + " x " + text;
  return all;
}

}  // namespace io

/// The options and kinds of a layer's parts, or of a router or an expert alone, as text under the keys that
/// save_layer gives them in the metadata: router, experts, shared_experts, or kind. Here all options are
/// said.
template <class Layer>
std::vector<std::pair<std::string, std::string>> describe(const Layer& layer) {
  std::vector<std::pair<std::string, std::string>> texts;
  if constexpr (requires { layer.router(); }) texts.emplace_back("router", io::describe_part(layer.router()));
  if constexpr (requires { layer.experts(); })
    texts.emplace_back("experts", io::describe_each(layer.experts()));
  else
    texts.emplace_back("kind", io::describe_part(layer));
  if constexpr (requires { layer.shared_experts(); })
    texts.emplace_back("shared_experts", io::describe_each(layer.shared_experts()));
  return texts;
}

namespace io {

// Where a part of a description ends: at a comma or a parenthesis that it did not open, or with the text.
inline std::size_t end_of_part(std::string_view text) {
  std::size_t open = 0, at = 0;
  for (; at < text.size(); ++at) {
    if (open == 0 && (text[at] == ',' || text[at] == ')')) break;
    if (text[at] == '(') ++open;
    if (text[at] == ')') --open;
  }
  return at;
}

// The description of a router with f(options, defaults) in place of every list of options.
template <class Router, class F>
std::string with_router_options(std::string_view text, const F& f) {
  if constexpr (requires(const Router& router) { std::string(router.describe()); }) {
    return std::string(text);
  } else if constexpr (requires(const Router& router) {
                         router.parent();
                         router.children();
                       }) {
    using Parent = std::remove_cvref_t<decltype(std::declval<const Router&>().parent())>;
    using Child = std::remove_cvref_t<decltype(std::declval<const Router&>().children()[0])>;
    std::string changed;
    // Copies up to the next `begin` and with it; false where there is none.
    const auto copy_through = [&](std::string_view begin) {
      const std::size_t at = text.find(begin);
      const std::size_t size = at == std::string_view::npos ? text.size() : at + begin.size();
      changed += text.substr(0, size);
      text.remove_prefix(size);
      return at != std::string_view::npos;
    };
    const auto change = [&]<class Part>(std::type_identity<Part>) {
      const std::size_t size = end_of_part(text);
      changed += with_router_options<Part>(text.substr(0, size), f);
      text.remove_prefix(size);
    };
    if (copy_through("parent(")) change(std::type_identity<Parent>());
    while (copy_through(" x ")) change(std::type_identity<Child>());
    return changed;
  } else if constexpr (requires(const Router& router) { options_text(router.options()); }) {
    return f(text, typename Router::Options{});
  } else {
    return std::string(text);
  }
}

// The same of the units of experts.
template <class F>
std::string with_unit_options(std::string text, const F& f) {
  for (std::size_t at = text.find(kClamped); at != std::string::npos; at = text.find(kClamped, at)) {
    at += kClamped.size();
    const std::size_t size = end_of_part(std::string_view(text).substr(at));
    const std::string changed = f(std::string_view(text).substr(at, size), ClampedSwiGLU{});
    text.replace(at, size, changed);
    at += changed.size();
  }
  return text;
}

// The same of what describe says of a layer's part.
template <class Layer, class F>
std::string with_options(std::string_view part, const std::string& text, const F& f) {
  if constexpr (requires(const Layer& layer) { layer.router(); }) {
    using Router = std::remove_cvref_t<decltype(std::declval<const Layer&>().router())>;
    if (part == "router") return with_router_options<Router>(text, f);
  }
  if (part == "kind") return with_unit_options(with_router_options<Layer>(text, f), f);
  return with_unit_options(text, f);
}

inline constexpr const char* kVersion =
    "moe_version";  // whose value is that of the library that wrote the file

// Throws unless a file describes the layer as it is described here. What it does not describe is not
// compared.
template <class Layer>
void require_description(const Checkpoint& checkpoint, const Layer& layer) {
  const auto& metadata = checkpoint.metadata();
  for (const auto& [part, text] : moe::describe(layer)) {
    const auto saved = metadata.find(part);
    if (saved == metadata.end() || saved->second.empty()) continue;
    // A part of one's own that says nothing of itself; older versions listed its options where they knew
    // their names.
    if (text == "own" && parse_options(saved->second)) continue;
    std::vector<std::string> unknown;
    const AddDefaults add_defaults{unknown};
    const std::string there = with_options<Layer>(part, saved->second, add_defaults);
    if (!unknown.empty()) {
      const auto version = metadata.find(kVersion);
      throw CheckpointError("load_layer: " + checkpoint.path().string() + " was saved with " + part +
                            " option " + printable(unknown.front()) +
                            ", which this version, " MOE_VERSION_STRING
                            ", does not have; it was written by " +
                            (version == metadata.end() ? "an older one" : printable(version->second)));
    }
    const std::string here = with_options<Layer>(part, text, add_defaults);
    if (there != here) {
      const auto [saved_text, expected] = without_common_options(there, here);
      constexpr std::size_t kMaxLength = 2000;
      throw CheckpointError("load_layer: " + checkpoint.path().string() + " was saved with " + part + " = " +
                            printable(saved_text, kMaxLength) + ", expected " + expected);
    }
  }
}

inline constexpr const char* kTable = "router.table";  // what a HashRouter's table is called in a file

// The table of a layer's HashRouter; empty where there is none.
template <class Layer>
std::vector<std::int64_t> hash_table_of(const Layer& layer) {
  if constexpr (requires {
                  { layer.router().options().table } -> std::same_as<const IndexVector&>;
                }) {
    const IndexVector& table = layer.router().options().table;
    return {table.begin(), table.end()};
  } else {
    return {};
  }
}

inline void require_table(const TensorView& tensor, const std::vector<std::int64_t>& table,
                          const std::string& file) {
  const std::vector<Index> shape{Index(table.size())};
  if (tensor.dtype != DType::I64 || tensor.shape != shape)
    throw CheckpointError("load_layer: " + tensor.name + " in " + file + " is " +
                          std::string(name_of(tensor.dtype)) + " of shape " + text_of(tensor.shape) +
                          ", expected I64 of " + text_of(shape));
  std::vector<std::int64_t> saved(table.size());
  read_tensor(tensor, saved.data());
  for (std::size_t id = 0; id < table.size(); ++id)
    if (saved[id] != table[id])
      throw CheckpointError("load_layer: " + tensor.name + " in " + file + " sends id " + std::to_string(id) +
                            " to expert " + std::to_string(saved[id]) + ", expected " +
                            std::to_string(table[id]));
}

}  // namespace io

/// Writes every parameter and buffer of a layer (or of anything with visit) to a safetensors file, a
/// HashRouter's table as "router.table", and to its metadata, as "router", "experts" and "shared_experts",
/// what else decides what the layer computes: the router's options that are not at their defaults, kinds of
/// experts and their units; as "moe_version" MOE_VERSION_STRING. `metadata` adds to that. An expert, unit or
/// router of your own takes part by a `std::string describe() const`, and so does a model of several layers,
/// whose options and tables are not compared otherwise. The file is replaced as a whole or not at all. Throws
/// CheckpointError when it can not be written.
/// @code
/// moe::Rng rng(1);
/// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
/// moe::save_layer("example.safetensors", layer, {{"step", "1000"}});
/// assert(moe::Checkpoint::open("example.safetensors").metadata().at("step") == "1000");
/// @endcode
template <class Layer>
void save_layer(const std::filesystem::path& path, const Layer& layer,
                std::map<std::string, std::string> metadata = {}) {
  std::vector<TensorToWrite> tensors;
  Layer::visit(
      [&](const ParameterInfo& info, const auto& array) {
        using S = typename std::remove_cvref_t<decltype(array)>::Scalar;
        static_assert(std::is_floating_point_v<S>, "layers of float and of double can be saved");
        tensors.push_back({std::string(info.name), *io::dtype_of<S>(), io::shape_of(array),
                           std::as_bytes(std::span(array.data(), std::size_t(array.size())))});
      },
      layer);
  const std::vector<std::int64_t> table = io::hash_table_of(layer);
  if (!table.empty())
    tensors.push_back({io::kTable, DType::I64, {Index(table.size())}, std::as_bytes(std::span(table))});
  metadata["format"] = "moe";
  metadata[io::kVersion] = MOE_VERSION_STRING;
  for (const auto& [part, text] : moe::describe(layer))
    metadata[part] = io::with_options<Layer>(part, text, io::LeaveDefaultsOut());
  write_safetensors(path, tensors, metadata);
}

/// Reads what save_layer of this or an older version wrote into a layer of the same kind, sizes and options.
/// An option that a file does not have is at its default. Values of another floating-point type are
/// converted. Throws CheckpointError, and changes nothing, for a name that is in the file or in the layer
/// only, for another shape, for another description or table, and for an option that this version does not
/// have. A part that a file does not describe is not compared.
/// @code
/// moe::Rng rng(1);
/// moe::MoELayer layer(moe::make_experts<moe::FeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
///                     moe::TopKRouter<float>({.d_model = 8, .num_experts = 4, .top_k = 2}, rng));
/// moe::save_layer("example.safetensors", layer);
/// auto loaded = moe::zeros_like(layer);  // or another one of the same kind, sizes and options
/// moe::load_layer(moe::Checkpoint::open("example.safetensors"), loaded);
/// const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8);
/// assert(loaded.forward(x) == layer.forward(x));
/// @endcode
template <class Layer>
void load_layer(const Checkpoint& checkpoint, Layer& layer) {
  const std::string file = checkpoint.path().string();
  io::require_description(checkpoint, layer);
  std::set<std::string> names;
  Layer::visit(
      [&](const ParameterInfo& info, const auto& array) {
        const std::string name(info.name);
        const TensorView& tensor = checkpoint.at(name);  // throws where it is missing
        if (tensor.shape != io::shape_of(array))
          throw CheckpointError("load_layer: " + name + " in " + file + " has shape " +
                                io::text_of(tensor.shape) + ", expected " + io::text_of(io::shape_of(array)));
        switch (tensor.dtype) {
          case DType::F64:
          case DType::F32:
          case DType::F16:
          case DType::BF16:
            break;
          default:
            throw CheckpointError("load_layer: " + name + " in " + file + " has type " +
                                  std::string(name_of(tensor.dtype)) + ", expected F64, F32, F16 or BF16");
        }
        names.insert(name);
      },
      static_cast<const Layer&>(layer));
  const std::vector<std::int64_t> table = io::hash_table_of(layer);
  if (!table.empty() && checkpoint.contains(io::kTable)) {
    io::require_table(checkpoint.at(io::kTable), table, file);
    names.insert(io::kTable);
  }
  for (const std::string& name : checkpoint.names())
    if (!names.contains(name))
      throw CheckpointError("load_layer: " + name + " in " + file + " is not in the layer, which has " +
                            std::to_string(names.size()) + " arrays");
  Layer::visit([&](const ParameterInfo& info,
                   auto& array) { read_tensor(checkpoint.at(std::string(info.name)), array.data()); },
               layer);
}

}  // namespace moe
