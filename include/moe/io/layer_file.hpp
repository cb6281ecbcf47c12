// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

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

template <class Layer>
std::string describe_router(const Layer& layer) {
  if constexpr (requires { layer.router().options(); })
    return describe_options(layer.router().options());
  else
    return "";
}

}  // namespace detail

/// Writes every parameter and buffer of a layer (or of anything with visit) to a safetensors file, and the
/// router's options to its metadata; `metadata` adds to that. The file is replaced as a whole or not at
/// all. Throws CheckpointError when it can not be written.
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
  metadata["format"] = "moe";
  if constexpr (requires { layer.router(); }) metadata["router"] = detail::describe_router(layer);
  write_safetensors(path, tensors, metadata);
}

/// Reads what save_layer wrote into a layer of the same kind, sizes and options. Values of another
/// floating-point type are converted. Throws CheckpointError, and changes nothing, for a name that is in
/// the file or in the layer only, for another shape, and for other options of the router.
/// Example: load_layer(Checkpoint::open("layer.safetensors"), layer).
template <class Layer>
void load_layer(const Checkpoint& checkpoint, Layer& layer) {
  const std::string file = checkpoint.path().string();
  if constexpr (requires { layer.router(); }) {
    const auto saved = checkpoint.metadata().find("router");
    const std::string here = detail::describe_router(layer);
    if (saved != checkpoint.metadata().end() && saved->second != here)
      throw CheckpointError("load_layer: " + file + " is of a router with " + saved->second +
                            ", expected " + here);
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
