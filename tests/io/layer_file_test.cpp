// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <locale>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
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
  Layer layer{
      experts,
      moe::TopKRouter<float>(
          {.d_model = 4, .num_experts = 3, .top_k = top_k, .bias = true, .selection_bias = true}, rng),
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
  Layer::visit([](const auto& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; }, wider,
               before);
  Layer more = make_layer(4);
  more.add_expert(more.experts()[0], moe::Vector<float>::Ones(4));
  expect_refused([&] { moe::load_layer(file, more); }, {"num_experts=3", "num_experts=4"});
}

// A model of one's own, which says as much of itself as it wants to be compared.
struct TwoLayers {
  moe::Matrix<float> embedding;
  std::vector<Layer> layers;
  std::string describe() const { return "top_k " + std::to_string(layers[0].router().options().top_k); }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"embedding"}, self.embedding...);
    moe::visit_parts("layers", f, self.layers...);
  }
};

TEST(LayerFile, AModelOfSeveralLayersIsSavedAndLoadedAsOneThing) {
  const TwoLayers saved{moe::Matrix<float>::Random(5, 4), {make_layer(1), make_layer(2)}};
  moe::save_layer(file_name(), saved);
  const Checkpoint file = Checkpoint::open(file_name());
  EXPECT_TRUE(file.contains("layers.1.experts.2.w_gate"));
  TwoLayers loaded{moe::Matrix<float>::Zero(5, 4), {make_layer(3), make_layer(4)}};
  moe::load_layer(file, loaded);
  TwoLayers::visit([](auto& info, auto& a, auto& b) { EXPECT_EQ(a, b) << info.name; }, saved, loaded);

  const TwoLayers before{moe::Matrix<float>::Zero(5, 4), {make_layer(3), make_layer(4, 2, 7)}};
  TwoLayers other = before;
  expect_refused([&] { moe::load_layer(file, other); }, {"layers.1.experts.0.w_gate", "[6, 4]", "[7, 4]"});
  TwoLayers::visit([](auto& info, auto& a, auto& b) { EXPECT_EQ(a, b) << info.name; }, other, before);
  other = {saved.embedding, {make_layer(1)}};
  expect_refused([&] { moe::load_layer(file, other); }, {"layers.1.", "is not in the layer"});
  other = {saved.embedding, {make_layer(1, 1), make_layer(2, 1)}};
  expect_refused([&] { moe::load_layer(file, other); }, {"kind = top_k 2", "top_k 1"});
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
      {{.capacity_rule = {.rounding = moe::Rounding::down}}, "capacity_rounding=down"},
      {{.capacity_rule = {.minimum = 4}}, "capacity_minimum=4"},
      {{.capacity_rule = {.multiple_of = 2}}, "capacity_multiple_of=2"}};
  for (const auto& [options, part] : others) {
    auto other = layer_with(options);
    expect_refused([&] { moe::load_layer(file, other); }, {part});
  }
}

// ---- The same arrays under other functions.

// A layer of experts with these options, all weights drawn from the same seed.
template <class E>
moe::MoELayer<E, moe::TopKRouter<float>> layer_of(const typename E::Options& options) {
  Rng rng(6);
  return {moe::make_experts<E>(3, options, rng),
          moe::TopKRouter<float>({.d_model = 4, .num_experts = 3}, rng),
          {moe::make_experts<E>(1, options, rng)}};
}

// Loading the file of `saved` into `other` is refused; into its like it is not.
template <class A, class B>
void expect_another_function(const A& saved, B other, const std::vector<std::string>& parts) {
  moe::save_layer(file_name(), saved);
  const Checkpoint file = Checkpoint::open(file_name());
  expect_refused([&] { moe::load_layer(file, other); }, parts);
  A same = saved;
  EXPECT_NO_THROW(moe::load_layer(file, same));
}

TEST(LayerFile, UnitsOfExpertsAreCompared) {
  using moe::FeedForward, moe::GatedFeedForward;
  expect_another_function(layer_of<GatedFeedForward<float, moe::SwiGLU>>({4, 2}),
                          layer_of<GatedFeedForward<float, moe::GEGLU>>({4, 2}),
                          {"experts = 3 x GatedFeedForward(Glu(SiLU))", "Glu(GELU)"});
  expect_another_function(layer_of<FeedForward<float, moe::GELU>>({4, 2}),
                          layer_of<FeedForward<float, moe::GELUTanh>>({4, 2}),
                          {"FeedForward(GELU)", "FeedForward(GELUTanh)"});
  using Clamped = GatedFeedForward<float, moe::ClampedSwiGLU>;
  const auto clamped = layer_of<Clamped>({4, 2});
  expect_another_function(clamped, layer_of<Clamped>({4, 2, false, {.limit = 0.125}}),
                          {"limit=7 ", "limit=0.125 "});
  expect_another_function(clamped, layer_of<Clamped>({4, 2, false, {.alpha = 1}}), {"alpha=1 "});
  expect_another_function(clamped, layer_of<Clamped>({4, 2, false, {.offset = 0}}), {"offset=0)"});
  // Experts alone, and the shared ones.
  expect_another_function(GatedFeedForward<float, moe::SwiGLU>({4, 2}),
                          GatedFeedForward<float, moe::ReGLU>({4, 2}), {"kind = ", "Glu(ReLU)"});
  Rng rng(7);
  const auto with_shared = [&](double limit) {
    return moe::MoELayer<Clamped, moe::TopKRouter<float>>(
        moe::make_experts<Clamped>(3, {4, 2}, rng),
        moe::TopKRouter<float>({.d_model = 4, .num_experts = 3}, rng),
        {moe::make_experts<Clamped>(1, {4, 2, false, {.limit = limit}}, rng)});
  };
  expect_another_function(with_shared(7), with_shared(6), {"shared_experts = 1 x ", "limit=6"});
}

TEST(LayerFile, KindsOfExpertsAreCompared) {
  using Zero = moe::ZeroExpert<float>;
  using Copy = moe::CopyExpert<float>;
  using Expert = moe::VariantExpert<Zero, Copy, moe::FeedForward<float>>;
  const Zero zero({.d_model = 4});
  const Copy copy({.d_model = 4});
  const auto layer = [&](const Expert& first, const Expert& second) {
    Rng rng(8);
    const moe::FeedForward<float> last({.d_model = 4, .d_ff = 2}, rng);
    return moe::MoELayer<Expert, moe::TopKRouter<float>>(
        {first, second, last}, moe::TopKRouter<float>({.d_model = 4, .num_experts = 3}, rng));
  };
  expect_another_function(layer(zero, zero), layer(copy, copy),
                          {"experts = 2 x ZeroExpert, 1 x FeedForward(ReLU)", "2 x CopyExpert"});
  expect_another_function(layer(zero, copy), layer(copy, zero), {"1 x ZeroExpert, 1 x CopyExpert"});

  // A shared expert without arrays.
  const auto with_shared = [&](std::vector<Copy> shared) {
    Rng rng(8);
    return moe::MoELayer<Copy, moe::TopKRouter<float>>(
        {copy, copy}, moe::TopKRouter<float>({.d_model = 4, .num_experts = 2}, rng), {std::move(shared)});
  };
  expect_another_function(with_shared({}), with_shared({copy}), {"shared_experts = none", "1 x CopyExpert"});
}

TEST(LayerFile, ExpertsOfASoftMoELayerAreCompared) {
  const auto layer = [](auto expert) {
    using Expert = decltype(expert);
    Rng rng(12);
    return moe::SoftMoELayer<Expert>({expert, expert}, {.d_model = 4, .num_experts = 2}, rng);
  };
  expect_another_function(layer(moe::FeedForward<float, moe::GELU>({4, 2})),
                          layer(moe::FeedForward<float, moe::ReLU>({4, 2})),
                          {"experts = 2 x FeedForward(GELU)", "FeedForward(ReLU)"});
}

TEST(LayerFile, TheRouterOfASoftMoELayerIsCompared) {
  const auto layer = [](moe::Index slots_per_expert, bool normalise) {
    using Copy = moe::CopyExpert<float>;
    Rng rng(12);
    return moe::SoftMoELayer<Copy>(
        {Copy({.d_model = 4}), Copy({.d_model = 4})},
        {.d_model = 4, .num_experts = 2, .slots_per_expert = slots_per_expert, .normalise = normalise}, rng);
  };
  expect_another_function(layer(1, true), layer(2, true), {"router = slots_per_expert=1, expected", "=2"});
  expect_another_function(layer(3, false), layer(3, true), {"router = normalise=false, expected", "=true"});
}

TEST(LayerFile, EveryLevelOfAHierarchyIsCompared) {
  using Router = moe::TopKRouter<float>;
  using Expert = moe::FeedForward<float>;
  const auto layer = [](const moe::TopKOptions& parent, const moe::TopKOptions& second_child) {
    Rng rng(9);
    std::vector<Router> children{Router({.d_model = 4, .num_experts = 2}, rng), Router(second_child, rng)};
    return moe::MoELayer<Expert, moe::HierarchicalRouter<Router>>(
        moe::make_experts<Expert>(4, {4, 2}, rng),
        moe::HierarchicalRouter<Router>(Router(parent, rng), children));
  };
  const moe::TopKOptions two{.d_model = 4, .num_experts = 2};
  moe::TopKOptions one = two, scaled = two;
  one.top_k = 1;
  scaled.gate_scale = 2.5;
  expect_another_function(layer(two, two), layer(one, two), {"router = parent(", "top_k=1"});
  expect_another_function(layer(two, two), layer(two, scaled), {"children(2 x ", "gate_scale=2.5"});
}

TEST(LayerFile, TheTableOfAHashRouterIsCompared) {
  using Expert = moe::FeedForward<float>;
  const auto layer = [](std::initializer_list<Index> experts) {
    Rng rng(10);
    moe::IndexVector table(Index(experts.size()));
    std::copy(experts.begin(), experts.end(), table.begin());
    return moe::MoELayer<Expert, moe::HashRouter<float>>(
        moe::make_experts<Expert>(3, {4, 2}, rng),
        moe::HashRouter<float>({.d_model = 4, .num_experts = 3, .table = table}));
  };
  expect_another_function(layer({0, 1, 2, 1, 0}), layer({0, 1, 2, 0, 0}),
                          {"router.table", "id 3 to expert 1, expected 0"});
  expect_another_function(layer({0, 1, 2}), layer({0, 1}), {"router.table", "[3]", "[2]"});
  const moe::TensorView saved = Checkpoint::open(file_name()).at("router.table");
  EXPECT_EQ(saved.dtype, moe::DType::I64);
}

// Files from before there were descriptions: nothing is compared but what they hold.
TEST(LayerFile, WhatAFileDoesNotDescribeIsNotCompared) {
  const auto swiglu = layer_of<moe::GatedFeedForward<float, moe::SwiGLU>>({4, 2});
  auto geglu = layer_of<moe::GatedFeedForward<float, moe::GEGLU>>({4, 2});
  moe::save_layer(file_name(), swiglu);
  const Checkpoint file = Checkpoint::open(file_name());
  std::vector<moe::TensorToWrite> tensors;
  for (const std::string& name : file.names()) tensors.push_back(file.at(name));
  moe::write_safetensors(file_name() + ".old", tensors,
                         {{"format", "moe"}, {"router", file.metadata().at("router")}});
  EXPECT_NO_THROW(moe::load_layer(Checkpoint::open(file_name() + ".old"), geglu));
  EXPECT_THROW(moe::load_layer(file, geglu), CheckpointError);
}

struct CommaAsDecimalPoint : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

TEST(LayerFile, DoesNotDependOnTheLocale) {
  using Expert = moe::GatedFeedForward<float, moe::ClampedSwiGLU>;
  Rng rng(11);
  moe::MoELayer<Expert, moe::TopKRouter<float>> layer(
      moe::make_experts<Expert>(1200, {4, 1}, rng),
      moe::TopKRouter<float>({.d_model = 4, .num_experts = 1200, .second_threshold = 0.25}, rng));
  moe::save_layer(file_name(), layer);
  const std::locale before = std::locale::global(
      std::locale(std::locale::classic(), new CommaAsDecimalPoint));  // the locale deletes it
  EXPECT_NO_THROW(moe::load_layer(Checkpoint::open(file_name()), layer));
  EXPECT_NO_THROW(moe::save_layer(file_name() + ".comma", layer));
  std::locale::global(before);
  EXPECT_EQ(io_test::text_in(file_name() + ".comma"), io_test::text_in(file_name()));
}

// ---- Parts of one's own.

struct Cube {
  template <class T>
  T forward(const T& x) const {
    return x * x * x;
  }
  template <class T>
  T derivative(const T& x) const {
    return 3 * x * x;
  }
};

struct Power {
  int exponent = 2;
  template <class T>
  T forward(const T& x) const {
    return T(std::pow(x, exponent));
  }
  template <class T>
  T derivative(const T& x) const {
    return T(exponent * std::pow(x, exponent - 1));
  }
  std::string describe() const { return "Power " + std::to_string(exponent); }
};

// y = factor * x, with one weight a column.
struct Scale {
  using Scalar = float;
  struct Options {
    Index d_model = 0;
  };
  Scale(const Options& options, Rng&) { weight.setOnes(options.d_model); }
  Index d_model() const { return weight.size(); }
  void forward(const moe::ConstMatrixRef<float>& x, moe::MatrixRef<float> y) const {
    y = x * weight.asDiagonal();
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"weight"}, self.weight...);
  }
  moe::Vector<float> weight;
};

TEST(LayerFile, PartsOfOnesOwnAreSavedWithTheirDescriptionOrWithout) {
  const auto round_trip = [](const auto& saved, const std::string& description) {
    moe::save_layer(file_name(), saved);
    const Checkpoint file = Checkpoint::open(file_name());
    EXPECT_EQ(file.metadata().at("experts"), description);
    auto loaded = saved;
    EXPECT_NO_THROW(moe::load_layer(file, loaded));
  };
  round_trip(layer_of<Scale>({4}), "3 x own");
  round_trip(layer_of<moe::FeedForward<float, Cube>>({4, 2}), "3 x FeedForward(own)");
  using Described = moe::FeedForward<float, Power>;
  round_trip(layer_of<Described>({4, 2}), "3 x FeedForward(Power 2)");
  expect_another_function(layer_of<Described>({4, 2}), layer_of<Described>({4, 2, false, {3}}),
                          {"Power 2", "Power 3"});
}

// A router that says nothing of itself, but has options some of whose names a library's have. Older versions
// wrote these down.
struct Plain {
  using Scalar = float;
  struct Options {
    Index d_model = 0, num_experts = 0, top_k = 1;
  };
  Options own;
  moe::Matrix<float> w_router;
  explicit Plain(const Options& options) : own(options) {
    w_router.setOnes(options.num_experts, options.d_model);
  }
  Index d_model() const { return own.d_model; }
  Index num_experts() const { return own.num_experts; }
  const Options& options() const { return own; }
  void route(const moe::ConstMatrixRef<float>& x, const moe::BatchInfo& info,
             moe::Routing<float>& routing) const {
    moe::begin_routing(x.rows(), own.num_experts, info, routing, "Plain");
  }
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"w_router"}, self.w_router...);
  }
};

TEST(LayerFile, OfARouterThatDoesNotDescribeItselfIsReadFromOlderVersions) {
  Rng rng(7);
  using Expert = moe::FeedForward<float>;
  moe::MoELayer<Expert, Plain> layer(moe::make_experts<Expert>(3, {.d_model = 4, .d_ff = 2}, rng),
                                     Plain({4, 3, 2}));
  moe::save_layer(file_name(), layer);
  const Checkpoint file = Checkpoint::open(file_name());
  EXPECT_EQ(file.metadata().at("router"), "own");
  std::vector<moe::TensorToWrite> tensors;
  for (const std::string& name : file.names()) tensors.push_back(file.at(name));
  auto metadata = file.metadata();
  for (const char* const router : {"own", "d_model=4 num_experts=3 top_k=2"}) {
    metadata["router"] = router;
    const std::string older = file_name() + std::string(".older");
    moe::write_safetensors(older, tensors, metadata);
    layer.router().w_router.setZero();
    EXPECT_NO_THROW(moe::load_layer(Checkpoint::open(older), layer)) << router;
    EXPECT_EQ(layer.router().w_router, moe::Matrix<float>::Ones(3, 4));
    std::filesystem::remove(older);
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
