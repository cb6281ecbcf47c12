// SPDX-License-Identifier: MIT
// Layers whose experts are packed in several formats.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "fp16_format.hpp"
#include "packed/packed_testing.hpp"
#include "sanitized.hpp"

namespace moe::mixed_formats_test {
namespace {

using packed_testing::available_sets;
using packed_testing::Backwards;
using packed_testing::message_of;
using packed_testing::same_bits;

using Gated = GatedFeedForward<float>;
using Plain = FeedForward<float, GELU>;
using Router = TopKRouter<float>;

template <class E>
MoELayer<E, Router> draw_layer(Index d_model, Index num_experts, Index num_shared, Rng& rng) {
  const Index awkward[] = {1,   31,  64,  65,
                           129, 513, 600, 1100};  // from 513 on hidden rows have several blocks
  const auto draw = [&](Index count) {
    std::vector<E> experts;
    for (Index e = 0; e < count; ++e) {
      E expert({.d_model = d_model, .d_ff = awkward[rng.index(8)], .bias = rng.index(2) == 0}, rng);
      E::visit(
          [&](const ParameterInfo&, auto& p) {
            if (p.cols() == 1) fill_normal(p, 0.5, rng);
          },
          expert);
      experts.push_back(std::move(expert));
    }
    return experts;
  };
  auto experts = draw(num_experts);
  return {std::move(experts),
          Router({.d_model = d_model, .num_experts = num_experts, .top_k = 1 + rng.index(num_experts)}, rng),
          SharedExperts<E>{draw(num_shared)}};
}

// The layer with the weights of each expert rounded by its own format.
template <Format... F, class E>
MoELayer<E, Router> rounded(MoELayer<E, Router> layer, const std::vector<Index>& positions) {
  for (Index e = 0; e < Index(positions.size()); ++e) {
    const Index routed = layer.num_experts();
    E& expert =
        e < routed ? layer.experts()[std::size_t(e)] : layer.shared_experts()[std::size_t(e - routed)];
    Index position = 0;
    const auto round_if = [&]<Format Of>(Of) {
      if (position++ != positions[std::size_t(e)]) return;
      E::visit(
          [](const ParameterInfo& info, auto& p) {
            const bool weight = info.name.str().find("w_") != std::string::npos;
            for (Index i = 0; weight && i < p.rows(); ++i) Of::round(&p(i, 0), p.cols());
          },
          expert);
    };
    (round_if(F()), ...);
  }
  return layer;
}

std::vector<Index> draw_positions(Index count, Index formats, Rng& rng) {
  std::vector<Index> positions;
  for (Index e = 0; e < count; ++e) positions.push_back(rng.index(formats));
  return positions;
}

template <class E, Format... F>
void expect_bits_of_the_rounded_layer(Rng& rng) {
  const Index awkward[] = {8, 31, 33, 64, 65, 100, 129, 600};
  const Index num_experts = 1 + rng.index(5), num_shared = rng.index(3), d_model = awkward[rng.index(8)];
  const auto layer = draw_layer<E>(d_model, num_experts, num_shared, rng);
  const auto positions = draw_positions(num_experts + num_shared, sizeof...(F), rng);
  const auto format_of = [&](Index e) { return positions[std::size_t(e)]; };
  const auto as_floats = rounded<F...>(layer, positions);
  const Index tokens = rng.index(10) == 0 ? 257 : 1 + rng.index(12);
  Matrix<float> x(tokens, d_model);
  fill_normal(x, 1.0, rng);
  for (const InstructionSet set : available_sets()) {
    if (set == InstructionSet::amx) continue;  // its sums of bfloat16 have another order
    const auto packed = pack<F...>(layer, format_of, {.instruction_set = set});
    const Matrix<float> expected = pack<F32>(as_floats, {.instruction_set = set}).forward(x);
    PackedWorkspace workspace;  // for all executors
    Matrix<float> y;
    for (const Index workers : {7, 1, 3}) {
      packed.forward(x, y, workspace, {}, Backwards{workers});
      ASSERT_TRUE(same_bits(y, expected)) << name_of(set) << ", " << workers << " workers";
    }
    const Index t = rng.index(tokens);
    ASSERT_TRUE(same_bits(packed.forward(x.row(t)), expected.row(t))) << name_of(set) << ", token " << t;
  }
}

TEST(MixedFormats, APackedLayerHasTheBitsOfFloatsOfWhichEachExpertsAreRoundedByItsFormat) {
  Rng rng(1);
  for (int trial = 0; trial < (kSanitized ? 4 : 15); ++trial) {
    expect_bits_of_the_rounded_layer<Gated, Int4, Int8>(rng);
    expect_bits_of_the_rounded_layer<Plain, F32, BF16, FP8>(rng);
    expect_bits_of_the_rounded_layer<Gated, MXFP4, test::Fp16, BF16, Int4Offset, F32, Int8>(rng);
    if (HasFatalFailure()) return;
  }
}

// Where activations of some experts are in other numbers: each expert alone gives what it adds to the output,
// in ascending order by one fused multiply-add. Alone it is packed in its format, so that this holds for sums
// of any order; experts in blocks of rows of floats and others are neighbours.
void expect_sums_of_experts_alone(const PackOptions& options, Rng& rng) {
  const InstructionSet set = *options.instruction_set;
  const auto layer = draw_layer<Gated>(70, 5, 2, rng);
  std::vector<Index> positions = draw_positions(7, 3, rng);
  positions[std::size_t(1 + rng.index(6))] = 1;
  const auto format_of = [&](Index e) { return positions[std::size_t(e)]; };
  positions[0] = 0;
  const auto packed = pack<Int8, BF16, F32>(layer, format_of, options);
  for (const Index tokens : {1, 5, 300}) {
    Matrix<float> x(tokens, 70);
    fill_normal(x, 1.0, rng);
    const Routing<float> routing = packed.route(x);
    const DispatchPlan<float>& plan = routing.plan;
    Matrix<float> expected = Matrix<float>::Zero(tokens, 70);
    const auto add = [&]<Format F>(F, const Gated& expert, Index e) {
      PackOptions own = options;
      own.bf16_dot_product &= DotFormat<F>;
      own.int8_activations &= Int8Format<F>;
      const MoELayer alone(std::vector<Gated>{expert},
                           Router({.d_model = 70, .num_experts = 1, .top_k = 1}, rng));
      const auto one = pack<F>(alone, own);
      const Matrix<float> output = one.forward(x);
      const auto add_row = [&](Index t, float gate) {
        for (Index j = 0; j < 70; ++j) expected(t, j) = std::fma(gate, output(t, j), expected(t, j));
      };
      if (e >= 5)
        for (Index t = 0; t < tokens; ++t) add_row(t, 1);
      else
        for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
          add_row(plan.token[a], plan.gate[a]);
    };
    for (Index e = 0; e < 7; ++e) {
      const Gated& expert =
          e < 5 ? layer.experts()[std::size_t(e)] : layer.shared_experts()[std::size_t(e - 5)];
      if (format_of(e) == 0) add(Int8(), expert, e);
      if (format_of(e) == 1) add(BF16(), expert, e);
      if (format_of(e) == 2) add(F32(), expert, e);
    }
    for (const Index workers : {1, 3, 8})
      ASSERT_TRUE(same_bits(packed.forward(x, BatchInfo{}, Backwards{workers}), expected))
          << name_of(set) << ", " << tokens << " tokens, " << workers << " workers";
    ASSERT_TRUE(same_bits(packed.forward(x.row(tokens - 1)), expected.row(tokens - 1))) << name_of(set);
  }
}

TEST(MixedFormats, ExpertsWithRoundedActivationsStandBesideOthers) {
  Rng rng(2);
  for (int trial = 0; trial < (kSanitized ? 2 : 4); ++trial)
    for (const InstructionSet set : available_sets()) {
      if (set == InstructionSet::portable) continue;  // whether it fuses is up to the compiler
      const bool dot = kernels::find_dot(set, true) != nullptr, int8 = int8_product_of<Int8>(set) != nullptr;
      expect_sums_of_experts_alone({.instruction_set = set}, rng);
      if (dot) expect_sums_of_experts_alone({.instruction_set = set, .bf16_dot_product = true}, rng);
      if (int8) expect_sums_of_experts_alone({.instruction_set = set, .int8_activations = true}, rng);
      if (dot && int8)
        expect_sums_of_experts_alone(
            {.instruction_set = set, .bf16_dot_product = true, .int8_activations = true}, rng);
      if (HasFatalFailure()) return;
    }
}

TEST(MixedFormats, ActivationsAreRoundedWhereTheFormatHasAProductForThat) {
  Rng rng(3);
  const auto layer = draw_layer<Gated>(64, 2, 1, rng);
  const auto shared_is_bf16 = [](Index e) { return e == 2 ? 1 : 0; };
  const auto pack_all = [&](InstructionSet set, bool dot = true) {
    return pack<Int8, BF16>(layer, shared_is_bf16, {.instruction_set = set, .bf16_dot_product = dot});
  };
  Matrix<float> x(3, 64);
  fill_normal(x, 1.0, rng);
  for (const InstructionSet set : available_sets())
    if (kernels::find_dot(set, true) == nullptr)
      EXPECT_EQ(message_of([&] { pack_all(set); }),
                std::string("pack: bf16_dot_product = true, but this processor has none for ") +
                    name_of(set) + ", expected false");
    else
      EXPECT_FALSE(same_bits(pack_all(set).forward(x), pack_all(set, false).forward(x))) << name_of(set);
  // Formats of the list that no expert has do not count.
  const auto none = [](Index) { return 0; };
  EXPECT_EQ(message_of([&] { pack<Int8, BF16>(layer, none, {.bf16_dot_product = true}); }),
            "pack: bf16_dot_product = true, but the weights are not packed as BF16, expected false");
}

TEST(MixedFormats, AmxIsAskedForWhereSomeExpertIsMultipliedByIt) {
  Rng rng(4);
  const auto layer = draw_layer<Gated>(64, 2, 1, rng);
  const auto with_bf16_for = [&](Index expert) {
    return pack<Int8, BF16>(layer, [&](Index e) { return e == expert; }).instruction_set();
  };
  EXPECT_EQ(with_bf16_for(-1), best_instruction_set());
  for (const Index e : {0, 2})
    EXPECT_EQ(with_bf16_for(e),
              is_available(InstructionSet::amx) ? InstructionSet::amx : best_instruction_set());
}

TEST(MixedFormats, MemoryIsThatOfEachExpert) {
  Rng rng(5);
  const Gated::Options options{.d_model = 64, .d_ff = 128};
  const Router router({.d_model = 64, .num_experts = 2, .top_k = 1}, rng);
  const MoELayer layer(make_experts<Gated>(2, options, rng), router, {make_experts<Gated>(1, options, rng)});
  const auto packed = pack<F32, BF16, Int8>(layer, [](Index e) { return e; });
  EXPECT_EQ(packed.memory_bytes(), 3u * 64 * 128 * 4 + 3u * 64 * 128 * 2 + 3u * 64 * 128 / 32 * 34);
}

TEST(MixedFormats, TakesExpertsOneAtATime) {
  Rng rng(6);
  const auto layer = draw_layer<Gated>(48, 4, 2, rng);
  const auto format_of = [](Index e) { return e % 3; };
  Index made = 0;
  const auto expert = [&](Index e) {
    EXPECT_EQ(e, made++);
    return e < 4 ? layer.experts()[std::size_t(e)] : layer.shared_experts()[std::size_t(e - 4)];
  };
  const PackedParts<Router> parts{layer.router(), 2};
  const auto fast = pack<Int4, FP8, F32>(parts, expert, format_of);
  EXPECT_EQ(made, 6);
  Matrix<float> x(9, 48);
  fill_normal(x, 1.0, rng);
  EXPECT_TRUE(same_bits(fast.forward(x), (pack<Int4, FP8, F32>(layer, format_of).forward(x))));
  const auto copy = fast;  // shares the weights
  EXPECT_TRUE(same_bits(copy.forward(x), fast.forward(x)));
}

TEST(MixedFormats, PositionsThatAreNoneAreRefusedBeforeTheFirstExpertIsAskedFor) {
  Rng rng(7);
  const auto layer = draw_layer<Gated>(16, 3, 1, rng);
  const auto refused = [&](Index expert, Index position) {
    const auto format_of = [&](Index e) { return e == expert ? position : 0; };
    const std::string message = message_of([&] { pack<Int4, Int8>(layer, format_of); });
    Index asked = 0;
    const auto source = [&](Index) -> const Gated& {
      ++asked;
      return layer.experts()[0];
    };
    const PackedParts<Router> parts{layer.router(), 1};
    EXPECT_EQ(message_of([&] { pack<Int4, Int8>(parts, source, format_of); }), message);
    EXPECT_EQ(asked, 0);
    return message;
  };
  EXPECT_EQ(refused(1, 2), "pack: the format of expert 1 is at position 2, expected 0 to 1");
  EXPECT_EQ(refused(0, -1), "pack: the format of expert 0 is at position -1, expected 0 to 1");
  EXPECT_EQ(refused(3, 7), "pack: the format of expert 3 is at position 7, expected 0 to 1");
}

}  // namespace
}  // namespace moe::mixed_formats_test
