// SPDX-License-Identifier: MIT
// What holds of formats in blocks whatever the compiler is told of floating-point numbers, -ffast-math too.
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace moe::quantisers_test {
namespace {

template <class F>
class Quantisers : public testing::Test {};
using Formats = testing::Types<Int8, Int4, Int4Offset, MXFP4, FP8>;
TYPED_TEST_SUITE(Quantisers, Formats);

TYPED_TEST(Quantisers, KeepNumbers) {
  Rng rng(1);
  Matrix<float> w(1, 64 * 16);
  fill_normal(w, 0.02, rng);
  Matrix<float> kept = w;
  TypeParam::round(kept.data(), kept.size());
  EXPECT_LT((kept - w).norm(), 0.12f * w.norm());
  EXPECT_GT((kept - w).norm(), 0.001f * w.norm());
}

TYPED_TEST(Quantisers, LoseNoNaN) {
  for (const std::uint32_t bad : {0x7FC00000u, 0x7F800000u, 0xFF800000u}) {
    std::vector<float> row(std::size_t(TypeParam::kBlock), 0.25f);
    row[3] = std::bit_cast<float>(bad);
    TypeParam::round(row.data(), TypeParam::kBlock);
    for (const float number : row) EXPECT_EQ(number_kind(number), NumberKind::nan);
  }
}

}  // namespace
}  // namespace moe::quantisers_test
