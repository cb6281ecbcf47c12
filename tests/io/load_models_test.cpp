// SPDX-License-Identifier: MIT
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/load_layer.hpp>
#include <moe/models/grok.hpp>
#include <moe/models/nllb.hpp>
#include <moe/models/openmoe.hpp>
#include <moe/models/switch_transformer.hpp>

// Layers of models out of checkpoints as those who converted them name and shape their tensors.
namespace {

using moe::Index;
using Shapes = std::vector<std::pair<std::string, std::vector<Index>>>;

constexpr Index kModel = 4, kFf = 3, kExperts = 2, kLayer = 5;

// Tensor i holds 100 * (i + 1), 100 * (i + 1) + 1, ...
moe::Checkpoint checkpoint_of(const Shapes& shapes) {
  std::vector<std::vector<float>> values;
  std::vector<moe::TensorToWrite> tensors;
  for (const auto& [name, shape] : shapes) {
    Index size = 1;
    for (const Index n : shape) size *= n;
    values.emplace_back();
    for (Index i = 0; i < size; ++i) values.back().push_back(float(100 * values.size()) + float(i));
  }
  for (std::size_t i = 0; i < shapes.size(); ++i)
    tensors.push_back({shapes[i].first, moe::DType::F32, shapes[i].second,
                       std::as_bytes(std::span(values[i]))});
  const std::string path = testing::TempDir() + "load_models_test." +
                           testing::UnitTest::GetInstance()->current_test_info()->name() +
                           ".safetensors";
  moe::write_safetensors(path, tensors);
  return moe::Checkpoint::open(path);
}

template <class M>
M sized(const M& model, const moe::Checkpoint& checkpoint) {
  const M m = moe::sized_as(model, checkpoint, kLayer);
  EXPECT_EQ(m.d_model(), kModel);
  EXPECT_EQ(m.num_experts(), kExperts);
  EXPECT_EQ(m.d_ff, kFf);
  return m;
}

// Gate [E, d_model, 2 d_ff], up [E, d_model, d_ff], down [E, d_ff, d_model].
TEST(LoadModels, TakesOpenMoEsGatesOfTwiceTheWidth) {
  const std::string prefix = "model.layers.5.mlp.";
  const auto checkpoint = checkpoint_of({{prefix + "gate_weight", {kExperts, kModel}},
                                         {prefix + "experts.wi_gate", {kExperts, kModel, 2 * kFf}},
                                         {prefix + "experts.wi_up", {kExperts, kModel, kFf}},
                                         {prefix + "experts.wo", {kExperts, kFf, kModel}}});
  const auto model = sized(moe::openmoe_8b_32e, checkpoint);
  const auto layer = moe::load_layer<float>(model, checkpoint, kLayer);
  EXPECT_EQ(layer.router().w_router(1, 2), 100 + 1 * kModel + 2);
  const auto& expert = layer.experts()[1];
  for (Index j = 0; j < kModel; ++j) {
    for (Index i = 0; i < 2 * kFf; ++i)
      EXPECT_EQ(expert.w_gate(i, j), float(200 + (kModel + j) * 2 * kFf + i));
    for (Index i = 0; i < kFf; ++i) {
      EXPECT_EQ(expert.w_up(i, j), float(300 + (kModel + j) * kFf + i));
      EXPECT_EQ(expert.w_down(j, i), float(400 + (kFf + i) * kModel + j));
    }
  }

  const auto [mapped, tensors] = moe::load_mapped_layer<float>(model, checkpoint, kLayer);
  EXPECT_EQ(mapped.experts()[1].w_gate.view(), expert.w_gate);
  const moe::Matrix<float> x = moe::Matrix<float>::Random(3, kModel) / 100;
  EXPECT_EQ(mapped.forward(x), layer.forward(x));
  for (const moe::LoadedTensor& tensor : tensors)
    EXPECT_EQ(tensor.copied,
              tensor.name == prefix + "gate_weight" ? "not an expert's matrix" : "transposed");

  // What stands as [out, in] is read where it lies.
  const auto turned =
      checkpoint_of({{prefix + "gate_weight", {kExperts, kModel}},
                     {prefix + "experts.wi_gate", {kExperts, 2 * kFf, kModel}},
                     {prefix + "experts.wi_up", {kExperts, kFf, kModel}},
                     {prefix + "experts.wo", {kExperts, kModel, kFf}}});
  auto as_it_lies = model;
  for (moe::TensorSource* source :
       {&as_it_lies.tensors.experts.w_gate, &as_it_lies.tensors.experts.w_up,
        &as_it_lies.tensors.experts.w_down})
    source->transposed = false;
  const auto in_place = moe::load_mapped_layer<float>(as_it_lies, turned, kLayer);
  for (const moe::LoadedTensor& tensor : in_place.tensors)
    EXPECT_EQ(tensor.copied,
              tensor.name == prefix + "gate_weight" ? "not an expert's matrix" : "");
  EXPECT_EQ(in_place.layer.experts()[1].w_gate.view()(2 * kFf - 1, 0),
            float(200 + (4 * kFf - 1) * kModel));
  EXPECT_EQ(in_place.layer.forward(x),
            moe::load_layer<float>(as_it_lies, turned, kLayer).forward(x));
}

// `linear` is what GELU sees, `linear_v` what multiplies it, `linear_1` goes down.
TEST(LoadModels, TakesGrok1sPort) {
  const std::string prefix = "transformer.decoder_layer.5.";
  Shapes shapes = {{prefix + "router.weight", {kExperts, kModel}}};
  for (const char* expert : {"0", "1"})
    for (const char* matrix : {"linear", "linear_v", "linear_1"}) {
      std::vector<Index> shape{kFf, kModel};
      if (matrix == std::string("linear_1")) std::swap(shape[0], shape[1]);
      shapes.emplace_back(prefix + "moe." + expert + "." + matrix + ".weight", shape);
    }
  shapes.emplace_back(prefix + "rms_norm.weight", std::vector<Index>{kModel});  // of no concern
  const auto checkpoint = checkpoint_of(shapes);
  const auto layer = moe::load_layer<float>(sized(moe::grok_1, checkpoint), checkpoint, kLayer);
  EXPECT_EQ(layer.router().w_router(1, 2), 106);
  EXPECT_EQ(layer.experts()[0].w_gate(1, 0), 204);
  EXPECT_EQ(layer.experts()[1].w_gate(1, 0), 504);
  EXPECT_EQ(layer.experts()[1].w_up(2, 3), 611);
  EXPECT_EQ(layer.experts()[1].w_down(1, 0), 703);

  shapes.emplace_back(prefix + "router.bias", std::vector<Index>{kExperts});
  const auto biased = checkpoint_of(shapes);
  try {
    moe::load_layer<float>(sized(moe::grok_1, biased), biased, kLayer);
    ADD_FAILURE() << "a bias that the model does not have was left over in silence";
  } catch (const moe::CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("0 of the 2 values of " + prefix + "router.bias"),
              std::string::npos)
        << error.what();
  }
}

// Encoder and decoder of one file.
TEST(LoadModels, TakesDecodersOfSwitchAndNllb) {
  Shapes shapes;
  for (const char* part : {"encoder.block.5.layer.1.mlp.", "decoder.block.5.layer.2.mlp."}) {
    shapes.push_back({part + std::string("router.classifier.weight"), {kExperts, kModel}});
    for (const char* expert : {"0", "1"}) {
      const std::string name = part + std::string("experts.expert_") + expert;
      shapes.push_back({name + ".wi.weight", {kFf, kModel}});
      shapes.push_back({name + ".wo.weight", {kModel, kFf}});
    }
  }
  const auto switch_file = checkpoint_of(shapes);
  auto model = moe::switch_c;
  EXPECT_EQ(moe::load_layer<float>(sized(model, switch_file), switch_file, kLayer)
                .experts()[1].w_up(0, 1), 401);
  model.tensors = moe::switch_decoder_tensors;
  EXPECT_EQ(moe::load_layer<float>(sized(model, switch_file), switch_file, kLayer)
                .experts()[1].w_up(0, 1), 901);

  const std::string ffn = "model.decoder.layers.5.ffn.";
  shapes = {{ffn + "router.classifier.weight", {kExperts, kModel}}};
  for (const char* expert : {"0", "1"}) {
    const std::string name = ffn + "experts.expert_" + expert;
    shapes.push_back({name + ".fc1.weight", {kFf, kModel}});
    shapes.push_back({name + ".fc1.bias", {kFf}});
    shapes.push_back({name + ".fc2.weight", {kModel, kFf}});
    shapes.push_back({name + ".fc2.bias", {kModel}});
  }
  const auto nllb_file = checkpoint_of(shapes);
  auto nllb = moe::nllb_moe_54b;
  nllb.tensors = moe::nllb_decoder_tensors;
  const auto layer = moe::load_layer<float>(sized(nllb, nllb_file), nllb_file, kLayer);
  EXPECT_EQ(layer.experts()[0].b_down[3], 503);
  EXPECT_EQ(layer.experts()[1].w_down(1, 0), 803);
}

}  // namespace
