// SPDX-License-Identifier: MIT
#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/moe.hpp>

#include "files.hpp"
#include "saved_layers.hpp"

// Files that versions of this library wrote, and how options stand in them.
namespace {

using io_test::expect_error;
using io_test::saved_top_k_layer;
using io_test::saved_top_k_options;
using io_test::TemporaryDirectory;
using moe::Checkpoint;
using moe::io::AddDefaults;
using moe::io::LeaveDefaultsOut;
using moe::io::options_text;

const std::vector<std::string> kLayouts{"layout_1", "layout_2", "layout_3", "layout_4", "layout_5"};

std::filesystem::path saved_file(const std::string& layout, const std::string& name) {
  return std::filesystem::path(MOE_IO_DATA_DIR) / layout / name;
}

TEST(SavedFiles, OfEveryLayoutAreRead) {
  for (const std::string& layout : kLayouts) {
    int files = 0;
    io_test::for_each_saved_layer([&](const std::string& name, const auto& saved) {
      if (layout == "layout_1" && name == "hierarchical.safetensors") return;  // there were none
      SCOPED_TRACE(layout + "/" + name);
      using Saved = std::remove_cvref_t<decltype(saved)>;
      Saved loaded = saved;
      Saved::visit([](const moe::ParameterInfo&, auto& array) { array.setConstant(-1); }, loaded);
      ASSERT_NO_THROW(moe::load_layer(Checkpoint::open(saved_file(layout, name)), loaded));
      Saved::visit(
          [](const moe::ParameterInfo& info, const auto& a, const auto& b) { EXPECT_EQ(a, b) << info.name; },
          loaded, saved);
      ++files;
    });
    EXPECT_EQ(files, layout == "layout_1" ? 8 : 9);
  }
}

// An option with another value than the file says, or than its default where the file does not say.
TEST(SavedFiles, OfOtherOptionsAreRefused) {
  struct Case {
    std::function<void(moe::TopKOptions&)> change;
    std::string there, here;
  };
  // Thresholds need what the file does not have: a router without a bias, groups and input gates.
  const auto with_threshold = [](double second, double random) {
    return moe::TopKOptions{.d_model = 2,
                            .num_experts = 4,
                            .second_threshold = second,
                            .random_second_threshold = random,
                            .softmax_before_selection = false};
  };
  const std::vector<Case> cases{
      {[](auto& o) { o.top_k = 2; }, "top_k=1", "top_k=2"},
      {[](auto& o) { o.score = moe::Score::sqrt_softplus; }, "score=sigmoid", "score=sqrt_softplus"},
      {[](auto& o) { o.renormalise = false; }, "renormalise=true", "renormalise=false"},
      {[](auto& o) { o.renormalise_epsilon = 0; }, "renormalise_epsilon=9.9999999999999995e-21",
       "renormalise_epsilon=0"},
      {[](auto& o) { o.gate_scale = 1; }, "gate_scale=2.5", "gate_scale=1"},
      {[](auto& o) { o.gate_side = moe::GateSide::output; }, "gate_side=input", "gate_side=output"},
      {[](auto& o) { o.group_limit.kept = 2; }, "kept_groups=1", "kept_groups=2"},
      {[](auto& o) { o.group_limit.groups = 1; }, "groups=2", "groups=1"},
      {[](auto& o) { o.group_limit.score = moe::GroupScore::max; }, "group_score=top_two_sum",
       "group_score=max"},
      {[](auto& o) { o.noise_stddev = 0; }, "noise_stddev=0.10000000000000001", "noise_stddev=0"},
      {[](auto& o) { o.jitter = 0; }, "jitter=0.01", "jitter=0"},
      {[](auto& o) { o.capacity.reset(); }, "capacity=1.25", "capacity=none"},
      {[](auto& o) { o.training_capacity = 2; }, "training_capacity=1.5", "training_capacity=2"},
      {[](auto& o) { o.capacity_rule.rounding = moe::Rounding::nearest_even; }, "capacity_rounding=up",
       "capacity_rounding=nearest_even"},
      {[](auto& o) { o.capacity_rule.minimum = 4; }, "capacity_minimum=0", "capacity_minimum=4"},
      {[](auto& o) { o.capacity_rule.multiple_of = 4; }, "capacity_multiple_of=1", "capacity_multiple_of=4"},
      {[](auto& o) { o.overflow = moe::Overflow::drop; }, "overflow=pass_through", "overflow=drop"},
      {[](auto& o) { o.priority = moe::Priority::token_max_prob; }, "priority=assignment_gate",
       "priority=token_max_prob"},
      {[](auto& o) { o.renormalise_after_drop = false; }, "renormalise_after_drop=true",
       "renormalise_after_drop=false"},
  };
  const auto message = [](const Checkpoint& file, auto layer) -> std::string {
    try {
      moe::load_layer(file, layer);
    } catch (const moe::CheckpointError& error) {
      return error.what();
    }
    return "";
  };
  const auto refused = [](const Checkpoint& file, const std::string& there, const std::string& here) {
    return "load_layer: " + file.path().string() + " was saved with router = " + there + ", expected " + here;
  };
  for (const std::string& layout : kLayouts) {
    const Checkpoint file = Checkpoint::open(saved_file(layout, "top_k.safetensors"));
    for (const Case& c : cases) {
      moe::TopKOptions options = saved_top_k_options();
      c.change(options);
      EXPECT_EQ(message(file, saved_top_k_layer(options)), refused(file, c.there, c.here));
    }
    const Checkpoint plain = Checkpoint::open(saved_file(layout, "softmax_after.safetensors"));
    const auto with = [&](const moe::TopKOptions& options) {
      return message(plain, io_test::layer_of(moe::TopKRouter<float>(options)));
    };
    EXPECT_EQ(with(with_threshold(0, 0)), "");
    EXPECT_EQ(with(with_threshold(0.25, 0)), refused(plain, "second_threshold=0", "second_threshold=0.25"));
    EXPECT_EQ(with(with_threshold(0, 0.25)),
              refused(plain, "random_second_threshold=0", "random_second_threshold=0.25"));
    const Checkpoint top_p = Checkpoint::open(saved_file(layout, "top_p.safetensors"));
    EXPECT_EQ(message(top_p, io_test::layer_of(moe::TopKRouter<float>(
                                 {.d_model = 2, .num_experts = 4, .top_k = 4, .top_p = 0.5}))),
              refused(top_p, "top_p=0.40000000000000002", "top_p=0.5"));
    EXPECT_EQ(message(plain, io_test::layer_of(moe::TopKRouter<float>({.d_model = 2, .num_experts = 4}))),
              refused(plain, "softmax_before_selection=false", "softmax_before_selection=true"));
  }
  // Units, in files that describe them.
  for (const std::string& layout : {kLayouts[2], kLayouts[3], kLayouts[4]}) {
    auto layer = saved_top_k_layer(saved_top_k_options(), {.alpha = 1.5, .limit = 7, .offset = 0.5});
    expect_error(
        layout, [&] { moe::load_layer(Checkpoint::open(saved_file(layout, "top_k.safetensors")), layer); },
        {"experts = 4 x GatedFeedForward(ClampedSwiGLU(alpha=1.5 limit=6.5 offset=0.5)), expected 4 x",
         "(alpha=1.5 limit=7 offset=0.5)"});
  }
}

// The metadata of a file of this version: options by name, where they are not at their defaults.
TEST(SavedFiles, SayWhatIsNotAtItsDefault) {
  const TemporaryDirectory directory;
  const auto path = directory / "layer.safetensors";
  std::map<std::string, std::map<std::string, std::string>> metadata;
  io_test::for_each_saved_layer([&](const std::string& name, const auto& layer) {
    moe::save_layer(path, layer);
    metadata[name] = Checkpoint::open(path).metadata();
  });
  EXPECT_EQ(metadata.at("top_k.safetensors"),
            (std::map<std::string, std::string>{
                {"format", "moe"},
                {"moe_version", MOE_VERSION_STRING},
                {"experts", "4 x GatedFeedForward(ClampedSwiGLU(alpha=1.5 limit=6.5 offset=0.5))"},
                {"shared_experts", "1 x GatedFeedForward(ClampedSwiGLU(alpha=1.5 limit=6.5 offset=0.5))"},
                {"router",
                 "d_model=2 num_experts=4 top_k=1 score=sigmoid renormalise=true "
                 "renormalise_epsilon=9.9999999999999995e-21 gate_scale=2.5 gate_side=input groups=2 "
                 "group_score=top_two_sum noise_stddev=0.10000000000000001 jitter=0.01 capacity=1.25 "
                 "training_capacity=1.5 overflow=pass_through priority=assignment_gate "
                 "renormalise_after_drop=true"}}));
  const auto router = [&](const std::string& name) {
    return metadata.at(name + ".safetensors").at("router");
  };
  EXPECT_EQ(router("softmax_after"), "d_model=2 num_experts=4 softmax_before_selection=false");
  EXPECT_EQ(router("noisy_top_k"), "d_model=2 num_experts=4 top_k=3 noise_epsilon=0.5 capacity=2");
  EXPECT_EQ(router("sinkhorn"), "d_model=2 num_experts=4 top_k=2 tolerance=0.125 max_iterations=7");
  EXPECT_EQ(router("sparse_mixer"), "d_model=2 num_experts=4 jitter=0.25");
  EXPECT_EQ(router("expert_choice"), "d_model=2 num_experts=4 capacity=1.5 overflow=pass_through");
  EXPECT_EQ(router("hash"), "d_model=2 num_experts=4 capacity=1.25");
  EXPECT_EQ(router("hierarchical"),
            "parent(d_model=2 num_experts=2) children(1 x d_model=2 num_experts=2, "
            "1 x d_model=2 num_experts=2 gate_scale=2.5)");
}

// A later version's option that is not at its default, wherever it stands.
TEST(SavedFiles, OfOptionsThatAreNotKnownAreRefused) {
  const TemporaryDirectory directory;
  const auto path = directory / "layer.safetensors";
  // Loads a layer's file with `added` after the first `after` of what it says of a part.
  const auto load_with = [&](auto layer, const std::string& part, const std::string& after,
                             const std::string& added, const std::map<std::string, std::string>& more = {}) {
    moe::save_layer(path, layer);
    const Checkpoint file = Checkpoint::open(path);
    std::map<std::string, std::string> metadata = file.metadata();
    for (const auto& [key, value] : more) metadata[key] = value;
    std::string& text = metadata.at(part);
    text.insert(text.find(after) + after.size(), added);
    std::vector<moe::TensorToWrite> tensors;
    for (const std::string& name : file.names()) tensors.push_back(file.at(name));
    moe::write_safetensors(path, tensors, metadata);
    moe::load_layer(Checkpoint::open(path), layer);
  };
  const auto layer = saved_top_k_layer(saved_top_k_options());
  EXPECT_NO_THROW(load_with(layer, "router", "", ""));
  expect_error(
      "router",
      [&] {
        load_with(layer, "router", "gate_scale=2.5", " cube=3", {{"moe_version", "7.8.9"}});
      },
      {path.string(), "router option cube=3", "this version, " MOE_VERSION_STRING, "written by 7.8.9"});
  expect_error("unit", [&] { load_with(layer, "shared_experts", "alpha=1.5", " beta=2"); },
               {"shared_experts option beta=2", "written by " MOE_VERSION_STRING});
  const moe::TopKRouter<float> two({.d_model = 2, .num_experts = 2});
  const auto tree = io_test::layer_of(moe::HierarchicalRouter<moe::TopKRouter<float>>(two, {two, two}));
  expect_error("child", [&] { load_with(tree, "router", "children(2 x d_model=2", " cube=3"); },
               {"option cube=3"});
  expect_error("parent", [&] { load_with(tree, "router", "parent(d_model=2", " cube=3"); },
               {"option cube=3"});
  // What is no list of options is another description.
  for (const std::string text : {"!", " ", " =1", " top_k=1", "("})
    EXPECT_THROW(load_with(layer, "router", "d_model=2 num_experts=4", text), moe::CheckpointError) << text;
}

// ---- Text of options.

template <class Options>
void expect_text(const Options& changed, const std::string& short_text) {
  const std::string all = options_text(changed);
  EXPECT_EQ(LeaveDefaultsOut()(all, Options{}), short_text);
  std::vector<std::string> unknown;
  EXPECT_EQ(AddDefaults{unknown}(short_text, Options{}), all);
  EXPECT_EQ(AddDefaults{unknown}("", Options{}), options_text(Options{}));
  EXPECT_TRUE(unknown.empty());
}

TEST(OptionsText, NamesEveryOptionOfEveryRouter) {
  const moe::CapacityRule rule{.rounding = moe::Rounding::down, .minimum = 3, .multiple_of = 2};
  const std::string rule_text = " capacity_rounding=down capacity_minimum=3 capacity_multiple_of=2";
  expect_text(moe::NoisyTopKOptions{1, 2, 3, 0.5, 1.5, 2.5, rule, moe::Overflow::next_best,
                                    moe::Priority::token_max_gate, true, true},
              "d_model=1 num_experts=2 top_k=3 noise_epsilon=0.5 capacity=1.5 training_capacity=2.5" +
                  rule_text + " overflow=next_best priority=token_max_gate renormalise_after_drop=true");
  expect_text(
      moe::SinkhornOptions{1, 2, 3, 0.5, 7, 1.5, 2.5, rule, moe::Overflow::next_best,
                           moe::Priority::token_max_prob},
      "d_model=1 num_experts=2 top_k=3 tolerance=0.5 max_iterations=7 capacity=1.5 training_capacity=2.5" +
          rule_text + " overflow=next_best priority=token_max_prob");
  expect_text(moe::SparseMixerOptions{1, 2, 0.5}, "d_model=1 num_experts=2 jitter=0.5");
  expect_text(moe::ExpertChoiceOptions{1, 2, 1.5, rule, moe::Overflow::pass_through},
              "d_model=1 num_experts=2 capacity=1.5" + rule_text + " overflow=pass_through");
  expect_text(moe::HashOptions{1, 2, {}, 1.5, rule, moe::Overflow::pass_through},
              "d_model=1 num_experts=2 capacity=1.5" + rule_text + " overflow=pass_through");
  expect_text(moe::ClampedSwiGLU{1, 2, 3}, "alpha=1 limit=2 offset=3");
  expect_text(moe::TopKOptions{}, "");
}

// Numbers of enumerators as files had them, those that there are not as they stand.
TEST(OptionsText, ReadsNumbersOfEnumerators) {
  const auto read = [](const std::string& text) {
    std::vector<std::string> unknown;
    return LeaveDefaultsOut()(AddDefaults{unknown}(text, moe::TopKOptions{}), moe::TopKOptions{});
  };
  EXPECT_EQ(read("score=1 gate_side=1 group_score=1 capacity_rounding=1 overflow=1 priority=1"),
            "score=sigmoid gate_side=input group_score=top_two_sum capacity_rounding=down overflow=next_best "
            "priority=token_max_gate");
  EXPECT_EQ(
      read("score=2 capacity_rounding=2 overflow=2 priority=2"),
      "score=sqrt_softplus capacity_rounding=nearest_even overflow=pass_through priority=assignment_gate");
  EXPECT_EQ(read("score=3 priority=3"), "score=relu priority=token_max_prob");
  EXPECT_EQ(read("score=0 gate_side=0 group_score=0 capacity_rounding=0 overflow=0 priority=0"), "");
  EXPECT_EQ(read("score=4 gate_side=-1 overflow=1x priority="), "score=4 gate_side=-1 overflow=1x priority=");
  EXPECT_EQ(read("score=99999999999"), "score=99999999999");
}

}  // namespace
