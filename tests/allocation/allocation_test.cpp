// SPDX-License-Identifier: MIT
// Counts every allocation of the process while a warm layer works: malloc itself is replaced, so
// that what Eigen or the OpenMP runtime allocates counts too.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <string>
#include <vector>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace {
std::atomic<long> allocations{0};
}

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* p, std::size_t size) {
  ++allocations;
  return __libc_realloc(p, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }
int posix_memalign(void** p, std::size_t alignment, std::size_t size) {
  *p = memalign(alignment, size);
  return *p != nullptr ? 0 : ENOMEM;
}
}

namespace moe {
namespace {

TEST(Allocation, TheCounterCountsMallocAndNew) {
  const long before = allocations;
  Matrix<float> m(100, 100);
  std::vector<int> v(1000);
  EXPECT_GE(allocations - before, 2);
  EXPECT_EQ(m.size() + Index(v.size()), 11000);
}

// Runs inference, training forward and backward on batches that all differ; after the first nothing
// may be allocated.
template <class Layer, class E>
void expect_no_allocation(Layer layer, Index tokens, const E& executor) {
  Rng rng(7);
  const Index d_model = layer.d_model();
  Layer::visit([&](const ParameterInfo&, auto& p) { fill_normal(p, 0.3, rng); }, layer);
  typename Layer::Workspace workspace;
  typename Layer::Cache cache;
  Layer grad = zeros_like(layer);
  RoutingGradient<float> none;
  Matrix<float> x(tokens, d_model), y, y_train, d_x;
  BatchInfo info;
  info.mask = Mask::Constant(tokens, true);
  info.token_ids.resize(tokens);
  for (int step = 0; step < 6; ++step) {
    fill_normal(x, 1.0, rng);
    for (Index& id : info.token_ids) id = rng.index(step % 3 == 1 ? 3 : 100);
    // Batches are skewed in different ways, so that every expert's number of rows moves.
    if (step % 3 == 1) x.rowwise() += x.row(0) * 3;
    if (step > 0) info.mask[step * 5] = false;
    const long before = allocations;
    layer.forward(x, y, workspace, info, executor);
    const long inference = allocations;
    layer.forward(x, rng, y_train, cache, info, executor);
    const long training = allocations;
    layer.backward(y, cache, grad, none, d_x, executor);
    const long backward = allocations;
    if (step == 0) continue;
    EXPECT_EQ(inference - before, 0) << "inference, step " << step;
    EXPECT_EQ(training - inference, 0) << "training forward, step " << step;
    EXPECT_EQ(backward - training, 0) << "backward, step " << step;
  }
}

// After a batch of `most` tokens, batches of any number up to that allocate nothing: no tokens at all, one,
// inference and training in turn, into views of larger matrices.
template <class Layer, class E>
void expect_no_allocation_of_smaller_batches(const Layer& layer, Index most, int batches, const E& executor) {
  Rng rng(8);
  const Index d_model = layer.d_model();
  typename Layer::Workspace workspace;
  typename Layer::Cache cache;
  Layer grad = zeros_like(layer);
  Matrix<float> x(most, d_model), y(most, d_model), d_x(most, d_model);
  BatchInfo largest;
  largest.group_begin = IndexVector{{0, most / 2, most}};
  largest.token_ids = IndexVector::Zero(most);
  layer.reserve(workspace, most, largest, executor);
  Index sum = 0;
  for (int batch = 0; batch < batches; ++batch) {
    const Index n = batch == 0 ? most : rng.index(most + 1);
    sum += n;
    fill_normal(x, 1.0, rng);
    BatchInfo info;
    if (batch % 3 == 0) info.mask = Mask::Constant(n, true);
    if (batch % 2 == 0) info.group_begin = IndexVector{{0, rng.index(n + 1), n}};
    info.token_ids = IndexVector::Zero(n);
    for (Index& id : info.token_ids) id = rng.index(100);
    const long before = allocations;
    layer.forward(x.topRows(n), y.topRows(n), workspace, info, executor);
    const long inference = allocations;
    layer.forward(x.topRows(n), y.topRows(n), cache, info, executor);
    const long differentiable = allocations;
    layer.forward(x.topRows(n), rng, y.topRows(n), cache, info, executor);
    const long training = allocations;
    layer.backward(y.topRows(n), cache, grad, {}, d_x.topRows(n), executor);
    const long backward = allocations;
    ASSERT_EQ(inference - before, 0) << "inference, batch " << batch << " of " << n;
    if (batch == 0) continue;
    ASSERT_EQ(differentiable - inference, 0) << "differentiable forward, batch " << batch << " of " << n;
    ASSERT_EQ(training - differentiable, 0) << "training forward, batch " << batch << " of " << n;
    ASSERT_EQ(backward - training, 0) << "backward, batch " << batch << " of " << n;
  }
  EXPECT_GT(sum, batches);
}

// A router whose gates scale inputs has no gated shared experts beside it.
template <class Router>
void expect_no_allocation_with(const Router& router, bool gated_shared = true) {
  const Index d_model = router.d_model(), experts = router.num_experts();
  Rng rng(1);
  const typename FeedForward<float>::Options plain{.d_model = d_model, .d_ff = 48, .bias = true};
  const typename GatedFeedForward<float>::Options gated{.d_model = d_model, .d_ff = 48};
  const MoELayer simple(make_experts<FeedForward<float>>(experts, plain, rng), router);
  const MoELayer shared(make_experts<GatedFeedForward<float>>(experts, gated, rng), router,
                        {make_experts<GatedFeedForward<float>>(1, gated, rng), gated_shared}, true);
  expect_no_allocation(simple, 90, Sequential{});
  expect_no_allocation(shared, 90, Sequential{});
  if (d_model <= 64) expect_no_allocation_of_smaller_batches(shared, 12, 1000, Sequential{});
#ifdef _OPENMP
  expect_no_allocation(shared, 90, OpenMP{.num_threads = 2});
  if (d_model <= 64) expect_no_allocation_of_smaller_batches(shared, 40, 100, OpenMP{.num_threads = 2});
#endif
}

class Allocation : public testing::TestWithParam<Index> {};

TEST_P(Allocation, NoneOnceWarmWithMappedExperts) {
  using E = GatedFeedForward<float, SwiGLU, Mapped>;
  Rng rng(1);
  const Index d_model = GetParam(), d_ff = 48;
  const auto weight = [&](Index rows, Index cols) {
    return MappedMatrix<float>(lecun_normal<float>(rows, cols, rng));
  };
  std::vector<E> experts;
  for (int e = 0; e < 8; ++e)
    experts.push_back(E{{.d_model = d_model, .d_ff = d_ff},
                        weight(d_ff, d_model),
                        weight(d_ff, d_model),
                        weight(d_model, d_ff)});
  const MoELayer layer(std::move(experts),
                       TopKRouter<float>({.d_model = d_model, .num_experts = 8, .top_k = 2}, rng));
  decltype(layer)::Workspace workspace;
  Matrix<float> x(90, d_model), y;
  for (int step = 0; step < 6; ++step) {
    fill_normal(x, 1.0, rng);
    if (step % 3 == 1) x.rowwise() += x.row(0) * 3;
    const long before = allocations;
    layer.forward(x, y, workspace, {}, Sequential{});
    if (step > 0) {
      EXPECT_EQ(allocations - before, 0) << "step " << step;
    }
  }
}

TEST_P(Allocation, NoneOnceWarmWhenPacked) {
  using E = GatedFeedForward<float>;
  Rng rng(1);
  const Index d_model = GetParam();
  const E::Options options{.d_model = d_model, .d_ff = 48};
  for (const GateSide side : {GateSide::output, GateSide::input}) {
    const MoELayer layer(
        make_experts<E>(8, options, rng),
        TopKRouter<float>({.d_model = d_model, .num_experts = 8, .top_k = 2, .gate_side = side}, rng),
        {make_experts<E>(1, options, rng), side == GateSide::output});
    const auto f32 = pack<F32>(layer);
    const auto bf16 = pack<BF16>(layer);
    const auto mixed = pack<Int8, BF16>(layer, [](Index e) { return e % 2; });
    const auto int8 = pack<Int4>(layer, {.int8_activations = true});
    PackedWorkspace workspace;
    Matrix<float> x(90, d_model), y;
    const auto expect_none = [&](const auto& packed, const auto& executor) {
      for (int step = 0; step < 6; ++step) {
        fill_normal(x, 1.0, rng);
        if (step % 3 == 1) x.rowwise() += x.row(0) * 3;
        const long before = allocations;
        packed.forward(x, y, workspace, {}, executor);
        packed.forward(x, workspace.routing, y, workspace, executor);
        if (step > 0) {
          EXPECT_EQ(allocations - before, 0) << "step " << step;
        }
      }
    };
    expect_none(f32, Sequential{});
    expect_none(bf16, Sequential{});
    expect_none(mixed, Sequential{});
    expect_none(int8, Sequential{});
    const auto expect_none_of_smaller = [&](const auto& packed) {
      PackedWorkspace own;
      packed.reserve(own, 12, {}, Sequential{});
      for (int batch = 0; batch < 1000; ++batch) {
        const Index n = batch == 0 ? 12 : rng.index(13);
        const long before = allocations;
        packed.forward(x.topRows(n), y.topRows(n), own, {}, Sequential{});
        packed.forward(x.topRows(n), own.routing, y.topRows(n), own, Sequential{});
        ASSERT_EQ(allocations - before, 0) << "batch " << batch << " of " << n;
      }
    };
    expect_none_of_smaller(f32);
    expect_none_of_smaller(bf16);
    expect_none_of_smaller(mixed);
    expect_none_of_smaller(int8);
#ifdef _OPENMP
    expect_none(f32, OpenMP{.num_threads = 2});
#endif
  }
}

TEST_P(Allocation, NoneOnceWarmWithTopK) {
  Rng rng(1);
  for (const Overflow overflow : {Overflow::drop, Overflow::next_best, Overflow::pass_through})
    for (const Priority priority : {Priority::token_order, Priority::token_max_gate,
                                    Priority::assignment_gate, Priority::token_max_prob}) {
      if (GetParam() > 64 && int(overflow) != int(priority)) continue;  // each value once
      expect_no_allocation_with(TopKRouter<float>({.d_model = GetParam(),
                                                   .num_experts = 8,
                                                   .top_k = 2,
                                                   .jitter = 0.01,
                                                   .capacity = 2.0,
                                                   .training_capacity = 1.1,
                                                   .overflow = overflow,
                                                   .priority = priority},
                                                  rng));
    }
}

TEST_P(Allocation, NoneOnceWarmWithDroplessTopK) {
  Rng rng(1);
  expect_no_allocation_with(
      TopKRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 2, .bias = true}, rng));
}

TEST_P(Allocation, NoneOnceWarmWithRandomSecondExperts) {
  Rng rng(1);
  expect_no_allocation_with(TopKRouter<float>({.d_model = GetParam(),
                                               .num_experts = 8,
                                               .top_k = 3,
                                               .second_threshold = 0.2,
                                               .random_second_threshold = 0.5,
                                               .renormalise = true,
                                               .capacity = 1.0,
                                               .training_capacity = 1.0,
                                               .capacity_rule = {Rounding::down, 4, 4}},
                                              rng));
}

TEST_P(Allocation, NoneOnceWarmWithNoisyTopK) {
  Rng rng(1);
  expect_no_allocation_with(
      NoisyTopKRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 2}, rng));
}

TEST_P(Allocation, NoneOnceWarmWithExpertChoice) {
  Rng rng(1);
  expect_no_allocation_with(ExpertChoiceRouter<float>({.d_model = GetParam(), .num_experts = 8}, rng));
}

TEST_P(Allocation, NoneOnceWarmWithScoresGroupsAndBiases) {
  Rng rng(1);
  expect_no_allocation_with(
      TopKRouter<float>({.d_model = GetParam(),
                         .num_experts = 8,
                         .top_k = 2,
                         .score = Score::sigmoid,
                         .renormalise = true,
                         .selection_bias = true,
                         .group_limit = {.groups = 4, .kept = 2, .score = GroupScore::top_two_sum},
                         .noise_stddev = 0.1,
                         .training_capacity = 1.1},
                        rng));
  expect_no_allocation_with(
      TopKRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 3, .second_threshold = 0.1}, rng));
  expect_no_allocation_with(
      TopKRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 8, .top_p = 0.4}, rng));
  expect_no_allocation_with(
      TopKRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 8, .score = Score::relu}, rng));
  expect_no_allocation_with(TopKRouter<float>({.d_model = GetParam(),
                                               .num_experts = 8,
                                               .top_k = 8,
                                               .top_p = 0.4,
                                               .capacity = 1.0,
                                               .training_capacity = 0.8},
                                              rng));
  expect_no_allocation_with(TopKRouter<float>(
      {.d_model = GetParam(), .num_experts = 8, .top_k = 2, .score = Score::sqrt_softplus}, rng));
  expect_no_allocation_with(TopKRouter<float>({.d_model = GetParam(),
                                               .num_experts = 8,
                                               .top_k = 2,
                                               .score = Score::sigmoid,
                                               .gate_side = GateSide::input},
                                              rng),
                            false);
}

TEST_P(Allocation, NoneOnceWarmWithThreeWayExperts) {
  Rng rng(1);
  const TopKRouter<float> router({.d_model = GetParam(), .num_experts = 8}, rng);
  expect_no_allocation(
      MoELayer(make_experts<ThreeWayFeedForward<float>>(8, {.d_model = GetParam(), .d_ff = 48}, rng), router),
      90, Sequential{});
}

TEST_P(Allocation, NoneOnceWarmWithNullExperts) {
  Rng rng(1);
  using Any =
      VariantExpert<GatedFeedForward<float>, ZeroExpert<float>, CopyExpert<float>, ConstantExpert<float>>;
  const Index d_model = GetParam();
  std::vector<Any> experts;
  for (int i = 0; i < 2; ++i) {
    experts.push_back(GatedFeedForward<float>({.d_model = d_model, .d_ff = 48}, rng));
    experts.push_back(ZeroExpert<float>({.d_model = d_model}));
    experts.push_back(CopyExpert<float>({.d_model = d_model}));
    experts.push_back(ConstantExpert<float>({.d_model = d_model}, rng));
  }
  for (const GateSide side : {GateSide::output, GateSide::input})
    expect_no_allocation(
        MoELayer(experts, TopKRouter<float>({.d_model = d_model, .num_experts = 8, .gate_side = side}, rng)),
        90, Sequential{});
}

TEST_P(Allocation, NoneOnceWarmWithSinkhorn) {
  Rng rng(1);
  expect_no_allocation_with(
      SinkhornRouter<float>({.d_model = GetParam(), .num_experts = 8, .top_k = 2}, rng));
}

TEST_P(Allocation, NoneOnceWarmWithRoutersOfRouters) {
  Rng rng(1);
  const TopKRouter<float>::Options parent{.d_model = GetParam(), .num_experts = 2, .top_k = 1},
      child{.d_model = GetParam(), .num_experts = 4, .top_k = 2, .jitter = 0.01};
  const TopKRouter<float> top(parent, rng), first(child, rng), second(child, rng);
  expect_no_allocation_with(HierarchicalRouter<TopKRouter<float>>(top, std::vector{first, second}));
}

TEST_P(Allocation, NoneOnceWarmWithSparseMixer) {
  Rng rng(1);
  expect_no_allocation_with(SparseMixerRouter<float>({.d_model = GetParam(), .num_experts = 8}, rng));
}

TEST_P(Allocation, NoneOnceWarmWithHashes) {
  Rng rng(1);
  HashRouter<float>::Options options{
      .d_model = GetParam(), .num_experts = 8, .table = random_hash_table(100, 8, rng)};
  expect_no_allocation_with(HashRouter<float>(options));
  options.capacity = 1.1;
  options.overflow = Overflow::pass_through;
  expect_no_allocation_with(HashRouter<float>(options));
}

// Inference, differentiable forward and backward of a warm SoftMoELayer, on batches that all differ.
template <class E>
void expect_no_soft_allocation(const SoftMoEOptions& options, Index tokens, Index groups, const E& executor) {
  Rng rng(7);
  using Layer = SoftMoELayer<GatedFeedForward<float>>;
  const Layer layer(make_experts<GatedFeedForward<float>>(options.num_experts,
                                                          {.d_model = options.d_model, .d_ff = 48}, rng),
                    options, rng);
  Layer::Workspace workspace;
  Layer::Cache cache;
  Layer grad = zeros_like(layer);
  Matrix<float> x(tokens, options.d_model), y, y_train, d_x;
  BatchInfo info;
  info.mask = Mask::Constant(tokens, true);
  info.group_begin.resize(groups + 1);
  for (int step = 0; step < 6; ++step) {
    fill_normal(x, 1.0, rng);
    // Groups move; in the first batch, and now and then, one has no token.
    for (Index g = 0; g <= groups; ++g)
      info.group_begin[g] = g % groups == 0 ? g / groups * tokens : g * 20 - rng.index(10);
    if (step > 0) info.mask[step * 5] = false;
    if (groups > 1 && step % 2 == 0) info.group_begin[1] = 0;
    const long before = allocations;
    layer.forward(x, y, workspace, info, executor);
    const long inference = allocations;
    layer.forward(x, y_train, cache, info, executor);
    const long training = allocations;
    layer.backward(y, cache, grad, d_x, executor);
    const long backward = allocations;
    if (step == 0) continue;
    EXPECT_EQ(inference - before, 0) << "inference, step " << step;
    EXPECT_EQ(training - inference, 0) << "differentiable forward, step " << step;
    EXPECT_EQ(backward - training, 0) << "backward, step " << step;
  }
}

TEST_P(Allocation, NoneOnceWarmInSoftMoEWithSmallerBatches) {
  Rng rng(9);
  using Layer = SoftMoELayer<GatedFeedForward<float>>;
  const Index d_model = GetParam(), most = 12;
  for (const bool normalise : {true, false}) {
    const Layer layer(make_experts<GatedFeedForward<float>>(4, {.d_model = d_model, .d_ff = 48}, rng),
                      {.d_model = d_model, .num_experts = 4, .slots_per_expert = 2, .normalise = normalise},
                      rng);
    Layer::Workspace workspace;
    Layer::Cache cache;
    Layer grad = zeros_like(layer);
    Matrix<float> x(most, d_model), y(most, d_model), d_x(most, d_model);
    fill_normal(x, 1.0, rng);
    layer.reserve(workspace, most, {}, Sequential{});
    for (int batch = 0; batch < 1000; ++batch) {
      const Index n = batch == 0 ? most : rng.index(most + 1);
      const long before = allocations;
      layer.forward(x.topRows(n), y.topRows(n), workspace, {}, Sequential{});
      const long inference = allocations;
      layer.forward(x.topRows(n), y.topRows(n), cache, {}, Sequential{});
      layer.backward(y.topRows(n), cache, grad, d_x.topRows(n), Sequential{});
      ASSERT_EQ(inference - before, 0) << "inference, batch " << batch << " of " << n;
      if (batch == 0) continue;
      ASSERT_EQ(allocations - inference, 0) << "forward and backward, batch " << batch << " of " << n;
    }
  }
}

TEST_P(Allocation, NoneOnceWarmInSoftMoE) {
  for (const bool normalise : {true, false})
    for (const Index groups : {1, 4}) {
      const SoftMoEOptions options{
          .d_model = GetParam(), .num_experts = 8, .slots_per_expert = 3, .normalise = normalise};
      expect_no_soft_allocation(options, 90, groups, Sequential{});
#ifdef _OPENMP
      expect_no_soft_allocation(options, 90, groups, OpenMP{.num_threads = 2});
#endif
    }
}

INSTANTIATE_TEST_SUITE_P(DModel, Allocation, testing::Values(64, 1024),
                         [](const auto& instance) { return std::to_string(instance.param); });

}  // namespace
}  // namespace moe
