// SPDX-License-Identifier: MIT
#include <cstddef>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/models/published/grok.hpp>
#include <moe/models/published/nllb.hpp>
#include <moe/models/published/openmoe.hpp>
#include <moe/models/published/soft_moe.hpp>
#include <moe/models/published/switch_transformer.hpp>
#include <moe/models/published/vmoe.hpp>

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
    tensors.push_back(
        {shapes[i].first, moe::DType::F32, shapes[i].second, std::as_bytes(std::span(values[i]))});
  const std::string path = testing::TempDir() + "load_models_test." +
                           testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors";
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
    EXPECT_EQ(tensor.copied, tensor.name == prefix + "gate_weight" ? "not an expert's matrix" : "transposed");

  // What stands as [out, in] is read where it lies.
  const auto turned = checkpoint_of({{prefix + "gate_weight", {kExperts, kModel}},
                                     {prefix + "experts.wi_gate", {kExperts, 2 * kFf, kModel}},
                                     {prefix + "experts.wi_up", {kExperts, kFf, kModel}},
                                     {prefix + "experts.wo", {kExperts, kModel, kFf}}});
  auto as_it_lies = model;
  for (moe::TensorSource* source : {&as_it_lies.tensors.experts.w_gate, &as_it_lies.tensors.experts.w_up,
                                    &as_it_lies.tensors.experts.w_down})
    source->transposed = false;
  const auto in_place = moe::load_mapped_layer<float>(as_it_lies, turned, kLayer);
  for (const moe::LoadedTensor& tensor : in_place.tensors)
    EXPECT_EQ(tensor.copied, tensor.name == prefix + "gate_weight" ? "not an expert's matrix" : "");
  EXPECT_EQ(in_place.layer.experts()[1].w_gate.view()(2 * kFf - 1, 0), float(200 + (4 * kFf - 1) * kModel));
  EXPECT_EQ(in_place.layer.forward(x), moe::load_layer<float>(as_it_lies, turned, kLayer).forward(x));
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
  EXPECT_EQ(moe::load_layer<float>(sized(model, switch_file), switch_file, kLayer).experts()[1].w_up(0, 1),
            401);
  model.tensors = moe::switch_decoder_tensors;
  EXPECT_EQ(moe::load_layer<float>(sized(model, switch_file), switch_file, kLayer).experts()[1].w_up(0, 1),
            901);

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

// Flax: kernels are [in, out], those of experts [E, in, out].
const std::string kFlax = "Encoder/encoderblock_5/Moe/";
const Shapes kFlaxExperts = {{kFlax + "Mlp/Dense_0/kernel", {kExperts, kModel, kFf}},
                             {kFlax + "Mlp/Dense_0/bias", {kExperts, kFf}},
                             {kFlax + "Mlp/Dense_1/kernel", {kExperts, kFf, kModel}},
                             {kFlax + "Mlp/Dense_1/bias", {kExperts, kModel}}};

template <class Expert>
void expect_flax_experts(const Expert& second) {
  EXPECT_EQ(second.w_up(2, 1), 100 + (kModel + 1) * kFf + 2);
  EXPECT_EQ(second.b_up[2], 200 + kFf + 2);
  EXPECT_EQ(second.w_down(1, 2), 300 + (kFf + 2) * kModel + 1);
  EXPECT_EQ(second.b_down[3], 400 + kModel + 3);
}

TEST(LoadModels, TakesVMoEsParameters) {
  Shapes shapes = kFlaxExperts;
  shapes.push_back({kFlax + "Router/dense/kernel", {kModel, kExperts}});
  shapes.push_back({"Encoder/encoderblock_5/LayerNorm_1/scale", {kModel}});  // of no concern
  const auto checkpoint = checkpoint_of(shapes);
  const auto model = sized(moe::vmoe_l16, checkpoint);
  const auto layer = moe::load_layer<float>(model, checkpoint, kLayer);
  EXPECT_EQ(layer.router().w_router(1, 2), 500 + 2 * kExperts + 1);
  expect_flax_experts(layer.experts()[1]);
  const auto [mapped, tensors] = moe::load_mapped_layer<float>(model, checkpoint, kLayer);
  const moe::Matrix<float> x = moe::Matrix<float>::Random(3, kModel) / 100;
  EXPECT_EQ(mapped.forward(x), layer.forward(x));
}

constexpr Index kSlots = 3;

Shapes soft_moe_shapes() {
  Shapes shapes = kFlaxExperts;
  shapes.push_back({kFlax + "Router/mu", {kModel, kExperts, kSlots}});
  shapes.push_back({kFlax + "Router/scale", {}});
  shapes.push_back({"Encoder/encoderblock_4/Moe/Router/scale", {}});  // of no concern
  return shapes;
}

TEST(LoadModels, TakesSoftMoEsParameters) {
  const auto checkpoint = checkpoint_of(soft_moe_shapes());
  auto model = sized(moe::soft_moe_s16, checkpoint);
  EXPECT_EQ(model.layer.slots_per_expert, kSlots);
  const auto layer = moe::load_layer<float>(model, checkpoint, kLayer);
  expect_flax_experts(layer.experts()[1]);
  for (Index s = 0; s < kExperts * kSlots; ++s)
    for (Index j = 0; j < kModel; ++j)
      EXPECT_EQ(layer.router().w_slots(s, j), float(500 + j * kExperts * kSlots + s));
  ASSERT_EQ(layer.router().scale.size(), 1);
  EXPECT_EQ(layer.router().scale[0], 600);

  // Slots that stand as [num_experts, slots_per_expert, d_model].
  Shapes turned = soft_moe_shapes();
  turned[4].second = {kExperts, kSlots, kModel};
  const auto file = checkpoint_of(turned);
  auto as_it_lies = moe::soft_moe_s16;
  as_it_lies.tensors.w_slots.transposed = false;
  as_it_lies = sized(as_it_lies, file);
  EXPECT_EQ(as_it_lies.layer.slots_per_expert, kSlots);
  EXPECT_EQ(moe::load_layer<float>(as_it_lies, file, kLayer).router().w_slots(4, 1), 500 + 4 * kModel + 1);
}

// As Flax saves them, below "params".
TEST(LoadModels, FindsSoftMoEBelowOtherModules) {
  Shapes shapes = soft_moe_shapes();
  const auto expected = checkpoint_of(shapes);
  for (auto& [name, shape] : shapes) name.insert(0, "params/");
  const auto checkpoint = checkpoint_of(shapes);
  const auto model = sized(moe::soft_moe_s16, checkpoint);
  EXPECT_EQ(moe::load_layer<float>(model, checkpoint, kLayer).router().w_slots,
            moe::load_layer<float>(model, expected, kLayer).router().w_slots);
}

// What load_layer says of a checkpoint of Soft MoE in which a tensor was changed.
std::string soft_moe_error(const std::string& name, const std::optional<std::vector<Index>>& shape) {
  Shapes shapes = soft_moe_shapes();
  std::erase_if(shapes, [&](const auto& tensor) { return tensor.first == kFlax + name; });
  if (shape) shapes.emplace_back(kFlax + name, *shape);
  auto model = moe::soft_moe_s16.scaled_to(kModel, kFf, kExperts);
  model.layer.slots_per_expert = kSlots;
  try {
    moe::load_layer<float>(model, checkpoint_of(shapes), kLayer);
  } catch (const moe::CheckpointError& error) {
    return error.what();
  }
  return "";
}

TEST(LoadModels, SaysWhatOfSoftMoEIsMissing) {
  const auto begin = [](const std::string& name) {
    return testing::TempDir() +
           "load_models_test.SaysWhatOfSoftMoEIsMissing.safetensors: there is no tensor '" + kFlax + name +
           "' among 6: did you mean '";
  };
  // Those that are much farther than the nearest are not named.
  const std::string other_layer = "Encoder/encoderblock_4/Moe/Router/scale'";
  EXPECT_EQ(soft_moe_error("Router/scale", {}), begin("Router/scale") + other_layer + "?");
  EXPECT_EQ(soft_moe_error("Router/mu", {}),
            begin("Router/mu") + kFlax + "Router/scale' or '" + other_layer + "?");
  for (const char* name :
       {"Mlp/Dense_0/kernel", "Mlp/Dense_0/bias", "Mlp/Dense_1/kernel", "Mlp/Dense_1/bias"})
    EXPECT_EQ(soft_moe_error(name, {}).substr(0, begin(name).size()), begin(name));
}

TEST(LoadModels, SaysWhatOfSoftMoEHasAnotherShape) {
  const auto message = [](const std::string& name, const char* seen, const char* expected) {
    return "load_layer: " + kFlax + name + " has shape " + seen + ", expected " + expected;
  };
  EXPECT_EQ(soft_moe_error("Router/mu", {{kModel, kSlots, kExperts}}),
            message("Router/mu", "[4, 3, 2]", "[4, 2, 3]"));
  EXPECT_EQ(soft_moe_error("Router/mu", {{kModel, kExperts * kSlots}}),
            message("Router/mu", "[4, 6]", "[4, 2, 3]"));
  EXPECT_EQ(soft_moe_error("Router/scale", {{1}}), message("Router/scale", "[1]", "[]"));
  EXPECT_EQ(soft_moe_error("Mlp/Dense_0/kernel", {{kExperts, kFf, kModel}}),
            message("Mlp/Dense_0/kernel", "[2, 3, 4]", "[2, 4, 3]"));
  EXPECT_EQ(soft_moe_error("Mlp/Dense_1/bias", {{kModel}}), message("Mlp/Dense_1/bias", "[4]", "[2, 4]"));
}

TEST(LoadModels, SaysWhatOfSoftMoEIsLeftOver) {
  EXPECT_EQ(soft_moe_error("Router/dense/kernel", {{kModel, kExperts}}),
            "load_layer: 0 of the 8 values of " + kFlax +
                "Router/dense/kernel belong to layer 5 of this model, expected all");
}

TEST(LoadModels, RefusesBadArgumentsOfSoftMoE) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    } catch (const moe::CheckpointError& error) {
      return error.what();
    }
    return "";
  };
  const auto checkpoint =
      checkpoint_of({{kFlax + "Router/mu", {kModel, kExperts}}, {kFlax + "Router/dense/kernel", {kModel}}});
  const auto& model = moe::soft_moe_s16;
  EXPECT_EQ(message([&] { moe::load_layer<float>(model, checkpoint, -1); }),
            "load_layer: layer = -1, expected at least 0");
  auto unnamed = model;
  unnamed.tensors = {};
  EXPECT_EQ(message([&] { moe::load_layer<float>(unnamed, checkpoint, 0); }),
            "load_layer: the tensor names of Soft MoE S/16 are not known");
  EXPECT_EQ(message([&] { moe::sized_as(unnamed, checkpoint, 0); }),
            "sized_as: the tensor names of Soft MoE S/16 are not known");
  EXPECT_EQ(
      message([&] { moe::sized_as(model, checkpoint, kLayer); }),
      "sized_as: " + kFlax + "Router/mu has shape [4, 2], expected [d_model, num_experts, slots_per_expert]");
  EXPECT_EQ(message([&] { moe::sized_as(moe::vmoe_l16, checkpoint, kLayer); }),
            "sized_as: " + kFlax + "Router/dense/kernel has shape [4], expected [d_model, num_experts]");
}

}  // namespace
