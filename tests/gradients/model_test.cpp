// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include <moe/moe.hpp>

#include "layers.hpp"

// Gradients of a model of one's own: an embedding and two layers with residuals, checked as one thing.
namespace {

using namespace gradients;

struct Stack {
  using Layer = moe::MoELayer<SwiGLUExpert, moe::NoisyTopKRouter<double>>;
  Matrix<double> embedding;  // [ids, d_model]
  std::vector<Layer> layers;
  Matrix<double> constant = Matrix<double>::Ones(2, 2);
  moe::IndexVector table = moe::IndexVector::Constant(3, 1);

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"embedding"}, self.embedding...);
    moe::visit_array(f, {"constant", moe::Kind::frozen}, self.constant...);
    moe::visit_array(f, {"table", moe::Kind::buffer}, self.table...);
    moe::visit_parts("layers", f, self.layers...);
  }
};

Stack make_stack(Rng& rng) {
  Stack stack{moe::lecun_normal<double>(kTokens, kDModel, rng), {}};
  for (int i = 0; i < 2; ++i) {
    moe::NoisyTopKRouter<double> router({.d_model = kDModel, .num_experts = kNumExperts, .top_k = 2}, rng);
    randomise(router, rng);
    stack.layers.push_back(make_layer<SwiGLUExpert>(router, Shared::plain, true, rng));
  }
  return stack;
}

// What the output is worth, and how evenly both layers use their experts.
double value_of(const Stack& stack, Stack* grad, moe::RoutingSignature& signature) {
  Rng rng(3);
  std::vector<Stack::Layer::Cache> caches(stack.layers.size());
  Matrix<double> x = stack.embedding, y(kTokens, kDModel), d_y(kTokens, kDModel);
  moe::fill_normal(d_y, 1.0, rng);
  double value = 0;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    stack.layers[i].forward(x, rng, y, caches[i], {}, moe::Sequential{});
    x += y;
    signature.add(caches[i].routing);
    value += moe::load_balancing_loss(caches[i].routing).value;
  }
  value += d_y.cwiseProduct(x).sum();
  if (grad == nullptr) return value;
  for (std::size_t i = caches.size(); i-- > 0;) {
    const auto balance = moe::load_balancing_loss(caches[i].routing);
    d_y += stack.layers[i].backward(d_y, caches[i], grad->layers[i], balance.gradient, moe::Sequential{});
  }
  grad->embedding += d_y;
  return value;
}

// A model off the kinks.
Stack fit_stack() {
  Rng rng(41);
  for (int redraw = 0; redraw <= kMostRedraws; ++redraw) {
    Stack stack = make_stack(rng);
    if (moe::check_gradients(stack, value_of).crossed == 0) return stack;
  }
  ADD_FAILURE() << "no fit model in " << kMostRedraws << " draws";
  return make_stack(rng);
}

}  // namespace

TEST(Gradients, OfAModelOfSeveralLayersAreExact) {
  const Stack stack = fit_stack();
  const moe::GradientReport report = moe::check_gradients(stack, value_of);
  EXPECT_EQ(report.crossed, 0);
  EXPECT_LE(report.worst, kTolerance) << report.where;
  EXPECT_EQ(report.checked, moe::num_parameters(stack));  // neither the constant nor the table
  EXPECT_NE(report.where, "");
}

TEST(Gradients, OfAModelAreNamedWhereTheyAreWrong) {
  const auto wrong = [](const Stack& stack, Stack* grad) {
    moe::RoutingSignature signature;
    const double value = value_of(stack, grad, signature);
    if (grad) grad->layers[1].router().w_router(1, 2) += 1e-3;
    return value;
  };
  const moe::GradientReport report = moe::check_gradients(fit_stack(), wrong);
  EXPECT_GT(report.worst, 10 * kTolerance);
  EXPECT_EQ(report.where, "layers.1.router.w_router");
  EXPECT_NEAR(report.analytic - report.numeric, 1e-3, 1e-6);
}

TEST(Gradients, OfAModelCountWhereARoutingOfItChanges) {
  Stack stack = fit_stack();
  // Two experts of one layer all but tie for every token.
  Matrix<double>& w = stack.layers[1].router().w_router;
  w.row(0) = w.row(1) * (1 + 1e-6);
  const auto in_inference = [](const Stack& s, Stack*, moe::RoutingSignature& signature) {
    signature.add(s.layers[0].route(s.embedding, {}, moe::Sequential{}));
    signature.add(s.layers[1].route(s.embedding, {}, moe::Sequential{}));
    return 0.0;
  };
  EXPECT_GT(moe::check_gradients(stack, in_inference).crossed, 0);
  // An objective that shows no routing has nothing to count.
  EXPECT_EQ(moe::check_gradients(stack, [](const Stack&, Stack*) { return 0.0; }).crossed, 0);
}

TEST(Gradients, OfAModelAreRefusedWhereTheyCanNotBeCompared) {
  Rng rng(42);
  const Stack stack = make_stack(rng);
  const auto reshaped = [](const Stack&, Stack* grad) {
    if (grad) grad->embedding.resize(1, 1);
    return 0.0;
  };
  const auto shortened = [](const Stack&, Stack* grad) {
    if (grad) grad->layers.pop_back();
    return 0.0;
  };
  EXPECT_THROW(moe::check_gradients(stack, reshaped), std::invalid_argument);
  EXPECT_THROW(moe::check_gradients(stack, shortened), std::invalid_argument);
  EXPECT_THROW(moe::check_gradients(stack, value_of, {.step = 0}), std::invalid_argument);
}
