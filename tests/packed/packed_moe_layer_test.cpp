// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "compare.hpp"
#include "packed/packed_testing.hpp"
#include "reference_moe.hpp"
#include "sanitized.hpp"

namespace moe::packed_moe_layer_test {
namespace {

using packed_testing::available_sets;
using packed_testing::Backwards;
using packed_testing::message_of;
using packed_testing::same_bits;

using Any = VariantExpert<FeedForward<float, ReLU>, FeedForward<float, GELU>, FeedForward<float, GELUTanh>,
                          FeedForward<float, SiLU>, GatedFeedForward<float, SwiGLU>,
                          GatedFeedForward<float, GEGLU>, GatedFeedForward<float, GEGLUTanh>,
                          GatedFeedForward<float, ReGLU>, GatedFeedForward<float, ClampedSwiGLU>>;

template <class E>
Any make(Index d_model, Index d_ff, bool bias, Rng& rng) {
  typename E::Options options{.d_model = d_model, .d_ff = d_ff, .bias = bias};
  E expert(options, rng);
  E::visit(
      [&](const ParameterInfo&, auto& p) {
        if (p.cols() == 1) fill_normal(p, 0.5, rng);
      },
      expert);
  return expert;
}

Any draw_expert(Index d_model, Rng& rng) {
  const Index d_ff = 1 + rng.index(70);
  const bool bias = rng.uniform() < 0.5;
  switch (rng.index(9)) {
    case 0:
      return make<FeedForward<float, ReLU>>(d_model, d_ff, bias, rng);
    case 1:
      return make<FeedForward<float, GELU>>(d_model, d_ff, bias, rng);
    case 2:
      return make<FeedForward<float, GELUTanh>>(d_model, d_ff, bias, rng);
    case 3:
      return make<FeedForward<float, SiLU>>(d_model, d_ff, bias, rng);
    case 4:
      return make<GatedFeedForward<float, SwiGLU>>(d_model, d_ff, bias, rng);
    case 5:
      return make<GatedFeedForward<float, GEGLU>>(d_model, d_ff, bias, rng);
    case 6:
      return make<GatedFeedForward<float, GEGLUTanh>>(d_model, d_ff, bias, rng);
    case 7:
      return make<GatedFeedForward<float, ReGLU>>(d_model, d_ff, bias, rng);
    default:
      return make<GatedFeedForward<float, ClampedSwiGLU>>(d_model, d_ff, bias, rng);
  }
}

// To nearest, ties to even: by Eigen, which the library does not use for this.
double rounded(float w) { return double(float(Eigen::bfloat16(w))); }

// The same expert in double; `round` is applied to its weights.
template <template <class...> class Kind, class Unit, class... Rest, class Round>
Kind<double, Unit> in_double(const Kind<float, Unit, Rest...>& e, const Round& round) {
  Kind<double, Unit> wide = [&] {
    if constexpr (requires { e.glu(); })
      return Kind<double, Unit>({e.d_model(), e.d_ff(), e.has_bias(), e.glu()});
    else
      return Kind<double, Unit>({e.d_model(), e.d_ff(), e.has_bias(), e.activation()});
  }();
  if constexpr (requires { e.w_gate; }) {
    wide.w_gate = e.w_gate.unaryExpr(round);
    wide.b_gate = e.b_gate.template cast<double>();
  }
  wide.w_up = e.w_up.unaryExpr(round);
  wide.w_down = e.w_down.unaryExpr(round);
  wide.b_up = e.b_up.template cast<double>();
  wide.b_down = e.b_down.template cast<double>();
  return wide;
}

using AnyDouble =
    VariantExpert<FeedForward<double, ReLU>, FeedForward<double, GELU>, FeedForward<double, GELUTanh>,
                  FeedForward<double, SiLU>, GatedFeedForward<double, SwiGLU>,
                  GatedFeedForward<double, GEGLU>, GatedFeedForward<double, GEGLUTanh>,
                  GatedFeedForward<double, ReGLU>, GatedFeedForward<double, ClampedSwiGLU>>;

DispatchPlan<double> in_double(const DispatchPlan<float>& plan) {
  DispatchPlan<double> wide;
  wide.num_tokens = plan.num_tokens;
  wide.token_state = plan.token_state;
  wide.expert_begin = plan.expert_begin;
  wide.token = plan.token;
  for (const float g : plan.gate) wide.gate.push_back(g);
  wide.gate_side = plan.gate_side;
  wide.passed_through = plan.passed_through;
  return wide;
}

template <class Layer>
Matrix<double> expected_output(const Layer& layer, const Matrix<float>& x, const Routing<float>& routing,
                               bool round) {
  const auto weight = [round](float w) { return round ? rounded(w) : double(w); };
  const auto widen = [&](auto experts) {
    std::vector<AnyDouble> wide;
    for (const auto& e : experts)
      wide.push_back(
          std::visit([&](const auto& kind) { return AnyDouble(in_double(kind, weight)); }, Any(e).get()));
    return wide;
  };
  return reference::layer_output<double>(x.cast<double>(), widen(layer.experts()),
                                         widen(layer.shared_experts()),
                                         layer.w_shared_gate.template cast<double>(),
                                         layer.b_output.template cast<double>(), in_double(routing.plan));
}

// Rows that are NaN in both are taken out.
double error_of(const Matrix<float>& y, const Matrix<double>& expected) {
  Matrix<double> a = y.cast<double>(), b = expected;
  for (Index t = 0; t < b.rows(); ++t)
    if (b.row(t).hasNaN() && a.row(t).array().isNaN().all()) {
      a.row(t).setZero();
      b.row(t).setZero();
    }
  return relative_error(a, b, 1e-3);
}

// Any router options, capacities, masks and poison; experts of all kinds in one layer.
TEST(PackedMoELayer, IsTheLayerInDouble) {
  Rng rng(1);
  const int count = kSanitized ? 60 : 1000;
  double worst_f32 = 0, worst_bf16 = 0;
  for (int i = 0; i < count; ++i) {
    const Index tokens = rng.index(12), d_model = 1 + rng.index(75), experts = 1 + rng.index(6);
    const Index shared = std::max<Index>(0, rng.index(5) - 2);
    const bool scales_inputs = rng.uniform() < 0.15;
    TopKRouter<float> router(
        {.d_model = d_model,
         .num_experts = experts,
         .top_k = 1 + rng.index(experts),
         .renormalise = rng.uniform() < 0.5,
         .gate_side = scales_inputs ? GateSide::input : GateSide::output,
         .capacity = rng.uniform() < 0.5 ? std::optional(rng.uniform(0.3, 1.2)) : std::nullopt,
         .overflow = Overflow(rng.index(3)),
         .allow_constant_gate = true},
        rng);
    SharedExperts<Any> shared_experts{.gated = shared > 0 && !scales_inputs && rng.uniform() < 0.5};
    std::vector<Any> routed;
    for (Index e = 0; e < experts; ++e) routed.push_back(draw_expert(d_model, rng));
    for (Index s = 0; s < shared; ++s) shared_experts.experts.push_back(draw_expert(d_model, rng));
    MoELayer<Any, TopKRouter<float>> layer(std::move(routed), std::move(router), std::move(shared_experts),
                                           rng.uniform() < 0.3);
    if (layer.b_output.size() > 0) fill_normal(layer.b_output, 1.0, rng);
    if (layer.w_shared_gate.size() > 0) fill_normal(layer.w_shared_gate, 1.0, rng);
    Matrix<float> x(tokens, d_model);
    fill_normal(x, 1.0, rng);
    BatchInfo info;
    info.mask.resize(tokens);
    for (Index t = 0; t < tokens; ++t) info.mask[t] = rng.uniform() < 0.8;
    if (tokens > 0 && rng.uniform() < 0.2)
      x(rng.index(tokens), rng.index(d_model)) = std::numeric_limits<float>::quiet_NaN();
    const Routing<float> routing = layer.route(x, info, Sequential{});
    const Matrix<double> exact = expected_output(layer, x, routing, false);
    const Matrix<double> rounded = expected_output(layer, x, routing, true);
    for (const InstructionSet set : available_sets()) {
      const auto f32 = pack<F32>(layer, {.instruction_set = set});
      const auto bf16 = pack<BF16>(layer, {.instruction_set = set});
      ASSERT_TRUE(routing.plan == f32.route(x, info, Sequential{}).plan);
      const double of_f32 = error_of(f32.forward(x, routing, Sequential{}), exact);
      const double of_bf16 = error_of(bf16.forward(x, routing, Sequential{}), rounded);
      ASSERT_LE(of_f32, 1e-5) << "configuration " << i << ", " << name_of(set);
      ASSERT_LE(of_bf16, 1e-5) << "configuration " << i << ", " << name_of(set);
      worst_f32 = std::max(worst_f32, of_f32);
      worst_bf16 = std::max(worst_bf16, of_bf16);
      Matrix<float> y;
      PackedWorkspace workspace;
      f32.forward(x, y, workspace, info, Sequential{});
      ASSERT_TRUE(same_bits(y, f32.forward(x, routing, Sequential{})));
      y.setZero();
      f32.forward(x, routing, y, workspace, Sequential{});
      ASSERT_TRUE(same_bits(y, f32.forward(x, routing, Sequential{})));
    }
  }
  RecordProperty("worst_f32", std::to_string(worst_f32));
  RecordProperty("worst_bf16", std::to_string(worst_bf16));
}

// Sets that have products with rounded activations.
std::vector<InstructionSet> sets_with_dot_products() {
  std::vector<InstructionSet> sets = available_sets();
  std::erase_if(sets, [](InstructionSet set) { return kernels::find_dot(set, true) == nullptr; });
  return sets;
}

// An expert's hidden values in double from x and weights that are rounded already.
template <class S, class A>
Vector<S> hidden_of(const FeedForward<S, A>& e, const Vector<S>& x) {
  return reference::linear(x, e.w_up, e.b_up).unaryExpr([&](S v) {
    return reference::activate(e.activation(), v);
  });
}
template <class S, class U>
Vector<S> hidden_of(const GatedFeedForward<S, U>& e, const Vector<S>& x) {
  return reference::linear(x, e.w_gate, e.b_gate)
      .binaryExpr(reference::linear(x, e.w_up, e.b_up),
                  [&](S gate, S up) { return reference::activate_gated(e.glu(), gate, up); });
}

// The reference rounds x, the weights and hidden values. A hidden value between two bfloat16 may go either
// way; rows that have such a value are left out, and they are not many.
TEST(PackedMoELayer, TheDotProductIsTheLayerInDoubleWithRoundedActivations) {
  if (sets_with_dot_products().empty()) GTEST_SKIP() << "no AVX-512 BF16";
  Rng rng(11);
  const int count = kSanitized ? 60 : 1000;
  Index compared = 0, rows = 0;
  for (int i = 0; i < count; ++i) {
    const Index tokens = 1 + rng.index(14), d_model = 1 + rng.index(75), experts = 1 + rng.index(4);
    std::vector<Any> drawn;
    for (Index e = 0; e < experts; ++e) drawn.push_back(draw_expert(d_model, rng));
    const MoELayer<Any, TopKRouter<float>> layer(
        std::move(drawn),
        TopKRouter<float>({.d_model = d_model,
                           .num_experts = experts,
                           .top_k = 1 + rng.index(experts),
                           .gate_side = rng.uniform() < 0.2 ? GateSide::input : GateSide::output,
                           .allow_constant_gate = true},
                          rng));
    Matrix<float> x(tokens, d_model);
    fill_normal(x, 1.0, rng);
    const Routing<float> routing = layer.route(x, {}, Sequential{});
    const DispatchPlan<float>& plan = routing.plan;
    Matrix<double> expected = Matrix<double>::Zero(tokens, d_model);
    std::vector<bool> sure(std::size_t(tokens), true);
    for (Index e = 0; e < experts; ++e)
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a) {
        const Index t = plan.token[a];
        const bool scales_input = plan.gate_side == GateSide::input;
        const Vector<double> row = x.row(t).transpose().unaryExpr(
            [&](float v) { return rounded(scales_input ? plan.gate[a] * v : v); });
        const Vector<double> output = std::visit(
            [&](const auto& kind) -> Vector<double> {
              const auto wide = in_double(kind, [](float w) { return rounded(w); });
              Vector<double> hidden = hidden_of(wide, row);
              const double largest = hidden.cwiseAbs().maxCoeff(), margin = 1e-6 * largest;
              for (double& h : hidden) {
                if (rounded(float(h + margin)) - rounded(float(h - margin)) > 1e-5 * largest)
                  sure[std::size_t(t)] = false;
                h = rounded(float(h));
              }
              return reference::linear(hidden, wide.w_down, wide.b_down);
            },
            layer.experts()[std::size_t(e)].get());
        expected.row(t) += (scales_input ? 1.0 : double(plan.gate[a])) * output.transpose();
      }
    for (Index t = 0; t < tokens; ++t) {
      ++rows;
      if (!sure[std::size_t(t)]) continue;
      ++compared;
    }
    for (const InstructionSet set : sets_with_dot_products()) {
      const auto fast = pack<BF16>(layer, {.instruction_set = set, .bf16_dot_product = true});
      const Matrix<double> y = fast.forward(x, routing, Sequential{}).cast<double>();
      for (Index t = 0; t < tokens; ++t) {
        if (!sure[std::size_t(t)]) continue;
        ASSERT_LE(relative_error(y.row(t).eval(), expected.row(t).eval(), 1e-3), 1e-5)
            << "configuration " << i << ", token " << t << ", " << name_of(set);
      }
    }
  }
  EXPECT_GT(2 * compared, rows);
}

using Gated = GatedFeedForward<float>;
using Layer = MoELayer<Gated, TopKRouter<float>>;

Layer make_layer(Index d_model, Index d_ff, Index experts, Index top_k, bool shared = true) {
  Rng rng(2);
  SharedExperts<Gated> with;
  if (shared) with = {make_experts<Gated>(1, {.d_model = d_model, .d_ff = 2 * d_ff}, rng), true};
  Layer layer(make_experts<Gated>(experts, {.d_model = d_model, .d_ff = d_ff}, rng),
              TopKRouter<float>({.d_model = d_model, .num_experts = experts, .top_k = top_k}, rng),
              std::move(with));
  if (shared) fill_normal(layer.w_shared_gate, 0.3, rng);
  return layer;
}

Matrix<float> draw(Index rows, Index cols, Rng& rng) {
  Matrix<float> m(rows, cols);
  fill_normal(m, 1.0, rng);
  return m;
}

template <class Format>
void expect_bits_of_a_row_alone(bool dot = false) {
  Rng rng(3);
  const Layer layer = make_layer(83, 57, 6, 2);
  const Matrix<float> x = draw(257, 83, rng);
  for (const InstructionSet set : available_sets()) {
    if (dot && kernels::find_dot(set, true) == nullptr) continue;
    const auto fast = pack<Format>(layer, {.instruction_set = set, .bf16_dot_product = dot});
    const Routing<float> routing = fast.route(x);
    const Matrix<float> y = fast.forward(x, BatchInfo{}, Sequential{});
    for (const Index t : {0, 1, 100, 255, 256})
      EXPECT_TRUE(same_bits(fast.forward(x.row(t), BatchInfo{}, Sequential{}), y.row(t)))
          << name_of(set) << ", token " << t;
    for (const Index workers : {1, 2, 3, 8, 64})
      EXPECT_TRUE(same_bits(fast.forward(x, BatchInfo{}, Backwards{workers}), y))
          << name_of(set) << ", " << workers << " workers";
  }
}

TEST(PackedMoELayer, ARowDoesNotDependOnItsBatchOrOnTheExecutor) {
  expect_bits_of_a_row_alone<F32>();
  expect_bits_of_a_row_alone<BF16>();
  expect_bits_of_a_row_alone<BF16>(true);
}

// Each expert alone gives what it adds; those are added up here, one fused multiply-add after the other.
TEST(PackedMoELayer, AddsExpertsInAscendingOrder) {
  Rng rng(13);
  constexpr Index kExperts = 5;
  const Layer layer = make_layer(70, 33, kExperts, kExperts, false);
  const Matrix<float> x = draw(40, 70, rng);
  for (const InstructionSet set : available_sets()) {
    if (set == InstructionSet::portable) continue;  // whether it fuses is up to the compiler
    const auto fast = pack<F32>(layer, {.instruction_set = set});
    const Routing<float> routing = fast.route(x);
    const Matrix<float> y = fast.forward(x, routing);
    Matrix<float> ascending = Matrix<float>::Zero(40, 70), descending = ascending;
    const auto add = [&](Index e, Matrix<float>& sum) {
      const Layer alone(std::vector<Gated>{layer.experts()[std::size_t(e)]},
                        TopKRouter<float>({.d_model = 70, .num_experts = 1, .top_k = 1}, rng));
      const Matrix<float> output = pack<F32>(alone, {.instruction_set = set}).forward(x);
      const DispatchPlan<float>& plan = routing.plan;
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
        for (Index j = 0; j < 70; ++j) {
          float& to = sum(plan.token[a], j);
          to = std::fma(plan.gate[a], output(plan.token[a], j), to);
        }
    };
    for (Index e = 0; e < kExperts; ++e) add(e, ascending);
    for (Index e = kExperts; e-- > 0;) add(e, descending);
    EXPECT_TRUE(same_bits(y, ascending)) << name_of(set);
    EXPECT_FALSE(same_bits(y, descending)) << name_of(set);
  }
}

// More rows than a product takes at once, and depths of several blocks and a rest in either product.
TEST(PackedMoELayer, TakesManyRowsAndDeepProducts) {
  Rng rng(4);
  for (const auto& [d_model, d_ff] :
       std::vector<std::pair<Index, Index>>{{1100, 24}, {2127, 24}, {40, 1301}}) {
    const Layer layer = make_layer(d_model, d_ff, 1, 1, false);
    const Matrix<float> x = draw(2 * kernels::kMaxRows + 31, d_model, rng);
    const Matrix<double> exact = expected_output(layer, x, layer.route(x), false);
    const Matrix<double> rounded = expected_output(layer, x, layer.route(x), true);
    const auto check = [&](const auto& fast, const Matrix<double>& expected, double tolerance) {
      const Matrix<float> y = fast.forward(x);
      EXPECT_LE(relative_error(y.cast<double>().eval(), expected), tolerance)
          << name_of(fast.instruction_set());
      for (const Index t : {0, 95, 200})
        EXPECT_TRUE(same_bits(fast.forward(x.row(t)), y.row(t)))
            << name_of(fast.instruction_set()) << ", token " << t;
    };
    for (const InstructionSet set : available_sets()) {
      check(pack<F32>(layer, {.instruction_set = set}), exact, 1e-5);
      check(pack<BF16>(layer, {.instruction_set = set}), rounded, 1e-5);
    }
    for (const InstructionSet set : sets_with_dot_products())
      check(pack<BF16>(layer, {.instruction_set = set, .bf16_dot_product = true}), rounded, 1e-2);
  }
}

// Few rows go through several panels from end to end, one row through two at a time, more rows block by
// block.
TEST(PackedMoELayer, FewRowsThroughDeepPanelsAreRowsOfABatch) {
  Rng rng(16);
  const Layer layer = make_layer(1101, 1301, 1, 1, false);
  const Matrix<float> x = draw(7, 1101, rng);
  const Matrix<double> exact = expected_output(layer, x, layer.route(x), false);
  const Matrix<double> rounded = expected_output(layer, x, layer.route(x), true);
  const auto check = [&](const auto& fast, const Matrix<double>& expected, double tolerance) {
    const Matrix<float> y = fast.forward(x);
    EXPECT_LE(relative_error(y.cast<double>().eval(), expected), tolerance)
        << name_of(fast.instruction_set());
    for (Index rows = 1; rows < 7; ++rows)
      EXPECT_TRUE(same_bits(fast.forward(x.topRows(rows)), y.topRows(rows)))
          << name_of(fast.instruction_set()) << ", " << rows << " rows";
  };
  for (const InstructionSet set : available_sets()) {
    check(pack<F32>(layer, {.instruction_set = set}), exact, 1e-5);
    check(pack<BF16>(layer, {.instruction_set = set}), rounded, 1e-5);
  }
  for (const InstructionSet set : sets_with_dot_products())
    check(pack<BF16>(layer, {.instruction_set = set, .bf16_dot_product = true}), rounded, 1e-2);
}

// Hidden rows of several blocks, for experts of several sizes beside each other, with gates on either side.
TEST(PackedMoELayer, TakesExpertsOfSeveralBlocksAndSizes) {
  Rng rng(15);
  const Matrix<float> x = draw(2 * kernels::kMaxRows + 31, 40, rng);
  for (const GateSide side : {GateSide::output, GateSide::input}) {
    std::vector<Any> experts;
    for (const Index d_ff : {513, 24, 1301})
      experts.push_back(Any(Gated({.d_model = 40, .d_ff = d_ff}, rng)));
    SharedExperts<Any> shared;
    if (side == GateSide::output) shared.experts.push_back(Any(Gated({.d_model = 40, .d_ff = 700}, rng)));
    const MoELayer layer(
        std::move(experts),
        TopKRouter<float>({.d_model = 40, .num_experts = 3, .top_k = 2, .gate_side = side}, rng),
        std::move(shared));
    const Matrix<double> exact = expected_output(layer, x, layer.route(x), false);
    const Matrix<double> rounded = expected_output(layer, x, layer.route(x), true);
    for (const InstructionSet set : available_sets()) {
      const Matrix<float> y = pack<F32>(layer, {.instruction_set = set}).forward(x);
      EXPECT_LE(error_of(y, exact), 1e-5) << name_of(set);
      EXPECT_LE(error_of(pack<BF16>(layer, {.instruction_set = set}).forward(x), rounded), 1e-5)
          << name_of(set);
    }
    for (const InstructionSet set : sets_with_dot_products()) {
      const auto fast = pack<BF16>(layer, {.instruction_set = set, .bf16_dot_product = true});
      EXPECT_LE(error_of(fast.forward(x), rounded), 1e-2) << name_of(set);
    }
  }
}

// Exact products of weights in bfloat16 take every bit of an activation, and what is not finite stays so.
TEST(PackedMoELayer, AmxTakesFloatsWhole) {
  const kernels::DotProduct* const amx = kernels::find_dot(InstructionSet::amx, false);
  if (amx == nullptr) GTEST_SKIP() << "no AMX";
  ASSERT_EQ(amx->parts, 3);
  constexpr Index kCount = 21, kWidth = 32;
  Rng rng(14);
  const float infinity = std::numeric_limits<float>::infinity();
  for (int i = 0; i < 1000; ++i) {
    float from[kCount];
    for (float& v : from) v = std::ldexp(float(rng.uniform(-2, 2)), int(rng.index(200)) - 90);
    from[3] = std::numeric_limits<float>::max();
    from[5] = -infinity;
    from[7] = std::bit_cast<float>(0x7F800001u);  // a NaN whose first half alone is infinity
    from[11] = -0.0f;
    std::uint16_t to[3 * kWidth];
    std::memset(to, 0xFF, sizeof to);
    amx->split(kCount, from, to, kWidth);
    for (Index j = 0; j < kWidth; ++j) {
      const auto part = [&](Index p) {
        return double(std::bit_cast<float>(std::uint32_t(to[p * kWidth + j]) << 16));
      };
      const double expected = j < kCount ? double(from[j]) : 0.0;
      EXPECT_TRUE(part(0) + part(1) + part(2) == expected || (j == 7 && std::isnan(part(0)))) << j;
      EXPECT_TRUE((j != 5 && j != 7) || (part(1) == 0 && part(2) == 0)) << j;
    }
  }
}

TEST(PackedMoELayer, Avx2AndAvx512AreTheSameBits) {
  if (!is_available(InstructionSet::avx512)) GTEST_SKIP() << "no AVX-512";
  Rng rng(5);
  for (int i = 0; i < 20; ++i) {
    std::vector<Any> experts;
    const Index d_model = 1 + rng.index(150);
    for (int e = 0; e < 4; ++e) experts.push_back(draw_expert(d_model, rng));
    const MoELayer layer(std::move(experts),
                         TopKRouter<float>({.d_model = d_model, .num_experts = 4, .top_k = 2}, rng));
    const Matrix<float> x = 4 * draw(60, d_model, rng);
    const auto narrow = pack<F32>(layer, {.instruction_set = InstructionSet::avx2});
    const auto wide = pack<F32>(layer, {.instruction_set = InstructionSet::avx512});
    EXPECT_TRUE(same_bits(narrow.forward(x), wide.forward(x))) << "configuration " << i;
    EXPECT_TRUE(same_bits(pack<BF16>(layer, {.instruction_set = InstructionSet::avx2}).forward(x),
                          pack<BF16>(layer, {.instruction_set = InstructionSet::avx512}).forward(x)));
  }
}

template <class Format>
void expect_poison_to_stay_in_its_row() {
  Rng rng(6);
  const Layer layer = make_layer(40, 30, 4, 2);
  for (const InstructionSet set : available_sets()) {
    const auto fast = pack<Format>(layer, {.instruction_set = set});
    Matrix<float> x = draw(20, 40, rng);
    BatchInfo masked;
    masked.mask = Mask::Constant(20, true);
    masked.mask[7] = false;
    const Matrix<float> expected = fast.forward(x, masked);
    EXPECT_TRUE((expected.row(7).array() == 0).all());
    for (const float poison :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      x(7, 3) = poison;
      Matrix<float> y = fast.forward(x);
      EXPECT_TRUE(y.row(7).array().isNaN().all());
      y.row(7).setZero();
      EXPECT_TRUE(same_bits(y, expected)) << name_of(set);
    }
  }
}

TEST(PackedMoELayer, APoisonedTokenChangesNoOtherRow) {
  expect_poison_to_stay_in_its_row<F32>();
  expect_poison_to_stay_in_its_row<BF16>();
}

// Large activations meet the ends of the exponential.
TEST(PackedMoELayer, ActivationsHoldAtTheirEnds) {
  for (const InstructionSet set : available_sets()) {
    const kernels::Kernels& k = *kernels::find(set);
    const auto check = [&](kernels::Unit unit, const auto& activation) {
      std::vector<float> x(std::size_t(k.columns)), out(x.size());
      for (float scale : {1e-30f, 1e-3f, 1.0f, 30.0f, 90.0f, 1e4f, 1e30f}) {
        for (std::size_t j = 0; j < x.size(); ++j) x[j] = scale * (float(j) / float(x.size() - 1) * 2 - 1);
        k.activate({unit, false}, 1, x.data(), nullptr, out.data(), k.columns);
        for (std::size_t j = 0; j < x.size(); ++j) {
          const double expected = reference::activate(activation, double(x[j]));
          EXPECT_NEAR(out[j], expected, 4e-7 * std::max(1e-30, std::abs(double(x[j]))))
              << name_of(set) << ", unit " << int(unit) << " of " << x[j];
        }
      }
      x[0] = std::numeric_limits<float>::quiet_NaN();
      k.activate({unit, false}, 1, x.data(), nullptr, out.data(), k.columns);
      EXPECT_TRUE(std::isnan(out[0])) << name_of(set) << ", unit " << int(unit);
    };
    check(kernels::Unit::relu, ReLU{});
    check(kernels::Unit::gelu, GELU{});
    check(kernels::Unit::gelu_tanh, GELUTanh{});
    check(kernels::Unit::silu, SiLU{});
  }
}

// What a layer writes beside its experts, and how often each number of the output was begun and ended.
struct CountingOutput {
  Matrix<float>& y;
  Matrix<int>&begun, &ended;

  void begin(const OutputBlock& b) const {
    y.block(b.token_begin, b.column_begin, b.token_end - b.token_begin, b.column_end - b.column_begin)
        .setZero();
    count(b, begun);
  }
  void end(const OutputBlock& b) const { count(b, ended); }
  static void count(const OutputBlock& b, Matrix<int>& times) {
    times.block(b.token_begin, b.column_begin, b.token_end - b.token_begin, b.column_end - b.column_begin)
        .array() += 1;
  }
};

TEST(PackedExperts, BeginAndEndEveryNumberOfTheOutputOnce) {
  Rng rng(17);
  const Layer layer = make_layer(203, 57, 4, 2, false);
  for (const Index tokens : {0, 1, 70, 1030}) {
    const Matrix<float> x = draw(tokens, 203, rng);
    for (const Index workers : {1, 3, 16}) {
      const auto fast = pack<BF16>(layer);
      const Routing<float> routing = fast.route(x);
      PackedExperts experts(fast.instruction_set(), 203);
      for (const Gated& expert : layer.experts()) experts.add(BF16(), expert);
      EXPECT_EQ(experts.size(), 4);
      EXPECT_EQ(experts.memory_bytes(), fast.memory_bytes());
      Matrix<float> y = Matrix<float>::Constant(tokens, 203, 5);
      Matrix<int> begun = Matrix<int>::Zero(tokens, 203), ended = begun;
      PackedExpertsWorkspace workspace;
      const CheckedPlan<float> plan(routing.plan, x.rows(), routing.num_experts(), "test");
      experts.forward({x.data(), x.cols(), routing.plan.token.data()}, plan, y,
                      CountingOutput{y, begun, ended}, workspace, Backwards{workers});
      EXPECT_TRUE((begun.array() == 1).all() && (ended.array() == 1).all()) << tokens << ", " << workers;
      EXPECT_TRUE(same_bits(y, fast.forward(x, routing))) << tokens << ", " << workers;
    }
  }
}

TEST(PackedExperts, RefuseWhatDoesNotFit) {
  PackedExperts experts(InstructionSet::portable, 8);
  EXPECT_EQ(
      message_of([&] { experts.add(F32(), make_layer(8, 4, 1, 1).experts()[0], {.to_bfloat16 = true}); }),
      "PackedProduct: there is no product for portable kernels with activations in bfloat16");
  EXPECT_EQ(message_of([&] { experts.add(FP8(), make_layer(8, 4, 1, 1).experts()[0], {.to_int8 = true}); }),
            "PackedProduct: there is no product for portable kernels with activations in 8 bits");
  EXPECT_EQ(message_of([&] { experts.add(F32(), make_layer(9, 4, 1, 1).experts()[0]); }),
            "PackedExperts::add: expert 0 has d_model = 9, expected 8");
  EXPECT_EQ(experts.size(), 0);
  // A plan over more experts, and an output of another shape.
  const auto layer = make_layer(8, 4, 2, 1);
  const Matrix<float> x = Matrix<float>::Ones(3, 8);
  const Routing<float> routing = layer.route(x);
  const CheckedPlan<float> plan(routing.plan, 3, 2, "test");
  PackedExpertsWorkspace workspace;
  const auto run = [&](Index rows) {
    Matrix<float> y = Matrix<float>::Zero(rows, 8);
    const PackedOutput output{x, routing.plan, Vector<float>(), y};
    experts.forward({x.data(), x.cols(), routing.plan.token.data()}, plan, y, output, workspace,
                    Sequential{});
  };
  experts.add(F32(), layer.experts()[0]);
  EXPECT_EQ(message_of([&] { run(3); }), "PackedExperts::forward: the plan is over 2 experts, expected 1");
  experts.add(F32(), layer.experts()[1]);
  EXPECT_EQ(message_of([&] { run(2); }), "PackedExperts::forward: y has shape [2, 8], expected [3, 8]");
  EXPECT_NO_THROW(run(3));
}

TEST(BF16, RoundsToBfloat16AsEigenDoes) {
  for (std::uint32_t high = 0; high < 0x10000; high += 7)
    for (const std::uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const float value = std::bit_cast<float>((high << 16) | low);
      const auto bits = std::uint16_t(BF16::rounded(value));
      const float back = std::bit_cast<float>(std::uint32_t(bits) << 16);
      const float expected = float(Eigen::bfloat16(value));
      EXPECT_TRUE(back == expected || (std::isnan(back) && std::isnan(value))) << value;
    }
}

// An activation that the kernels do not know: the expert runs as it is.
struct Cube {
  template <class T>
  T forward(const T& x) const {
    return x * x * x;
  }
  template <class T>
  T derivative(const T& x) const {
    return T(3) * x * x;
  }
};

TEST(PackedMoELayer, ExpertsWithoutAPackedFormRunAsTheyAre) {
  static_assert(!PackableExpert<FeedForward<float, Cube>>);
  static_assert(PackableExpert<FeedForward<float, GELU>>);
  Rng rng(7);
  using Own = FeedForward<float, Cube>;
  MoELayer<Own, TopKRouter<float>> layer(
      make_experts<Own>(4, {.d_model = 12, .d_ff = 20}, rng),
      TopKRouter<float>({.d_model = 12, .num_experts = 4, .top_k = 2}, rng),
      {make_experts<Own>(1, {.d_model = 12, .d_ff = 20}, rng)}, true);
  fill_normal(layer.b_output, 1.0, rng);
  const auto fast = pack<BF16>(layer);
  const Matrix<float> x = draw(30, 12, rng);
  EXPECT_LE(relative_error(fast.forward(x), layer.forward(x)), 1e-6);
}

TEST(PackedMoELayer, TakesExpertsOneAtATime) {
  const Layer layer = make_layer(48, 32, 5, 2);
  const auto whole = pack<F32>(layer);
  Index made = 0;
  const auto fast =
      pack<F32>(PackedParts<TopKRouter<float>>{layer.router(), 1, layer.w_shared_gate}, [&](Index e) {
        EXPECT_EQ(e, made++);
        return e < 5 ? layer.experts()[std::size_t(e)] : layer.shared_experts()[0];
      });
  EXPECT_EQ(made, 6);
  Rng rng(8);
  const Matrix<float> x = draw(9, 48, rng);
  EXPECT_TRUE(same_bits(fast.forward(x), whole.forward(x)));
  EXPECT_EQ(fast.memory_bytes(), whole.memory_bytes());
  const auto copy = fast;  // shares the weights
  EXPECT_TRUE(same_bits(copy.forward(x), whole.forward(x)));
}

TEST(PackedMoELayer, AFewTokensAfterManyNeedNoMoreRoom) {
  const Layer layer = make_layer(8, 512, 4, 2);
  Rng rng(15);
  const auto check = [&](const auto& fast) {
    PackedWorkspace workspace;
    Matrix<float> y;
    fast.forward(draw(2000, 8, rng), y, workspace);
    const Index tasks = workspace.packed.tasks.capacity();
    for (const Index tokens : {1, 3, 0}) {
      fast.forward(draw(tokens, 8, rng), y, workspace);
      EXPECT_EQ(workspace.packed.tasks.capacity(), tasks) << tokens << " tokens";
    }
  };
  check(pack<F32>(layer));
  check(pack<BF16>(layer));
}

TEST(PackedMoELayer, WeightsAsFloatsDoNotAskForAmx) {
  const Layer layer = make_layer(8, 8, 2, 1);
  EXPECT_NE(pack<F32>(layer).instruction_set(), InstructionSet::amx);
  EXPECT_NE(best_instruction_set(), InstructionSet::amx);
  EXPECT_EQ(pack<BF16>(layer).instruction_set(),
            is_available(InstructionSet::amx) ? InstructionSet::amx : best_instruction_set());
}

TEST(PackedMoELayer, MemoryIsThatOfThePanels) {
  const Layer layer = make_layer(64, 128, 4, 1, false);
  EXPECT_EQ(pack<F32>(layer).memory_bytes(), 4u * 3 * 64 * 128 * 4);
  EXPECT_EQ(pack<BF16>(layer).memory_bytes(), 4u * 3 * 64 * 128 * 2);
}

TEST(PackedMoELayer, RefusesWhatDoesNotFit) {
  const Layer layer = make_layer(16, 24, 4, 2);
  const auto fast = pack<F32>(layer);
  EXPECT_EQ(message_of([&] { fast.forward(Matrix<float>::Zero(3, 15)); }),
            "PackedMoELayer::forward: x has 15 columns, expected d_model = 16; tokens are rows");
  const Routing<float> routing = fast.route(Matrix<float>::Zero(3, 16));
  EXPECT_EQ(message_of([&] { fast.forward(Matrix<float>::Zero(2, 16), routing); }),
            "PackedMoELayer::forward: the routing is of 3 tokens, expected 2");
  Matrix<float> x = Matrix<float>::Zero(3, 16);
  PackedWorkspace workspace;
  EXPECT_EQ(message_of([&] { fast.forward(x, x, workspace); }),
            "PackedMoELayer::forward: y and x overlap: 3 x 64 bytes and 3 x 64 bytes, expected memory of "
            "their own");
  EXPECT_EQ(message_of([&] { fast.forward(x, routing, x, workspace); }),
            "PackedMoELayer::forward: y and x overlap: 3 x 64 bytes and 3 x 64 bytes, expected memory of "
            "their own");
  PackedParts<TopKRouter<float>> parts{layer.router()};
  parts.b_output.resize(15);
  const auto first = [&](Index) -> const Gated& { return layer.experts()[0]; };
  EXPECT_EQ(message_of([&] { pack<F32>(parts, first); }),
            "pack: b_output has 15 entries, expected d_model = 16");
  parts.b_output.resize(0);
  parts.num_shared_experts = -1;
  EXPECT_EQ(message_of([&] { pack<F32>(parts, first); }),
            "pack: num_shared_experts = -1, expected at least 0");
  parts.num_shared_experts = 2;
  parts.w_shared_gate.resize(1, 16);
  EXPECT_EQ(message_of([&] { pack<F32>(parts, first); }),
            "pack: w_shared_gate has shape [1, 16], expected [2, 16]");
  const Layer narrow = make_layer(15, 24, 4, 2);
  parts = {layer.router()};
  EXPECT_EQ(message_of([&] { pack<F32>(parts, [&](Index) -> const Gated& { return narrow.experts()[0]; }); }),
            "pack: expert 0 has d_model = 15, but the router has 16");
  for (const auto set : {InstructionSet::avx2, InstructionSet::avx512})
    if (!is_available(set)) {
      const std::string message = message_of([&] { pack<F32>(layer, {.instruction_set = set}); });
      EXPECT_NE(message.find(name_of(set)), std::string::npos) << message;
    }
  EXPECT_EQ(message_of([&] { pack<F32>(layer, {.bf16_dot_product = true}); }),
            "pack: bf16_dot_product = true, but the weights are not packed as BF16, expected false");
  EXPECT_EQ(
      message_of([&] {
        pack<BF16>(layer, {.instruction_set = InstructionSet::portable, .bf16_dot_product = true});
      }),
      "pack: bf16_dot_product = true, but this processor has none for portable kernels, expected false");
}

}  // namespace
}  // namespace moe::packed_moe_layer_test
