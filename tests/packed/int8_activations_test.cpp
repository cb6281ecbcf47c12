// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "packed/packed_testing.hpp"
#include "sanitized.hpp"

// Packed layers whose activations are rounded to 8 bits; their products: tests/kernels.
namespace moe::int8_activations_test {
namespace {

using packed_testing::message_of;
using packed_testing::same_bits;

using Gated = GatedFeedForward<float>;

// Not AVX-512 where it has no VNNI.
std::vector<InstructionSet> sets_with_int8() {
  auto sets = packed_testing::available_sets(false);
  std::erase_if(sets, [](InstructionSet set) { return !int8_product_of<Int8>(set); });
  return sets;
}

PackOptions rounded_on(InstructionSet set) { return {.instruction_set = set, .int8_activations = true}; }

template <class F>
class Int8Activations : public testing::Test {};
using Formats = testing::Types<Int8, Int4, Int4Offset, MXFP4>;
TYPED_TEST_SUITE(Int8Activations, Formats);

template <class E>
MoELayer<E, TopKRouter<float>> draw_layer(Index d_model, Index d_ff, Index num_experts, bool bias, Rng& rng) {
  const auto draw = [&](Index count) {
    return make_experts<E>(count, {.d_model = d_model, .d_ff = d_ff, .bias = bias}, rng);
  };
  return {draw(num_experts),
          TopKRouter<float>(
              {.d_model = d_model, .num_experts = num_experts, .top_k = 1 + rng.index(num_experts)}, rng),
          SharedExperts<E>{draw(rng.index(2))}};
}

// Rows of numbers in blocks of 32, of which the largest magnitude becomes 127.
Matrix<double> rounded(const Matrix<double>& x) {
  Matrix<double> y = x;
  for (Index i = 0; i < x.rows(); ++i)
    for (Index p = 0; p < x.cols(); p += 32) {
      auto block = y.row(i).segment(p, std::min<Index>(32, x.cols() - p));
      const double scale = block.cwiseAbs().maxCoeff() / 127;
      if (scale > 0) block = (block / scale).array().rint().matrix() * scale;
    }
  return y;
}

// The layer in double, of weights rounded to a format, rows rounded before every product or not.
template <class F>
Matrix<double> expected(const MoELayer<Gated, TopKRouter<float>>& layer, const Matrix<float>& x,
                        bool rounds) {
  const auto weights = [](Matrix<float> w) {
    for (Index i = 0; i < w.rows(); ++i) F::round(&w(i, 0), w.cols());
    return Matrix<double>(w.template cast<double>());
  };
  const auto rows = [rounds](const Matrix<double>& m) { return rounds ? rounded(m) : m; };
  const auto run = [&](const Gated& expert, const Matrix<double>& from) {
    const Matrix<double> in = rows(from), gate = in * weights(expert.w_gate).transpose();
    const Matrix<double> up = in * weights(expert.w_up).transpose();
    const Matrix<double> hidden = (gate.array() / (1 + (-gate.array()).exp()) * up.array()).matrix();
    return Matrix<double>(rows(hidden) * weights(expert.w_down).transpose());
  };
  const Routing<float> routing = layer.route(x);
  Matrix<double> y = Matrix<double>::Zero(x.rows(), x.cols());
  for (Index e = 0; e < layer.num_experts(); ++e)
    for (Index a = routing.plan.expert_begin[e]; a < routing.plan.expert_begin[e + 1]; ++a) {
      const Index t = routing.plan.token[a];
      y.row(t) += double(routing.plan.gate[a]) *
                  run(layer.experts()[std::size_t(e)], x.row(t).template cast<double>());
    }
  for (const Gated& shared : layer.shared_experts()) y += run(shared, x.template cast<double>());
  return y;
}

TYPED_TEST(Int8Activations, RowsAreRoundedBeforeEveryProductAndNothingElse) {
  Rng rng(1);
  for (const auto& [d, f] : {std::pair<Index, Index>{64, 96}, {33, 70}, {200, 131}}) {
    const auto layer = draw_layer<Gated>(d, f, 4, false, rng);
    Matrix<float> x(9, d);
    fill_normal(x, 1.0, rng);
    const Matrix<double> with = expected<TypeParam>(layer, x, true),
                         without = expected<TypeParam>(layer, x, false);
    const double effect = (with - without).norm();
    EXPECT_LT(effect, 0.03 * without.norm());
    for (const InstructionSet set : sets_with_int8()) {
      const Matrix<double> y = pack<TypeParam>(layer, rounded_on(set)).forward(x).template cast<double>();
      // A hidden value between two codes may be rounded to the other one.
      EXPECT_LT((y - with).norm(), 0.1 * effect) << name_of(set) << ' ' << d << ' ' << f;
    }
  }
}

TYPED_TEST(Int8Activations, ATokenHasTheSameBitsAloneAndAmongOthersOnEveryInstructionSet) {
  Rng rng(2);
  const Index awkward[] = {1, 8, 24, 31, 32, 33, 64, 65, 100, 129, 200};
  for (int trial = 0; trial < (kSanitized ? 6 : 60); ++trial) {
    const Index d = awkward[rng.index(11)], f = awkward[rng.index(11)];
    const Index tokens = trial % 20 == 0 ? 257 : 1 + rng.index(12);
    const auto layer = draw_layer<FeedForward<float, GELU>>(d, f, 1 + rng.index(4), rng.index(2) == 0, rng);
    Matrix<float> x(tokens, d), first;
    fill_normal(x, 1.0, rng);
    for (const InstructionSet set : sets_with_int8()) {
      const auto packed = pack<TypeParam>(layer, rounded_on(set));
      const Matrix<float> y = packed.forward(x);
      const Index t = rng.index(tokens);
      ASSERT_TRUE(same_bits(packed.forward(x.row(t)), y.row(t))) << name_of(set) << ", " << d << ", " << f;
      if (set == InstructionSet::portable) continue;
      if (first.size() == 0) first = y;
      ASSERT_TRUE(same_bits(y, first)) << name_of(set) << ", " << d << ", " << f << ", " << tokens;
    }
  }
}

TYPED_TEST(Int8Activations, WidthsOfPublishedModelsRun) {
  Rng rng(3);
  for (const auto& [d, f] : {std::pair<Index, Index>{2880, 96}, {96, 2880}, {1408, 40}, {24, 1408}}) {
    const auto layer = draw_layer<Gated>(d, f, 2, true, rng);
    Matrix<float> x(7, d);
    fill_normal(x, 1.0, rng);
    const Matrix<float> exact = pack<TypeParam>(layer).forward(x);
    const Matrix<float> y = pack<TypeParam>(layer, {.int8_activations = true}).forward(x);
    EXPECT_LT((y - exact).norm(), 0.03f * exact.norm()) << d << ' ' << f;
    EXPECT_GT((y - exact).norm(), 0) << d << ' ' << f;
  }
}

TYPED_TEST(Int8Activations, ANumberThatIsNoneMakesItsTokenNaN) {
  Rng rng(4);
  MoELayer<Gated, TopKRouter<float>> layer(
      make_experts<Gated>(2, {.d_model = 70, .d_ff = 40}, rng),
      TopKRouter<float>({.d_model = 70, .num_experts = 2, .top_k = 2}, rng));
  Matrix<float> x(5, 70);
  fill_normal(x, 1.0, rng);
  Routing<float> routing = layer.route(x);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    x(3, 50) = bad;
    for (const InstructionSet set : sets_with_int8()) {
      const Matrix<float> y = pack<TypeParam>(layer, rounded_on(set)).forward(x, routing);
      EXPECT_TRUE(y.row(3).array().isNaN().all()) << name_of(set);
      EXPECT_EQ(y.array().isNaN().count(), 70) << name_of(set);
    }
  }
}

TYPED_TEST(Int8Activations, GatesMayScaleInputs) {
  Rng rng(5);
  const MoELayer<Gated, TopKRouter<float>> layer(
      make_experts<Gated>(4, {.d_model = 64, .d_ff = 32}, rng),
      TopKRouter<float>({.d_model = 64, .num_experts = 4, .top_k = 2, .gate_side = GateSide::input}, rng));
  Matrix<float> x(9, 64);
  fill_normal(x, 1.0, rng);
  const Matrix<float> exact = pack<TypeParam>(layer).forward(x);
  EXPECT_LT((pack<TypeParam>(layer, {.int8_activations = true}).forward(x) - exact).norm(),
            0.03f * exact.norm());
}

TEST(Int8ActivationsOption, IsRefusedWhereNoWeightsAreIntegers) {
  Rng rng(6);
  const auto layer = draw_layer<Gated>(8, 8, 2, false, rng);
  const std::string message =
      "pack: int8_activations = true, but the weights are not packed as Int8, Int4, Int4Offset or MXFP4, "
      "expected false";
  EXPECT_EQ(message_of([&] { pack<F32>(layer, {.int8_activations = true}); }), message);
  EXPECT_EQ(message_of([&] { pack<BF16>(layer, {.int8_activations = true}); }), message);
  EXPECT_EQ(message_of([&] { pack<FP8>(layer, {.int8_activations = true}); }), message);
  EXPECT_THAT(message_of([&] { pack<Int8>(layer, {.bf16_dot_product = true}); }),
              testing::HasSubstr("bf16_dot_product = true"));
  EXPECT_THROW(PackedProduct(FP8(), InstructionSet::portable, {.to_int8 = true}), std::invalid_argument);
}

}  // namespace
}  // namespace moe::int8_activations_test
