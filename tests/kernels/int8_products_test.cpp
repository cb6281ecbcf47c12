// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <moe/kernels/tables.hpp>
#include <moe/moe.hpp>
#include <moe/packed.hpp>

// Products with activations in 8 bits, by every set of instructions that this processor has, also those that
// find_int8_product does not choose, against the sums written out.
namespace moe::int8_products_test {
namespace {

using kernels::Int8Activations;

struct Variant {
  std::string name;
  bool is_fused;
  const kernels::Kernels* kernels;
  const kernels::Product<Int8Activations>* product;
};

template <class B>
std::vector<Variant> variants() {
#if defined(__FMA__) || defined(__aarch64__)
  constexpr bool kFused = true;
#else
  constexpr bool kFused = false;
#endif
  using namespace kernels;
  std::vector<Variant> all{{"portable", kFused, &portable::kTable, &portable::kInt8Product<B>}};
#if defined(__x86_64__)
  if (has(InstructionSet::avx2)) {
    all.push_back({"AVX2", true, &avx2::kTable, &avx2::kInt8Product<B>});
    if (has_avx_vnni()) all.push_back({"AVX-VNNI", true, &avx2::kTable, &avx2_vnni::kInt8Product<B>});
  }
  if (has(InstructionSet::avx512) && __builtin_cpu_supports("avx512vnni"))
    all.push_back({"AVX-512 VNNI", true, &avx512::kTable, &avx512_vnni::kInt8Product<B>});
#endif
  return all;
}

// Number i of a block as an integer times scale_of, plus offset_of.
int code(const Int8::Block& block, Index i) { return int(block.words[i / 4] >> (8 * (i % 4)) & 255) - 128; }
int code(const Int4::Block& block, Index i) {
  return int(block.words[nibble_word(i)] >> nibble_bit(i) & 15) - 8;
}
int code(const Int4Offset::Block& block, Index i) {
  return int(block.words[nibble_word(i)] >> nibble_bit(i) & 15);
}
int code(const MXFP4::Block& block, Index i) {
  constexpr int kDoubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  const std::uint32_t bits = block.words[nibble_word(i)] >> nibble_bit(i) & 15;
  return bits & 8 ? -kDoubled[bits & 7] : kDoubled[bits];
}
template <class Block>
float scale_of(const Block& block) {
  return float_of_half(block.scale);
}
float scale_of(const Int4Offset::Block& block) { return block.scale; }
float scale_of(const MXFP4::Block& block) { return std::ldexp(0.5f, int(block.scale) - 127); }

struct Activations {
  float scale;
  int sum = 0;
  int codes[32];
};
Activations rounded(const float* x, Index count) {
  float most = 0;
  for (Index i = 0; i < count; ++i) most = std::max(most, std::abs(x[i]));
  Activations block{most * (1.0f / 127.0f), 0, {}};
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (Index i = 0; i < count; ++i) block.sum += block.codes[i] = int(std::nearbyint(x[i] * inverse));
  return block;
}

float added(float product, float factor, float sum, bool fused) {
  if (fused) return std::fma(product, factor, sum);
  const volatile float rounded_product = product * factor;
  return rounded_product + sum;
}

template <class F>
class Int8Products : public testing::Test {
 protected:
  using Block = typename F::Block;
  static constexpr Index kBlock = F::kBlock;

  struct Weights {
    Index depth, columns;
    std::vector<Block> blocks;  // column by column
    const Block* column(Index j) const { return blocks.data() + j * F::blocks(depth); }
  };

  // Any bits for the codes; `word`: of all of them.
  Weights draw(Index depth, Index columns, const std::uint32_t* word = nullptr) {
    Weights w{depth, columns, std::vector<Block>(std::size_t(F::blocks(depth) * columns))};
    for (Block& block : w.blocks) {
      const float scale = float(0.001 + rng_.uniform());
      if constexpr (std::is_same_v<F, MXFP4>)
        block.scale = std::uint8_t(120 + rng_.index(9));
      else if constexpr (std::is_same_v<F, Int4Offset>)
        block.scale = scale;
      else
        block.scale = half_of(rng_.index(2) == 0 ? scale : -scale);
      if constexpr (requires { block.offset; }) block.offset = float(rng_.uniform() - 0.5);
      for (auto& bits : block.words) bits = word ? *word : std::uint32_t(rng_.index(Index(1) << 32));
    }
    // Behind the last number there are zeros.
    const Index left = depth % kBlock;
    for (Index j = 0; left > 0 && j < columns; ++j) {
      Block& last = w.blocks[std::size_t((j + 1) * F::blocks(depth) - 1)];
      const Block zeros = zero_codes();
      for (Index i = left; i < kBlock; ++i) set_code(last, zeros, i);
    }
    return w;
  }

  // As a layer lays its panels out.
  static std::vector<std::byte> packed(const Weights& w, const kernels::Kernels& k) {
    const Index wide = k.columns / k.streams, panels = (w.columns + k.columns - 1) / k.columns;
    std::vector<std::byte> bytes(std::size_t(panels * k.columns * F::bytes(w.depth)));
    for (Index begin = 0; begin < panels * k.columns; begin += wide) {
      std::vector<const Block*> columns;
      for (Index j = begin; j < begin + wide; ++j) columns.push_back(j < w.columns ? w.column(j) : nullptr);
      F::encode(columns.data(), w.depth, wide, k.lanes, bytes.data() + begin * F::bytes(w.depth));
    }
    return bytes;
  }

  // In two parts, so that the second adds to the first.
  static Matrix<float> multiplied(const Variant& by, const Weights& w, const Matrix<float>& x) {
    const kernels::Kernels& k = *by.kernels;
    const std::vector<std::byte> bytes = packed(w, k);
    const Index rows = x.rows(), panels = (w.columns + k.columns - 1) / k.columns;
    const Index stride = kernels::kRowStride<Int8Activations>, wide = k.columns / k.streams;
    std::vector<float> c(std::size_t(panels * rows * k.columns), std::numeric_limits<float>::quiet_NaN());
    std::vector<Int8Activations> parts(std::size_t(rows * stride));
    const Index half = (w.depth / 2 + 64) / 64 * 64;
    for (Index p = 0; p < w.depth; p += half) {
      const Index deep = std::min(half, w.depth - p);
      for (Index i = 0; i < rows; ++i)
        by.product->split(deep, &x(i, p), parts.data() + i * stride, (deep + 31) / 32 * 32);
      by.product->multiply(rows, deep, {parts.data(), stride, 0}, bytes.data() + F::bytes(p) * wide,
                           F::bytes(w.depth) * wide, panels, c.data(), p > 0, bytes.data());
    }
    Matrix<float> y(rows, w.columns);
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < w.columns; ++j)
        y(i, j) = c[std::size_t((j / k.columns * rows + i) * k.columns + j % k.columns)];
    return y;
  }

  static Matrix<float> expected(const Weights& w, const Matrix<float>& x, bool fused) {
    Matrix<float> y(x.rows(), w.columns);
    for (Index i = 0; i < x.rows(); ++i) {
      std::vector<Activations> row;
      for (Index p = 0; p < w.depth; p += kBlock)
        row.push_back(rounded(&x(i, p), std::min(kBlock, w.depth - p)));
      for (Index j = 0; j < w.columns; ++j) {
        float sum = 0;
        for (Index nth = 0; nth < F::blocks(w.depth); ++nth) {
          const Block& block = w.column(j)[nth];
          const Activations& part = row[std::size_t(nth)];
          int products = 0;
          for (Index q = 0; q < kBlock; ++q) products += code(block, q) * part.codes[q];
          sum = added(float(products) * scale_of(block), part.scale, sum, fused);
          if constexpr (requires { block.offset; })
            sum = added(block.offset * float(part.sum), part.scale, sum, fused);
        }
        y(i, j) = sum;
      }
    }
    return y;
  }

  // Beside the product of the numbers themselves: half a step of each block, by the magnitudes of its
  // weights.
  static void expect_near_exact(const Weights& w, const Matrix<float>& x, const Matrix<float>& y) {
    for (Index i = 0; i < x.rows(); ++i)
      for (Index j = 0; j < w.columns; ++j) {
        double sum = 0, bound = 0, magnitude = 0;
        for (Index p = 0; p < w.depth; p += kBlock) {
          const Index count = std::min(kBlock, w.depth - p);
          const Block& block = w.column(j)[p / kBlock];
          const double step = x.row(i).segment(p, count).cwiseAbs().maxCoeff() / 127.0;
          for (Index q = 0; q < count; ++q) {
            double weight = double(code(block, q)) * double(scale_of(block));
            if constexpr (requires { block.offset; }) weight += double(block.offset);
            sum += weight * double(x(i, p + q));
            bound += std::abs(weight) * step / 2;
            magnitude += std::abs(weight) * (std::abs(double(x(i, p + q))) + step);
          }
        }
        ASSERT_LE(std::abs(double(y(i, j)) - sum), bound + 1e-5 * magnitude + 1e-30) << i << ' ' << j;
      }
  }

  void expect_equal(const Weights& w, const Matrix<float>& x) {
    expect_near_exact(w, x, expected(w, x, true));
    for (const Variant& by : variants<Block>()) {
      const Matrix<float> y = multiplied(by, w, x), wanted = expected(w, x, by.is_fused);
      ASSERT_EQ(std::memcmp(y.data(), wanted.data(), std::size_t(y.size()) * sizeof(float)), 0)
          << by.name << ", " << x.rows() << " rows, depth " << w.depth << ", " << w.columns << " columns";
    }
  }

  Rng rng_{11};

 private:
  static Block zero_codes() {
    const float zeros[32] = {};
    return F::quantised(zeros, kBlock);
  }
  // Number i of a block becomes that of another.
  static void set_code(Block& block, const Block& from, Index i) {
    const bool is_byte = std::is_same_v<F, Int8>;
    const Index word = is_byte ? i / 4 : nibble_word(i), bit = is_byte ? 8 * (i % 4) : nibble_bit(i);
    const std::uint32_t mask = (is_byte ? 255u : 15u) << bit;
    block.words[word] = (block.words[word] & ~mask) | (from.words[word] & mask);
  }
};

using Formats = testing::Types<Int8, Int4, Int4Offset, MXFP4>;
TYPED_TEST_SUITE(Int8Products, Formats);

TYPED_TEST(Int8Products, AreTheSumsWrittenOut) {
  for (const Index depth : {1, 24, 32, 33, 64, 96, 517, 1408, 2000})
    for (const Index rows : {1, 2, 3, 4, 5, 8, 31}) {
      const auto w = this->draw(depth, 1 + this->rng_.index(140));
      Matrix<float> x(rows, depth);
      fill_normal(x, 1.0, this->rng_);
      if (rows > 1) x.row(1).setZero();
      this->expect_equal(w, x);
    }
}

// Products of two bytes that an instruction adds in 16 bits would not fit there.
TYPED_TEST(Int8Products, DoNotSaturate) {
  for (const std::uint32_t word : {0u, 0xFFFFFFFFu, 0x77777777u, 0x88888888u, 0x7F7F7F7Fu, 0x80808080u,
                                   0x00FF00FFu, 0xFF00FF00u, 0xF0F0F0F0u, 0x0F0F0F0Fu}) {
    const auto w = this->draw(320, 70, &word);
    Matrix<float> x(6, 320);
    x.row(0).setConstant(3.0f);
    x.row(1).setConstant(-3.0f);
    for (Index p = 0; p < 320; ++p) {
      x(2, p) = p % 2 == 0 ? 1.0f : -1.0f;
      x(3, p) = p % 8 < 4 ? 1e30f : -1e30f;
      x(4, p) = p % 3 == 0 ? 1e-30f : 0.0f;
      x(5, p) = (std::numeric_limits<float>::max)() * (p == 7 ? 1.0f : 1e-3f);
    }
    x.row(5) *= 1e-6f;
    this->expect_equal(w, x);
  }
}

TYPED_TEST(Int8Products, ABlockWithANumberThatIsNoneIsNaN) {
  const auto w = this->draw(96, 20);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()})
    for (const Variant& by : variants<typename TypeParam::Block>()) {
      Matrix<float> x = Matrix<float>::Ones(3, 96);
      x(1, 70) = bad;
      const Matrix<float> y = this->multiplied(by, w, x);
      EXPECT_TRUE(y.row(1).array().isNaN().all()) << by.name;
      EXPECT_TRUE(y.row(0).allFinite() && y.row(2).allFinite()) << by.name;
    }
}

TYPED_TEST(Int8Products, TheLargestNumbersTimesSmallWeightsAreFinite) {
  const std::uint32_t zeros = std::is_same_v<TypeParam, Int8>   ? 0x80808080u
                              : std::is_same_v<TypeParam, Int4> ? 0x88888888u
                                                                : 0u;
  auto w = this->draw(64, 20, &zeros);
  for (auto& block : w.blocks)
    if constexpr (requires { block.offset; }) block.offset = 1e-6f;
  for (const Variant& by : variants<typename TypeParam::Block>()) {
    const Matrix<float> x = Matrix<float>::Constant(2, 64, (std::numeric_limits<float>::max)());
    const Matrix<float> y = this->multiplied(by, w, x);
    EXPECT_TRUE(y.allFinite()) << by.name;
    const bool is_zero = (y.array() == 0).all();
    EXPECT_EQ(is_zero, (!std::is_same_v<TypeParam, Int4Offset>)) << by.name;
  }
}

TYPED_TEST(Int8Products, NumbersBelow2ToTheMinus119CountAsZero) {
  const auto w = this->draw(32, 20);
  for (const Variant& by : variants<typename TypeParam::Block>()) {
    Matrix<float> x = Matrix<float>::Constant(2, 32, 0x1p-120f);
    x.row(1).setConstant(-0x1p-119f);
    const Matrix<float> y = this->multiplied(by, w, x);
    EXPECT_TRUE((y.row(0).array() == 0).all()) << by.name;
    EXPECT_TRUE((y.row(1).array() != 0).any()) << by.name;
  }
}

}  // namespace
}  // namespace moe::int8_products_test
