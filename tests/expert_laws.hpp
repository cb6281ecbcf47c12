// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <concepts>
#include <set>
#include <string>

#include <moe/moe.hpp>

#include "laws.hpp"
#include "reference_moe.hpp"

// The laws that every expert obeys. A new expert needs a struct as below, and a line:
//   const bool checked = check_experts<MyTraits<float>, MyTraits<double>>("Mine");
//
//   template <class S>
//   struct MyTraits {
//     using Expert = ...;
//     static Expert make(moe::Index d_model, moe::Index d_ff, moe::Rng& rng);
//   };
namespace laws {

template <class Traits>
struct ExpertKind {
  using ExpertType = typename Traits::Expert;
  using Scalar = typename ExpertType::Scalar;
  static_assert(moe::TrainableExpert<ExpertType>);
  static_assert(std::copyable<ExpertType>);

  static ExpertType make(Index d_model, Index d_ff, Rng& rng) {
    ExpertType expert = Traits::make(d_model, d_ff, rng);
    randomise(expert, rng);
    return expert;
  }

  static Matrix<Scalar> forward(const ExpertType& expert, const Matrix<Scalar>& x) {
    Matrix<Scalar> y = Matrix<Scalar>::Constant(x.rows(), x.cols(), 99);
    expert.forward(x, y);
    return y;
  }

  // Forward and backward of the rows [begin, end) alone.
  struct Pass {
    Matrix<Scalar> y, d_x;
    ExpertType grad;
  };
  static Pass run(const ExpertType& expert, const Matrix<Scalar>& x, const Matrix<Scalar>& d_y) {
    Pass pass{Matrix<Scalar>::Constant(x.rows(), x.cols(), 99),
              Matrix<Scalar>::Constant(x.rows(), x.cols(), 99), moe::zeros_like(expert)};
    Matrix<Scalar> cache(x.rows(), expert.cache_cols());
    expert.forward(x, pass.y, cache);
    expert.backward(x, d_y, cache, pass.d_x, pass.grad);
    return pass;
  }
};

struct ExpertShape {
  Index d_model, d_ff;
};
constexpr ExpertShape kExpertShapes[] = {{1, 1}, {3, 2}, {7, 9}, {16, 33}, {40, 24}};

template <class Kind>
void ForwardEqualsTheReference() {
  Rng rng(31);
  using S = typename Kind::Scalar;
  using reference::expert_output;  // or that of an expert here
  for (const auto [d_model, d_ff] : kExpertShapes) {
    const auto expert = Kind::make(d_model, d_ff, rng);
    const Matrix<S> x = normal_matrix<S>(13, d_model, rng);
    Matrix<S> expected(13, d_model);
    for (Index i = 0; i < 13; ++i) {
      const Vector<S> row = expert_output(expert, reference::row_of(x, i));
      for (Index j = 0; j < d_model; ++j) expected(i, j) = row[j];
    }
    EXPECT_TRUE(equal_to_rounding(Kind::forward(expert, x), expected));
  }
}

template <class Kind>
void RowsDoNotDependOnTheRowsBesideThem() {
  Rng rng(32);
  using S = typename Kind::Scalar;
  for (const auto [d_model, d_ff] : kExpertShapes) {
    const auto expert = Kind::make(d_model, d_ff, rng);
    const Matrix<S> x = normal_matrix<S>(29, d_model, rng);
    const Matrix<S> d_y = normal_matrix<S>(29, d_model, rng);
    const auto whole = Kind::run(expert, x, d_y);
    EXPECT_TRUE(same_bits(Kind::forward(expert, x), whole.y));
    for (Index begin = 0; begin < 29; begin += 3) {
      for (const Index end : {begin + 1, begin + 2, Index(29)}) {
        const Matrix<S> x_part = x.middleRows(begin, end - begin);
        const auto part = Kind::run(expert, x_part, d_y.middleRows(begin, end - begin));
        EXPECT_TRUE(same_bits(part.y, Matrix<S>(whole.y.middleRows(begin, end - begin))));
        EXPECT_TRUE(same_bits(part.d_x, Matrix<S>(whole.d_x.middleRows(begin, end - begin))));
      }
    }
    // Blocks of a larger matrix are rows like any others.
    Matrix<S> y = Matrix<S>::Zero(29, d_model);
    expert.forward(x.middleRows(4, 11), y.middleRows(4, 11));
    EXPECT_TRUE(same_bits(Matrix<S>(y.middleRows(4, 11)), Matrix<S>(whole.y.middleRows(4, 11))));
    EXPECT_TRUE(all_zero(y.row(3)) && all_zero(y.row(15)));
  }
}

template <class Kind>
void NoRowsAreOrdinary() {
  Rng rng(33);
  using S = typename Kind::Scalar;
  using Expert = typename Kind::ExpertType;
  const auto expert = Kind::make(5, 6, rng);
  const auto pass = Kind::run(expert, Matrix<S>(0, 5), Matrix<S>(0, 5));
  EXPECT_EQ(pass.y.rows(), 0);
  Expert::visit(
      [](const moe::ParameterInfo& info, const auto& g) { EXPECT_TRUE((g.array() == 0).all()) << info.name; },
      pass.grad);
}

template <class Kind>
void GradientsOfRowsAddUp() {
  Rng rng(34);
  using S = typename Kind::Scalar;
  using Expert = typename Kind::ExpertType;
  for (const auto [d_model, d_ff] : kExpertShapes) {
    const auto expert = Kind::make(d_model, d_ff, rng);
    const Matrix<S> x = normal_matrix<S>(12, d_model, rng);
    const Matrix<S> d_y = normal_matrix<S>(12, d_model, rng);
    const auto whole = Kind::run(expert, x, d_y);
    Expert sum = moe::zeros_like(expert);
    for (Index begin = 0; begin < 12; begin += 4) {
      Matrix<S> y(4, d_model), d_x(4, d_model), cache(4, expert.cache_cols());
      expert.forward(x.middleRows(begin, 4), y, cache);
      expert.backward(x.middleRows(begin, 4), d_y.middleRows(begin, 4), cache, d_x, sum);
    }
    Expert::visit(
        [](const moe::ParameterInfo& info, const auto& a, const auto& b) {
          EXPECT_TRUE(equal_to_rounding(Matrix<S>(a), Matrix<S>(b))) << info.name;
        },
        sum, whole.grad);
  }
}

template <class Kind>
void BackwardAddsToTheGradientAndCanBeRepeatedOnOneCache() {
  Rng rng(35);
  using S = typename Kind::Scalar;
  using Expert = typename Kind::ExpertType;
  for (const auto [d_model, d_ff] : kExpertShapes) {
    const auto expert = Kind::make(d_model, d_ff, rng);
    const Matrix<S> x = normal_matrix<S>(10, d_model, rng);
    const Matrix<S> d_y = normal_matrix<S>(10, d_model, rng);
    Matrix<S> y(10, d_model), d_x(10, d_model), d_x_again(10, d_model);
    Matrix<S> cache(10, expert.cache_cols());
    expert.forward(x, y, cache);
    Expert once = moe::zeros_like(expert), again = once, twice = once;
    expert.backward(x, d_y, cache, d_x, once);
    expert.backward(x, d_y, cache, d_x_again, again);
    EXPECT_TRUE(same_bits(d_x_again, d_x));
    expert.backward(x, d_y, cache, d_x_again, twice);
    expert.backward(x, d_y, cache, d_x_again, twice);
    EXPECT_TRUE(same_bits(d_x_again, d_x));
    Expert::visit(
        [](const moe::ParameterInfo& info, const auto& a, const auto& b, const auto& doubled) {
          EXPECT_TRUE((a.array() != 0).any()) << info.name;
          EXPECT_TRUE(same_bits(a.data(), b.data(), a.size())) << info.name;
          EXPECT_TRUE(equal_to_rounding(Matrix<S>(doubled), Matrix<S>(2 * a))) << info.name;
        },
        once, again, twice);
  }
}

template <class Kind>
void ParametersHaveNamesAndTheirGradientsTheSameShapes() {
  Rng rng(36);
  using Expert = typename Kind::ExpertType;
  const Expert expert = Kind::make(5, 6, rng);
  const Expert grad = moe::zeros_like(expert);
  EXPECT_EQ(grad.d_model(), 5);
  EXPECT_EQ(grad.cache_cols(), expert.cache_cols());
  std::set<std::string> names;
  Index count = 0;
  Expert::visit(
      [&](const moe::ParameterInfo& info, const auto& p, const auto& g, const auto& again) {
        EXPECT_TRUE(names.insert(std::string(info.name)).second) << info.name;
        EXPECT_EQ(info.kind, moe::Kind::parameter);
        EXPECT_EQ(p.rows(), g.rows()) << info.name;
        EXPECT_EQ(p.cols(), g.cols()) << info.name;
        EXPECT_TRUE((p.array() != 0).all()) << info.name;
        EXPECT_TRUE((g.array() == 0).all()) << info.name;
        EXPECT_EQ(&p, &again) << info.name;
        count += p.size();
      },
      expert, grad, expert);
  EXPECT_TRUE(names.count("w_up"));
  EXPECT_TRUE(names.count("w_down"));
  EXPECT_EQ(moe::num_parameters(expert), count);

  Expert copy = expert;  // a value: changing the copy leaves the expert alone
  moe::set_zero(copy);
  Expert::visit(
      [](const moe::ParameterInfo& info, const auto& p, const auto& zero) {
        EXPECT_TRUE((p.array() != 0).all()) << info.name;
        EXPECT_TRUE((zero.array() == 0).all()) << info.name;
      },
      expert, copy);
}

// Makes every law a test of every kind.
template <class... Traits>
bool check_experts(const std::string& name) {
  Index number = 0;
  const auto add_tests = [&]<class Kind>(Kind) {
    const std::string suite = name + "/ExpertLaws/" + std::to_string(number++);
    add_test(suite, "ForwardEqualsTheReference", &ForwardEqualsTheReference<Kind>);
    add_test(suite, "RowsDoNotDependOnTheRowsBesideThem", &RowsDoNotDependOnTheRowsBesideThem<Kind>);
    add_test(suite, "NoRowsAreOrdinary", &NoRowsAreOrdinary<Kind>);
    add_test(suite, "GradientsOfRowsAddUp", &GradientsOfRowsAddUp<Kind>);
    add_test(suite, "BackwardAddsToTheGradientAndCanBeRepeatedOnOneCache",
             &BackwardAddsToTheGradientAndCanBeRepeatedOnOneCache<Kind>);
    add_test(suite, "ParametersHaveNamesAndTheirGradientsTheSameShapes",
             &ParametersHaveNamesAndTheirGradientsTheSameShapes<Kind>);
  };
  (add_tests(ExpertKind<Traits>{}), ...);
  return true;
}

}  // namespace laws
