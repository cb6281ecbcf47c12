// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <moe/core/random.hpp>
#include <moe/kernels/select.hpp>
#include <moe/math/init.hpp>
#include <moe/math/linear.hpp>

namespace linear_test {
namespace {

using moe::Index;
using moe::Matrix;
using moe::Vector;
using moe::Write;

template <class S>
Matrix<S> random_matrix(Index rows, Index cols, moe::Rng& rng) {
  Matrix<S> m(rows, cols);
  moe::fill_normal(m, 1.0, rng);
  return m;
}

// The same matrix inside a larger one, so that its rows do not follow each other.
template <class S>
struct Strided {
  Matrix<S> all;
  Index cols;
  explicit Strided(const Matrix<S>& m)
      : all(Matrix<S>::Constant(m.rows() + 1, m.cols() + 5, S(99))), cols(m.cols()) {
    view() = m;
  }
  auto view() { return all.block(0, 3, all.rows() - 1, cols); }
  bool margins_are_untouched() const {
    return (all.leftCols(3).array() == S(99)).all() && (all.rightCols(2).array() == S(99)).all() &&
           (all.bottomRows(1).array() == S(99)).all();
  }
};

// |got - sum a b| within the rounding of a sum of `depth` products.
template <class S>
void expect_sum(S got, long double sum, long double magnitude, Index depth) {
  const long double bound =
      (long double)(depth + 2) * (long double)(std::numeric_limits<S>::epsilon()) * magnitude;
  EXPECT_LE(std::abs((long double)(got)-sum), bound);
}

template <class S>
void check_products(Index rows, Index in, Index out, moe::Rng& rng) {
  SCOPED_TRACE(testing::Message() << "rows " << rows << ", in " << in << ", out " << out);
  const Matrix<S> x = random_matrix<S>(rows, in, rng), w = random_matrix<S>(out, in, rng),
                  d_y = random_matrix<S>(rows, out, rng);
  Strided<S> x_view(x), w_view(w), d_y_view(d_y);
  for (const Write write : {Write::replace, Write::add}) {
    const Matrix<S> y_before = random_matrix<S>(rows, out, rng), d_x_before = random_matrix<S>(rows, in, rng);
    const bool add = write == Write::add;
    Matrix<S> y = y_before, d_x = d_x_before;
    moe::linear(x, w, y, write);
    moe::linear_backward_input(d_y, w, d_x, write);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < out; ++j) {
        long double sum = add ? y_before(i, j) : S(0), magnitude = std::abs(sum);
        for (Index p = 0; p < in; ++p) {
          sum += (long double)(x(i, p)) * w(j, p);
          magnitude += std::abs((long double)(x(i, p)) * w(j, p));
        }
        expect_sum(y(i, j), sum, magnitude, in);
      }
      for (Index p = 0; p < in; ++p) {
        long double sum = add ? d_x_before(i, p) : S(0), magnitude = std::abs(sum);
        for (Index j = 0; j < out; ++j) {
          sum += (long double)(d_y(i, j)) * w(j, p);
          magnitude += std::abs((long double)(d_y(i, j)) * w(j, p));
        }
        expect_sum(d_x(i, p), sum, magnitude, out);
      }
    }
    // Operands whose rows are apart give the same bits.
    Strided<S> y_view(y_before), d_x_view(d_x_before);
    moe::linear(x_view.view(), w_view.view(), y_view.view(), write);
    moe::linear_backward_input(d_y_view.view(), w_view.view(), d_x_view.view(), write);
    EXPECT_TRUE((y_view.view().array() == y.array()).all());
    EXPECT_TRUE((d_x_view.view().array() == d_x.array()).all());
    EXPECT_TRUE(y_view.margins_are_untouched());
    EXPECT_TRUE(d_x_view.margins_are_untouched());
  }
  const Matrix<S> d_w_before = random_matrix<S>(out, in, rng);
  Matrix<S> d_w = d_w_before;
  moe::linear_backward_weight(d_y, x, d_w);
  for (Index j = 0; j < out; ++j) {
    for (Index p = 0; p < in; ++p) {
      long double sum = d_w_before(j, p), magnitude = std::abs(sum);
      for (Index i = 0; i < rows; ++i) {
        sum += (long double)(d_y(i, j)) * x(i, p);
        magnitude += std::abs((long double)(d_y(i, j)) * x(i, p));
      }
      expect_sum(d_w(j, p), sum, magnitude, rows);
    }
  }
  Strided<S> d_w_view(d_w_before);
  moe::linear_backward_weight(d_y_view.view(), x_view.view(), d_w_view.view());
  EXPECT_TRUE((d_w_view.view().array() == d_w.array()).all());
  EXPECT_TRUE(d_w_view.margins_are_untouched());
}

template <class S>
class ProductOf : public testing::Test {};
using Scalars = testing::Types<float, double, long double>;
TYPED_TEST_SUITE(ProductOf, Scalars);

TYPED_TEST(ProductOf, EqualsTripleLoopsOverManyOddShapes) {
  moe::Rng rng(1);
  const Index sizes[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 33, 48, 50};
  for (int i = 0; i < 150; ++i)
    check_products<TypeParam>(sizes[rng.index(20)], sizes[rng.index(20)], sizes[rng.index(20)], rng);
}

TYPED_TEST(ProductOf, EqualsTripleLoopsWhereADimensionIsZeroOrOne) {
  moe::Rng rng(2);
  for (const Index rows : {0, 1, 4})
    for (const Index in : {0, 1, 4})
      for (const Index out : {0, 1, 4}) check_products<TypeParam>(rows, in, out, rng);
}

TYPED_TEST(ProductOf, EqualsTripleLoopsAroundTheDepthAtWhichSumsAreCut) {
  moe::Rng rng(3);
  for (const Index deep : {255, 256, 257, 511, 512, 513, 700, 2047, 2050, 4099}) {
    check_products<TypeParam>(5, deep, 7, rng);   // deep in linear
    check_products<TypeParam>(3, 9, deep, rng);   // deep in the gradient by the input
    check_products<TypeParam>(deep, 5, 11, rng);  // deep in the gradient by the weight
  }
}

// Rows of a weight of at least 2^16 numbers are multiplied far from each other: in widths of whole pages and
// others, with columns left over and without.
TYPED_TEST(ProductOf, EqualsTripleLoopsWhereTheWeightIsLarge) {
  moe::Rng rng(4);
  for (const Index rows : {1, 2, 3, 5, 8}) {
    check_products<TypeParam>(rows, 1024, 64, rng);
    check_products<TypeParam>(rows, 1024, 77, rng);
    check_products<TypeParam>(rows, 520, 144, rng);
    check_products<TypeParam>(rows, 515, 135, rng);
  }
}

TYPED_TEST(ProductOf, TakesMapsAndRefs) {
  using S = TypeParam;
  moe::Rng rng(4);
  const Matrix<S> x = random_matrix<S>(6, 10, rng), w = random_matrix<S>(7, 10, rng);
  Matrix<S> expected(6, 7), y(6, 7);
  moe::linear(x, w, expected);
  const moe::ConstMatrixRef<S> x_ref = x, w_ref = w;
  moe::MatrixRef<S> y_ref = y;
  moe::linear(x_ref, w_ref, y_ref);
  EXPECT_TRUE((y.array() == expected.array()).all());
  std::vector<S> apart(6 * 12);
  Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>> map(apart.data(), 6, 10, Eigen::OuterStride<>(12));
  map = x;
  y.setZero();
  moe::linear(map, Eigen::Map<const Matrix<S>>(w.data(), 7, 10), y);
  EXPECT_TRUE((y.array() == expected.array()).all());
  y.setZero();
  moe::linear(x.middleRows(2, 3), w, y.middleRows(2, 3));
  EXPECT_TRUE((y.middleRows(2, 3).array() == expected.middleRows(2, 3).array()).all());
  EXPECT_TRUE((y.topRows(2).array() == S(0)).all());
}

TYPED_TEST(ProductOf, TakesVectorsAsMatricesOfOneColumn) {
  using S = TypeParam;
  moe::Rng rng(5);
  const Matrix<S> x = random_matrix<S>(9, 1, rng), w = random_matrix<S>(4, 1, rng),
                  one = random_matrix<S>(1, 6, rng), z = random_matrix<S>(9, 6, rng);
  Matrix<S> expected(9, 4), y(9, 4);
  moe::linear(x, w, expected);
  moe::linear(Vector<S>(x), Vector<S>(w), y);
  EXPECT_TRUE((y.array() == expected.array()).all());
  Matrix<S> column(9, 1);
  Vector<S> column_vector(9);
  moe::linear(z, one, column);
  moe::linear(z, one, column_vector);
  EXPECT_TRUE((column_vector.array() == column.array()).all());
}

// ---- What decides the bits of a result.

template <class S>
struct OffsetMap {
  std::vector<S> memory;
  Index rows, cols, offset;
  OffsetMap(const Matrix<S>& m, Index offset_)
      : memory(std::size_t(m.size() + offset_)), rows(m.rows()), cols(m.cols()), offset(offset_) {
    map() = m;
  }
  Eigen::Map<Matrix<S>> map() { return {memory.data() + offset, rows, cols}; }
};

TYPED_TEST(ProductOf, ARowsBitsDoNotDependOnTheRowsBesideIt) {
  using S = TypeParam;
  moe::Rng rng(6);
  const Index most = 40;
  for (const auto& [in, out] : {std::pair<Index, Index>{19, 23}, {300, 37}, {64, 96}}) {
    const Matrix<S> x = random_matrix<S>(most, in, rng), w = random_matrix<S>(out, in, rng),
                    d_y = random_matrix<S>(most, out, rng);
    Matrix<S> y_alone(most, out), d_x_alone(most, in);
    for (Index i = 0; i < most; ++i) {
      moe::linear(x.middleRows(i, 1), w, y_alone.middleRows(i, 1));
      moe::linear_backward_input(d_y.middleRows(i, 1), w, d_x_alone.middleRows(i, 1));
    }
    for (Index rows = 1; rows <= most; ++rows) {
      const Index first = rng.index(most - rows + 1);
      Matrix<S> y(rows, out), d_x(rows, in);
      moe::linear(x.middleRows(first, rows), w, y);
      moe::linear_backward_input(d_y.middleRows(first, rows), w, d_x);
      EXPECT_TRUE((y.array() == y_alone.middleRows(first, rows).array()).all()) << rows;
      EXPECT_TRUE((d_x.array() == d_x_alone.middleRows(first, rows).array()).all()) << rows;
    }
  }
}

TYPED_TEST(ProductOf, BitsDoNotDependOnAlignment) {
  using S = TypeParam;
  moe::Rng rng(7);
  const Matrix<S> x = random_matrix<S>(21, 19, rng), w = random_matrix<S>(35, 19, rng),
                  d_y = random_matrix<S>(21, 35, rng);
  Matrix<S> y(21, 35), d_x(21, 19), d_w = Matrix<S>::Zero(35, 19);
  moe::linear(x, w, y);
  moe::linear_backward_input(d_y, w, d_x);
  moe::linear_backward_weight(d_y, x, d_w);
  for (Index offset = 0; offset < 16; ++offset) {
    OffsetMap<S> x_at(x, offset), w_at(w, 15 - offset), d_y_at(d_y, offset / 2),
        y_at(Matrix<S>::Zero(21, 35), 5), d_x_at(Matrix<S>::Zero(21, 19), 3 + offset),
        d_w_at(Matrix<S>::Zero(35, 19), offset);
    moe::linear(x_at.map(), w_at.map(), y_at.map());
    moe::linear_backward_input(d_y_at.map(), w_at.map(), d_x_at.map());
    moe::linear_backward_weight(d_y_at.map(), x_at.map(), d_w_at.map());
    EXPECT_TRUE((y_at.map().array() == y.array()).all()) << offset;
    EXPECT_TRUE((d_x_at.map().array() == d_x.array()).all()) << offset;
    EXPECT_TRUE((d_w_at.map().array() == d_w.array()).all()) << offset;
  }
}

TYPED_TEST(ProductOf, AWeightsGradientMayBeMadeInPieces) {
  using S = TypeParam;
  moe::Rng rng(8);
  const Matrix<S> d_y = random_matrix<S>(300, 13, rng), x = random_matrix<S>(300, 41, rng);
  Matrix<S> whole = Matrix<S>::Zero(13, 41), pieces = whole;
  moe::linear_backward_weight(d_y, x, whole);
  for (Index begin = 0; begin < 41; begin += 7) {
    const Index count = std::min<Index>(7, 41 - begin);
    moe::linear_backward_weight(d_y, x.middleCols(begin, count), pieces.middleCols(begin, count));
  }
  EXPECT_TRUE((pieces.array() == whole.array()).all());
}

// ---- Vectors.

TYPED_TEST(ProductOf, DotAndAddScaledEqualLoopsAtEveryLengthAndAlignment) {
  using S = TypeParam;
  moe::Rng rng(9);
  for (Index n = 0; n <= 130; ++n) {
    const Matrix<S> a = random_matrix<S>(1, n, rng), b = random_matrix<S>(1, n, rng);
    const S scale = S(rng.normal());
    long double sum = 0, magnitude = 0;
    for (Index i = 0; i < n; ++i) {
      sum += (long double)(a(0, i)) * b(0, i);
      magnitude += std::abs((long double)(a(0, i)) * b(0, i));
    }
    const S result = moe::dot(n, a.data(), b.data());
    expect_sum(result, sum, magnitude, n);
    Matrix<S> scaled = b;
    moe::add_scaled(n, scale, a.data(), scaled.data());
    for (Index i = 0; i < n; ++i)
      expect_sum(scaled(0, i), b(0, i) + (long double)(scale)*a(0, i),
                 std::abs((long double)(b(0, i))) + std::abs((long double)(scale)*a(0, i)), 1);
    const Index offset = 1 + rng.index(15);
    OffsetMap<S> a_at(a, offset), b_at(b, 16 - offset);
    EXPECT_EQ(moe::dot(n, a_at.map().data(), b_at.map().data()), result);
    moe::add_scaled(n, scale, a_at.map().data(), b_at.map().data());
    EXPECT_TRUE((b_at.map().array() == scaled.array()).all());
  }
}

TYPED_TEST(ProductOf, BiasIsAddedToEveryRowAndItsGradientIsTheSumOfRows) {
  using S = TypeParam;
  Matrix<S> y(3, 5);
  y << 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15;
  const Vector<S> b{{S(100), S(200), S(300), S(400), S(500)}};
  Vector<S> d_b{{S(1), S(1), S(1), S(1), S(1)}};
  moe::bias_backward(y, d_b);
  EXPECT_EQ(d_b, (Vector<S>{{S(19), S(22), S(25), S(28), S(31)}}));
  Strided<S> view(y);
  moe::add_bias(b, view.view());
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 5; ++j) EXPECT_EQ(view.view()(i, j), y(i, j) + b[j]);
  EXPECT_TRUE(view.margins_are_untouched());
  Matrix<S> none(0, 5);
  moe::add_bias(b, none);
  moe::bias_backward(none, d_b);
  EXPECT_EQ(d_b[0], S(19));
}

// ---- Products of floats: every set of kernels.

using moe::InstructionSet;

std::vector<InstructionSet> available_sets() {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512})
    if (moe::is_available(set)) sets.push_back(set);
  return sets;
}

struct Products {
  Matrix<float> y, d_x, d_w;
  bool operator==(const Products&) const = default;
};

// All three products of operands with strides of their own, added to or replacing `before`.
Products multiply_with(InstructionSet set, const Matrix<float>& x, const Matrix<float>& w,
                       const Matrix<float>& d_y, const Products& before, bool add) {
  const moe::kernels::DenseKernels& table = *moe::kernels::find_dense(set);
  const moe::kernels::DenseBackwardKernels& backward = *moe::kernels::find_dense_backward(set);
  const Index rows = x.rows(), in = x.cols(), out = w.rows();
  Strided<float> x_at(x), w_at(w), d_y_at(d_y), y_at(before.y), d_x_at(before.d_x), d_w_at(before.d_w);
  auto x_view = x_at.view(), w_view = w_at.view(), d_y_view = d_y_at.view(), y_view = y_at.view(),
       d_x_view = d_x_at.view(), d_w_view = d_w_at.view();
  table.linear(rows, in, out, x_view.data(), in + 5, w_view.data(), in + 5, y_view.data(), out + 5, add);
  backward.linear_backward_input(rows, in, out, d_y_view.data(), out + 5, w_view.data(), in + 5,
                                 d_x_view.data(), in + 5, add);
  backward.linear_backward_weight(rows, in, out, d_y_view.data(), out + 5, x_view.data(), in + 5,
                                  d_w_view.data(), in + 5);
  for (auto* at : {&y_at, &d_x_at, &d_w_at}) EXPECT_TRUE(at->margins_are_untouched());
  return {y_view, d_x_view, d_w_view};
}

// a b and the sum of what it adds without their signs, in doubles.
struct Reference {
  Matrix<double> product, magnitude;
  Index depth;
  Reference(const Matrix<float>& a, const Matrix<float>& b)
      : product(a.cast<double>() * b.cast<double>()),
        magnitude(a.cwiseAbs().cast<double>() * b.cwiseAbs().cast<double>()),
        depth(a.cols()) {}

  // |got - (before + product)| is within the rounding of a sum.
  void expect(const Matrix<float>& got, const Matrix<float>& before, bool add) const {
    const Matrix<double> first = (add ? 1.0 : 0.0) * before.cast<double>();
    const double most = double(depth + 2) * double(std::numeric_limits<float>::epsilon());
    EXPECT_TRUE(((got.cast<double>() - first - product).array().abs() <=
                 most * (magnitude + first.cwiseAbs()).array())
                    .all());
  }
};

TEST(FloatProducts, EverySetOfKernelsEqualsDoublesOverManyOddShapes) {
  moe::Rng rng(10);
  const Index rows_of[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 25, 31, 64, 96, 97, 200, 300};
  const Index widths[] = {1,  2,  3,   4,   7,   8,   9,   15,  16,  17,  31,  33,  48,  63,  64,
                          65, 80, 127, 128, 129, 191, 200, 255, 256, 257, 300, 511, 512, 513, 600};
  for (int i = 0; i < 40; ++i) {
    const Index rows = rows_of[i % 20], in = widths[rng.index(30)], out = widths[rng.index(30)];
    SCOPED_TRACE(testing::Message() << "rows " << rows << ", in " << in << ", out " << out);
    const Matrix<float> x = random_matrix<float>(rows, in, rng), w = random_matrix<float>(out, in, rng),
                        d_y = random_matrix<float>(rows, out, rng);
    const Products before = {random_matrix<float>(rows, out, rng), random_matrix<float>(rows, in, rng),
                             random_matrix<float>(out, in, rng)};
    const Reference y(x, w.transpose()), d_x(d_y, w), d_w(d_y.transpose(), x);
    for (const bool add : {false, true}) {
      std::vector<Products> results;
      for (const InstructionSet set : available_sets()) {
        SCOPED_TRACE(moe::name_of(set));
        results.push_back(multiply_with(set, x, w, d_y, before, add));
        const Products& got = results.back();
        y.expect(got.y, before.y, add);
        d_x.expect(got.d_x, before.d_x, add);
        d_w.expect(got.d_w, before.d_w, true);
      }
      if (results.size() == 3) {
        EXPECT_TRUE(results[1] == results[2]) << "AVX2 and AVX-512";
      }
    }
  }
}

TEST(FloatProducts, ARowsBitsDoNotDependOnTheRowsBesideItInAnySet) {
  moe::Rng rng(11);
  const Index most = 40, in = 150, out = 90;
  const Matrix<float> x = random_matrix<float>(most, in, rng), w = random_matrix<float>(out, in, rng),
                      d_y = random_matrix<float>(most, out, rng);
  const Products before = {Matrix<float>::Ones(most, out), Matrix<float>::Ones(most, in),
                           Matrix<float>::Ones(out, in)};
  for (const InstructionSet set : available_sets()) {
    SCOPED_TRACE(moe::name_of(set));
    const Products all = multiply_with(set, x, w, d_y, before, true);
    for (const Index rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 24, 31}) {
      const Index first = rng.index(most - rows + 1);
      const Products some =
          multiply_with(set, x.middleRows(first, rows), w, d_y.middleRows(first, rows),
                        {before.y.topRows(rows), before.d_x.topRows(rows), before.d_w}, true);
      EXPECT_TRUE((some.y.array() == all.y.middleRows(first, rows).array()).all()) << rows;
      EXPECT_TRUE((some.d_x.array() == all.d_x.middleRows(first, rows).array()).all()) << rows;
    }
  }
}

TEST(FloatProducts, ANotANumberStaysInItsRow) {
  moe::Rng rng(12);
  for (const Index rows : {3, 7, 40}) {
    Matrix<float> x = random_matrix<float>(rows, 70, rng), d_y = random_matrix<float>(rows, 90, rng);
    const Matrix<float> w = random_matrix<float>(90, 70, rng);
    const Products before = {Matrix<float>::Zero(rows, 90), Matrix<float>::Zero(rows, 70),
                             Matrix<float>::Zero(90, 70)};
    x.row(1).setConstant(std::numeric_limits<float>::quiet_NaN());
    d_y.row(1).setConstant(std::numeric_limits<float>::quiet_NaN());
    for (const InstructionSet set : available_sets()) {
      const Products got = multiply_with(set, x, w, d_y, before, false);
      for (Index i = 0; i < rows; ++i) {
        EXPECT_EQ(got.y.row(i).array().isNaN().all(), i == 1);
        EXPECT_EQ(got.y.row(i).array().isNaN().any(), i == 1);
        EXPECT_EQ(got.d_x.row(i).array().isNaN().all(), i == 1);
        EXPECT_EQ(got.d_x.row(i).array().isNaN().any(), i == 1);
      }
    }
  }
}

}  // namespace
}  // namespace linear_test
