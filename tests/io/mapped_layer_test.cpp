// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <moe/io.hpp>
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

// From which value of a tensor on a mapped weight is read; -1 where it is not in the tensor's bytes.
template <class S>
Index place_in(const moe::TensorView& tensor, const moe::MappedMatrix<S>& weight) {
  const auto* const at = reinterpret_cast<const std::byte*>(weight.data());
  const auto *const begin = tensor.bytes.data(), *const end = begin + tensor.bytes.size();
  const bool inside = std::less_equal<>{}(begin, at) && std::less<>{}(at, end);
  return inside ? Index(at - begin) / Index(sizeof(S)) : -1;
}

template <class Loaded>
std::map<std::string, std::string> reasons(const Loaded& loaded) {
  std::map<std::string, std::string> list;
  for (const moe::LoadedTensor& tensor : loaded.tensors) list[tensor.name] = tensor.copied;
  return list;
}

// A parameter as an Eigen matrix.
template <class S>
auto values(const moe::MappedMatrix<S>& m) {
  return m.view();
}
template <class M>
const M& values(const M& m) {
  return m;
}

// Every parameter, and the output, bit for bit.
template <class A, class B>
void expect_same_layer(const A& mapped, const B& copied) {
  std::vector<Matrix<typename A::Scalar>> expected;
  B::visit([&](const moe::ParameterInfo&, const auto& p) { expected.push_back(values(p)); }, copied);
  std::size_t i = 0;
  A::visit(
      [&](const moe::ParameterInfo& info, const auto& p) {
        ASSERT_LT(i, expected.size());
        EXPECT_EQ(Matrix<typename A::Scalar>(values(p)), expected[i++]) << info.name;
      },
      mapped);
  EXPECT_EQ(i, expected.size());
  EXPECT_EQ(moe::num_parameters(mapped), moe::num_parameters(copied));
  moe::Rng rng(1);
  Matrix<typename A::Scalar> x(37, mapped.d_model());
  moe::fill_normal(x, 1.0, rng);
  EXPECT_EQ(mapped.forward(x), copied.forward(x));
}

TEST(MappedLayer, MatricesAreWhereTheFileIs) {
  const Checkpoint file = small_mixtral().open();
  const auto [layer, tensors] = moe::load_mapped_layer<float>(kSmallMixtral, file, 7);
  for (const Index e : {0, 1}) {
    const std::string expert = kMixtral + "experts." + std::to_string(e) + ".";
    EXPECT_EQ(place_in(file.at(expert + "w1.weight"), layer.experts()[std::size_t(e)].w_gate), 0);
    EXPECT_EQ(place_in(file.at(expert + "w2.weight"), layer.experts()[std::size_t(e)].w_down), 0);
    EXPECT_EQ(place_in(file.at(expert + "w3.weight"), layer.experts()[std::size_t(e)].w_up), 0);
  }
  ASSERT_EQ(tensors.size(), 7u);
  for (const moe::LoadedTensor& tensor : tensors) {
    const bool router = tensor.name == kMixtral + "gate.weight";
    EXPECT_EQ(tensor.copied, router ? "not an expert's matrix" : "") << tensor.name;
    EXPECT_EQ(tensor.values, router ? 8 : 12) << tensor.name;
  }
  expect_same_layer(layer, moe::load_layer<float>(kSmallMixtral, file, 7));
}

TEST(MappedLayer, OutlivesItsCheckpointAndItsFile) {
  std::optional<Checkpoint> file = small_mixtral().open();
  const auto copied = moe::load_layer<float>(kSmallMixtral, *file, 7);
  auto mapped = moe::load_mapped_layer<float>(kSmallMixtral, *file, 7).layer;
  const std::weak_ptr<const void> mapping = file->owner();
  file.reset();
  std::filesystem::remove(Tensors::path());
  expect_same_layer(mapped, copied);
  auto copy = mapped;
  EXPECT_EQ(copy.experts()[0].w_up.data(), mapped.experts()[0].w_up.data());  // a copy shares
  const auto expert = copy.experts()[1];
  mapped = moe::load_mapped_layer<float>(kSmallMixtral, small_mixtral().open(), 7).layer;
  copy = mapped;
  EXPECT_FALSE(mapping.expired());
  EXPECT_EQ(expert.w_up.view(), copied.experts()[1].w_up);
  moe::MappedMatrix<float> last = expert.w_down;
  EXPECT_EQ(mapping.use_count(), 4);  // three of the expert, and this
  last = copy.experts()[0].w_down;
  EXPECT_EQ(mapping.use_count(), 3);
}

// A file that is replaced, as write_safetensors does, is another one.
TEST(MappedLayer, KeepsTheOldFileWhenItIsReplaced) {
  const Checkpoint file = small_mixtral().open();
  const auto mapped = moe::load_mapped_layer<float>(kSmallMixtral, file, 7).layer;
  const auto copied = moe::load_layer<float>(kSmallMixtral, file, 7);
  Tensors other = small_mixtral();
  other.add_count(kMixtral + "experts.0.w1.weight", {3, 4}, -5);
  const auto changed = moe::load_mapped_layer<float>(kSmallMixtral, other.open(), 7).layer;
  expect_same_layer(mapped, copied);
  EXPECT_EQ(changed.experts()[0].w_gate.view()(0, 0), -5);
}

TEST(MappedLayer, MapsHalvesAndStackedExperts) {
  auto model = moe::granite_1b_a400m.scaled_to(4, 3, 2);
  const std::string prefix = "model.layers.0.block_sparse_moe.";
  Tensors t;
  t.add_count(prefix + "router.layer.weight", {2, 4}, 0);
  t.add_count(prefix + "input_linear.weight", {2, 6, 4}, 100);
  t.add_count(prefix + "output_linear.weight", {2, 4, 3}, 200);
  const Checkpoint file = t.open();
  const auto loaded = moe::load_mapped_layer<float>(model, file, 0);
  const auto& in = file.at(prefix + "input_linear.weight");
  EXPECT_EQ(place_in(in, loaded.layer.experts()[0].w_gate), 0);
  EXPECT_EQ(place_in(in, loaded.layer.experts()[0].w_up), 12);
  EXPECT_EQ(place_in(in, loaded.layer.experts()[1].w_gate), 24);
  EXPECT_EQ(place_in(in, loaded.layer.experts()[1].w_up), 36);
  EXPECT_EQ(place_in(file.at(prefix + "output_linear.weight"), loaded.layer.experts()[1].w_down), 12);
  ASSERT_EQ(loaded.tensors.size(), 3u);
  EXPECT_EQ(loaded.tensors[0].values, 48);
  EXPECT_EQ(loaded.tensors[1].values, 24);
  expect_same_layer(loaded.layer, moe::load_layer<float>(model, file, 0));

  // The same numbers by alternating rows.
  model.tensors.experts.w_gate.part = moe::TensorPart::even_rows;
  model.tensors.experts.w_up.part = moe::TensorPart::odd_rows;
  const auto alternating = moe::load_mapped_layer<float>(model, file, 0);
  EXPECT_EQ(reasons(alternating).at(prefix + "input_linear.weight"),
            "its rows alternate with those of another");
  EXPECT_EQ(alternating.layer.experts()[1].w_up.view()(1, 2), 100 + 0.5f * (24 + 3 * 4 + 2));
  EXPECT_EQ(place_in(in, alternating.layer.experts()[1].w_up), -1);
  expect_same_layer(alternating.layer, moe::load_layer<float>(model, file, 0));
}

TEST(MappedLayer, CopiesWhatIsTransposed) {
  const auto model = moe::dbrx.scaled_to(4, 3, 2);
  const std::string prefix = "transformer.blocks.0.ffn.";
  Tensors t;
  t.add_count(prefix + "router.layer.weight", {2, 4}, 0);
  t.add_count(prefix + "experts.mlp.w1", {6, 4}, 0);
  t.add_count(prefix + "experts.mlp.v1", {6, 4}, 100);
  t.add_count(prefix + "experts.mlp.w2", {6, 4}, 200);
  const Checkpoint file = t.open();
  const auto loaded = moe::load_mapped_layer<float>(model, file, 0);
  EXPECT_EQ(reasons(loaded),
            (std::map<std::string, std::string>{{prefix + "experts.mlp.v1", ""},
                                                {prefix + "experts.mlp.w1", ""},
                                                {prefix + "experts.mlp.w2", "transposed"},
                                                {prefix + "router.layer.weight", "not an expert's matrix"}}));
  EXPECT_EQ(place_in(file.at(prefix + "experts.mlp.v1"), loaded.layer.experts()[1].w_up), 12);
  EXPECT_EQ(place_in(file.at(prefix + "experts.mlp.w2"), loaded.layer.experts()[1].w_down), -1);
  expect_same_layer(loaded.layer, moe::load_layer<float>(model, file, 0));
}

TEST(MappedLayer, CopiesWhatIsOfAnotherType) {
  Tensors t = small_mixtral();
  const std::string name = kMixtral + "experts.1.w3.weight";
  t.add(name, DType::BF16, {3, 4}, std::vector<std::uint16_t>(12, 0x3F80));
  const Checkpoint file = t.open();
  const auto loaded = moe::load_mapped_layer<float>(kSmallMixtral, file, 7);
  EXPECT_EQ(reasons(loaded).at(name), "BF16, not F32");
  EXPECT_EQ(reasons(loaded).at(kMixtral + "experts.0.w3.weight"), "");
  expect_same_layer(loaded.layer, moe::load_layer<float>(kSmallMixtral, file, 7));
  const auto in_double = moe::load_mapped_layer<double>(kSmallMixtral, file, 7);
  EXPECT_EQ(reasons(in_double).at(kMixtral + "experts.0.w3.weight"), "F32, not F64");
  expect_same_layer(in_double.layer, moe::load_layer<double>(kSmallMixtral, file, 7));
}

// Tensors of one type as other programs may write them: after a header of any length.
TEST(MappedLayer, CopiesWhatIsMisaligned) {
  const Checkpoint aligned = small_mixtral().open();
  std::string bytes = io_test::text_in(Tensors::path());
  const std::size_t header = std::size_t(static_cast<unsigned char>(bytes[0])) +
                             256 * std::size_t(static_cast<unsigned char>(bytes[1]));
  for (const std::size_t spaces : {1u, 2u, 3u, 4u}) {
    const std::string path = Tensors::path() + std::to_string(spaces);
    io_test::write_text(path, io_test::length_bytes(header + spaces) + bytes.substr(8, header) +
                                  std::string(spaces, ' ') + bytes.substr(8 + header));
    const Checkpoint file = Checkpoint::open(path);
    const auto loaded = moe::load_mapped_layer<float>(kSmallMixtral, file, 7);
    EXPECT_EQ(reasons(loaded).at(kMixtral + "experts.0.w3.weight"), spaces == 4 ? "" : "misaligned");
    EXPECT_EQ(place_in(file.at(kMixtral + "experts.0.w3.weight"), loaded.layer.experts()[0].w_up),
              spaces == 4 ? 0 : -1);
    expect_same_layer(loaded.layer, moe::load_layer<float>(kSmallMixtral, aligned, 7));
  }
}

TEST(MappedLayer, CopiesWhatIsScaledInBlocks) {
  Tensors t = small_mixtral();
  const std::string name = kMixtral + "experts.0.w2.weight";
  t.add(name, DType::F8_E4M3, {4, 3}, std::vector<std::uint8_t>(12, 0x38));
  t.add_count(name + "_scale_inv", {1, 1}, 2);
  const Checkpoint file = t.open();
  const auto loaded = moe::load_mapped_layer<float>(kSmallMixtral, file, 7);
  EXPECT_EQ(reasons(loaded).at(name), "scaled in blocks");
  EXPECT_EQ(loaded.layer.experts()[0].w_down.view()(3, 2), 2);
  expect_same_layer(loaded.layer, moe::load_layer<float>(kSmallMixtral, file, 7));
}

TEST(MappedLayer, RefusesWhatLoadLayerRefuses) {
  const auto message = [](const auto& load) -> std::string {
    try {
      load();
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "nothing was thrown";
  };
  const auto expect_error = [&](const Tensors& tensors, const std::string& part) {
    const Checkpoint file = tensors.open();
    const std::string mapped = message([&] { moe::load_mapped_layer<float>(kSmallMixtral, file, 7); });
    EXPECT_NE(mapped.find(part), std::string::npos) << mapped;
    EXPECT_EQ(mapped, message([&] { moe::load_layer<float>(kSmallMixtral, file, 7); }));
  };
  Tensors t = small_mixtral();
  t.tensors.erase(kMixtral + "experts.1.w2.weight");
  expect_error(t, kMixtral + "experts.1.w2.weight");
  t = small_mixtral();
  t.add_count(kMixtral + "experts.0.w1.weight", {4, 3}, 0);
  expect_error(t, "experts.0.w1.weight has shape [4, 3], expected [3, 4]");
  t = small_mixtral();
  t.add_count(kMixtral + "experts.2.w1.weight", {3, 4}, 0);
  expect_error(t, "0 of the 12 values");
  EXPECT_THROW(moe::load_mapped_layer<float>(kSmallMixtral, t.open(), -1), std::invalid_argument);
}

// What is mapped can be saved, and read back into a layer with weights of its own.
TEST(MappedLayer, CanBeSaved) {
  const auto mapped = moe::load_mapped_layer<float>(kSmallMixtral, small_mixtral().open(), 7).layer;
  moe::save_layer(Tensors::path() + ".saved", mapped);
  auto owned = moe::make_empty_layer<float>(kSmallMixtral);
  moe::load_layer(Checkpoint::open(Tensors::path() + ".saved"), owned);
  expect_same_layer(mapped, owned);
}

// Layers of the models' own checkpoints, in the size that the golden file has; how many tensors are
// mapped (8 or 16 experts of 2 or 3 matrices, 3 of the shared one; or 2 for all experts), and copied.
template <class M>
void expect_same_golden(M model, const std::string& name, std::size_t mapped, std::size_t transposed) {
  SCOPED_TRACE(name);
  const Checkpoint file = Checkpoint::open(std::string(MOE_GOLDEN_DIR) + "/" + name + ".safetensors");
  const Index layer = nlohmann::json::parse(file.metadata().at("config")).at("layer").template get<Index>();
  if constexpr (requires { model.router.group_limit; }) model.router.group_limit = {};
  model = moe::sized_as(model, file, layer);
  const auto loaded = moe::load_mapped_layer<float>(model, file, layer);
  expect_same_layer(loaded.layer, moe::load_layer<float>(model, file, layer));
  std::map<std::string, std::size_t> count;
  for (const moe::LoadedTensor& tensor : loaded.tensors) ++count[tensor.copied];
  EXPECT_EQ(count[""], mapped);
  EXPECT_EQ(count["transposed"], transposed);
  EXPECT_EQ(count[""] + count["transposed"] + count["not an expert's matrix"], loaded.tensors.size());
}

TEST(MappedLayer, EqualsTheCopiedOneOfEveryModel) {
  expect_same_golden(moe::mixtral_8x7b, "mixtral", 24, 0);
  expect_same_golden(moe::qwen1_5_moe_a2_7b, "qwen2_moe", 27, 0);
  expect_same_golden(moe::qwen3_30b_a3b, "qwen3_moe", 24, 0);
  expect_same_golden(moe::olmoe_1b_7b, "olmoe", 24, 0);
  expect_same_golden(moe::deepseek_moe_16b, "deepseek_v2_lite", 27, 0);
  expect_same_golden(moe::deepseek_v2, "deepseek_v2", 51, 0);
  expect_same_golden(moe::deepseek_v3, "deepseek_v3", 51, 0);
  expect_same_golden(moe::dbrx, "dbrx", 2, 1);
  expect_same_golden(moe::gpt_oss_20b, "gpt_oss", 0, 2);
  expect_same_golden(moe::llama4_scout, "llama4", 3, 2);
  expect_same_golden(moe::granite_1b_a400m, "granitemoe", 2, 0);
  expect_same_golden(moe::jetmoe_8b, "jetmoe", 2, 0);
  expect_same_golden(moe::phi_3_5_moe, "phimoe", 24, 0);
  expect_same_golden(moe::glm_4_5, "glm4_moe", 27, 0);
  expect_same_golden(moe::ernie_4_5_21b_a3b, "ernie4_5_moe", 27, 0);
  expect_same_golden(moe::switch_base_8, "switch_transformers", 16, 0);
  expect_same_golden(moe::nllb_moe_54b, "nllb_moe", 16, 0);
}

}  // namespace
