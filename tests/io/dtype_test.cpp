// SPDX-License-Identifier: MIT
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/io/dtype.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/scaled_blocks.hpp>

#include "files.hpp"

namespace {

using io_test::bytes_of;
using io_test::expect_error;
using moe::DType;
using moe::Index;
using moe::TensorView;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A tensor that owns its bytes.
struct Tensor {
  template <class T>
  Tensor(DType dtype, std::vector<Index> shape, const std::vector<T>& values)
      : bytes(bytes_of(values)), view{"w", dtype, std::move(shape), bytes} {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  std::vector<std::byte> bytes;
  TensorView view;
};

template <class S, class T>
std::vector<S> numbers(DType dtype, const std::vector<T>& values) {
  const Tensor tensor(dtype, {Index(values.size())}, values);
  std::vector<S> out(values.size());
  moe::read_tensor(tensor.view, out.data());
  return out;
}

template <class T>
std::vector<T> all_values() {
  std::vector<T> values;
  for (std::uint32_t bits = 0; bits <= std::numeric_limits<T>::max(); ++bits) values.push_back(T(bits));
  return values;
}

// The value of a floating-point number by the book.
double by_the_book(unsigned bits, int exponent_bits, int mantissa_bits, bool has_infinity) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int mantissa = int(bits) % (1 << mantissa_bits);
  const int exponent = int(bits >> mantissa_bits) % (1 << exponent_bits);
  const double sign = bits >> (mantissa_bits + exponent_bits) ? -1 : 1;
  if (exponent == top && has_infinity) return sign * (mantissa == 0 ? kInf : kNan);
  if (exponent == top && mantissa == (1 << mantissa_bits) - 1) return sign * kNan;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class T>
void expect_all_by_the_book(DType dtype, int exponent_bits, int mantissa_bits, bool has_infinity) {
  const std::vector<T> values = all_values<T>();
  const std::vector<float> floats = numbers<float>(dtype, values);
  const std::vector<double> doubles = numbers<double>(dtype, values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double expected = by_the_book(values[i], exponent_bits, mantissa_bits, has_infinity);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[i]) && std::isnan(doubles[i])) << i;
    } else {
      ASSERT_EQ(floats[i], expected) << i;
      ASSERT_EQ(doubles[i], expected) << i;
    }
    ASSERT_EQ(std::signbit(floats[i]), values[i] >> (exponent_bits + mantissa_bits) == 1) << i;
    ASSERT_EQ(std::signbit(doubles[i]), std::signbit(floats[i])) << i;
  }
}

TEST(DType, HasANameAndASize) {
  const std::vector<std::tuple<DType, std::string, std::size_t>> expected{
      {DType::F64, "F64", 8},         {DType::F32, "F32", 4},         {DType::F16, "F16", 2},
      {DType::BF16, "BF16", 2},       {DType::F8_E4M3, "F8_E4M3", 1}, {DType::F8_E5M2, "F8_E5M2", 1},
      {DType::F8_E8M0, "F8_E8M0", 1}, {DType::I64, "I64", 8},         {DType::I32, "I32", 4},
      {DType::I16, "I16", 2},         {DType::I8, "I8", 1},           {DType::U64, "U64", 8},
      {DType::U32, "U32", 4},         {DType::U16, "U16", 2},         {DType::U8, "U8", 1},
      {DType::BOOL, "BOOL", 1}};
  for (const auto& [dtype, name, size] : expected) {
    EXPECT_EQ(moe::name_of(dtype), name);
    EXPECT_EQ(moe::size_of(dtype), size) << name;
  }
  expect_error("size_of", [] { moe::size_of(DType(26)); }, {"DType 26"});
  expect_error("name_of", [] { moe::name_of(DType(99)); }, {"DType 99"});
}

TEST(TensorView, CountsItsElements) {
  constexpr Index kMax = std::numeric_limits<Index>::max();
  const auto size = [](std::vector<Index> shape) {
    return TensorView{"w", DType::F32, std::move(shape), {}}.size();
  };
  EXPECT_EQ(size({}), 1);  // a scalar
  EXPECT_EQ(size({3, 4, 5}), 60);
  EXPECT_EQ(size({3, 0, 5}), 0);
  EXPECT_EQ(size({kMax, 0}), 0);
  EXPECT_EQ(size({kMax}), kMax);
  expect_error("negative", [&] { size({3, -1}); }, {"'w'", "[3, -1]"});
  expect_error("product", [&] { size({kMax, 2}); }, {"[9223372036854775807, 2]"});
  expect_error("zero last", [&] { size({kMax, 2, 0}); }, {"'w'"});
  expect_error("zero first", [&] { size({0, kMax, 2}); }, {"'w'"});
  expect_error("many", [&] { size(std::vector<Index>(1000, 2)); }, {"[2, 2, 2, 2, 2, 2, 2, 2, ...]"});
}

TEST(ReadTensor, ReadsEveryF16) { expect_all_by_the_book<std::uint16_t>(DType::F16, 5, 10, true); }
TEST(ReadTensor, ReadsEveryBF16) { expect_all_by_the_book<std::uint16_t>(DType::BF16, 8, 7, true); }
TEST(ReadTensor, ReadsEveryE4M3) { expect_all_by_the_book<std::uint8_t>(DType::F8_E4M3, 4, 3, false); }
TEST(ReadTensor, ReadsEveryE5M2) { expect_all_by_the_book<std::uint8_t>(DType::F8_E5M2, 5, 2, true); }

TEST(ReadTensor, ReadsEveryE8M0) {
  const auto values = all_values<std::uint8_t>();
  const auto floats = numbers<float>(DType::F8_E8M0, values);
  const auto doubles = numbers<double>(DType::F8_E8M0, values);
  for (int i = 0; i < 255; ++i) {
    EXPECT_EQ(floats[std::size_t(i)], std::ldexp(1.0, i - 127)) << i;
    EXPECT_EQ(doubles[std::size_t(i)], std::ldexp(1.0, i - 127)) << i;
  }
  EXPECT_TRUE(std::isnan(floats[255]) && std::isnan(doubles[255]));
}

// A few that one can look up.
TEST(ReadTensor, ReadsKnownValues) {
  EXPECT_EQ(numbers<float>(DType::F16, std::vector<std::uint16_t>{0x3c00, 0x7bff, 0x0001, 0xc000}),
            (std::vector<float>{1, 65504, 0x1p-24f, -2}));
  EXPECT_EQ(numbers<float>(DType::BF16, std::vector<std::uint16_t>{0x3f80, 0x4049, 0x0001}),
            (std::vector<float>{1, 3.140625f, 0x1p-133f}));
  EXPECT_EQ(numbers<float>(DType::F8_E4M3, std::vector<std::uint8_t>{0x38, 0x7e, 0x01, 0xf8}),
            (std::vector<float>{1, 448, 0x1p-9f, -256}));
  EXPECT_EQ(numbers<float>(DType::F8_E5M2, std::vector<std::uint8_t>{0x3c, 0x7b, 0x01, 0xfc}),
            (std::vector<float>{1, 57344, 0x1p-16f, -kInf}));
}

TEST(ReadTensor, RoundsADoubleToTheNearestFloat) {
  const std::vector<std::pair<double, float>> cases{
      {1 + 0x1p-24, 1.f},                     // a tie goes to the even one, below
      {1 + 0x3p-24, 1 + 0x1p-22f},            // and above
      {1 + 0x1p-24 + 0x1p-52, 1 + 0x1p-23f},  // just more than a tie
      {0.1, 0.1f},
      {0x1p-149, 0x1p-149f},    // the smallest float
      {0x1p-150, 0.f},          // a tie
      {0x1.8p-150, 0x1p-149f},  //
      {1e300, kInf},
      {-1e300, -kInf},
      {std::numeric_limits<double>::infinity(), kInf},
      {0x1.fffffep127, std::numeric_limits<float>::max()},
      {0x1.fffffefp127, std::numeric_limits<float>::max()},
  };
  std::vector<double> doubles;
  for (const auto& [from, to] : cases) doubles.push_back(from);
  const std::vector<float> floats = numbers<float>(DType::F64, doubles);
  for (std::size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(floats[i], cases[i].second) << i;
  const auto special = numbers<float>(DType::F64, std::vector<double>{-0.0, double(kNan), -1e-300});
  EXPECT_TRUE(special[0] == 0 && std::signbit(special[0]));
  EXPECT_TRUE(std::isnan(special[1]));
  EXPECT_TRUE(special[2] == 0 && std::signbit(special[2]));
}

TEST(ReadTensor, KeepsEveryBitWithoutAConversion) {
  std::mt19937_64 random(1);
  std::vector<std::uint64_t> bits(1000);
  for (auto& b : bits) b = random();
  bits[0] = 0x7ff0000000000001;  // a signalling NaN
  std::vector<double> doubles(bits.size());
  const Tensor f64(DType::F64, {10, 100}, bits);
  moe::read_tensor(f64.view, doubles.data());
  EXPECT_EQ(bytes_of(doubles), f64.bytes);
  bits[0] = 0x7f800001ff800001;
  std::vector<float> floats(2 * bits.size());
  const Tensor f32(DType::F32, {2000}, bits);
  moe::read_tensor(f32.view, floats.data());
  EXPECT_EQ(bytes_of(floats), f32.bytes);
  std::vector<std::int64_t> integers(bits.size());
  const Tensor i64(DType::I64, {1000}, bits);
  moe::read_tensor(i64.view, integers.data());
  EXPECT_EQ(bytes_of(integers), i64.bytes);
}

TEST(ReadTensor, WidensAFloat) {
  EXPECT_EQ(numbers<double>(DType::F32, std::vector<float>{0.1f, -kInf, 0x1p-149f}),
            (std::vector<double>{double(0.1f), -double(kInf), 0x1p-149}));
}

TEST(ReadTensor, ReadsIntegers) {
  using Integers = std::vector<std::int64_t>;
  EXPECT_EQ(numbers<std::int64_t>(DType::I32, std::vector<std::int32_t>{-5, INT32_MIN, INT32_MAX}),
            (Integers{-5, INT32_MIN, INT32_MAX}));
  EXPECT_EQ(numbers<std::int64_t>(DType::I16, std::vector<std::int16_t>{-5, 300}), (Integers{-5, 300}));
  EXPECT_EQ(numbers<std::int64_t>(DType::I8, std::vector<std::int8_t>{-128, 127}), (Integers{-128, 127}));
  EXPECT_EQ(numbers<std::int64_t>(DType::U32, std::vector<std::uint32_t>{0, UINT32_MAX}),
            (Integers{0, UINT32_MAX}));
  EXPECT_EQ(numbers<std::int64_t>(DType::U16, std::vector<std::uint16_t>{65535}), (Integers{65535}));
  EXPECT_EQ(numbers<std::int64_t>(DType::U8, std::vector<std::uint8_t>{255}), (Integers{255}));
  EXPECT_EQ(numbers<std::int64_t>(DType::BOOL, std::vector<std::uint8_t>{0, 1, 2}), (Integers{0, 1, 1}));
  EXPECT_EQ(numbers<std::int64_t>(DType::U64, std::vector<std::uint64_t>{0, INT64_MAX}),
            (Integers{0, INT64_MAX}));
  const Tensor large(DType::U64, {2}, std::vector<std::uint64_t>{1, std::uint64_t(INT64_MAX) + 1});
  Integers out{7, 7};
  expect_error("U64", [&] { moe::read_tensor(large.view, out.data()); },
               {"'w'", "element 1", "9223372036854775808", "9223372036854775807"});
  EXPECT_EQ(out, (Integers{7, 7}));
}

TEST(ReadTensor, RefusesWhatDoesNotConvert) {
  const std::vector<DType> floating{DType::F64,     DType::F32,     DType::F16,    DType::BF16,
                                    DType::F8_E4M3, DType::F8_E5M2, DType::F8_E8M0};
  const std::vector<DType> integral{DType::I64, DType::I32, DType::I16, DType::I8,  DType::U64,
                                    DType::U32, DType::U16, DType::U8,  DType::BOOL};
  const std::vector<std::uint64_t> zero{0};
  for (const DType dtype : integral) {
    const Tensor tensor(dtype, {Index(8 / moe::size_of(dtype))}, zero);
    std::vector<float> floats(8, 7);
    std::vector<double> doubles(8, 7);
    const std::string name(moe::name_of(dtype));
    expect_error(name, [&] { moe::read_tensor(tensor.view, floats.data()); }, {"'w'", name, "F32"});
    expect_error(name, [&] { moe::read_tensor(tensor.view, doubles.data()); }, {name, "F64"});
    EXPECT_EQ(floats, std::vector<float>(8, 7));
    EXPECT_EQ(doubles, std::vector<double>(8, 7));
  }
  for (const DType dtype : floating) {
    const Tensor tensor(dtype, {Index(8 / moe::size_of(dtype))}, zero);
    std::vector<std::int64_t> integers(8, 7);
    const std::string name(moe::name_of(dtype));
    expect_error(name, [&] { moe::read_tensor(tensor.view, integers.data()); }, {name, "I64"});
    EXPECT_EQ(integers, std::vector<std::int64_t>(8, 7));
  }
}

TEST(ReadTensor, RefusesBytesThatDoNotFitTheShape) {
  const Tensor tensor(DType::F32, {3}, std::vector<float>{1, 2});
  float out[3] = {7, 7, 7};
  expect_error("short", [&] { moe::read_tensor(tensor.view, out); }, {"'w'", "[3]", " 8 ", "12"});
  EXPECT_EQ(out[0], 7);
  TensorView huge = tensor.view;
  huge.shape = {Index(1) << 62, 2};
  expect_error("huge", [&] { moe::read_tensor(huge, out); }, {"'w'", "[4611686018427387904, 2]"});
}

TEST(ReadTensor, ReadsAtAnyAddressAndNothingWhereThereIsNothing) {
  const std::vector<float> values{1.5f, -2, 3};
  std::vector<std::byte> memory(1);
  const auto bytes = bytes_of(values);
  memory.insert(memory.end(), bytes.begin(), bytes.end());
  const TensorView odd{"w", DType::F32, {3}, std::span<const std::byte>(memory).subspan(1)};
  std::vector<float> floats(3);
  moe::read_tensor(odd, floats.data());
  EXPECT_EQ(floats, values);
  std::vector<double> doubles(3);
  moe::read_tensor(odd, doubles.data());
  EXPECT_EQ(doubles, (std::vector<double>{1.5, -2, 3}));
  moe::read_tensor(TensorView{"w", DType::F32, {0}, {}}, static_cast<float*>(nullptr));
  moe::read_tensor(TensorView{"w", DType::F16, {2, 0}, {}}, static_cast<float*>(nullptr));
}

TEST(IsReadableInPlace, AsksForTheTypeAndTheAlignment) {
  alignas(16) std::byte memory[32]{};
  const auto view = [&](DType dtype, std::size_t offset) {
    return TensorView{"w", dtype, {1}, {memory + offset, moe::size_of(dtype)}};
  };
  EXPECT_TRUE(moe::is_readable_in_place<float>(view(DType::F32, 4)));
  EXPECT_FALSE(moe::is_readable_in_place<float>(view(DType::F32, 2)));
  EXPECT_FALSE(moe::is_readable_in_place<float>(view(DType::BF16, 4)));
  EXPECT_FALSE(moe::is_readable_in_place<float>(view(DType::I32, 4)));
  EXPECT_TRUE(moe::is_readable_in_place<double>(view(DType::F64, 8)));
  EXPECT_EQ(moe::is_readable_in_place<double>(view(DType::F64, 4)), alignof(double) <= 4);
  EXPECT_FALSE(moe::is_readable_in_place<double>(view(DType::F32, 8)));
  EXPECT_TRUE(moe::is_readable_in_place<std::int64_t>(view(DType::I64, 8)));
  EXPECT_FALSE(moe::is_readable_in_place<std::int64_t>(view(DType::U64, 8)));
  EXPECT_TRUE(moe::is_readable_in_place<std::uint8_t>(view(DType::U8, 3)));
}

// --- Block scales --------------------------------------------------------------------------------

TEST(ReadBlockScaledFp8, MultipliesEveryBlockByItsScale) {
  std::mt19937 random(2);
  const std::vector<std::pair<Index, Index>> shapes{{1, 1},     {128, 128}, {129, 257}, {300, 130},
                                                    {127, 256}, {0, 5},     {5, 0},     {0, 0}};
  for (const auto& [rows, cols] : shapes) {
    const Index block_rows = (rows + 127) / 128, block_cols = (cols + 127) / 128;
    std::vector<std::uint8_t> weights(std::size_t(rows * cols));
    for (auto& w : weights) w = std::uint8_t(random());
    std::vector<float> scales(std::size_t(block_rows * block_cols));
    for (auto& s : scales) s = float(random() % 1000 + 1) / 256;
    const Tensor weight(DType::F8_E4M3, {rows, cols}, weights);
    const Tensor scale(DType::F32, {block_rows, block_cols}, scales);
    std::vector<float> out(weights.size() + 1, 7);
    moe::read_block_scaled_fp8(weight.view, scale.view, out.data());
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        const float s = scales[std::size_t(i / 128 * block_cols + j / 128)];
        const auto at = std::size_t(i * cols + j);
        const float expected = float(by_the_book(weights[at], 4, 3, false)) * s;
        if (std::isnan(expected))
          ASSERT_TRUE(std::isnan(out[at]));
        else
          ASSERT_EQ(out[at], expected) << i << ' ' << j;
      }
    }
    EXPECT_EQ(out.back(), 7);
  }
}

// 3 x 2 blocks of [257, 130], each with a scale of its own.
TEST(ReadBlockScaledFp8, TakesScalesOfOtherTypes) {
  constexpr Index kRows = 257, kCols = 130;
  std::vector<std::uint8_t> weights(std::size_t(kRows * kCols));
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = std::uint8_t(i % 127);  // positive, no NaN
  const Tensor weight(DType::F8_E4M3, {kRows, kCols}, weights);
  const auto expect_scales = [&](const Tensor& scale, const std::vector<float>& values) {
    std::vector<float> out(weights.size() + 1, 7);
    moe::read_block_scaled_fp8(weight.view, scale.view, out.data());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::size_t row = i / kCols, col = i % kCols;
      ASSERT_EQ(out[i], float(by_the_book(weights[i], 4, 3, false)) * values[row / 128 * 2 + col / 128])
          << moe::name_of(scale.view.dtype) << ' ' << i;
    }
    EXPECT_EQ(out.back(), 7);
  };
  // 1, -2, pi in 8 bits, the smallest, 1.0078125 (the next to 1), 0
  expect_scales(
      Tensor(DType::BF16, {3, 2}, std::vector<std::uint16_t>{0x3f80, 0xc000, 0x4049, 0x0001, 0x3f81, 0}),
      {1, -2, 3.140625f, 0x1p-133f, 1.0078125f, 0});
  expect_scales(Tensor(DType::F8_E8M0, {3, 2}, std::vector<std::uint8_t>{127, 128, 120, 0, 200, 126}),
                {1, 2, 0x1p-7f, 0x1p-127f, 0x1p73f, .5f});

  std::vector<float> out(weights.size());
  const Tensor nan_scale(DType::F8_E8M0, {3, 2}, std::vector<std::uint8_t>{255, 127, 127, 127, 127, 254});
  moe::read_block_scaled_fp8(weight.view, nan_scale.view, out.data());
  EXPECT_TRUE(std::isnan(out[0]));  // 0 times NaN
  EXPECT_TRUE(std::isnan(out[127 * kCols + 127]));
  EXPECT_FALSE(std::isnan(out[128]));
  EXPECT_EQ(out.back(), float(by_the_book(weights.back(), 4, 3, false)) * 0x1p127f);
}

TEST(ReadBlockScaledFp8, RefusesWhatDoesNotFit) {
  const std::vector<std::uint8_t> bytes(129 * 3);
  const Tensor weight(DType::F8_E4M3, {129, 3}, bytes);
  const Tensor scale(DType::F32, {2, 1}, std::vector<float>{1, 1});
  const Tensor other_type(DType::U8, {129, 3}, bytes), flat(DType::F8_E4M3, {387}, bytes);
  const Tensor transposed(DType::F32, {1, 2}, std::vector<float>{1, 1});
  const Tensor many(DType::F32, {2, 2}, std::vector<float>{1, 1, 1, 1});
  const Tensor double_scale(DType::F64, {2, 1}, std::vector<double>{1, 1});
  const Tensor u8_scale(DType::U8, {2, 1}, std::vector<std::uint8_t>{127, 127});
  const Tensor short_bf16_scale(DType::BF16, {2, 1}, std::vector<std::uint16_t>{0x3f80});
  const Tensor short_weight(DType::F8_E4M3, {129, 3}, std::vector<std::uint8_t>(386));
  const Tensor short_scale(DType::F32, {2, 1}, std::vector<float>{1});
  std::vector<float> out(387, 7);
  const auto read = [&](const Tensor& w, const Tensor& s) {
    return [&] { moe::read_block_scaled_fp8(w.view, s.view, out.data()); };
  };
  expect_error("dtype", read(other_type, scale), {"U8 [129, 3]", "F8_E4M3 [rows, cols]"});
  expect_error("rank", read(flat, scale), {"F8_E4M3 [387]"});
  expect_error("transposed", read(weight, transposed), {"F32 [1, 2]", "F32 [2, 1]", "[129, 3]"});
  expect_error("many", read(weight, many), {"F32 [2, 2]", "F32 [2, 1]"});
  expect_error("F64", read(weight, double_scale), {"F64 [2, 1]", "BF16, F8_E8M0 or F32 [2, 1]"});
  expect_error("U8", read(weight, u8_scale), {"U8 [2, 1]", "F32 [2, 1]"});
  expect_error("weight bytes", read(short_weight, scale), {"386", "387"});
  expect_error("scale bytes", read(weight, short_scale), {" 4 ", " 8"});
  expect_error("BF16 scale bytes", read(weight, short_bf16_scale), {" 2 ", " 4"});
  EXPECT_EQ(out, std::vector<float>(387, 7));
}

TEST(ReadMxfp4, ReadsTheLowHalfFirst) {
  std::vector<std::uint8_t> blocks(16);
  for (int i = 0; i < 16; ++i) blocks[std::size_t(i)] = std::uint8_t(i | (15 - i) << 4);
  const float table[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
  for (const int exponent : {0, 1, 126, 127, 128, 200, 252}) {  // in U8 where it is even, else in F8_E8M0
    const Tensor block(DType::U8, {1, 16}, blocks);
    const Tensor scale(exponent % 2 == 0 ? DType::U8 : DType::F8_E8M0, {1},
                       std::vector<std::uint8_t>{std::uint8_t(exponent)});
    std::vector<float> out(33, 7);
    moe::read_mxfp4(block.view, scale.view, out.data());
    for (std::size_t i = 0; i < 16; ++i) {
      EXPECT_EQ(out[2 * i], std::ldexp(double(table[i]), exponent - 127));
      EXPECT_EQ(out[2 * i + 1], std::ldexp(double(table[15 - i]), exponent - 127));
    }
    EXPECT_TRUE(std::signbit(out[16]) && out[16] == 0);
    EXPECT_EQ(out[32], 7);
  }
}

TEST(ReadMxfp4, HasNanAndInfinity) {
  const std::vector<std::uint8_t> blocks(32, 0x70);  // 0 and 6
  const Tensor block(DType::U8, {2, 16}, blocks);
  for (const DType dtype : {DType::U8, DType::F8_E8M0}) {
    const Tensor scale(dtype, {2}, std::vector<std::uint8_t>{255, 254});
    std::vector<float> out(64);
    moe::read_mxfp4(block.view, scale.view, out.data());
    EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[31]));
    EXPECT_EQ(out[32], 0);
    EXPECT_EQ(out[33], kInf);  // 6 * 2^127
  }
}

TEST(ReadMxfp4, TakesAnyNumberOfDimensions) {
  // [experts = 2, rows = 3, cols = 64]: 2 blocks a row, each of one value, with a scale of its own.
  std::vector<std::uint8_t> blocks, scales;
  for (std::size_t b = 0; b < 12; ++b) {
    blocks.insert(blocks.end(), 16, 0x22);  // 1 and 1
    scales.push_back(std::uint8_t(120 + b));
  }
  const Tensor block(DType::U8, {2, 3, 2, 16}, blocks), scale(DType::U8, {2, 3, 2}, scales);
  std::vector<float> out(2 * 3 * 64);
  moe::read_mxfp4(block.view, scale.view, out.data());
  for (std::size_t i = 0; i < out.size(); ++i)
    ASSERT_EQ(out[i], std::ldexp(1.0, int(i / 32) + 120 - 127)) << i;
  const Tensor none(DType::U8, {0, 2, 16}, std::vector<std::uint8_t>{});
  const Tensor no_scales(DType::U8, {0, 2}, std::vector<std::uint8_t>{});
  moe::read_mxfp4(none.view, no_scales.view, nullptr);
}

TEST(ReadMxfp4, RefusesWhatDoesNotFit) {
  const std::vector<std::uint8_t> bytes(64);
  const Tensor blocks(DType::U8, {2, 2, 16}, bytes), scales(DType::U8, {2, 2}, std::vector<std::uint8_t>(4));
  const Tensor signed_blocks(DType::I8, {2, 2, 16}, bytes), narrow(DType::U8, {2, 4, 8}, bytes);
  const Tensor flat(DType::U8, {16}, std::vector<std::uint8_t>(16));
  const Tensor flat_scales(DType::U8, {4}, std::vector<std::uint8_t>(4));
  const Tensor other_scales(DType::I8, {2, 2}, std::vector<std::uint8_t>(4));
  const Tensor short_blocks(DType::U8, {2, 2, 16}, std::vector<std::uint8_t>(63));
  const Tensor short_scales(DType::U8, {2, 2}, std::vector<std::uint8_t>(3));
  std::vector<float> out(128, 7);
  const auto read = [&](const Tensor& b, const Tensor& s) {
    return [&] { moe::read_mxfp4(b.view, s.view, out.data()); };
  };
  expect_error("dtype", read(signed_blocks, scales), {"I8 [2, 2, 16]", "U8 [..., cols / 32, 16]"});
  expect_error("narrow", read(narrow, scales), {"U8 [2, 4, 8]"});
  expect_error("rank", read(flat, scales), {"U8 [16]"});
  expect_error("scales' shape", read(blocks, flat_scales), {"U8 [4]", "U8 [2, 2]"});
  expect_error("scales' dtype", read(blocks, other_scales), {"I8 [2, 2]", "U8 [2, 2]"});
  expect_error("bytes", read(short_blocks, scales), {"63", "64"});
  expect_error("scales' bytes", read(blocks, short_scales), {" 3 ", " 4"});
  EXPECT_EQ(out, std::vector<float>(128, 7));
}

}  // namespace
