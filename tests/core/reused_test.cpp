// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include <moe/core/output.hpp>
#include <moe/core/reused.hpp>
#include <moe/core/types.hpp>

namespace reused_test {
namespace {

using moe::ConstMatrixRef;
using moe::Index;
using moe::Matrix;
using moe::MatrixRef;
using moe::Output;
using moe::Reused;
using moe::ReusedMatrix;

const Matrix<float> kSix{{1, 2, 3}, {4, 5, 6}};

TEST(Reused, ChangesShapeWithinItsMemory) {
  ReusedMatrix<float> m;
  EXPECT_EQ(m.size() + m.capacity(), 0);
  m.resize(10, 8);
  const float* const memory = m.data();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 64, 0u);
  for (const Index rows : {0, 5, 10}) {
    m.resize(rows, 8);
    EXPECT_EQ(m.rows(), rows);
    EXPECT_EQ(m.data(), memory);
  }
  m.setConstant(4, 20, 7);  // another shape of the same size
  EXPECT_EQ(m.data(), memory);
  EXPECT_EQ(m, Matrix<float>::Constant(4, 20, 7));
  m = kSix;
  m = m.size() == 6 ? kSix.topRows(1) : kSix.topRows(2);
  EXPECT_EQ(m, kSix.topRows(1));
  EXPECT_EQ(m.data(), memory);
  EXPECT_EQ(m.capacity(), 80);
  m.resize(9, 9);
  EXPECT_EQ(m.capacity(), 81);
}

TEST(Reused, KeepsItsElementsWhereRoomIsMade) {
  ReusedMatrix<float> m = kSix;
  m.reserve(100);
  EXPECT_EQ(m.capacity(), 100);
  EXPECT_EQ(m, kSix);
  m.reserve(10);
  EXPECT_EQ(m.capacity(), 100);
}

TEST(Reused, IsAValueAndMovingLeavesAnEmptyOne) {
  ReusedMatrix<float> a = kSix;
  a.reserve(100);
  ReusedMatrix<float> b = a;
  EXPECT_EQ(b.capacity(), 6);  // not the spare capacity
  b(0, 0) = 9;
  EXPECT_EQ(a, kSix);
  const float* const memory = b.data();
  ReusedMatrix<float> c = std::move(b);
  EXPECT_EQ(c.data(), memory);
  EXPECT_EQ(b.size() + b.capacity(), 0);
  b.resize(1, 1);  // still of use
  b(0, 0) = 3;
  a = std::move(c);
  EXPECT_EQ(a.data(), memory);
  EXPECT_EQ(a(0, 0), 9);
  EXPECT_EQ(b(0, 0), 3);
  ReusedMatrix<float>& same = a;
  a = same;
  a = std::move(same);
  EXPECT_EQ(a(1, 2), 6);
}

TEST(Reused, BindsToViewsWithoutACopyAndWorksInExpressions) {
  ReusedMatrix<float> m = kSix;
  const MatrixRef<float> view(m);
  EXPECT_EQ(view.data(), m.data());
  const ConstMatrixRef<float> read(std::as_const(m));
  EXPECT_EQ(read.data(), m.data());
  m += m;
  m = m * 0.5f + Matrix<float>::Ones(2, 3);
  EXPECT_EQ(m, Matrix<float>((kSix.array() + 1).matrix()));
  const Matrix<float> plain = m;
  EXPECT_NE(plain.data(), m.data());
}

TEST(Reused, HoldsVectorsAndMasks) {
  Reused<moe::Mask> mask;
  EXPECT_EQ(mask.size(), 0);
  EXPECT_EQ(mask.cols(), 1);
  mask = moe::Mask::Constant(3, true);
  mask[1] = false;
  EXPECT_EQ(mask.count(), 2);
  const bool* const memory = mask.data();
  mask.resize(2);
  EXPECT_EQ(mask.data(), memory);
  Reused<moe::IndexVector> indices;
  EXPECT_EQ(indices.setZero(4).sum(), 0);
  indices = moe::IndexVector{{1, 2}};
  EXPECT_EQ(indices.sum(), 3);
  const Reused<moe::IndexVector> moved = std::move(indices);
  EXPECT_EQ(moved.size(), 2);
  EXPECT_EQ(indices.size(), 0);
  EXPECT_EQ(indices.cols(), 1);
}

TEST(Reused, RefusesNegativeShapes) {
  ReusedMatrix<float> m = kSix;
  EXPECT_THROW(m.resize(-1, 2), std::invalid_argument);
  EXPECT_THROW(m.resize(1, -2), std::invalid_argument);
  EXPECT_THROW(Reused<moe::Mask>().resize(1, 2), std::invalid_argument);
  EXPECT_EQ(m, kSix);
}

// ---- Where functions write.

void write_ones(const Output<float>& output) { output.of_shape(2, 3, "write_ones", "y").setOnes(); }

TEST(Output, ResizesAMatrixAndTakesViewsAsTheyAre) {
  const Matrix<float> ones = Matrix<float>::Ones(2, 3);
  Matrix<float> m;
  write_ones(m);
  EXPECT_EQ(m, ones);
  Matrix<float> large = Matrix<float>::Zero(4, 5);
  write_ones(large.block(1, 2, 2, 3));
  EXPECT_EQ(large.sum(), 6);
  EXPECT_EQ(Matrix<float>(large.block(1, 2, 2, 3)), ones);
  std::vector<float> memory(6);
  write_ones(Eigen::Map<Matrix<float>>(memory.data(), 2, 3));
  EXPECT_EQ(memory, std::vector<float>(6, 1.0f));
  MatrixRef<float> view = large.topLeftCorner(2, 3);
  write_ones(view);
  EXPECT_EQ(large.sum(), 11);
  ReusedMatrix<float> reused = kSix;
  write_ones(reused);
  EXPECT_EQ(reused, ones);
}

TEST(Output, NamesBothShapesOfAViewThatDoesNotFit) {
  Matrix<float> m = Matrix<float>::Zero(4, 3);
  try {
    write_ones(m.topRows(3));
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "write_ones: y has shape [3, 3], expected [2, 3]");
  }
  EXPECT_EQ(m.sum(), 0);
}

// What can not be written, or only through a copy, does not compile.
template <class M>
constexpr bool kFits = std::is_constructible_v<Output<float>, M>;
static_assert(kFits<Matrix<float>&> && !kFits<const Matrix<float>&> && !kFits<Matrix<float>>);
static_assert(!kFits<Matrix<double>&> && !kFits<Eigen::MatrixXf&>);
static_assert(kFits<Eigen::Block<Matrix<float>>> && !kFits<Eigen::Block<const Matrix<float>>>);
static_assert(!kFits<decltype(kSix + kSix)> && !kFits<Eigen::Transpose<Matrix<float>>>);

}  // namespace
}  // namespace reused_test
