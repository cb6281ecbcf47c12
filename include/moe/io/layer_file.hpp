// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <locale>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <moe/activation.hpp>
#include <moe/experts/feed_forward.hpp>
#include <moe/experts/gated_feed_forward.hpp>
#include <moe/experts/null_experts.hpp>
#include <moe/experts/three_way_feed_forward.hpp>
#include <moe/experts/variant_expert.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/parameters.hpp>
#include <moe/types.hpp>

// A layer of your own, saved and loaded: every array that Layer::visit shows, under its name.
namespace moe {

namespace detail {

template <class Array>
std::vector<Index> shape_of(const Array& array) {
  if (Array::ColsAtCompileTime == 1) return {array.rows()};
  return {array.rows(), array.cols()};
}

inline std::string option_text(bool value) { return value ? "true" : "false"; }
inline std::string option_text(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());  // whatever decimal point the program prints
  text.precision(17);
  text << value;
  return text.str();
}
inline std::string option_text(const std::optional<double>& value) {
  return value ? option_text(*value) : "none";
}
template <class T>
  requires std::is_integral_v<T> || std::is_enum_v<T>
std::string option_text(T value) {
  return std::to_string(static_cast<long long>(value));
}

// The options that decide what a router makes of its parameters, as far as it has them.
template <class Options>
std::string describe_options(const Options& o) {
  std::string text;
  const auto add = [&](const char* name, const auto& value) {
    text += (text.empty() ? "" : " ") + std::string(name) + "=" + option_text(value);
  };
  if constexpr (requires { o.d_model; }) add("d_model", o.d_model);
  if constexpr (requires { o.num_experts; }) add("num_experts", o.num_experts);
  if constexpr (requires { o.top_k; }) add("top_k", o.top_k);
  if constexpr (requires { o.top_p; }) add("top_p", o.top_p);
  if constexpr (requires { o.second_threshold; }) add("second_threshold", o.second_threshold);
  if constexpr (requires { o.random_second_threshold; })
    add("random_second_threshold", o.random_second_threshold);
  if constexpr (requires { o.score; }) add("score", o.score);
  if constexpr (requires { o.softmax_before_selection; }) add("softmax_before_selection", o.softmax_before_selection);
  if constexpr (requires { o.renormalise; }) add("renormalise", o.renormalise);
  if constexpr (requires { o.renormalise_epsilon; }) add("renormalise_epsilon", o.renormalise_epsilon);
  if constexpr (requires { o.renormalise_minimum; }) add("renormalise_minimum", o.renormalise_minimum);
  if constexpr (requires { o.gate_scale; }) add("gate_scale", o.gate_scale);
  if constexpr (requires { o.gate_side; }) add("gate_side", o.gate_side);
  if constexpr (requires { o.noise_stddev; }) add("noise_stddev", o.noise_stddev);
  if constexpr (requires { o.noise_epsilon; }) add("noise_epsilon", o.noise_epsilon);
  if constexpr (requires { o.jitter; }) add("jitter", o.jitter);
  if constexpr (requires { o.tolerance; }) add("tolerance", o.tolerance);
  if constexpr (requires { o.max_iterations; }) add("max_iterations", o.max_iterations);
  if constexpr (requires { o.capacity; }) add("capacity", o.capacity);
  if constexpr (requires { o.training_capacity; }) add("training_capacity", o.training_capacity);
  if constexpr (requires { o.capacity_rule; }) {
    add("capacity_rounding", o.capacity_rule.rounding);
    add("capacity_minimum", o.capacity_rule.minimum);
    add("capacity_multiple_of", o.capacity_rule.multiple_of);
  }
  if constexpr (requires { o.overflow; }) add("overflow", o.overflow);
  if constexpr (requires { o.priority; }) add("priority", o.priority);
  if constexpr (requires { o.renormalise_after_drop; }) add("renormalise_after_drop", o.renormalise_after_drop);
  if constexpr (requires { o.group_limit; }) {
    add("groups", o.group_limit.groups);
    add("kept_groups", o.group_limit.kept);
    add("group_score", o.group_limit.score);
  }
  return text;
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
  else if constexpr (requires { part.parent(); part.children(); })  // a HierarchicalRouter
    return "parent(" + describe_part(part.parent()) + ") children(" + describe_each(part.children()) + ")";
  else if constexpr (requires { part.options(); })
    return describe_options(part.options());
  else
    return "own";
}

inline std::string describe_part(const ReLU&) { return "ReLU"; }
inline std::string describe_part(const GELU&) { return "GELU"; }
inline std::string describe_part(const GELUTanh&) { return "GELUTanh"; }
inline std::string describe_part(const SiLU&) { return "SiLU"; }
template <class Activation>
std::string describe_part(const Glu<Activation>& glu) {
  return "Glu(" + describe_part(glu.activation) + ")";
}
inline std::string describe_part(const ClampedSwiGLU& glu) {
  return "ClampedSwiGLU(alpha=" + option_text(glu.alpha) + " limit=" + option_text(glu.limit) +
         " offset=" + option_text(glu.offset) + ")";
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

}  // namespace detail

/// The options and kinds of a layer's parts, or of a router or an expert alone, as text under the keys that
/// save_layer gives them in the metadata: router, experts, shared_experts, or kind.
template <class Layer>
std::vector<std::pair<std::string, std::string>> describe(const Layer& layer) {
  std::vector<std::pair<std::string, std::string>> texts;
  if constexpr (requires { layer.router(); })
    texts.emplace_back("router", detail::describe_part(layer.router()));
  if constexpr (requires { layer.experts(); })
    texts.emplace_back("experts", detail::describe_each(layer.experts()));
  else
    texts.emplace_back("kind", detail::describe_part(layer));
  if constexpr (requires { layer.shared_experts(); })
    texts.emplace_back("shared_experts", detail::describe_each(layer.shared_experts()));
  return texts;
}

namespace detail {

inline constexpr const char* kTable = "router.table";  // what a HashRouter's table is called in a file

// The table of a layer's HashRouter; empty where there is none.
template <class Layer>
std::vector<std::int64_t> hash_table_of(const Layer& layer) {
  if constexpr (requires { { layer.router().options().table } -> std::same_as<const IndexVector&>; }) {
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
      throw CheckpointError("load_layer: " + tensor.name + " in " + file + " sends id " +
                            std::to_string(id) + " to expert " + std::to_string(saved[id]) +
                            ", expected " + std::to_string(table[id]));
}

}  // namespace detail

/// Writes every parameter and buffer of a layer (or of anything with visit) to a safetensors file, a
/// HashRouter's table as "router.table", and to its metadata, as "router", "experts" and "shared_experts",
/// what else decides what the layer computes: the router's options, kinds of experts and their units.
/// `metadata` adds to that. An expert, unit or router of your own takes part by a
/// `std::string describe() const`. The file is replaced as a whole or not at all. Throws CheckpointError
/// when it can not be written.
/// Example: save_layer("layer.safetensors", layer).
template <class Layer>
void save_layer(const std::filesystem::path& path, const Layer& layer,
                std::map<std::string, std::string> metadata = {}) {
  std::vector<TensorToWrite> tensors;
  Layer::visit(
      [&](const ParameterInfo& info, const auto& array) {
        using S = typename std::remove_cvref_t<decltype(array)>::Scalar;
        static_assert(std::is_floating_point_v<S>, "layers of float and of double can be saved");
        tensors.push_back({std::string(info.name), *detail::dtype_of<S>(), detail::shape_of(array),
                           std::as_bytes(std::span(array.data(), std::size_t(array.size())))});
      },
      layer);
  const std::vector<std::int64_t> table = detail::hash_table_of(layer);
  if (!table.empty())
    tensors.push_back(
        {detail::kTable, DType::I64, {Index(table.size())}, std::as_bytes(std::span(table))});
  metadata["format"] = "moe";
  for (const auto& [part, text] : moe::describe(layer)) metadata[part] = text;
  write_safetensors(path, tensors, metadata);
}

/// Reads what save_layer wrote into a layer of the same kind, sizes and options. Values of another
/// floating-point type are converted. Throws CheckpointError, and changes nothing, for a name that is in
/// the file or in the layer only, for another shape, and for another description or table. What a file
/// does not describe is not compared.
/// Example: load_layer(Checkpoint::open("layer.safetensors"), layer).
template <class Layer>
void load_layer(const Checkpoint& checkpoint, Layer& layer) {
  const std::string file = checkpoint.path().string();
  for (const auto& [part, here] : moe::describe(layer)) {
    const auto saved = checkpoint.metadata().find(part);
    if (saved == checkpoint.metadata().end() || saved->second.empty()) continue;
    if (saved->second != here)
      throw CheckpointError("load_layer: " + file + " was saved with " + part + " = " +
                            saved->second + ", expected " + here);
  }
  std::set<std::string> names;
  Layer::visit(
      [&](const ParameterInfo& info, const auto& array) {
        const std::string name(info.name);
        const TensorView& tensor = checkpoint.at(name);  // throws where it is missing
        if (tensor.shape != detail::shape_of(array))
          throw CheckpointError("load_layer: " + name + " in " + file + " has shape " +
                                detail::text_of(tensor.shape) + ", expected " +
                                detail::text_of(detail::shape_of(array)));
        switch (tensor.dtype) {
          case DType::F64:
          case DType::F32:
          case DType::F16:
          case DType::BF16:
            break;
          default:
            throw CheckpointError("load_layer: " + name + " in " + file + " has type " +
                                  std::string(name_of(tensor.dtype)) + ", expected F32 or F64");
        }
        names.insert(name);
      },
      static_cast<const Layer&>(layer));
  const std::vector<std::int64_t> table = detail::hash_table_of(layer);
  if (!table.empty() && checkpoint.contains(detail::kTable)) {
    detail::require_table(checkpoint.at(detail::kTable), table, file);
    names.insert(detail::kTable);
  }
  for (const std::string& name : checkpoint.names())
    if (!names.contains(name))
      throw CheckpointError("load_layer: " + name + " in " + file + " is not in the layer, which has " +
                            std::to_string(names.size()) + " arrays");
  Layer::visit(
      [&](const ParameterInfo& info, auto& array) {
        read_tensor(checkpoint.at(std::string(info.name)), array.data());
      },
      layer);
}

}  // namespace moe
