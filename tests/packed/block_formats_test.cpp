// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <moe/io.hpp>
#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "packed/packed_testing.hpp"
#include "sanitized.hpp"

namespace moe::block_formats_test {
namespace {

using packed_testing::available_sets;
using packed_testing::same_bits;

using Gated = GatedFeedForward<float>;

template <class F>
class BlockFormats : public testing::Test {};
using Formats = testing::Types<Int8, Int4, Int4Offset, MXFP4, FP8>;
TYPED_TEST_SUITE(BlockFormats, Formats);

// ---- A packed layer has the bits of pack<F32> of the floats that its weights stand for.

template <class F, class E>
MoELayer<E, TopKRouter<float>> rounded(const MoELayer<E, TopKRouter<float>>& layer) {
  auto copy = layer;
  MoELayer<E, TopKRouter<float>>::visit(
      [](const ParameterInfo& info, auto& array) {
        const std::string name = info.name.str();
        if (!name.starts_with("router") && name.find(".w_") != std::string::npos)
          for (Index i = 0; i < array.rows(); ++i) F::round(&array(i, 0), array.cols());
      },
      copy);
  return copy;
}

template <class F, class E>
void expect_exact(Index d_model, Index d_ff, Index num_experts, Index tokens, bool bias, Rng& rng) {
  const auto draw = [&](Index count) {
    auto experts = make_experts<E>(count, {.d_model = d_model, .d_ff = d_ff, .bias = bias}, rng);
    for (E& expert : experts)
      E::visit(
          [&](const ParameterInfo&, auto& p) {
            if (p.cols() == 1) fill_normal(p, 0.5, rng);
          },
          expert);
    return experts;
  };
  const MoELayer<E, TopKRouter<float>> layer(
      draw(num_experts),
      TopKRouter<float>({.d_model = d_model, .num_experts = num_experts, .top_k = 1 + rng.index(num_experts)},
                        rng),
      SharedExperts<E>{draw(rng.index(2))});
  const auto as_floats = rounded<F>(layer);
  Matrix<float> x(tokens, d_model);
  fill_normal(x, 1.0, rng);
  for (const InstructionSet set : available_sets(false)) {
    const auto packed = pack<F>(layer, {.instruction_set = set});
    const auto floats = pack<F32>(as_floats, {.instruction_set = set});
    const Matrix<float> y = packed.forward(x);
    ASSERT_TRUE(same_bits(y, floats.forward(x)))
        << name_of(set) << ": " << d_model << ", " << d_ff << ", " << num_experts << ", " << tokens;
    const Index t = rng.index(tokens);  // a token alone
    ASSERT_TRUE(same_bits(packed.forward(x.row(t)), y.row(t))) << name_of(set) << ", " << t;
  }
}

TYPED_TEST(BlockFormats, APackedLayerHasTheBitsOfTheFloatsThatItStandsFor) {
  Rng rng(1);
  const Index awkward[] = {1, 8, 24, 31, 32, 33, 63, 64, 65, 96, 100, 128, 129, 200};
  for (int trial = 0; trial < (kSanitized ? 10 : 200); ++trial) {
    const Index d = awkward[rng.index(14)], f = awkward[rng.index(14)];
    const Index tokens = rng.index(20) == 0 ? 257 : 1 + rng.index(12);
    if (trial % 2 == 0)
      expect_exact<TypeParam, Gated>(d, f, 1 + rng.index(4), tokens, rng.index(2) == 0, rng);
    else
      expect_exact<TypeParam, FeedForward<float, GELU>>(d, f, 1 + rng.index(4), tokens, rng.index(2) == 0,
                                                        rng);
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(BlockFormats, APackedLayerOfOddPublishedWidthsHasThem) {
  Rng rng(2);
  for (const auto& [d, f] :
       {std::pair<Index, Index>{2880, 96}, {96, 2880}, {1408, 40}, {40, 1408}, {601, 517}})
    expect_exact<TypeParam, Gated>(d, f, 2, 7, true, rng);
  expect_exact<TypeParam, Gated>(33, 24, 60, 65, false, rng);
}

// ---- Blocks: what kernels make of them, and what they are made of.

// Columns of blocks through the product: c [depth, columns] = I * panel. A zero has no sign there.
template <class F>
Matrix<float> multiplied_out(const std::vector<std::vector<typename F::Block>>& columns, Index depth,
                             InstructionSet set) {
  const kernels::Kernels& kernels = *kernels::find(set);
  std::vector<const typename F::Block*> rows;
  for (Index j = 0; j < kernels.columns; ++j)
    rows.push_back(j < Index(columns.size()) ? columns[std::size_t(j)].data() : nullptr);
  std::vector<std::byte> panel(std::size_t(F::bytes(depth) * kernels.columns));
  const Index wide = kernels.columns / kernels.streams;
  for (Index j = 0; j < kernels.columns; j += wide)
    F::encode(rows.data() + j, depth, wide, kernels.lanes, panel.data() + j * F::bytes(depth));
  constexpr Index kStride = kernels::kRowStride<float>;
  std::vector<float> x(std::size_t(depth * kStride));
  for (Index p = 0; p < depth; ++p) x[std::size_t(p * kStride + p)] = 1;
  Matrix<float> c(depth, kernels.columns);
  F::find_product(set)->multiply(depth, depth, {x.data(), kStride, depth}, panel.data(),
                                 F::bytes(depth) * wide, 1, c.data(), false, panel.data());
  return c;
}

template <class Block>
Block random_block(Rng& rng) {
  Block block;
  auto* const bytes = reinterpret_cast<unsigned char*>(&block);
  for (std::size_t i = 0; i < sizeof block; ++i) bytes[i] = static_cast<unsigned char>(rng.index(256));
  return block;
}

// Any bits, but for NaN and what overflows: they would spread over a column.
template <class Block>
Block random_finite_block(Rng& rng) {
  Block block = random_block<Block>(rng);
  if constexpr (std::is_same_v<Block, kernels::MXFP4Block>)
    block.scale = std::uint8_t(rng.index(252));
  else if constexpr (std::is_same_v<decltype(block.scale), std::uint16_t>)
    block.scale = std::uint16_t(block.scale & 0x8000) | std::uint16_t(rng.index(0x7C00));
  else
    block.scale = float(int(rng.index(1 << 20)) - (1 << 19)) * std::ldexp(1.0f, int(rng.index(30)) - 40);
  if constexpr (requires { block.offset; }) block.offset = float(rng.uniform() - 0.5);
  if constexpr (std::is_same_v<Block, kernels::FP8Block>)
    for (auto& word : block.words)
      if ((word & 127) == 127) word ^= 1;
  return block;
}

TYPED_TEST(BlockFormats, KernelsMakeOfABlockTheNumbersThatItStandsFor) {
  using Block = typename TypeParam::Block;
  Rng rng(4);
  for (int trial = 0; trial < 50; ++trial) {
    const Index depth = 1 + rng.index(96), blocks = TypeParam::blocks(depth);
    std::vector<std::vector<Block>> columns(13);
    for (auto& column : columns)
      for (Index b = 0; b < blocks; ++b) column.push_back(random_finite_block<Block>(rng));
    for (const InstructionSet set : available_sets(false)) {
      const Matrix<float> c = multiplied_out<TypeParam>(columns, depth, set);
      for (Index j = 0; j < c.cols(); ++j)
        for (Index p = 0; p < depth; ++p) {
          const float expected =
              j < 13 ? TypeParam::number(columns[std::size_t(j)][std::size_t(p / TypeParam::kBlock)],
                                         p % TypeParam::kBlock)
                     : 0.0f;
          ASSERT_EQ(c(p, j), expected) << name_of(set) << ", " << p << ", " << j;
        }
    }
  }
}

TYPED_TEST(BlockFormats, NumbersThatAreNotFiniteMakeTheirBlockNaN) {
  for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> row(2 * TypeParam::kBlock, 0.25f);
    row[std::size_t(TypeParam::kBlock)] = bad;
    std::vector<std::vector<typename TypeParam::Block>> columns(1);
    for (Index b = 0; b < 2; ++b)
      columns[0].push_back(TypeParam::quantised(row.data() + b * TypeParam::kBlock, TypeParam::kBlock));
    EXPECT_NEAR(TypeParam::number(columns[0][0], 3), 0.25f, 1e-4f);
    EXPECT_TRUE(std::isnan(TypeParam::number(columns[0][1], 3)));
    for (const InstructionSet set : available_sets(false)) {
      columns[0].resize(1, columns[0][1]);
      EXPECT_TRUE(multiplied_out<TypeParam>({{columns[0][0]}}, 5, set).col(0).allFinite()) << name_of(set);
      const auto nan = TypeParam::quantised(row.data() + TypeParam::kBlock, TypeParam::kBlock);
      EXPECT_TRUE(multiplied_out<TypeParam>({{nan}}, 5, set).col(0).array().isNaN().all()) << name_of(set);
    }
  }
}

TYPED_TEST(BlockFormats, ZerosStayZerosAndABlockMayBeShort) {
  const std::vector<float> zeros(64, 0.0f);
  Rng rng(5);
  Matrix<float> w(1, 200);
  fill_normal(w, 1.0, rng);
  for (Index count = 1; count <= TypeParam::kBlock; ++count) {
    const auto zero = TypeParam::quantised(zeros.data(), count);
    for (Index i = 0; i < count; ++i) ASSERT_EQ(TypeParam::number(zero, i), 0.0f);
    Matrix<float> row = w.leftCols(count);
    TypeParam::round(row.data(), count);
    EXPECT_LT((row - w.leftCols(count)).norm(), 0.2f * w.leftCols(count).norm()) << count;
  }
}

// Of numbers drawn from a normal distribution, and of equal ones, which every format keeps well.
TYPED_TEST(BlockFormats, ErrorsAreThoseOfItsBits) {
  Rng rng(6);
  Matrix<float> w(1, 64 * 1024);
  fill_normal(w, 0.02, rng);
  Matrix<float> kept = w;
  TypeParam::round(kept.data(), kept.size());
  const double error = (kept - w).norm() / w.norm();
  const double most = std::is_same_v<TypeParam, Int8>         ? 0.005
                      : std::is_same_v<TypeParam, FP8>        ? 0.022
                      : std::is_same_v<TypeParam, Int4>       ? 0.083
                      : std::is_same_v<TypeParam, Int4Offset> ? 0.074
                                                              : 0.113;
  EXPECT_LT(error, most);
  EXPECT_GT(error, 0.8 * most);
}

template <class Block>
void set_code(Block& block, Index i, unsigned code) {
  if constexpr (std::is_same_v<Block, kernels::FP8Block>)
    block.words[i] = std::uint8_t(code);
  else if constexpr (std::is_same_v<Block, kernels::Int8Block>)
    block.words[i / 4] = (block.words[i / 4] & ~(255u << (8 * (i % 4)))) | code << (8 * (i % 4));
  else
    block.words[nibble_word(i)] =
        (block.words[nibble_word(i)] & ~(15u << nibble_bit(i))) | code << nibble_bit(i);
}

TYPED_TEST(BlockFormats, NoOtherCodeIsNearer) {
  Rng rng(11);
  constexpr bool kBytes = std::is_same_v<TypeParam, FP8> || std::is_same_v<TypeParam, Int8>;
  Matrix<float> w(20, TypeParam::kBlock);
  fill_normal(w, 1.0, rng);
  w.topRows(5) *= 1e-6f;
  w.bottomRows(5) *= 1e4f;
  for (Index row = 0; row < w.rows(); ++row) {
    const auto block = TypeParam::quantised(&w(row, 0), TypeParam::kBlock);
    for (Index i = 0; i < TypeParam::kBlock; ++i) {
      const double taken = std::abs(double(w(row, i)) - TypeParam::number(block, i));
      for (unsigned code = 0; code < (kBytes ? 256 : 16); ++code) {
        if (std::is_same_v<TypeParam, FP8> && code % 128 == 127) continue;  // NaN
        auto other = block;
        set_code(other, i, code);
        ASSERT_LE(taken, std::abs(double(w(row, i)) - TypeParam::number(other, i)) * 1.00001 + 1e-30)
            << row << ", " << i << ": " << code;
      }
    }
  }
}

TYPED_TEST(BlockFormats, RoundingTwiceChangesNextToNothing) {
  Rng rng(7);
  Matrix<float> w(1, 64 * 512);
  fill_normal(w, 0.02, rng);
  TypeParam::round(w.data(), w.size());
  Matrix<float> again = w;
  TypeParam::round(again.data(), again.size());
  EXPECT_LT((again - w).norm(), 0.01f * w.norm());
}

TEST(MXFP4, KeepsWhatWasStoredAsMXFP4) {
  Rng rng(8);
  for (int trial = 0; trial < 5000; ++trial) {
    auto block = random_finite_block<kernels::MXFP4Block>(rng);
    block.scale = std::uint8_t(3 + rng.index(250));
    const Index most = 1 + rng.index(8);  // of the magnitudes
    float numbers[32];
    for (Index i = 0; i < 32; ++i) {
      const std::uint32_t code = block.words[nibble_word(i)] >> nibble_bit(i) & 15;
      if (Index(code & 7) >= most) block.words[nibble_word(i)] &= ~(7u << nibble_bit(i));
    }
    for (Index i = 0; i < 32; ++i) numbers[i] = MXFP4::number(block, i);
    const auto again = MXFP4::quantised(numbers, 32);
    for (Index i = 0; i < 32; ++i)
      ASSERT_EQ(std::bit_cast<std::uint32_t>(MXFP4::number(again, i)),
                std::bit_cast<std::uint32_t>(numbers[i]))
          << trial << ", " << i;
  }
}

TEST(MXFP4, RoundsToNearestTiesToEven) {
  const float from[32] = {6.0f,  5.0f, 5.1f,  3.5f, 3.4f,  2.5f,  2.6f,  1.75f, 1.7f,  1.25f,  1.3f,
                          0.75f, 0.7f, 0.25f, 0.3f, -6.0f, -5.0f, -0.1f, 0.0f,  -3.5f, -0.75f, 4.4f};
  const float expected[22] = {6, 4,    6, 4,    3,  2,  3,     2, 1.5f, 1,  1.5f,
                              1, 0.5f, 0, 0.5f, -6, -4, -0.0f, 0, -4,   -1, 4};
  // The next power up rounds worse here, and so does the one below.
  const auto block = MXFP4::quantised(from, 32);
  ASSERT_EQ(block.scale, 127);
  for (Index i = 0; i < 22; ++i)
    EXPECT_EQ(std::bit_cast<std::uint32_t>(MXFP4::number(block, i)),
              std::bit_cast<std::uint32_t>(expected[i]))
        << i;
}

TEST(MXFP4, TakesTheLowerPowerWhereThatIsBetter) {
  std::vector<float> from(32, 0.25f);
  from[0] = 4;
  EXPECT_EQ(MXFP4::quantised(from.data(), 32).scale, 126);
}

TYPED_TEST(BlockFormats, TinyNumbersBesideZerosStayTiny) {
  for (const float tiny : {1e-37f, 1e-38f, 1e-40f}) {
    const float from[4] = {tiny, 0, 0, 0.3f * tiny};
    const auto block = TypeParam::quantised(from, 4);
    for (Index i = 0; i < 4; ++i)
      EXPECT_LE(std::abs(TypeParam::number(block, i)), 1.2f * from[i] + 0.05f * tiny) << tiny;
  }
}

TYPED_TEST(BlockFormats, SmallNumbersKeepTheirDigits) {
  Rng rng(12);
  Matrix<float> w(1, 64 * 64);
  fill_normal(w, 1e-6, rng);
  Matrix<float> kept = w;
  TypeParam::round(kept.data(), kept.size());
  EXPECT_LT((kept - w).norm(), (std::is_same_v<TypeParam, Int8> ? 0.02f : 0.12f) * w.norm());
}

TEST(Int4Offset, RefusesARangeThatIsNoFloat) {
  const float from[2] = {3e38f, -3e38f};
  EXPECT_THROW(Int4Offset::quantised(from, 2), std::invalid_argument);
}

TEST(IntegerFormats, HaveNoNegativeZero) {
  const float from[2] = {-1, -1e-9f};
  EXPECT_FALSE(std::signbit(Int8::number(Int8::quantised(from, 2), 1)));
  EXPECT_FALSE(std::signbit(Int4::number(Int4::quantised(from, 2), 1)));
}

TEST(MXFP4, ScalesAreE8M0AtBothEnds) {
  std::vector<kernels::MXFP4Block> low(1), nan(1);
  low[0] = {0, {0x11111111, 0x22222222, 0x77777777, 0x99999999}};  // 2^-127
  nan[0] = {255, {}};
  EXPECT_EQ(MXFP4::number(low[0], 0), std::ldexp(0.5f, -127));
  EXPECT_TRUE(std::isnan(MXFP4::number(nan[0], 0)));
  for (const InstructionSet set : available_sets(false)) {
    const Matrix<float> c = multiplied_out<MXFP4>({low}, 32, set);
    for (Index p = 0; p < 32; ++p) EXPECT_EQ(c(p, 0), MXFP4::number(low[0], p)) << name_of(set) << ", " << p;
    EXPECT_TRUE(multiplied_out<MXFP4>({nan}, 32, set).col(0).array().isNaN().all()) << name_of(set);
  }
}

// Every byte but NaN, by the reader's table.
TEST(FP8, NumbersAreThoseOfE4M3) {
  for (int bits = 0; bits < 256; ++bits) {
    if ((bits & 127) == 127) continue;
    const std::byte byte{static_cast<unsigned char>(bits)};
    const TensorView tensor{.name = "w", .dtype = DType::F8_E4M3, .shape = {1}, .bytes = {&byte, 1}};
    float expected = 0;
    read_tensor(tensor, &expected);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(FP8::float_of(std::uint8_t(bits))),
              std::bit_cast<std::uint32_t>(expected))
        << bits;
  }
}

TEST(FP8, KeepsEveryNumberBelowItsLargest) {
  std::vector<float> numbers;
  for (int bits = 0; bits < 127; ++bits) numbers.push_back(FP8::float_of(std::uint8_t(bits)) * 0.3f);
  for (std::size_t begin = 0; begin < numbers.size(); begin += 63) {
    std::vector<float> some(numbers.begin() + std::ptrdiff_t(begin),
                            numbers.begin() + std::ptrdiff_t(std::min(numbers.size(), begin + 63)));
    some.push_back(448 * 0.3f);
    const auto block = FP8::quantised(some.data(), Index(some.size()));
    for (std::size_t i = 0; i < some.size(); ++i)
      EXPECT_NEAR(FP8::number(block, Index(i)), some[i], 1e-6f * some[i]) << begin + i;
  }
}

TEST(Int8, KeepsIntegersTimesAScale) {
  float from[32];
  for (int i = 0; i < 32; ++i) from[i] = float(i % 2 ? -4 * i : 4 * i) * 0.125f;
  from[31] = 127 * 0.125f;
  const auto block = Int8::quantised(from, 32);
  for (Index i = 0; i < 32; ++i) EXPECT_EQ(Int8::number(block, i), from[i]) << i;
  EXPECT_EQ(float_of_half(block.scale), 0.125f);
}

TEST(Int4, UsesTheEndThatHasEightSteps) {
  float from[32] = {};
  for (int i = 0; i < 16; ++i) from[i] = float(i - 7) * 0.5f;  // -3.5 to 4
  const auto block = Int4::quantised(from, 32);
  EXPECT_EQ(float_of_half(block.scale), -0.5f);
  for (Index i = 0; i < 32; ++i) EXPECT_EQ(Int4::number(block, i), from[i]) << i;
}

TEST(Int4Offset, KeepsSixteenSteps) {
  float from[32] = {};
  for (int i = 0; i < 32; ++i) from[i] = 3 + float(i % 16) * 0.25f;
  const auto block = Int4Offset::quantised(from, 32);
  EXPECT_EQ(block.scale, 0.25f);
  for (Index i = 0; i < 32; ++i) EXPECT_EQ(Int4Offset::number(block, i), from[i]) << i;
}

TEST(Int4Offset, KeepsEqualNumbers) {
  const std::vector<float> from(32, 0.3f);
  const auto block = Int4Offset::quantised(from.data(), 32);
  for (Index i = 0; i < 32; ++i) EXPECT_EQ(Int4Offset::number(block, i), 0.3f) << i;
}

TEST(IntegerFormats, RefuseWhatIsTooLargeForTheirScale) {
  const float large = 65504.0f * 127 * 1.01f;
  try {
    Int8::quantised(&large, 1);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("too large for a scale in half precision"));
  }
  EXPECT_THROW(Int4::quantised(&large, 1), std::invalid_argument);
  const float tiny = 1e-12f;  // too small: a zero
  EXPECT_EQ(Int8::number(Int8::quantised(&tiny, 1), 0), 0.0f);
}

// ---- Weights that are in blocks already.

template <class F>
Matrix<float> drawn(Index rows, Index cols, Rng& rng) {
  Matrix<float> w(rows, cols);
  fill_normal(w, 0.05, rng);
  return w;
}

TYPED_TEST(BlockFormats, ExpertsInBlocksArePackedAsTheyAre) {
  Rng rng(9);
  using Blocks = GatedFeedForward<float, SwiGLU, Quantised<TypeParam>>;
  const Index d = 70, f = 45;
  std::vector<Gated> floats;
  std::vector<Blocks> blocks;
  for (int e = 0; e < 3; ++e) {
    const auto draw = [&](Index rows, Index cols) {
      BlockMatrix<TypeParam> matrix(rows, cols);
      for (Index i = 0; i < rows; ++i)
        for (Index b = 0; b < TypeParam::blocks(cols); ++b) {
          auto& block = matrix.row(i)[b] = random_finite_block<typename TypeParam::Block>(rng);
          if constexpr (std::is_same_v<TypeParam, MXFP4>)
            block.scale = std::uint8_t(120 + rng.index(5));
          else if constexpr (std::is_same_v<decltype(block.scale), std::uint16_t>)
            block.scale = half_of(float(rng.uniform()) * 0.1f);
          else
            block.scale = float(rng.index(64)) / 4096;
        }
      return matrix;
    };
    const auto gate = draw(f, d), up = draw(f, d), down = draw(d, f);
    floats.push_back(Gated({.d_model = d, .d_ff = f}, gate.numbers(), up.numbers(), down.numbers()));
    blocks.push_back(Blocks({.d_model = d, .d_ff = f}, gate, up, down));
  }
  const TopKRouter<float> router({.d_model = d, .num_experts = 3, .top_k = 2}, rng);
  const auto of = [&](const auto& experts) {
    return [&](Index e) -> const auto& { return experts[std::size_t(e)]; };
  };
  Matrix<float> x(9, d);
  fill_normal(x, 1.0, rng);
  const PackedParts<TopKRouter<float>> parts{.router = router};
  const Matrix<float> expected = pack<F32>(MoELayer(floats, router)).forward(x);
  using Layer = PackedMoELayer<Gated, TopKRouter<float>>;
  EXPECT_TRUE(same_bits(Layer(ExpertFormats<TypeParam>{}, parts, of(blocks)).forward(x), expected));
  // The same blocks, packed as floats.
  EXPECT_TRUE(same_bits(Layer(ExpertFormats<F32>{}, parts, of(blocks)).forward(x), expected));
}

TYPED_TEST(BlockFormats, AMatrixIsItsRowsRounded) {
  Rng rng(10);
  Matrix<float> w = drawn<TypeParam>(5, 77, rng);
  const Matrix<float> numbers = BlockMatrix<TypeParam>::of(w).numbers();
  for (Index i = 0; i < w.rows(); ++i) TypeParam::round(&w(i, 0), w.cols());
  EXPECT_EQ(numbers, w);
}

}  // namespace
}  // namespace moe::block_formats_test
