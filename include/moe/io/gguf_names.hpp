// SPDX-License-Identifier: MIT
#pragma once

#include <map>
#include <string>
#include <string_view>

#include <moe/core/check.hpp>
#include <moe/core/types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/gguf.hpp>
#include <moe/io/layer_names.hpp>
#include <moe/models/model.hpp>

// Where a checkpoint holds a model's layer: under its published names, or, in a GGUF file, under llama.cpp's.
namespace moe::io {

/// The names of llama.cpp for the parameters that `own` has. Its files keep gate and up projections apart, or
/// `fused`, the rows of the gate first, and every matrix as [out, in]; the experts of one are one tensor, or,
/// in older files, each has its own.
constexpr LayerTensors gguf_tensors(const LayerTensors& own, bool stacked, bool fused = false) {
  const auto named = [](const TensorSource& source, std::string_view name) {
    return source.empty() ? TensorSource{} : TensorSource{name};
  };
  const ExpertTensors &routed = own.experts, &shared = own.shared_expert;
  const auto weight = [&](const TensorSource& source, std::string_view of_all, std::string_view of_one) {
    return named(source, stacked ? of_all : of_one);
  };
  const auto half = [&](const TensorSource& apart, std::string_view of_both, TensorPart part) {
    return fused && !apart.empty() ? TensorSource{of_both, part} : apart;
  };
  constexpr std::string_view kWeights = "blk.{layer}.ffn_gate_up_exps.weight",
                             kBiases = "blk.{layer}.ffn_gate_up_exps.bias";
  constexpr TensorPart kGate = TensorPart::first_half, kUp = TensorPart::second_half;
  return {.prefix = "blk.{layer}.ffn_gate",
          .more_prefixes = {"blk.{layer}.ffn_up", "blk.{layer}.ffn_down", "blk.{layer}.exp_probs_b"},
          .w_router = named(own.w_router, "blk.{layer}.ffn_gate_inp.weight"),
          .b_router = named(own.b_router, "blk.{layer}.ffn_gate_inp.bias"),
          .selection_bias = named(own.selection_bias, "blk.{layer}.exp_probs_b.bias"),
          .experts = {.w_gate = half(weight(routed.w_gate, "blk.{layer}.ffn_gate_exps.weight",
                                            "blk.{layer}.ffn_gate.{expert}.weight"),
                                     kWeights, kGate),
                      .w_up = half(weight(routed.w_up, "blk.{layer}.ffn_up_exps.weight",
                                          "blk.{layer}.ffn_up.{expert}.weight"),
                                   kWeights, kUp),
                      .w_down = weight(routed.w_down, "blk.{layer}.ffn_down_exps.weight",
                                       "blk.{layer}.ffn_down.{expert}.weight"),
                      .b_gate = half(named(routed.b_gate, "blk.{layer}.ffn_gate_exps.bias"), kBiases, kGate),
                      .b_up = half(named(routed.b_up, "blk.{layer}.ffn_up_exps.bias"), kBiases, kUp),
                      .b_down = named(routed.b_down, "blk.{layer}.ffn_down_exps.bias")},
          .shared_expert = {.w_gate = named(shared.w_gate, "blk.{layer}.ffn_gate_shexp.weight"),
                            .w_up = named(shared.w_up, "blk.{layer}.ffn_up_shexp.weight"),
                            .w_down = named(shared.w_down, "blk.{layer}.ffn_down_shexp.weight")},
          .w_shared_gate = named(own.w_shared_gate, "blk.{layer}.ffn_gate_inp_shexp.weight"),
          .gguf = own.gguf};
}

/// The names of a model's tensors in a checkpoint. `where` begins messages. Throws CheckpointError for a GGUF
/// file of another architecture, and std::invalid_argument for one of a model that has none.
template <class M>
LayerTensors tensors_in(const Checkpoint& checkpoint, const M& model, Index layer, const char* where) {
  if (!checkpoint.is_gguf()) return model.tensors;
  const auto found = checkpoint.metadata().find("general.architecture");
  const std::string architecture = found == checkpoint.metadata().end() ? "" : found->second;
  const std::string_view expected = model.tensors.gguf;
  require(!expected.empty(), where, ": the tensor names of ", model.name, " in GGUF files are not known");
  if (architecture != expected)
    fail_checkpoint(where, ": ", checkpoint.path().string(), " has general.architecture ",
                    in_quotes(architecture), ", expected ", in_quotes(expected), " for ", model.name);
  const auto has = [&](const char* name) { return checkpoint.contains(replaced(name, "{layer}", layer)); };
  return gguf_tensors(model.tensors, !has("blk.{layer}.ffn_down.0.weight"),
                      has("blk.{layer}.ffn_gate_up_exps.weight"));
}

}  // namespace moe::io
