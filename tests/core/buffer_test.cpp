// SPDX-License-Identifier: MIT
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/buffer.hpp>

namespace buffer_test {
namespace {

using moe::Buffer;
using moe::Index;
using moe::RowBuffer;

static_assert(std::copyable<Buffer<int>> && std::copyable<RowBuffer<float>>);
static_assert(std::is_nothrow_move_constructible_v<Buffer<int>>);
static_assert(std::is_nothrow_move_assignable_v<Buffer<int>>);
static_assert(std::is_nothrow_move_constructible_v<RowBuffer<float>>);
static_assert(std::is_nothrow_move_assignable_v<RowBuffer<float>>);

std::vector<int> list(const Buffer<int>& b) { return {b.begin(), b.end()}; }

TEST(Buffer, StartsEmptyAndHoldsWhatItIsGiven) {
  const Buffer<int> none;
  EXPECT_TRUE(none.empty());
  EXPECT_EQ(none.size(), 0);
  EXPECT_EQ(none.capacity(), 0);
  EXPECT_EQ(none.begin(), none.end());
  const Buffer<int> three{7, 8, 9};
  EXPECT_FALSE(three.empty());
  EXPECT_EQ(list(three), (std::vector<int>{7, 8, 9}));
  EXPECT_EQ(three[1], 8);
}

TEST(Buffer, OnlyGrowsAndKeepsItsMemoryWithinCapacity) {
  Buffer<int> b;
  b.resize(100);
  const int* const memory = b.data();
  const Index capacity = b.capacity();
  EXPECT_GE(capacity, 100);
  for (const Index n : {0, 1, 50, 100, 3}) {
    b.resize(n);
    EXPECT_EQ(b.size(), n);
    EXPECT_EQ(b.capacity(), capacity);
    EXPECT_EQ(b.data(), memory);
  }
  b.clear();
  EXPECT_TRUE(b.empty());
  EXPECT_EQ(b.capacity(), capacity);
  for (int i = 0; i < 100; ++i) b.push_back(i);
  EXPECT_EQ(b.data(), memory);
  b.assign(60, 4);
  EXPECT_EQ(b.data(), memory);
  b.reserve(20);
  EXPECT_EQ(b.data(), memory);
  EXPECT_EQ(b.size(), 60);
}

TEST(Buffer, KeepsItsElementsWhenItGrows) {
  Buffer<int> b{1, 2, 3};
  b.resize(200);
  EXPECT_EQ(b[0], 1);
  EXPECT_EQ(b[2], 3);
  for (Index i = 3; i < 200; ++i) EXPECT_EQ(b[i], 0);  // value-initialised
  Buffer<int> pushed;
  for (int i = 0; i < 1000; ++i) pushed.push_back(i);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(pushed[i], i);
  Buffer<int> reserved{5, 6};
  reserved.reserve(500);
  EXPECT_EQ(list(reserved), (std::vector<int>{5, 6}));
}

TEST(Buffer, KeepsWhatTheMemoryHeldWhenItShrinksAndGrowsAgain) {
  Buffer<int> b{1, 2, 3, 4};
  b.resize(1);
  b.resize(4);
  EXPECT_EQ(list(b), (std::vector<int>{1, 2, 3, 4}));
}

TEST(Buffer, IsAValue) {
  Buffer<int> a{1, 2, 3};
  Buffer<int> b = a;
  EXPECT_EQ(a, b);
  b[0] = 9;
  EXPECT_EQ(a[0], 1);
  EXPECT_FALSE(a == b);
  EXPECT_FALSE(a == (Buffer<int>{1, 2}));
  EXPECT_FALSE((Buffer<int>{1, 2}) == a);
  const Buffer<int>& same = b;
  b = same;
  EXPECT_EQ(list(b), (std::vector<int>{9, 2, 3}));
}

TEST(Buffer, ACopyHoldsTheElementsAndNotTheSpareRoom) {
  Buffer<int> b;
  b.resize(1000);
  b.resize(2);
  EXPECT_EQ(Buffer<int>(b).capacity(), 2);
}

TEST(Buffer, AssignmentReusesTheMemory) {
  Buffer<int> a;
  a.resize(10);
  const int* const memory = a.data();
  a = Buffer<int>{1, 2, 3}.size() == 3 ? std::as_const(a) : a;  // self, by another name
  const Buffer<int> three{1, 2, 3};
  a = three;
  EXPECT_EQ(a.data(), memory);
  EXPECT_EQ(list(a), (std::vector<int>{1, 2, 3}));
}

TEST(Buffer, MovingTakesTheMemoryAndLeavesAnEmptyOne) {
  Buffer<int> a{1, 2, 3};
  const int* const memory = a.data();
  Buffer<int> b = std::move(a);
  EXPECT_EQ(b.data(), memory);
  EXPECT_EQ(b.size(), 3);
  EXPECT_TRUE(a.empty());
  EXPECT_EQ(a.begin(), a.end());
  Buffer<int> c{4};
  c = std::move(b);
  EXPECT_EQ(c.data(), memory);
  EXPECT_TRUE(b.empty());
  b.push_back(5);  // still of use
  a = c;
  EXPECT_EQ(list(b), (std::vector<int>{5}));
  EXPECT_EQ(list(a), (std::vector<int>{1, 2, 3}));
}

TEST(Buffer, MovingOntoItselfKeepsItWhole) {
  Buffer<int> a{1, 2, 3};
  Buffer<int>& same = a;
  a = std::move(same);
  EXPECT_LE(a.size(), a.capacity());
  EXPECT_EQ(list(a), (std::vector<int>{1, 2, 3}));
}

TEST(Buffer, IsAlignedForVectors) {
  for (const Index n : {1, 3, 17, 1000}) {
    Buffer<float> b;
    b.resize(n);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data()) % 16, 0u);
  }
}

TEST(RowBuffer, IsARowMajorMatrix) {
  RowBuffer<double> b;
  EXPECT_EQ(b.rows(), 0);
  EXPECT_EQ(b.cols(), 0);
  b.resize(3, 4);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 4; ++j) b.row(i)[j] = double(10 * i + j);
  EXPECT_EQ(b.matrix().rows(), 3);
  EXPECT_EQ(b.matrix().cols(), 4);
  EXPECT_EQ(b.matrix()(2, 3), 23);
  b.block(1, 2)(0, 0) = 99;
  EXPECT_EQ(std::as_const(b).matrix()(1, 0), 99);
  EXPECT_EQ(std::as_const(b).block(1, 2)(1, 1), 21);
  EXPECT_EQ(std::as_const(b).block(3, 0).rows(), 0);
}

TEST(RowBuffer, ChangesShapeWithinItsMemory) {
  RowBuffer<float> b;
  b.resize(2, 8, 10);
  const float* const memory = b.data();
  for (const Index rows : {10, 0, 5, 10}) {
    b.resize(rows, 8);
    EXPECT_EQ(b.rows(), rows);
    EXPECT_EQ(b.data(), memory);
  }
  b.resize(4, 20);  // another shape of the same size
  EXPECT_EQ(b.data(), memory);
  EXPECT_EQ(b.row(3), memory + 60);
}

TEST(RowBuffer, IsAValueAndMovingLeavesAnEmptyOne) {
  RowBuffer<int> a;
  a.resize(2, 2);
  a.matrix() << 1, 2, 3, 4;
  RowBuffer<int> b = a;
  b.matrix()(0, 0) = 9;
  EXPECT_EQ(a.matrix()(0, 0), 1);
  const RowBuffer<int> c = std::move(b);
  EXPECT_EQ(c.matrix()(0, 0), 9);
  EXPECT_EQ(c.rows(), 2);
  EXPECT_EQ(b.rows(), 0);  // no rows without memory behind them
  EXPECT_EQ(b.matrix().size(), 0);
  a = RowBuffer<int>();
  EXPECT_EQ(a.rows(), 0);
  RowBuffer<int> d;
  d.resize(1, 3);
  a = std::move(d);
  EXPECT_EQ(a.cols(), 3);
  EXPECT_EQ(d.rows() * d.cols(), 0);
}

}  // namespace
}  // namespace buffer_test
