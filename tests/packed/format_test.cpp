// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "fp16_format.hpp"
#include "packed/packed_testing.hpp"

namespace moe::format_test {
namespace {

using packed_testing::available_sets;
using packed_testing::same_bits;

using test::Fp16;

// The bytes of a stream of columns that are drawn, the second one of zeros.
template <class F>
std::vector<std::byte> encoded(Index depth, Index columns) {
  Rng rng(3);
  Matrix<float> weights(columns, 100);
  fill_normal(weights, 1.0, rng);
  std::vector<const float*> rows;
  for (Index j = 0; j < columns; ++j) rows.push_back(j == 1 ? nullptr : weights.row(j).data());
  std::vector<std::byte> bytes(std::size_t(F::bytes(depth) * columns));
  F::encode(rows.data(), depth, columns, columns, bytes.data());
  return bytes;
}

template <class F>
class FormatLaws : public testing::Test {};
using Formats = testing::Types<F32, BF16, Fp16, Int8, Int4, Int4Offset, MXFP4, FP8>;
TYPED_TEST_SUITE(FormatLaws, Formats);

// A product that begins at a block of the depth finds there what it would find in a panel of its own.
TYPED_TEST(FormatLaws, BlocksOfTheDepthFollowEachOther) {
  for (const Index columns : {1, 8, 16}) {
    const std::vector<std::byte> all = encoded<TypeParam>(99, columns);
    for (Index depth = TypeParam::kBlock; depth < 99; depth += TypeParam::kBlock) {
      const std::vector<std::byte> some = encoded<TypeParam>(depth, columns);
      ASSERT_TRUE(std::equal(some.begin(), some.end(), all.begin())) << depth << ", " << columns;
    }
  }
}

// What is kept of a format while a program runs knows how long columns are.
TYPED_TEST(FormatLaws, ColumnsAreWholeBlocks) {
  const PackedFormat format = packed_format<TypeParam>(InstructionSet::portable, {});
  for (Index depth = 0; depth < 200; ++depth)
    ASSERT_EQ(format.bytes(depth), TypeParam::bytes(depth)) << depth;
}

TYPED_TEST(FormatLaws, EveryAvailableSetHasAProduct) {
  for (const auto set :
       {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::amx})
    EXPECT_EQ(TypeParam::find_product(set) != nullptr, is_available(set)) << name_of(set);
}

TEST(BF16, HoldsPairsOfAColumnAndFillsUpTheLastOne) {
  const float first[] = {1.0f, -2.0f, 3.0f}, third[] = {0.5f, 1.00390625f, -0.0f};
  const float* const rows[] = {first, nullptr, third};
  ASSERT_EQ(BF16::bytes(3), 8);
  std::uint16_t bits[12];
  BF16::encode(rows, 3, 3, 3, reinterpret_cast<std::byte*>(bits));
  const std::uint16_t expected[] = {0x3F80, 0xC000, 0, 0, 0x3F00, 0x3F80, 0x4040, 0, 0, 0, 0x8000, 0};
  EXPECT_EQ(std::memcmp(bits, expected, sizeof bits), 0);
}

TEST(Fp16, RoundsAsEigenDoes) {
  for (std::uint32_t high = 0; high < 0x10000; ++high)
    for (const std::uint32_t low : {0u, 1u, 0xFFFu, 0x1000u, 0x1001u, 0x7FFFu, 0xFFFFu}) {
      const float value = std::bit_cast<float>((high << 16) | low);
      const Eigen::half expected(value);
      const float back = Fp16::widened(Fp16::rounded(value));
      ASSERT_TRUE((std::isnan(value) && std::isnan(back)) ||
                  std::bit_cast<std::uint32_t>(back) == std::bit_cast<std::uint32_t>(float(expected)))
          << value << ": " << back << ", expected " << float(expected);
    }
}

// A format is one header: the packed layer runs it, and gives the bits of floats that were rounded before.
template <class E>
void expect_bits_of_rounded_weights(const typename E::Options& options) {
  Rng rng(1);
  const auto draw = [&](Index count) {
    auto experts = make_experts<E>(count, options, rng);
    for (E& expert : experts)
      E::visit(
          [&](const ParameterInfo&, auto& p) {
            if (p.cols() == 1) fill_normal(p, 0.5, rng);
          },
          expert);
    return experts;
  };
  const auto rounded = [](std::vector<E> experts) {
    for (E& expert : experts)
      E::visit(
          [](const ParameterInfo&, auto& p) {
            if (p.cols() > 1) p = p.unaryExpr([](float w) { return float(Eigen::half(w)); }).eval();
          },
          expert);
    return experts;
  };
  const std::vector<E> routed = draw(2), shared = draw(1);
  const TopKRouter<float> router({.d_model = options.d_model, .num_experts = 2, .top_k = 2}, rng);
  const MoELayer layer(routed, router, SharedExperts<E>{shared});
  const MoELayer as_floats(rounded(routed), router, SharedExperts<E>{rounded(shared)});
  for (const InstructionSet set : available_sets()) {
    const auto halves = pack<Fp16>(layer, {.instruction_set = set});
    const auto floats = pack<F32>(as_floats, {.instruction_set = set});
    EXPECT_LT(halves.memory_bytes(), floats.memory_bytes());
    for (const Index tokens : {1, 3, 40}) {
      Matrix<float> x(tokens, options.d_model);
      fill_normal(x, 1.0, rng);
      EXPECT_TRUE(same_bits(halves.forward(x), floats.forward(x))) << name_of(set) << ", " << tokens;
    }
  }
}

TEST(Fp16, APackedLayerGivesTheBitsOfFloatsThatWereRoundedBefore) {
  expect_bits_of_rounded_weights<GatedFeedForward<float>>({.d_model = 601, .d_ff = 70});
  expect_bits_of_rounded_weights<GatedFeedForward<float>>({.d_model = 65, .d_ff = 1301, .bias = true});
  expect_bits_of_rounded_weights<FeedForward<float, GELU>>({.d_model = 66, .d_ff = 33, .bias = true});
}

TEST(Fp16, APackedLayerTakesTheBestSetForFloatsAndHasNoDotProduct) {
  Rng rng(2);
  const MoELayer layer(make_experts<FeedForward<float>>(2, {.d_model = 8, .d_ff = 8}, rng),
                       TopKRouter<float>({.d_model = 8, .num_experts = 2, .top_k = 1}, rng));
  EXPECT_EQ(pack<Fp16>(layer).instruction_set(), best_instruction_set());
  EXPECT_THROW(pack<Fp16>(layer, {.bf16_dot_product = true}), std::invalid_argument);
}

}  // namespace
}  // namespace moe::format_test
