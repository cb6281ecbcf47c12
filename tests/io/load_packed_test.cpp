// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/io.hpp>
#include <moe/models/published/all.hpp>
#include <moe/packed.hpp>

#include "io/tensors.hpp"
#include "packed/packed_testing.hpp"

namespace moe::load_packed_test {
namespace {

using io_test::Tensors;

template <class A, class B>
void expect_same_bits(const A& a, const B& b, Rng& rng) {
  for (const Index tokens : {1, 2, 40}) {
    Matrix<float> x(tokens, a.d_model());
    fill_normal(x, 1.0, rng);
    const Matrix<float> ya = a.forward(x), yb = b.forward(x);
    EXPECT_TRUE(ya.allFinite());
    EXPECT_EQ(std::memcmp(ya.data(), yb.data(), std::size_t(ya.size()) * sizeof(float)), 0)
        << name_of(a.instruction_set()) << ", " << tokens;
  }
}

std::vector<float> drawn(Index size, double deviation, Rng& rng) {
  Matrix<float> values(size, 1);
  fill_normal(values, deviation, rng);
  return {values.data(), values.data() + size};
}
std::vector<std::uint8_t> bytes(Index size, Rng& rng) {
  std::vector<std::uint8_t> values;
  for (Index i = 0; i < size; ++i) values.push_back(std::uint8_t(rng.index(256)));
  return values;
}

constexpr const char* kGptOss = "model.layers.0.mlp.";
auto small_gpt_oss() {
  auto model = gpt_oss_20b.scaled_to(96, 64, 3);
  model.router.top_k = 2;
  return model;
}
Tensors gpt_oss(Rng& rng) {
  const std::string prefix = kGptOss;
  Tensors t;
  t.add(prefix + "router.weight", DType::F32, {3, 96}, drawn(3 * 96, 1, rng));
  t.add(prefix + "router.bias", DType::F32, {3}, drawn(3, 1, rng));
  t.add(prefix + "experts.gate_up_proj_bias", DType::F32, {3, 128}, drawn(3 * 128, 1, rng));
  t.add(prefix + "experts.down_proj_bias", DType::F32, {3, 96}, drawn(3 * 96, 1, rng));
  for (const auto& [name, rows, blocks] :
       {std::tuple{"gate_up_proj", Index(128), Index(3)}, std::tuple{"down_proj", Index(96), Index(2)}}) {
    t.add(prefix + "experts." + name + "_blocks", DType::U8, {3, rows, blocks, 16},
          bytes(3 * rows * blocks * 16, rng));
    std::vector<std::uint8_t> scales;
    for (Index i = 0; i < 3 * rows * blocks; ++i) scales.push_back(std::uint8_t(118 + rng.index(6)));
    t.add(prefix + "experts." + name + "_scales", DType::U8, {3, rows, blocks}, scales);
  }
  return t;
}

TEST(LoadPacked, MXFP4IsWhatTheFileHolds) {
  Rng rng(1);
  const auto model = small_gpt_oss();
  const Checkpoint checkpoint = gpt_oss(rng).open();
  const auto layer = load_layer<float>(model, checkpoint, 0);
  for (const InstructionSet set : packed_testing::available_sets(false))
    expect_same_bits(load_packed<MXFP4>(model, checkpoint, 0, {.instruction_set = set}),
                     pack<F32>(layer, {.instruction_set = set}), rng);
}

constexpr const char* kDeepSeek = "model.layers.3.mlp.";
auto small_deepseek() {
  auto model = deepseek_v3.scaled_to(200, 131, 4);
  model.router.group_limit = {};
  model.router.top_k = 2;
  model.shared_d_ff = 70;
  return model;
}
Tensors deepseek(DType scale_type, Rng& rng) {
  const std::string prefix = kDeepSeek;
  Tensors t;
  t.add(prefix + "gate.weight", DType::F32, {4, 200}, drawn(4 * 200, 0.1, rng));
  t.add(prefix + "gate.e_score_correction_bias", DType::F32, {4}, drawn(4, 0.1, rng));
  for (const std::string expert :
       {"experts.0.", "experts.1.", "experts.2.", "experts.3.", "shared_experts."}) {
    const Index f = expert == "shared_experts." ? 70 : 131;
    for (const std::string part : {"gate_proj", "up_proj", "down_proj"}) {
      const std::vector<Index> shape =
          part == "down_proj" ? std::vector<Index>{200, f} : std::vector<Index>{f, 200};
      const std::string name = prefix + expert + part + ".weight";
      std::vector<std::uint8_t> values = bytes(f * 200, rng);
      for (auto& value : values)
        if ((value & 127) == 127) value = 0;  // NaN
      t.add(name, DType::F8_E4M3, shape, values);
      const std::vector<Index> blocks{(shape[0] + 127) / 128, (shape[1] + 127) / 128};
      const Index count = blocks[0] * blocks[1];
      if (scale_type == DType::F32) {
        std::vector<float> scales;
        for (Index i = 0; i < count; ++i) scales.push_back(float(1 + rng.uniform()) * 1e-3f);
        t.add(name + "_scale_inv", DType::F32, blocks, scales);
      } else if (scale_type == DType::BF16) {
        std::vector<std::uint16_t> scales;
        for (Index i = 0; i < count; ++i) scales.push_back(std::uint16_t(0x3A80 + rng.index(128)));
        t.add(name + "_scale_inv", DType::BF16, blocks, scales);
      } else {
        std::vector<std::uint8_t> scales;
        for (Index i = 0; i < count; ++i) scales.push_back(std::uint8_t(115 + rng.index(4)));
        t.add(name + "_scale_inv", DType::F8_E8M0, blocks, scales);
      }
    }
  }
  return t;
}

TEST(LoadPacked, FP8IsWhatTheFileHolds) {
  Rng rng(2);
  const auto model = small_deepseek();
  for (const DType scale_type : {DType::F32, DType::BF16, DType::F8_E8M0}) {
    const Checkpoint checkpoint = deepseek(scale_type, rng).open();
    const auto layer = load_layer<float>(model, checkpoint, 3);
    for (const InstructionSet set : packed_testing::available_sets(false))
      expect_same_bits(load_packed<FP8>(model, checkpoint, 3, {.instruction_set = set}),
                       pack<F32>(layer, {.instruction_set = set}), rng);
  }
}

TEST(LoadPacked, FP8WithAScaleForEveryRowIsWhatTheFileHolds) {
  Rng rng(8);
  const auto model = small_deepseek();
  Tensors t = deepseek(DType::F32, rng);
  for (const std::string expert : {"experts.0.", "experts.1.", "experts.2.", "experts.3.", "shared_experts."})
    for (const std::string part : {"gate_proj", "up_proj", "down_proj"}) {
      const std::string name = kDeepSeek + expert + part + ".weight";
      const Index rows = t.tensors[name].shape[0];
      std::vector<float> scales;
      for (Index i = 0; i < rows; ++i) scales.push_back(float(1 + rng.uniform()) * 1e-3f);
      t.tensors.erase(name + "_scale_inv");
      t.add(name + "_scale", DType::F32, {rows, 1}, scales);
    }
  const Checkpoint checkpoint = t.open();
  const auto layer = load_layer<float>(model, checkpoint, 3);
  for (const InstructionSet set : packed_testing::available_sets(false))
    expect_same_bits(load_packed<FP8>(model, checkpoint, 3, {.instruction_set = set}),
                     pack<F32>(layer, {.instruction_set = set}), rng);
}

TEST(LoadPacked, OtherFormatsAreThoseOfTheLoadedLayer) {
  Rng rng(3);
  const auto model = small_deepseek();
  const Checkpoint checkpoint = deepseek(DType::F32, rng).open();
  const auto layer = load_layer<float>(model, checkpoint, 3);
  expect_same_bits(load_packed<F32>(model, checkpoint, 3), pack<F32>(layer), rng);
  expect_same_bits(load_packed<BF16>(model, checkpoint, 3), pack<BF16>(layer), rng);
  expect_same_bits(load_packed<Int8>(model, checkpoint, 3), pack<Int8>(layer), rng);
  expect_same_bits(load_packed<Int4>(model, checkpoint, 3), pack<Int4>(layer), rng);
  expect_same_bits(load_packed<MXFP4>(model, checkpoint, 3), pack<MXFP4>(layer), rng);
}

// The layer with the weights of one expert rounded.
template <Format F, class E>
void round_expert(E& expert) {
  for (auto* w : {&expert.w_gate, &expert.w_up, &expert.w_down})
    for (Index i = 0; i < w->rows(); ++i) F::round(&(*w)(i, 0), w->cols());
}

TEST(LoadPacked, ASharedExpertMayBeInAnotherFormat) {
  Rng rng(7);
  const auto model = small_deepseek();
  const Checkpoint checkpoint = deepseek(DType::F32, rng).open();
  auto layer = load_layer<float>(model, checkpoint, 3);
  round_expert<Int8>(layer.shared_experts()[0]);
  const auto format_of = [](Index e) { return e < 4 ? 0 : 1; };
  for (const InstructionSet set : packed_testing::available_sets(false))
    expect_same_bits(load_packed<FP8, Int8>(model, checkpoint, 3, format_of, {.instruction_set = set}),
                     pack<F32>(layer, {.instruction_set = set}), rng);
}

TEST(LoadPacked, EachExpertMayBeInAFormatOfItsOwn) {
  Rng rng(8);
  const auto model = small_gpt_oss();
  const Checkpoint checkpoint = gpt_oss(rng).open();
  auto layer = load_layer<float>(model, checkpoint, 0);
  round_expert<BF16>(layer.experts()[0]);
  round_expert<Int4>(layer.experts()[2]);
  const auto format_of = [](Index e) { return (e + 1) % 3; };
  for (const InstructionSet set : packed_testing::available_sets(false))
    expect_same_bits(
        load_packed<Int4, BF16, MXFP4>(model, checkpoint, 0, format_of, {.instruction_set = set}),
        pack<F32>(layer, {.instruction_set = set}), rng);
  EXPECT_THROW((load_packed<Int4, BF16>(model, checkpoint, 0, format_of)), std::invalid_argument);
}

TEST(LoadPacked, ANumberThatIsNoneMakesItsColumnNaN) {
  Rng rng(5);
  const auto model = small_deepseek();
  Tensors t = deepseek(DType::F32, rng);
  auto& values = t.tensors[std::string(kDeepSeek) + "shared_experts.down_proj.weight"].bytes;
  values[69 + 3 * 70] = std::byte{0x7F};  // output 3
  const auto packed = load_packed<FP8>(model, t.open(), 3);
  Matrix<float> x(2, 200);
  fill_normal(x, 1.0, rng);
  const Matrix<float> y = packed.forward(x);
  EXPECT_TRUE(y.col(3).array().isNaN().all());
  EXPECT_EQ(y.array().isNaN().count(), 2);
}

TEST(LoadPacked, SaysWhatIsWrong) {
  Rng rng(6);
  const auto model = small_deepseek();
  const auto message = [&](const Tensors& t) -> std::string {
    try {
      load_packed<FP8>(model, t.open(), 3);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "";
  };
  const Tensors good = deepseek(DType::F32, rng);
  EXPECT_EQ(message(good), "");
  const std::string name = std::string(kDeepSeek) + "experts.1.up_proj.weight";
  Tensors bad = good;
  bad.add(name + "_scale_inv", DType::F32, {2, 2}, std::vector<float>{1, 1e37f, 1, 1});
  EXPECT_THAT(message(bad),
              testing::HasSubstr(name + " has a scale of 1e+37, expected less than 1.32923e+36"));
  bad = good;
  bad.add(name + "_scale_inv", DType::F32, {1, 2}, std::vector<float>{1, 1});
  EXPECT_THAT(message(bad), testing::HasSubstr("expected BF16, F8_E8M0 or F32 [2, 2]"));
  bad = good;
  bad.tensors.erase(name);
  EXPECT_THAT(message(bad), testing::HasSubstr("there is no tensor"));
  bad = good;
  bad.add(std::string(kDeepSeek) + "experts.7.up_proj.weight", DType::F32, {1}, std::vector<float>{1});
  EXPECT_THAT(message(bad),
              testing::AllOf(testing::StartsWith("load_packed: "),
                             testing::HasSubstr("belong to layer 3 of this model, expected all")));
}

}  // namespace
}  // namespace moe::load_packed_test
