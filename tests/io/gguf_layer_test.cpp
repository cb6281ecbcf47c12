// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moe/io.hpp>
#include <moe/models/published/all.hpp>
#include <moe/packed.hpp>

#include "io/files.hpp"
#include "io/gguf_files.hpp"

// Layers of models out of GGUF files, whose tensors have llama.cpp's names.
namespace moe::gguf_layer_test {
namespace {

using io_test::expect_error;
using io_test::GGUFFile;

// Types by their numbers in ggml.
constexpr std::uint32_t kF32 = 0, kQ4_0 = 2, kQ4_1 = 3, kQ5_K = 13, kQ8_0 = 8, kQ4_K = 12, kMXFP4 = 39;

// Calls use(model, architecture) with all models that llama.cpp has.
template <class Use>
void for_all_models(const Use& use) {
  use(mixtral_8x7b, "llama");
  use(mixtral_8x22b, "llama");
  use(grok_1, "grok");
  use(dbrx, "dbrx");
  use(deepseek_moe_16b, "deepseek");
  use(deepseek_v2, "deepseek2");
  use(deepseek_v3, "deepseek2");
  use(qwen1_5_moe_a2_7b, "qwen2moe");
  use(qwen2_57b_a14b, "qwen2moe");
  use(qwen3_30b_a3b, "qwen3moe");
  use(qwen3_235b_a22b, "qwen3moe");
  use(qwen3_coder_480b_a35b, "qwen3moe");
  use(olmoe_1b_7b, "olmoe");
  use(phi_3_5_moe, "phimoe");
  use(granite_1b_a400m, "granitemoe");
  use(granite_3b_a800m, "granitemoe");
  use(llama4_scout, "llama4");
  use(llama4_maverick, "llama4");
  use(ernie_4_5_21b_a3b, "ernie4_5-moe");
  use(glm_4_5, "glm4moe");
  use(gpt_oss_20b, "gpt-oss");
  use(gpt_oss_120b, "gpt-oss");
}

std::string replaced(std::string text, std::string_view what, std::string_view with) {
  if (const auto at = text.find(what); at != std::string::npos) text.replace(at, what.size(), with);
  return text;
}

// ---- Names by the gguf package's table ----------------------------------------------------------------

// The module of a published name, as the package's table has it: experts are one, halves of a fused tensor
// two.
std::string module_of(const TensorSource& source, std::string_view half) {
  std::string name(source.name);
  for (const auto& [what, with] : {std::pair<std::string_view, std::string_view>{"language_model.", ""},
                                   {"{layer}", "0"},
                                   {".{expert}", ""},
                                   {"gate_up_proj", half},
                                   {".weight", ""},
                                   {"correction_bias", "correction"}})
    name = replaced(name, what, with);
  return name;
}

TEST(GGUFNames, AreThoseOfThePackage) {
  const auto golden = Checkpoint::open(MOE_GOLDEN_DIR "/gguf_types.gguf");
  for_all_models([&](const auto& model, const std::string& architecture) {
    EXPECT_EQ(model.tensors.gguf, architecture) << model.name;
    const std::vector<std::string> pairs =
        nlohmann::json::parse(golden.metadata().at("names." + architecture));
    std::map<std::string, std::string> names;
    for (std::size_t i = 0; i < pairs.size(); i += 2) names[pairs[i]] = pairs[i + 1];

    const LayerTensors own = model.tensors, gguf = io::gguf_tensors(own, true);
    std::size_t found = 0;
    const auto expect_name = [&](const TensorSource& published, const TensorSource& here,
                                 std::string_view half = "") {
      EXPECT_EQ(published.empty(), here.empty());
      const auto name = names.find(module_of(published, half));
      if (name == names.end()) return;
      ++found;
      const std::string_view suffix = here.name.substr(here.name.rfind('.'));
      EXPECT_TRUE(suffix == ".weight" || suffix == ".bias");
      EXPECT_EQ(replaced(std::string(here.name), "{layer}", "0"), name->second + std::string(suffix))
          << model.name;
      EXPECT_TRUE(here.part == TensorPart::all && !here.transposed);
    };
    expect_name(own.w_router, gguf.w_router);
    expect_name(own.selection_bias, gguf.selection_bias);
    expect_name(own.w_shared_gate, gguf.w_shared_gate);
    for (const auto& [published, here] :
         {std::pair{own.experts, gguf.experts}, {own.shared_expert, gguf.shared_expert}}) {
      expect_name(published.w_gate, here.w_gate, "gate_proj");
      expect_name(published.w_up, here.w_up, "up_proj");
      expect_name(published.w_down, here.w_down);
    }
    // DeepSeek-V2 has the architecture of V3 but no selection bias.
    EXPECT_EQ(found, names.size() - (model.name == "DeepSeek-V2" ? 1 : 0)) << model.name;
  });
}

// ---- Layers that were written -------------------------------------------------------------------------

constexpr Index kLayer = 2;
const std::string kBlock = "blk.2.";

// llama.cpp's name of a parameter, e.g. "experts.3.w_gate".
std::string tensor_of(const std::string& parameter, bool stacked) {
  if (parameter == "router.w_router") return kBlock + "ffn_gate_inp.weight";
  if (parameter == "router.b_router") return kBlock + "ffn_gate_inp.bias";
  if (parameter == "router.selection_bias") return kBlock + "exp_probs_b.bias";
  if (parameter == "w_shared_gate") return kBlock + "ffn_gate_inp_shexp.weight";
  const std::size_t kind = parameter.rfind('.') + 1;
  const std::string which = "ffn_" + parameter.substr(kind + 2);
  const std::string suffix = parameter[kind] == 'w' ? ".weight" : ".bias";
  if (parameter.starts_with("shared_experts.")) return kBlock + which + "_shexp" + suffix;
  const std::string expert = parameter.substr(8, kind - 9);
  return stacked ? kBlock + which + "_exps" + suffix : kBlock + which + "." + expert + suffix;
}

// A layer as llama.cpp's converter writes it, among tensors of no concern.
template <class Layer>
GGUFFile file_of(const Layer& layer, std::string_view architecture, bool stacked = true) {
  struct Tensor {
    std::vector<Index> shape{};
    std::vector<float> values{};
  };
  std::map<std::string, Tensor> tensors;
  Layer::visit(
      [&](const ParameterInfo& info, const auto& array) {
        if (info.name == "w_shared_gate" && array.size() == 0) return;
        const std::string name(info.name), to = tensor_of(name, stacked);
        Tensor& tensor = tensors[to];
        std::vector<Index> shape{array.rows(), array.cols()};
        if (array.cols() == 1 && to.ends_with(".bias")) shape = {array.rows()};
        if (name == "w_shared_gate") shape = {array.cols()};
        if (to.find("_exps") != std::string::npos) shape.insert(shape.begin(), layer.router().num_experts());
        tensor.shape = shape;
        tensor.values.insert(tensor.values.end(), array.data(), array.data() + array.size());
      },
      layer);
  GGUFFile file;
  file.architecture(architecture);
  file.tensor("blk.2.ffn_norm.weight", {4}, kF32, std::vector<float>(4));
  file.tensor("blk.2.attn_q.weight", {4, 4}, kF32, std::vector<float>(16));
  file.tensor("blk.20.ffn_gate_inp.weight", {4, 4}, kF32, std::vector<float>(16));
  for (const auto& [name, tensor] : tensors) file.tensor(name, tensor.shape, kF32, tensor.values);
  return file;
}

// A layer whose every parameter is a random number, biases too.
template <class M>
auto random_layer(const M& model, Rng& rng) {
  auto layer = make_empty_layer<float>(model);
  decltype(layer)::visit([&](const ParameterInfo&, auto& array) { fill_normal(array, 1.0, rng); }, layer);
  return layer;
}

template <class Layer>
void expect_equal(const Layer& a, const Layer& b, std::string_view name) {
  Layer::visit([&](const ParameterInfo& info, const auto& x,
                   const auto& y) { EXPECT_EQ(x, y) << name << ": " << info.name; },
               a, b);
}

TEST(GGUFLayer, IsTheOneThatWasWritten) {
  Rng rng(1);
  for_all_models([&](const auto& published, const std::string& architecture) {
    const auto model = published.scaled_to(8, 6, 4);
    const auto layer = random_layer(model, rng);
    const auto checkpoint = file_of(layer, architecture).open();
    expect_equal(load_layer<float>(model, checkpoint, kLayer), layer, model.name);
    const auto sized = sized_as(published, checkpoint, kLayer);
    EXPECT_EQ(sized.d_ff, 6) << model.name;
    EXPECT_EQ(sized.num_experts(), 4) << model.name;
    EXPECT_EQ(sized.shared_d_ff, model.shared_d_ff) << model.name;
    const auto [mapped, tensors] = load_mapped_layer<float>(model, checkpoint, kLayer);
    const Matrix<float> x = Matrix<float>::Random(3, 8);
    EXPECT_EQ(mapped.forward(x), layer.forward(x)) << model.name;
    for (const LoadedTensor& tensor : tensors)
      EXPECT_TRUE(tensor.copied.empty() || tensor.copied == "not an expert's matrix") << tensor.name;
  });
}

TEST(GGUFLayer, ExpertsOfOlderFilesHaveTensorsOfTheirOwn) {
  Rng rng(2);
  const auto model = mixtral_8x7b.scaled_to(8, 6, 4);
  const auto layer = random_layer(model, rng);
  const auto checkpoint = file_of(layer, "llama", false).open();
  EXPECT_TRUE(checkpoint.contains("blk.2.ffn_gate.3.weight"));
  expect_equal(load_layer<float>(model, checkpoint, kLayer), layer, model.name);
  EXPECT_EQ(sized_as(mixtral_8x7b, checkpoint, kLayer).d_ff, 6);
}

TEST(GGUFLayer, MayHaveARowForAVectorOrAVector) {
  Rng rng(3);
  const auto model = qwen2_57b_a14b.scaled_to(8, 6, 4);
  const auto layer = random_layer(model, rng);
  GGUFFile file = file_of(layer, "qwen2moe");
  const std::string vector = io_test::raw_text("blk.2.ffn_gate_inp_shexp.weight") + io_test::raw(1u) +
                             io_test::raw(std::uint64_t(8));
  const std::string row = io_test::raw_text("blk.2.ffn_gate_inp_shexp.weight") + io_test::raw(2u) +
                          io_test::raw(std::uint64_t(8)) + io_test::raw(std::uint64_t(1));
  file.infos = replaced(file.infos, vector, row);
  const auto checkpoint = file.open();
  EXPECT_THAT(checkpoint.at("blk.2.ffn_gate_inp_shexp.weight").shape, testing::ElementsAre(1, 8));
  expect_equal(load_layer<float>(model, checkpoint, kLayer), layer, model.name);
}

TEST(GGUFLayer, SaysWhatIsWrong) {
  Rng rng(4);
  const auto model = mixtral_8x7b.scaled_to(8, 6, 4);
  const auto layer = random_layer(model, rng);
  const auto load = [&](const GGUFFile& file, Index n = kLayer) { load_layer<float>(model, file.open(), n); };
  const GGUFFile good = file_of(layer, "llama");
  load(good);
  expect_error("architecture", [&] { load(file_of(layer, "qwen3moe")); },
               {"load_layer", "'qwen3moe'", "'llama'", "Mixtral 8x7B"});
  expect_error("layer", [&] { load(good, 1); },
               {"'blk.1.ffn_gate_inp.weight'", "'blk.2.ffn_gate_inp.weight'"});
  for (const std::string more : {"blk.2.exp_probs_b.bias", "blk.2.ffn_gate_shexp.weight",
                                 "blk.2.ffn_up.weight", "blk.2.ffn_down.7.weight"}) {
    GGUFFile file = good;
    file.tensor(more, {4}, kF32, std::vector<float>(4));
    expect_error(more, [&] { load(file); }, {"0 of the 4 values of " + more, "layer 2"});
  }
  GGUFFile bad = good;
  bad.infos = replaced(bad.infos, "ffn_up_exps", "ffn_xx_exps");
  expect_error("missing", [&] { load(bad); }, {"no tensor 'blk.2.ffn_up_exps.weight'"});
  expect_error("unread",
               [&] {
                 GGUFFile file;
                 file.architecture("llama");
                 file.tensor("blk.2.ffn_gate_inp.weight", {4, 256}, 10, std::vector<std::uint8_t>(4 * 84));
                 load(file);
               },
               {"'blk.2.ffn_gate_inp.weight'", "'Q2_K'", "Q4_K"});
  EXPECT_THROW(load_layer<float>(jetmoe_8b, good.open(), kLayer), std::invalid_argument);
  EXPECT_THROW(load_layer<float>(glam_64b_64e, good.open(), kLayer), std::invalid_argument);
}

// ---- Blocks -------------------------------------------------------------------------------------------

// Random blocks with scales of about 1/100, of either sign.
std::vector<std::uint8_t> blocks(std::uint32_t type, Index numbers, Rng& rng) {
  const bool k = type == kQ4_K || type == kQ5_K;
  const Index size = type == kQ8_0    ? 34
                     : type == kQ4_0  ? 18
                     : type == kQ4_1  ? 20
                     : type == kMXFP4 ? 17
                     : type == kQ4_K  ? 144
                                      : 176;
  std::vector<std::uint8_t> bytes(std::size_t(numbers / (k ? 256 : 32) * size));
  for (std::uint8_t& byte : bytes) byte = std::uint8_t(rng.index(256));
  for (std::size_t at = 0; at < bytes.size(); at += std::size_t(size)) {
    const auto half = [&](std::size_t i, int exponent) {  // with a random mantissa
      bytes[at + i + 1] = std::uint8_t((bytes[at + i + 1] & 0x83) | (exponent + 15) << 2);
    };
    if (type == kMXFP4)
      bytes[at] = std::uint8_t(118 + rng.index(6));
    else
      half(0, k ? -12 : type == kQ8_0 ? -10 : -7);
    if (type == kQ4_1) half(2, -5);
    if (k) half(2, -12);
  }
  return bytes;
}

template <class M>
GGUFFile block_file(const M& model, std::uint32_t type, Rng& rng) {
  const Index d = model.d_model(), f = model.d_ff, experts = model.num_experts();
  const auto numbers = [&](Index size) {
    Matrix<float> values(size, 1);
    fill_normal(values, 1.0, rng);
    return std::vector<float>(values.data(), values.data() + size);
  };
  GGUFFile file;
  file.architecture(model.tensors.gguf);
  file.tensor("blk.2.ffn_gate_inp.weight", {experts, d}, kF32, numbers(experts * d));
  for (const std::string part : {"gate", "up"})
    file.tensor("blk.2.ffn_" + part + "_exps.weight", {experts, f, d}, type,
                blocks(type, experts * f * d, rng));
  file.tensor("blk.2.ffn_down_exps.weight", {experts, d, f}, type, blocks(type, experts * d * f, rng));
  if (!model.expert_bias) return file;
  file.tensor("blk.2.ffn_gate_inp.bias", {experts}, kF32, numbers(experts));
  for (const std::string part : {"gate", "up"})
    file.tensor("blk.2.ffn_" + part + "_exps.bias", {experts, f}, kF32, numbers(experts * f));
  file.tensor("blk.2.ffn_down_exps.bias", {experts, d}, kF32, numbers(experts * d));
  return file;
}

template <class F, class M>
void expect_kept(const M& model, std::uint32_t type, Rng& rng) {
  const auto checkpoint = block_file(model, type, rng).open();
  const auto layer = load_layer<float>(model, checkpoint, kLayer);
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
    if (!is_available(set)) continue;
    const auto kept = load_packed<F>(model, checkpoint, kLayer, {.instruction_set = set});
    const auto floats = pack<F32>(layer, {.instruction_set = set});
    for (const Index tokens : {1, 2, 40}) {
      Matrix<float> x(tokens, model.d_model());
      fill_normal(x, 1.0, rng);
      const Matrix<float> a = kept.forward(x), b = floats.forward(x);
      EXPECT_TRUE(a.allFinite());
      EXPECT_GT(a.norm(), 0);
      EXPECT_EQ(std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(float)), 0)
          << name_of(set) << ", type " << type << ", " << tokens << " tokens";
    }
  }
}

TEST(GGUFLayer, BlocksArePackedAsTheFileHasThem) {
  Rng rng(5);
  const auto small = mixtral_8x7b.scaled_to(96, 64, 3), large = mixtral_8x7b.scaled_to(256, 512, 2);
  expect_kept<Int8>(small, kQ8_0, rng);
  expect_kept<Int4>(small, kQ4_0, rng);
  expect_kept<Int4Offset>(small, kQ4_1, rng);
  expect_kept<Int4Offset>(large, kQ4_K, rng);
  expect_kept<MXFP4>(gpt_oss_20b.scaled_to(96, 64, 3), kMXFP4, rng);
}

// Gate and up projections in one tensor, the rows of the gate first.
TEST(GGUFLayer, GateAndUpMayBeOneTensor) {
  Rng rng(9);
  const auto model = gpt_oss_20b.scaled_to(96, 64, 3);
  const GGUFFile apart = block_file(model, kMXFP4, rng);
  const auto checkpoint = apart.open();
  GGUFFile fused;
  fused.architecture(model.tensors.gguf);
  const auto bytes_of = [&](const std::string& name) { return checkpoint.at(name).bytes; };
  const auto fuse = [&](const std::string& end, std::vector<Index> shape, std::uint32_t type) {
    const auto gate = bytes_of("blk.2.ffn_gate_exps." + end), up = bytes_of("blk.2.ffn_up_exps." + end);
    const std::size_t size = gate.size() / 3;
    std::vector<std::byte> both;
    for (std::size_t e = 0; e < 3; ++e)
      for (const auto& half : {gate, up}) {
        const auto part = half.subspan(e * size, size);
        both.insert(both.end(), part.begin(), part.end());
      }
    fused.tensor("blk.2.ffn_gate_up_exps." + end, shape, type, both);
  };
  fuse("weight", {3, 128, 96}, kMXFP4);
  fuse("bias", {3, 128}, kF32);
  for (const std::string& name : checkpoint.names()) {
    if (name.find("gate_exps") != std::string::npos || name.find("up_exps") != std::string::npos) continue;
    const TensorView& tensor = checkpoint.at(name);
    fused.tensor(name, tensor.shape, tensor.dtype == DType::F32 ? kF32 : kMXFP4,
                 std::vector<std::byte>(tensor.bytes.begin(), tensor.bytes.end()));
  }
  const Matrix<float> x = Matrix<float>::Random(5, 96);
  const Matrix<float> y = load_layer<float>(model, checkpoint, kLayer).forward(x);
  const io_test::TemporaryDirectory directory;
  io_test::write_text(directory / "fused.gguf", fused.bytes());
  const auto opened = Checkpoint::open(directory / "fused.gguf");
  EXPECT_EQ(load_layer<float>(model, opened, kLayer).forward(x), y);
  EXPECT_EQ(load_packed<MXFP4>(model, opened, kLayer).forward(x),
            load_packed<MXFP4>(model, checkpoint, kLayer).forward(x));
  EXPECT_GT(y.norm(), 0);
}

// The numbers in order: a block of a packed format stands for what is read of the file.
TEST(GGUFLayer, BlocksStandForTheNumbersOfTheFile) {
  Rng rng(6);
  const auto expect_same = [&]<class F, class B>(F, B, std::uint32_t type, DType dtype) {
    const std::vector<std::uint8_t> bytes = blocks(type, 2 * 512, rng);
    const TensorView view{"w", dtype, {2, 512}, std::as_bytes(std::span(bytes))};
    Matrix<float> numbers(2, 512);
    read_tensor(view, numbers.data());
    const GGUFBlocks<F, B> stored(view, "test");
    for (Index i = 0; i < 2; ++i)
      for (Index j = 0; j < 512; ++j)
        ASSERT_EQ(F::number(stored.block(i, j / F::kBlock), j % F::kBlock), numbers(i, j))
            << type << ' ' << j;
  };
  expect_same(Int8{}, io::Q8_0{}, kQ8_0, DType::Q8_0);
  expect_same(Int4{}, io::Q4_0{}, kQ4_0, DType::Q4_0);
  expect_same(Int4Offset{}, io::Q4_1{}, kQ4_1, DType::Q4_1);
  expect_same(Int4Offset{}, io::Q4_K{}, kQ4_K, DType::Q4_K);
  expect_same(MXFP4{}, io::StoredFP4{}, kMXFP4, DType::MXFP4);
}

// Its scales in Int4Offset are floats; products with codes are exact while they have at most 20 bits.
TEST(GGUFLayer, ScalesOfQ4KHaveFewBits) {
  Rng rng(7);
  for (int n = 0; n < 2000; ++n) {
    const std::vector<std::uint8_t> bytes = blocks(kQ4_K, 256, rng);
    const float scale = io::Q4_K::scale(std::as_bytes(std::span(bytes)).data(), rng.index(8));
    EXPECT_EQ(bits_of(scale) & 15, 0);
  }
}

TEST(GGUFLayer, OtherBlocksAreRounded) {
  Rng rng(8);
  const auto model = mixtral_8x7b.scaled_to(256, 256, 2);
  const auto checkpoint = block_file(model, kQ5_K, rng).open();
  const Matrix<float> x = Matrix<float>::Random(3, 256);
  EXPECT_EQ(load_packed<Int8>(model, checkpoint, kLayer).forward(x),
            pack<Int8>(load_layer<float>(model, checkpoint, kLayer)).forward(x));
}

TEST(GGUFLayer, OfThePackageIsLoaded) {
  const auto checkpoint = Checkpoint::open(MOE_GOLDEN_DIR "/gguf_layer.gguf");
  const auto model = sized_as(qwen3_30b_a3b, checkpoint, 0);
  EXPECT_EQ(model.d_model(), 64);
  EXPECT_EQ(model.d_ff, 32);
  EXPECT_EQ(model.num_experts(), 4);
  const auto layer = load_layer<float>(model, checkpoint, 0);
  const auto packed = load_packed<Int4>(model, checkpoint, 0), floats = pack<F32>(layer);
  const Matrix<float> x = Matrix<float>::Random(5, 64);
  EXPECT_EQ(packed.forward(x), floats.forward(x));
  // The package's numbers are those of a normal distribution of variance 1 / 64, rounded to 16 levels a
  // block.
  EXPECT_NEAR(layer.experts()[3].w_up.norm(), std::sqrt(32.0f), 0.5f);
}

}  // namespace
}  // namespace moe::gguf_layer_test
