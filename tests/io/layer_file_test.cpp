// SPDX-License-Identifier: MIT
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/layer_file.hpp>
#include <moe/moe.hpp>

#include "files.hpp"

namespace {

using moe::Checkpoint;
using moe::CheckpointError;
using moe::Index;
using moe::Matrix;
using moe::Rng;

std::string file_name() {
  return testing::TempDir() + "layer_file_test." +
         testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors";
}

using Layer = moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;

Layer make_layer(std::uint64_t seed, Index top_k = 2, Index d_ff = 6) {
  Rng rng(seed);
  const moe::GatedFeedForward<float>::Options expert{.d_model = 4, .d_ff = d_ff, .bias = true};
  auto experts = moe::make_experts<moe::GatedFeedForward<float>>(3, expert, rng);
  auto shared = moe::make_experts<moe::GatedFeedForward<float>>(1, expert, rng);
  Layer layer{experts,
              moe::TopKRouter<float>(
                  {.d_model = 4, .num_experts = 3, .top_k = top_k, .bias = true, .selection_bias = true},
                  rng),
              {shared, true},
              true};
  Layer::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 1.0, rng); }, layer);
  return layer;
}

TEST(LayerFile, ARoundTripKeepsEveryBit) {
  const Layer saved = make_layer(1);
  moe::save_layer(file_name(), saved, {{"step", "1000"}});
  const Checkpoint file = Checkpoint::open(file_name());
  EXPECT_EQ(file.metadata().at("step"), "1000");
  Layer loaded = make_layer(2);
  moe::load_layer(file, loaded);
  Index arrays = 0;
  Layer::visit(
      [&](const moe::ParameterInfo& info, const auto& a, const auto& b) {
        EXPECT_EQ(a, b) << info.name;
        ++arrays;
      },
      saved, loaded);
  EXPECT_EQ(Index(file.names().size()), arrays);
  EXPECT_TRUE(file.contains("router.selection_bias"));  // a buffer
  EXPECT_TRUE(file.contains("shared_experts.0.b_down"));
  const Matrix<float> x = Matrix<float>::Random(5, 4);
  EXPECT_EQ(loaded.forward(x), saved.forward(x));
}

// Saved twice, a layer gives the same bytes.
TEST(LayerFile, FilesAreDeterministic) {
  moe::save_layer(file_name(), make_layer(1));
  moe::save_layer(file_name() + ".again", make_layer(1));
  const std::string bytes = io_test::text_in(file_name());
  EXPECT_FALSE(bytes.empty());
  EXPECT_EQ(io_test::text_in(file_name() + ".again"), bytes);
}

template <class F>
void expect_refused(const F& load, const std::vector<std::string>& parts) {
  try {
    load();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CheckpointError& error) {
    for (const std::string& part : parts)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(LayerFile, AnotherLayerIsRefusedAndLeftAsItWas) {
  moe::save_layer(file_name(), make_layer(1));
  const Checkpoint file = Checkpoint::open(file_name());
  Layer other_k = make_layer(2, 1), wider = make_layer(3, 2, 7);
  const Layer before = wider;
  expect_refused([&] { moe::load_layer(file, other_k); }, {"top_k=2", "top_k=1"});
  expect_refused([&] { moe::load_layer(file, wider); }, {"experts.0.w_gate", "[6, 4]", "[7, 4]"});
  Layer::visit([](const auto& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; },
               wider, before);
  Layer more = make_layer(4);
  more.add_expert(more.experts()[0], moe::Vector<float>::Ones(4));
  expect_refused([&] { moe::load_layer(file, more); }, {"num_experts=3", "num_experts=4"});
}

TEST(LayerFile, OptionsThatChangeWhatARouterDoesAreCompared) {
  using Options = moe::TopKOptions;
  const auto layer_with = [](Options options) {
    options.d_model = 4;
    options.num_experts = 3;
    Rng rng(5);
    return moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>(
        moe::make_experts<moe::GatedFeedForward<float>>(3, {.d_model = 4, .d_ff = 2}, rng),
        moe::TopKRouter<float>(options, rng));
  };
  moe::save_layer(file_name(), layer_with({}));
  const Checkpoint file = Checkpoint::open(file_name());
  const std::pair<Options, std::string> others[] = {
      {{.second_threshold = 0.25}, "second_threshold=0.25"},
      {{.random_second_threshold = 0.5}, "random_second_threshold=0.5"},
      {{.capacity_rule = {.rounding = moe::Rounding::down}}, "capacity_rounding=1"},
      {{.capacity_rule = {.minimum = 4}}, "capacity_minimum=4"},
      {{.capacity_rule = {.multiple_of = 2}}, "capacity_multiple_of=2"}};
  for (const auto& [options, part] : others) {
    auto other = layer_with(options);
    expect_refused([&] { moe::load_layer(file, other); }, {part});
  }
}

TEST(LayerFile, NamesAreStrict) {
  const moe::GatedFeedForward<float>::Options with{.d_model = 3, .d_ff = 2, .bias = true},
      without{.d_model = 3, .d_ff = 2};
  using Expert = moe::GatedFeedForward<float>;
  moe::save_layer(file_name(), Expert(with));
  Expert plain(without), biased(with);
  expect_refused([&] { moe::load_layer(Checkpoint::open(file_name()), plain); }, {"b_", "3 arrays"});
  moe::save_layer(file_name(), Expert(without));
  expect_refused([&] { moe::load_layer(Checkpoint::open(file_name()), biased); }, {"b_gate"});
}

TEST(LayerFile, FloatIsReadIntoDouble) {
  Rng rng(5);
  const moe::FeedForward<float> expert({.d_model = 3, .d_ff = 4}, rng);
  moe::save_layer(file_name(), expert);
  moe::FeedForward<double> wide({.d_model = 3, .d_ff = 4});
  moe::load_layer(Checkpoint::open(file_name()), wide);
  EXPECT_EQ(wide.w_up.cast<float>(), expert.w_up);
}

}  // namespace
