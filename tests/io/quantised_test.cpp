// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <moe/io.hpp>
#include <moe/models/published/llama4.hpp>
#include <moe/models/published/qwen.hpp>
#include <moe/packed.hpp>

#include "io/files.hpp"
#include "io/tensors.hpp"

// Experts as quantisers store them: several tensors for a matrix.
namespace moe::quantised_test {
namespace {

using io_test::expect_error;
using io_test::Tensors;

const std::string kGolden = MOE_GOLDEN_DIR "/quantised.safetensors";
constexpr int kCases = 16;

std::string matrix_name(Index layer, const std::string& part) {
  return "model.layers." + std::to_string(layer) + ".mlp.experts.0." + part + ".weight";
}
auto model_in(const Checkpoint& checkpoint, Index layer) {
  auto model = sized_as(qwen3_30b_a3b, checkpoint, layer);
  model.router.top_k = 1;
  return model;
}

bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(float)) == 0;
}

// ---- Against numbers of other people ------------------------------------------------------------------

TEST(Quantised, NumbersAreThoseOfTheirAuthors) {
  const auto checkpoint = Checkpoint::open(kGolden);
  for (Index layer = 0; layer < kCases; ++layer) {
    const auto loaded = load_layer<float>(model_in(checkpoint, layer), checkpoint, layer);
    const auto& expert = loaded.experts()[0];
    for (const auto& [part, matrix] :
         {std::pair{"gate_proj", &expert.w_gate}, {"up_proj", &expert.w_up}, {"down_proj", &expert.w_down}}) {
      Matrix<float> values(matrix->rows(), matrix->cols());
      const TensorView& golden = checkpoint.at("values." + matrix_name(layer, part));
      ASSERT_EQ(golden.shape, (std::vector<Index>{values.rows(), values.cols()}));
      read_tensor(golden, values.data());
      EXPECT_TRUE(same_bits(*matrix, values)) << layer << ' ' << part;
      EXPECT_GT(values.norm(), 0);
    }
  }
}

template <Format F>
void expect_kept(const Checkpoint& checkpoint, Index layer) {
  const auto model = model_in(checkpoint, layer);
  const auto loaded = load_layer<float>(model, checkpoint, layer);
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512}) {
    if (!is_available(set)) continue;
    const auto kept = load_packed<F>(model, checkpoint, layer, {.instruction_set = set});
    const auto floats = pack<F32>(loaded, {.instruction_set = set});
    for (const Index tokens : {1, 33}) {
      const Matrix<float> x = Matrix<float>::Random(tokens, model.d_model());
      EXPECT_TRUE(same_bits(kept.forward(x), floats.forward(x))) << layer << ' ' << name_of(set);
    }
  }
}

TEST(Quantised, BlocksArePackedAsTheFileHasThem) {
  const auto checkpoint = Checkpoint::open(kGolden);
  expect_kept<Int4Offset>(checkpoint, 0);  // scales in BF16
  expect_kept<Int4Offset>(checkpoint, 1);
  expect_kept<Int4>(checkpoint, 1);
  expect_kept<Int8>(checkpoint, 1);
  for (const Index layer : {2, 11, 13}) {  // with zero points
    expect_kept<Int4Offset>(checkpoint, layer);
    expect_kept<Int8>(checkpoint, layer);
  }
  for (const Index layer : {3, 4, 14}) expect_kept<Int8>(checkpoint, layer);
  expect_kept<FP8>(checkpoint, 6);
  for (const Index layer : {7, 10}) expect_kept<MXFP4>(checkpoint, layer);
}

// What became of the first expert's up projection.
std::string what_became_of(const Checkpoint& checkpoint, Index layer) {
  for (const auto& tensor : load_mapped_layer<float>(model_in(checkpoint, layer), checkpoint, layer).tensors)
    if (tensor.name.find("up_proj") != std::string::npos) return tensor.copied;
  return "";
}

TEST(Quantised, TensorsSayWhichFormatsKeepThem) {
  const auto checkpoint = Checkpoint::open(kGolden);
  EXPECT_EQ(what_became_of(checkpoint, 1), "scaled in blocks, as in Int4 and Int4Offset and Int8");
  EXPECT_EQ(what_became_of(checkpoint, 2), "scaled in blocks, as in Int4Offset and Int8");
  EXPECT_EQ(what_became_of(checkpoint, 4), "scaled in blocks, as in Int8");
  for (const Index layer : {5, 8, 9, 12, 15})
    EXPECT_EQ(what_became_of(checkpoint, layer), "scaled in blocks, as in no packed format") << layer;
  EXPECT_EQ(what_became_of(checkpoint, 6), "scaled in blocks");
}

TEST(Quantised, OtherFormatsAreRounded) {
  const auto checkpoint = Checkpoint::open(kGolden);
  for (const Index layer : {5, 8}) {
    const auto model = model_in(checkpoint, layer);
    const Matrix<float> x = Matrix<float>::Random(3, model.d_model());
    EXPECT_EQ(load_packed<Int8>(model, checkpoint, layer).forward(x),
              pack<Int8>(load_layer<float>(model, checkpoint, layer)).forward(x));
  }
}

// ---- Files made by hand -------------------------------------------------------------------------------

// The tensors of a layer of the golden file.
Tensors tensors_of(Index layer) {
  Tensors tensors;
  const auto checkpoint = Checkpoint::open(kGolden);
  for (const std::string& name : checkpoint.names()) {
    if (!name.starts_with("model.layers." + std::to_string(layer) + ".")) continue;
    const TensorView& tensor = checkpoint.at(name);
    tensors.tensors[name] = {tensor.dtype, tensor.shape, {tensor.bytes.begin(), tensor.bytes.end()}};
  }
  return tensors;
}

// A directory of a model: tensors and a config.json.
class Directory {
 public:
  Directory(const Tensors& tensors, const std::string& config) {
    std::vector<TensorToWrite> list;
    for (const auto& [name, tensor] : tensors.tensors)
      list.push_back({name, tensor.dtype, tensor.shape, tensor.bytes});
    write_safetensors(files_ / "model.safetensors", list);
    io_test::write_text(files_ / "config.json", config);
  }
  Checkpoint open() const { return Checkpoint::open(files_.path()); }

 private:
  io_test::TemporaryDirectory files_;
};

TEST(Quantised, ZeroPointsOfGPTQAreLessByOneButInVersion2) {
  const Tensors tensors = tensors_of(11);
  const auto up = [&](const std::string& config) {
    const Checkpoint checkpoint = Directory(tensors, config).open();
    return load_layer<float>(model_in(checkpoint, 11), checkpoint, 11).experts()[0].w_up;
  };
  const Matrix<float> v1 = up(R"({"quantization_config": {"quant_method": "gptq", "bits": 4}})");
  EXPECT_EQ(v1, up(R"({"quantization_config": {"checkpoint_format": "gptq"}})"));
  EXPECT_EQ(v1, up("{}"));
  const Matrix<float> v2 = up(R"({"quantization_config": {"checkpoint_format": "gptq_v2"}})");
  // One more is a scale more: of each number of a group the same.
  const Matrix<float> scale = v2 - v1;
  EXPECT_GT(scale.minCoeff(), 0);
  for (Index i = 0; i < scale.rows(); ++i)
    for (Index j = 1; j < 32; ++j) EXPECT_NEAR(scale(i, j), scale(i, 0), 1e-6);
}

TEST(Quantised, ConfigurationsAreRead) {
  const Tensors tensors = tensors_of(11);
  const auto config = Directory(tensors, R"({"quantization_config": {"quant_method": "gptq", "bits": 4,
      "sym": false, "damp": 0.5, "none": null, "modules": ["a"]}})")
                          .open()
                          .quantisation();
  EXPECT_EQ(
      config,
      (std::map<std::string, std::string>{
          {"quant_method", "gptq"}, {"bits", "4"}, {"sym", "false"}, {"damp", "0.5"}, {"none", "null"}}));
  EXPECT_TRUE(Directory(tensors, "{}").open().quantisation().empty());
  expect_error("no object", [&] { Directory(tensors, "[1").open(); }, {"config.json", "no JSON object"});
}

// ---- Experts in one tensor ----------------------------------------------------------------------------

// Llama 4 in FP8: gate and up of all experts as [in, out], a scale for each output, or for each expert.
TEST(Quantised, ScalesOfStackedExpertsAreTheirOwn) {
  const auto model = llama4_scout.scaled_to(6, 4, 2);
  const std::string mlp = "language_model.model.layers.0.feed_forward.";
  Rng rng(1);
  for (const bool one : {false, true}) {
    Tensors tensors;
    const auto floats = [&](Index size) {
      std::vector<float> values;
      for (Index i = 0; i < size; ++i) values.push_back(float(1 + rng.uniform()));
      return values;
    };
    tensors.add(mlp + "router.weight", DType::F32, {2, 6}, floats(12));
    for (const char* const part : {"gate_proj", "up_proj"})
      tensors.add(mlp + "shared_expert." + part + ".weight", DType::F32, {model.shared_d_ff, 6},
                  floats(model.shared_d_ff * 6));
    tensors.add(mlp + "shared_expert.down_proj.weight", DType::F32, {6, model.shared_d_ff},
                floats(model.shared_d_ff * 6));
    const auto add = [&](const std::string& name, Index in, Index out) {
      std::vector<std::uint8_t> bits;
      for (Index i = 0; i < 2 * in * out; ++i) bits.push_back(std::uint8_t(rng.index(127)));
      tensors.add(mlp + "experts." + name, DType::F8_E4M3, {2, in, out}, bits);
      const std::vector<Index> shape = one ? std::vector<Index>{2, 1, 1} : std::vector<Index>{2, 1, out};
      tensors.add(mlp + "experts." + name + "_scale", DType::F32, shape, floats(one ? 2 : 2 * out));
    };
    add("gate_up_proj", 6, 8);
    add("down_proj", 4, 6);
    const Checkpoint checkpoint = tensors.open();
    const auto layer = load_layer<float>(model, checkpoint, 0);
    const auto number = [&](const std::string& name, Index e, Index in, Index i, Index out, Index j) {
      const std::string full = mlp + "experts." + name;
      const auto bits = io::load<std::uint8_t>(checkpoint.at(full).bytes, (e * in + i) * out + j);
      return io::kE4M3[bits] * io::load<float>(checkpoint.at(full + "_scale").bytes, one ? e : e * out + j);
    };
    for (Index e = 0; e < 2; ++e)
      for (Index i = 0; i < 4; ++i)
        for (Index j = 0; j < 6; ++j) {
          EXPECT_EQ(layer.experts()[std::size_t(e)].w_gate(i, j), number("gate_up_proj", e, 6, j, 8, i));
          EXPECT_EQ(layer.experts()[std::size_t(e)].w_up(i, j), number("gate_up_proj", e, 6, j, 8, 4 + i));
          EXPECT_EQ(layer.experts()[std::size_t(e)].w_down(j, i), number("down_proj", e, 4, i, 6, j));
        }
    tensors.add(mlp + "experts.down_proj_scale", DType::F32, {3, 1, 6}, floats(18));
    expect_error("three", [&] { load_layer<float>(model, tensors.open(), 0); },
                 {"holds 2 experts", "[3, 1, 6]", mlp + "experts.down_proj"});
  }
}

// ---- What is refused ----------------------------------------------------------------------------------

// What load_layer says of a layer of the golden file that was changed.
void expect_refused(Index layer, const std::function<void(Tensors&, const std::string&)>& change,
                    const std::vector<std::string>& parts, const std::string& config = "{}") {
  const auto model = model_in(Checkpoint::open(kGolden), layer);
  Tensors tensors = tensors_of(layer);
  const std::string module = "model.layers." + std::to_string(layer) + ".mlp.experts.0.up_proj.";
  change(tensors, module);
  const Directory directory(tensors, config);
  std::vector<std::string> all = parts;
  all.push_back(module);
  expect_error(
      "layer " + std::to_string(layer), [&] { load_layer<float>(model, directory.open(), layer); }, all);
}

// The tensor in another shape, of zeros.
void reshape(Tensors& tensors, const std::string& name, std::vector<Index> shape) {
  ASSERT_TRUE(tensors.tensors.contains(name)) << name;
  auto& tensor = tensors.tensors[name];
  Index size = Index(size_of(tensor.dtype));
  for (const Index n : shape) size *= n;
  tensor.bytes.assign(std::size_t(size), std::byte(0));
  tensor.shape = std::move(shape);
}

TEST(Quantised, WhatDoesNotFitIsRefused) {
  const auto without = [](const char* part) {
    return [part](Tensors& t, const std::string& module) { t.tensors.erase(module + part); };
  };
  const auto shaped = [](const char* part, std::vector<Index> shape) {
    return [part, shape](Tensors& t, const std::string& module) { reshape(t, module + part, shape); };
  };
  expect_refused(0, without("weight_scale"), {"not read without its scale"});
  expect_refused(0, without("weight_shape"), {"there is no tensor", "weight_shape"});
  expect_refused(0, shaped("weight_scale", {32, 3}), {"3 scales for a row of 64"});
  expect_refused(0, shaped("weight_scale", {31, 2}), {"[31, 2]", "32 rows"});
  expect_refused(0, shaped("weight_packed", {32, 7}), {"[32, 7]", "[32, 64]"});
  expect_refused(2, shaped("weight_zero_point", {4, 3}), {"[4, 3]", "[4, 2]"});
  expect_refused(4, without("weight_scale"), {"is I8", "not read without its scale"});
  expect_refused(5, shaped("weight_zero_point", {31, 1}), {"[31, 1]", "[32, 1]"});
  expect_refused(7, shaped("weight_scale", {32, 1}), {"[32, 1]", "[32, 2]"});
  expect_refused(7, shaped("weight_packed", {32, 31}), {"rows of 31 bytes", "multiple of 16"});
  expect_refused(8, without("weight_global_scale"), {"not read without its scale"});
  expect_refused(8, shaped("weight_global_scale", {2}), {"[2]", "[1]"});
  expect_refused(10, without("scale"), {"not read without its scale"});
  expect_refused(11, without("scales"), {"not read without its scale"});
  expect_refused(11, without("qzeros"), {"there is no tensor", "qzeros"});
  expect_refused(11, shaped("qzeros", {2, 3}), {"3 words", "32 numbers"});
  expect_refused(11, shaped("qzeros", {1, 4}), {"[1, 4]", "2 rows"});
  expect_refused(11, shaped("qweight", {8, 31}), {"31 columns", "32 or 4"});
  expect_refused(11, shaped("qweight", {7, 32}), {"[7, 32]", "[32, 64]"});
  expect_refused(12, shaped("g_idx", {63}), {"[63]", "[64]"});
  expect_refused(12,
                 [](Tensors& t, const std::string& module) {
                   t.add(module + "g_idx", DType::I32, {64}, std::vector<std::int32_t>(64, 2));
                 },
                 {"has group 2", "0 to 1"});
  const Directory other(tensors_of(11), R"({"quantization_config": {"bits": 8}})");
  expect_error("bits", [&] { load_layer<float>(model_in(Checkpoint::open(kGolden), 11), other.open(), 11); },
               {"experts.0.gate_proj.qweight", "bits '8'", "expected 4"});
}

TEST(Quantised, MethodsThatAreNotKnownAreNamed) {
  expect_refused(
      4,
      [](Tensors& t, const std::string& module) {
        t.tensors.erase(module + "weight_scale");
        t.add(module + "weight.absmax", DType::F32, {2}, std::vector<float>{1, 1});
      },
      {"quant_method 'bitsandbytes' of config.json is not known"},
      R"({"quantization_config": {"quant_method": "bitsandbytes"}})");
}

}  // namespace
}  // namespace moe::quantised_test
