// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/models/published/dbrx.hpp>
#include <moe/models/published/deepseek.hpp>
#include <moe/models/published/gpt_oss.hpp>
#include <moe/models/published/granite.hpp>
#include <moe/models/published/gshard.hpp>
#include <moe/models/published/llama4.hpp>
#include <moe/models/published/mixtral.hpp>
#include <moe/moe.hpp>

#include "files.hpp"
#include "tensors.hpp"

namespace {

using io_test::kMixtral;
using io_test::kSmallMixtral;
using io_test::small_mixtral;
using io_test::Tensors;

using moe::Checkpoint;
using moe::CheckpointError;
using moe::DType;
using moe::Index;
using moe::Matrix;

void expect_error(const Tensors& tensors, const std::vector<std::string>& parts) {
  try {
    moe::load_layer<float>(kSmallMixtral, tensors.open(), 7);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CheckpointError& error) {
    for (const std::string& part : parts)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << '"' << error.what() << "\" has no \"" << part << '"';
  }
}

TEST(LoadLayer, PutsEveryTensorInItsPlace) {
  const auto layer = moe::load_layer<double>(kSmallMixtral, small_mixtral().open(), 7);
  EXPECT_EQ(layer.router().w_router(1, 2), 100 + 0.5 * 6);
  EXPECT_EQ(layer.experts()[1].w_gate(2, 1), 2000 + 0.5 * 9);
  EXPECT_EQ(layer.experts()[0].w_down(3, 1), 1200 + 0.5 * 10);
  EXPECT_EQ(layer.experts()[1].w_up(0, 3), 2400 + 0.5 * 3);
}

TEST(LoadLayer, SaysWhatIsMissing) {
  Tensors t = small_mixtral();
  t.tensors.erase(kMixtral + "experts.1.w2.weight");
  expect_error(t, {kMixtral + "experts.1.w2.weight"});
}

TEST(LoadLayer, SaysWhatHasAnotherShape) {
  Tensors t = small_mixtral();
  t.add_count(kMixtral + "experts.0.w1.weight", {4, 3}, 0);
  expect_error(t, {kMixtral + "experts.0.w1.weight", "[4, 3]", "[3, 4]"});
}

TEST(LoadLayer, SaysWhatIsLeftOver) {
  Tensors t = small_mixtral();
  t.add_count(kMixtral + "experts.2.w1.weight", {3, 4}, 0);  // a third expert
  expect_error(t, {kMixtral + "experts.2.w1.weight", "0 of the 12", "layer 7"});
  t = small_mixtral();
  t.add_count(kMixtral + "gate.bias", {2}, 0);
  expect_error(t, {kMixtral + "gate.bias", "0 of the 2"});
}

// Granite's gate and up projection are halves of one tensor. Two that overlap leave the count of values as
// it is where they are of the same size.
TEST(LoadLayer, RefusesToReadRowsTwice) {
  using enum moe::TensorPart;
  auto model = moe::granite_1b_a400m.scaled_to(4, 2, 2);
  const std::string prefix = "model.layers.0.block_sparse_moe.";
  Tensors t;
  t.add_count(prefix + "router.layer.weight", {2, 4}, 0);
  t.add_count(prefix + "input_linear.weight", {2, 4, 4}, 100);
  t.add_count(prefix + "output_linear.weight", {2, 4, 2}, 200);
  const Checkpoint file = t.open();
  const auto message = [&](moe::TensorPart gate, moe::TensorPart up) -> std::string {
    model.tensors.experts.w_gate.part = gate;
    model.tensors.experts.w_up.part = up;
    try {
      moe::load_layer<float>(model, file, 0);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(first_half, second_half), "");
  EXPECT_EQ(message(second_half, first_half), "");
  EXPECT_EQ(message(odd_rows, even_rows), "");
  const std::string refused = "load_layer: two parameters of this model take the same rows of " + prefix +
                              "input_linear.weight, expected one";
  EXPECT_EQ(message(first_half, first_half), refused);
  EXPECT_EQ(message(even_rows, even_rows), refused);
  EXPECT_EQ(message(first_half, even_rows), refused);
  EXPECT_EQ(message(odd_rows, second_half), refused);
  model = moe::granite_1b_a400m.scaled_to(4, 4, 2);  // all four rows as either
  model.tensors.experts.w_down = {"model.layers.{layer}.block_sparse_moe.input_linear.weight"};
  EXPECT_EQ(message(all, all), refused);
}

TEST(LoadLayer, ConvertsTypes) {
  Tensors t = small_mixtral();
  t.add(kMixtral + "gate.weight", DType::BF16, {2, 4},
        std::vector<std::uint16_t>{0x3F80, 0xC000, 0x4049, 0, 0, 0, 0, 0x7F80});
  const auto layer = moe::load_layer<float>(kSmallMixtral, t.open(), 7);
  EXPECT_EQ(layer.router().w_router(0, 0), 1.0f);
  EXPECT_EQ(layer.router().w_router(0, 1), -2.0f);
  EXPECT_EQ(layer.router().w_router(0, 2), 3.140625f);
}

// DeepSeek-V3's weights: 8 bits, and a scale for every block of 128 x 128.
TEST(LoadLayer, MultipliesBlockScalesOut) {
  auto model = moe::deepseek_v3.scaled_to(130, 3, 2);
  model.router.group_limit = {};
  model.router.top_k = 1;
  model.shared_d_ff = 3;
  Tensors t;
  const std::string prefix = "model.layers.3.mlp.";
  t.add_count(prefix + "gate.weight", {2, 130}, 0);
  t.add_count(prefix + "gate.e_score_correction_bias", {2}, 5);
  for (const std::string expert : {"experts.0.", "experts.1.", "shared_experts."}) {
    for (const std::string part : {"gate_proj", "up_proj", "down_proj"}) {
      const bool down = part == "down_proj";
      const std::string name = prefix + expert + part + ".weight";
      t.add(name, DType::F8_E4M3, down ? std::vector<Index>{130, 3} : std::vector<Index>{3, 130},
            std::vector<std::uint8_t>(390, 0x38));  // 1
      t.add_count(name + "_scale_inv", down ? std::vector<Index>{2, 1} : std::vector<Index>{1, 2}, 2);
    }
  }
  const auto layer = moe::load_layer<float>(model, t.open(), 3);
  EXPECT_EQ(layer.experts()[1].w_gate(2, 127), 2);
  EXPECT_EQ(layer.experts()[1].w_gate(2, 128), 2.5f);
  EXPECT_EQ(layer.shared_experts()[0].w_down(129, 0), 2.5f);
  // The same scales in other types.
  const std::string scale = prefix + "experts.1.gate_proj.weight_scale_inv";
  t.add(scale, DType::BF16, {1, 2}, std::vector<std::uint16_t>{0x4000, 0x4020});
  EXPECT_EQ(moe::load_layer<float>(model, t.open(), 3).experts()[1].w_gate, layer.experts()[1].w_gate);
  t.add(scale, DType::F8_E8M0, {1, 2}, std::vector<std::uint8_t>{126, 130});
  const auto by_powers = moe::load_layer<float>(model, t.open(), 3);
  EXPECT_EQ(by_powers.experts()[1].w_gate(2, 127), .5f);
  EXPECT_EQ(by_powers.experts()[1].w_gate(2, 128), 8);
  EXPECT_EQ(layer.router().selection_bias[1], 5.5f);
}

// A scale a row, as compressed-tensors writes its channels, or one for the matrix.
TEST(LoadLayer, MultipliesScalesOfRowsOut) {
  const std::string name = kMixtral + "experts.1.w3.weight";
  Tensors t = small_mixtral();
  t.add(name, DType::F8_E4M3, {3, 4}, std::vector<std::uint8_t>(12, 0x38));  // 1
  const auto loaded = [&] { return moe::load_layer<float>(kSmallMixtral, t.open(), 7).experts()[1].w_up; };
  const Matrix<float> rows{{2, 2, 2, 2}, {2.5f, 2.5f, 2.5f, 2.5f}, {3, 3, 3, 3}};
  t.add_count(name + "_scale", {3, 1}, 2);
  const auto first = loaded();
  EXPECT_EQ(first(0, 3), 2);
  EXPECT_EQ(first(2, 0), loaded()(2, 3));
  EXPECT_NE(first(0, 0), first(1, 0));
  t.add(name + "_scale", DType::F32, {3}, std::vector<float>{2, 2.5f, 3});
  EXPECT_EQ(loaded(), rows);
  t.add(name + "_scale", DType::BF16, {3, 1}, std::vector<std::uint16_t>{0x4000, 0x4020, 0x4040});
  EXPECT_EQ(loaded(), rows);
  t.add(name + "_scale", DType::F32, {1}, std::vector<float>{2});
  EXPECT_EQ(loaded(), moe::Matrix<float>::Constant(3, 4, 2));
  t.add(name + "_scale", DType::F32, {}, std::vector<float>{3});
  EXPECT_EQ(loaded(), moe::Matrix<float>::Constant(3, 4, 3));
  t.add(name + "_scale", DType::F32, {4, 1}, std::vector<float>{1, 1, 1, 1});
  expect_error(t, {"expected BF16, F8_E8M0 or F32 [1, 1], or [3, 1], or [1], for", "[4, 1]"});
}

// 8 bits are read with their scale or not at all.
TEST(LoadLayer, RefusesEightBitsWithoutTheirScale) {
  const std::string name = kMixtral + "experts.1.w3.weight";
  for (const DType dtype : {DType::F8_E4M3, DType::F8_E5M2, DType::F8_E8M0}) {
    Tensors t = small_mixtral();
    t.add(name, dtype, {3, 4}, std::vector<std::uint8_t>(12, 0x38));
    expect_error(t,
                 {"load_layer: " + name + " is " + std::string(moe::name_of(dtype)) +
                  ", which is not read without its scale '" + name + "_scale_inv' or '" + name + "_scale'"});
    const Checkpoint file = t.open();
    EXPECT_THROW(moe::load_mapped_layer<float>(kSmallMixtral, file, 7), CheckpointError);
  }
  // A scale under another name is not taken for it, but named.
  Tensors t = small_mixtral();
  t.add(name, DType::F8_E4M3, {3, 4}, std::vector<std::uint8_t>(12, 0x38));
  t.add_count(name + "_scales", {1}, 2);
  expect_error(t, {"'" + name + "_scale': did you mean '" + name + "_scales'"});
  // The router, and a type that has no scales.
  t = small_mixtral();
  t.add(kMixtral + "gate.weight", DType::F8_E4M3, {2, 4}, std::vector<std::uint8_t>(8, 0x38));
  expect_error(t, {"gate.weight_scale_inv'"});
  t.add(kMixtral + "gate.weight", DType::F8_E5M2, {2, 4}, std::vector<std::uint8_t>(8, 0x38));
  t.add_count(kMixtral + "gate.weight_scale_inv", {1, 1}, 2);
  expect_error(t, {"gate.weight', F8_E5M2 [2, 4]: expected F8_E4M3"});
}

// A tensor of a type that is not read: nobody's concern but that of the layer which has it.
TEST(LoadLayer, RefusesUnknownDTypesOfItsOwnTensorsOnly) {
  Tensors t = small_mixtral();
  t.add("model.layers.8.block_sparse_moe.gate.bias", DType::U16, {1}, std::vector<std::uint8_t>{1, 2});
  t.add(kMixtral + "gate.bias", DType::I16, {1}, std::vector<std::uint8_t>{1, 2});
  t.open();
  std::string file = io_test::text_in(Tensors::path());
  const auto change = [&](const std::string& from, const std::string& to) {
    file.replace(file.find(from), from.size(), to);
    io_test::write_text(Tensors::path(), file);
    return Checkpoint::open(Tensors::path());
  };
  const auto message = [](const Checkpoint& checkpoint) -> std::string {
    try {
      moe::load_layer<float>(kSmallMixtral, checkpoint, 7);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message(change("\"U16\"", "\"C64\"")).find("0 of the 1 values of " + kMixtral + "gate.bias"),
            std::string::npos);
  EXPECT_NE(message(change("\"I16\"", "\"C99\"")).find(kMixtral + "gate.bias': dtype 'C99' is not read"),
            std::string::npos);
  change(kMixtral + "gate.bias", "model.layers.9.block_sparse_moe.gate.bias");
  EXPECT_EQ(message(Checkpoint::open(Tensors::path())), "");
}

// Scales that were not read, whether what they are called after is there or not.
TEST(LoadLayer, RefusesScalesWithoutTheirTensor) {
  Tensors t = small_mixtral();
  t.add_count(kMixtral + "experts.2.w1.weight_scale_inv", {1, 1}, 2);
  expect_error(t, {kMixtral + "experts.2.w1.weight_scale_inv", "0 of the 1"});
  t = small_mixtral();
  t.add(kMixtral + "experts.0.w1.weight_scales", DType::U8, {3, 1}, std::vector<std::uint8_t>(3, 127));
  expect_error(t, {kMixtral + "experts.0.w1.weight_scales", "0 of the 3"});
  t = small_mixtral();
  t.tensors.erase(kMixtral + "experts.0.w1.weight");
  t.add(kMixtral + "experts.0.w1.weight_scales", DType::U8, {3, 1}, std::vector<std::uint8_t>(3, 127));
  expect_error(t, {"no tensor '" + kMixtral + "experts.0.w1.weight'"});
  t = small_mixtral();  // a weight of 16 bits beside a scale
  t.add_count(kMixtral + "experts.0.w1.weight_scale_inv", {1, 1}, 2);
  expect_error(t, {kMixtral + "experts.0.w1.weight', F32 [3, 4]: expected F8_E4M3"});
}

// gpt-oss: gate and up rows alternate; in 4 bits they stand as [rows, in], else as [in, rows].
TEST(LoadLayer, TakesBothFormsOfGptOss) {
  auto model = moe::gpt_oss_20b.scaled_to(32, 32, 2);
  model.router.top_k = 1;
  const std::string prefix = "model.layers.0.mlp.";
  Tensors plain;
  plain.add_count(prefix + "router.weight", {2, 32}, 0);
  plain.add_count(prefix + "router.bias", {2}, 0);
  plain.add_count(prefix + "experts.gate_up_proj_bias", {2, 64}, 0);
  plain.add_count(prefix + "experts.down_proj_bias", {2, 32}, 0);
  Tensors packed = plain;
  // Values 0, 1, ... 7 of the 4-bit table by (expert + row + column) % 8.
  const float table[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  for (const auto& [name, rows] : {std::pair{"gate_up_proj", Index(64)}, std::pair{"down_proj", Index(32)}}) {
    std::vector<float> values;
    std::vector<std::uint8_t> blocks;
    for (Index e = 0; e < 2; ++e)
      for (Index i = 0; i < 32; ++i)
        for (Index r = 0; r < rows; ++r) values.push_back(2 * table[(e + r + i) % 8]);
    for (Index e = 0; e < 2; ++e)
      for (Index r = 0; r < rows; ++r)
        for (Index i = 0; i < 32; i += 2)
          blocks.push_back(std::uint8_t((e + r + i) % 8 + 16 * ((e + r + i + 1) % 8)));
    plain.add(prefix + "experts." + name, DType::F32, {2, 32, rows}, values);
    packed.add(prefix + "experts." + name + "_blocks", DType::U8, {2, rows, 1, 16}, blocks);
    packed.add(prefix + "experts." + name + "_scales", DType::U8, {2, rows, 1},
               std::vector<std::uint8_t>(std::size_t(2 * rows), 128));  // 2
  }
  // What is said of a wrong shape has the stored one in it and what it holds.
  auto wider = model;
  wider.d_ff = 64;
  try {
    moe::load_layer<float>(wider, packed.open(), 0);
    ADD_FAILURE() << "another d_ff";
  } catch (const moe::CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("[2, 64, 1, 16], of 4-bit values [2, 64, 32], expected "),
              std::string::npos)
        << error.what();
  }
  const auto from_plain = moe::load_layer<float>(model, plain.open(), 0);
  const auto from_packed = moe::load_layer<float>(model, packed.open(), 0);
  EXPECT_EQ(from_plain.experts()[1].w_up(3, 5), 2 * table[(1 + 7 + 5) % 8]);
  EXPECT_EQ(from_plain.experts()[1].w_down(3, 5), 2 * table[(1 + 3 + 5) % 8]);
  std::remove_const_t<decltype(from_plain)>::visit(
      [](const moe::ParameterInfo& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; },
      from_plain, from_packed);
}

// Square matrices hide a wrong orientation: a load that does not turn gpt-oss's w_down is another layer.
TEST(LoadLayer, TheOrientationOfSquareMatricesMatters) {
  auto model = moe::gpt_oss_20b.scaled_to(4, 4, 1);
  Tensors t;
  const std::string prefix = "model.layers.0.mlp.";
  t.add_count(prefix + "router.weight", {1, 4}, 0);
  t.add_count(prefix + "router.bias", {1}, 0);
  t.add_count(prefix + "experts.gate_up_proj", {1, 4, 8}, 0);
  t.add_count(prefix + "experts.gate_up_proj_bias", {1, 8}, 0);
  t.add_count(prefix + "experts.down_proj", {1, 4, 4}, 0);
  t.add_count(prefix + "experts.down_proj_bias", {1, 4}, 0);
  const auto right = moe::load_layer<float>(model, t.open(), 0);
  EXPECT_EQ(right.experts()[0].w_down(1, 2), 0.5f * (2 * 4 + 1));  // stored [in, out]
  model.tensors.experts.w_down.transposed = false;
  const auto wrong = moe::load_layer<float>(model, t.open(), 0);
  EXPECT_EQ(wrong.experts()[0].w_down(1, 2), 0.5f * (1 * 4 + 2));
}

// Scales of which it is not known how experts share them.
TEST(LoadLayer, RefusesBlockScalesOfStackedExperts) {
  const std::string prefix = "transformer.blocks.0.ffn.";
  Tensors t;
  t.add_count(prefix + "router.layer.weight", {2, 4}, 0);
  for (const std::string name : {"w1", "v1", "w2"}) {
    t.add(prefix + "experts.mlp." + name, DType::F8_E4M3, {6, 4}, std::vector<std::uint8_t>(24, 0x38));
    t.add_count(prefix + "experts.mlp." + name + "_scale_inv", {1, 1}, 2);
  }
  try {
    moe::load_layer<float>(moe::dbrx.scaled_to(4, 3, 2), t.open(), 0);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("w1_scale_inv has shape [1, 1], expected 2 first"),
              std::string::npos)
        << error.what();
  }
}

TEST(LoadLayer, TakesStackedRowsOfDbrx) {
  const auto model = moe::dbrx.scaled_to(4, 3, 2);
  Tensors t;
  const std::string prefix = "transformer.blocks.0.ffn.";
  t.add_count(prefix + "router.layer.weight", {2, 4}, 0);
  t.add_count(prefix + "experts.mlp.w1", {6, 4}, 0);
  t.add_count(prefix + "experts.mlp.v1", {6, 4}, 100);
  t.add_count(prefix + "experts.mlp.w2", {6, 4}, 200);
  const auto layer = moe::load_layer<float>(model, t.open(), 0);
  EXPECT_EQ(layer.experts()[1].w_gate(2, 3), 0.5f * (5 * 4 + 3));
  EXPECT_EQ(layer.experts()[1].w_down(3, 2), 200 + 0.5f * (5 * 4 + 3));
}

// ---- Models that lie below other modules than in their own checkpoints.

// small_mixtral with `path` in place of "model." before "layers.".
Tensors small_mixtral_at(const std::string& path) {
  Tensors t;
  for (const auto& [name, tensor] : small_mixtral().tensors)
    t.tensors[path + name.substr(std::string("model.").size())] = tensor;
  return t;
}

std::string message_of(const Checkpoint& checkpoint) {
  try {
    moe::load_layer<float>(kSmallMixtral, checkpoint, 7);
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "";
}

TEST(LoadLayer, FindsTheModelBelowOtherModules) {
  const auto expected = moe::load_layer<float>(kSmallMixtral, small_mixtral().open(), 7);
  for (const std::string path : {"language_model.model.", "model.language_model.", "module.model.text.", "",
                                 "base_model.model.model."}) {
    Tensors t = small_mixtral_at(path);
    t.add_count("vision_tower.layers.7.mlp.fc1.weight", {2, 2}, 0);
    t.add_count("mtp.layers.7.block_sparse_moe.gate.weight", {2, 4}, -1);  // "mtp." is not "model."
    const Checkpoint file = t.open();
    const auto loaded = moe::load_layer<float>(kSmallMixtral, file, 7);
    EXPECT_EQ(loaded.router().w_router, expected.router().w_router) << path;
    EXPECT_EQ(loaded.experts()[1].w_down, expected.experts()[1].w_down) << path;
    const auto mapped = moe::load_mapped_layer<float>(kSmallMixtral, file, 7);
    EXPECT_EQ(mapped.layer.experts()[0].w_up.view(), expected.experts()[0].w_up) << path;
    EXPECT_EQ(mapped.tensors.back().name, path + "layers.7.block_sparse_moe.gate.weight");
    const auto sized = moe::sized_as(moe::mixtral_8x7b, file, 7);
    EXPECT_EQ(sized.d_ff, 3) << path;
    EXPECT_EQ(sized.num_experts(), 2) << path;
    // Names of that place are as strict as the model's own.
    t.add_count(path + "layers.7.block_sparse_moe.gate.bias", {2}, 0);
    EXPECT_EQ(message_of(t.open()),
              "load_layer: 0 of the 2 values of " + path +
                  "layers.7.block_sparse_moe.gate.bias belong to layer 7 of this model, "
                  "expected all");
    EXPECT_THROW(moe::load_layer<float>(kSmallMixtral, file, 6), CheckpointError);
  }
  // Modules of the model's own that the checkpoint leaves out.
  const auto llama = moe::llama4_scout.scaled_to(4, 3, 2);
  Tensors t;
  const std::string prefix = "model.layers.0.feed_forward.";
  t.add_count(prefix + "router.weight", {2, 4}, 100);
  t.add_count(prefix + "experts.gate_up_proj", {2, 4, 6}, 0);
  t.add_count(prefix + "experts.down_proj", {2, 3, 4}, 0);
  const Index shared = llama.shared_d_ff;
  t.add_count(prefix + "shared_expert.gate_proj.weight", {shared, 4}, 0);
  t.add_count(prefix + "shared_expert.up_proj.weight", {shared, 4}, 0);
  t.add_count(prefix + "shared_expert.down_proj.weight", {4, shared}, 0);
  EXPECT_EQ(moe::load_layer<float>(llama, t.open(), 0).router().w_router(1, 1), 102.5f);
}

TEST(LoadLayer, TakesTheModelsOwnNamesBeforeOthers) {
  Tensors t = small_mixtral();
  for (const auto& [name, tensor] : small_mixtral_at("language_model.model.").tensors) {
    t.tensors[name] = tensor;
    for (std::byte& byte : t.tensors[name].bytes) byte = std::byte(0);
  }
  EXPECT_EQ(moe::load_layer<float>(kSmallMixtral, t.open(), 7).router().w_router(1, 2), 100 + 0.5f * 6);
  // Where a layer of the model's own is not one of experts, another's is not taken for it.
  t = small_mixtral_at("model.mtp.");
  t.add_count("model.layers.7.mlp.up_proj.weight", {3, 4}, 0);
  EXPECT_NE(message_of(t.open()).find("there is no tensor '" + kMixtral + "gate.weight'"), std::string::npos);
}

TEST(LoadLayer, RefusesToChooseAmongSeveralPlaces) {
  Tensors t = small_mixtral_at("thinker.model.");
  for (const auto& [name, tensor] : small_mixtral_at("talker.model.").tensors) t.tensors[name] = tensor;
  t.add_count("talker.model.layers.7.block_sparse_moe.gate.weight", {2, 4}, 500);
  const Checkpoint file = t.open();
  const std::string expected =
      "no name in " + Tensors::path() +
      " begins with 'model.layers.', and 2 other paths lead to such layers, expected 1: "
      "'talker.model.', 'thinker.model.'; Checkpoint::below takes one";
  EXPECT_EQ(message_of(file), "load_layer: " + expected);
  try {
    moe::sized_as(kSmallMixtral, file, 7);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.what(), "sized_as: " + expected);
  }
  EXPECT_EQ(moe::load_layer<float>(kSmallMixtral, file.below("thinker."), 7).router().w_router(0, 0), 100);
  EXPECT_EQ(moe::load_layer<float>(kSmallMixtral, file.below("talker."), 7).router().w_router(0, 0), 500);
  EXPECT_EQ(moe::load_layer<float>(kSmallMixtral, file.below("talker.model."), 7).router().w_router(0, 0),
            500);
  // What is mapped outlives the checkpoint that it was taken below of.
  const auto mapped = moe::load_mapped_layer<float>(kSmallMixtral, t.open().below("talker."), 7).layer;
  EXPECT_EQ(mapped.experts()[1].w_up.view()(0, 3), 2400 + 0.5f * 3);
  // Places that do not have this layer, but others, count.
  t = small_mixtral_at("a.model.");
  for (int i = 0; i < 6; ++i)
    t.add_count(std::string(1, char('b' + i)) + ".model.layers.12.block_sparse_moe.gate.weight", {2, 4}, 0);
  EXPECT_NE(
      message_of(t.open()).find("7 other paths lead to such layers, expected 1: 'a.model.', 'b.model.', "
                                "'c.model.', 'd.model.', ...; "),
      std::string::npos)
      << message_of(t.open());
}

// Modules are added or left out, not exchanged, and are whole.
TEST(LoadLayer, DoesNotTakeOtherModulesForTheModels) {
  for (const std::string path : {"decoder.", "mymodel.", "model_", "language_model.", "model.decoder_"})
    EXPECT_NE(message_of(small_mixtral_at(path).open()).find("there is no tensor '" + kMixtral),
              std::string::npos)
        << path;
  using moe::io::is_within;
  EXPECT_TRUE(is_within("", "model."));
  EXPECT_TRUE(is_within("model.", "model."));
  EXPECT_TRUE(is_within("a.c.", "a.b.c."));
  EXPECT_TRUE(is_within("Encoder/", "params/Encoder/"));
  EXPECT_FALSE(is_within("c.a.", "a.b.c."));
  EXPECT_FALSE(is_within("a.a.", "a.b."));
  EXPECT_FALSE(is_within("a.", ""));
  EXPECT_FALSE(is_within("model.encoder.", "model.decoder."));
}

TEST(LoadLayer, BadArgumentsAreRefused) {
  const Checkpoint checkpoint = small_mixtral().open();
  EXPECT_THROW(moe::load_layer<float>(kSmallMixtral, checkpoint, -1), std::invalid_argument);
  EXPECT_THROW(moe::load_layer<float>(kSmallMixtral, checkpoint, 6), CheckpointError);
  EXPECT_THROW(moe::load_layer<float>(moe::gshard_600b.scaled_to(4, 3, 2), checkpoint, 0),
               std::invalid_argument);
  const auto expect_message = [](const auto& call, const std::string& message) {
    try {
      call();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(), message);
    }
  };
  expect_message([&] { moe::sized_as(kSmallMixtral, checkpoint, -1); },
                 "sized_as: layer = -1, expected at least 0");
  expect_message([&] { moe::sized_as(moe::gshard_600b, checkpoint, 0); },
                 "sized_as: the tensor names of GShard 600B are not known");
}

}  // namespace
