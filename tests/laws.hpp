// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "compare.hpp"

// What the laws of routers and the laws of experts share.
namespace laws {

using moe::Index;
using moe::Matrix;
using moe::Rng;
using moe::Vector;

template <class S>
Matrix<S> normal_matrix(Index rows, Index cols, Rng& rng) {
  Matrix<S> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

// Fills every parameter, so that none stays zero.
template <class Thing>
void randomise(Thing& thing, Rng& rng) {
  Thing::visit([&](const moe::ParameterInfo&, auto& p) { moe::fill_normal(p, 0.5, rng); }, thing);
}

template <class M>
std::vector<typename M::Scalar> values_of(const M& m) {
  return {m.data(), m.data() + m.size()};
}

// Equal to the last bit, NaN included.
template <class S>
bool same_bits(const S* a, const S* b, Index n) {
  return n == 0 || std::memcmp(a, b, sizeof(S) * std::size_t(n)) == 0;
}
template <class A, class B>
testing::AssertionResult same_bits(const A& of_a, const B& of_b) {
  const moe::ConstMatrixRef<typename A::Scalar> a(of_a), b(of_b);
  if (a.rows() != b.rows() || a.cols() != b.cols())
    return testing::AssertionFailure() << a.rows() << " rows and " << b.rows();
  for (Index i = 0; i < a.rows(); ++i)
    if (!same_bits(a.row(i).data(), b.row(i).data(), a.cols()))
      return testing::AssertionFailure() << "row " << i << ":\n" << a.row(i) << "\n" << b.row(i);
  return testing::AssertionSuccess();
}

template <class S>
constexpr double kRounding = sizeof(S) == 4 ? 1e-5 : 1e-13;

template <class A, class B>
testing::AssertionResult equal_to_rounding(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols())
    return testing::AssertionFailure() << a.rows() << " rows and " << b.rows();
  const double error = relative_error(a, b);
  if (error <= kRounding<typename A::Scalar>) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "differ by " << error << " of the largest entry";
}

// A test that runs a function.
class FunctionTest : public testing::Test {
 public:
  explicit FunctionTest(std::function<void()> run) : run_(std::move(run)) {}
  void TestBody() override { run_(); }

 private:
  std::function<void()> run_;
};
inline void add_test(const std::string& suite, const char* name, std::function<void()> run) {
  testing::RegisterTest(suite.c_str(), name, nullptr, nullptr, __FILE__, __LINE__,
                        [run] { return new FunctionTest(run); });
}

}  // namespace laws
