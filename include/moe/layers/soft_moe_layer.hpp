// SPDX-License-Identifier: MIT
#pragma once

#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/core/buffer.hpp>
#include <moe/core/check.hpp>
#include <moe/core/executor.hpp>
#include <moe/core/output.hpp>
#include <moe/core/parameters.hpp>
#include <moe/core/types.hpp>
#include <moe/experts/expert.hpp>
#include <moe/layers/grouped_experts.hpp>
#include <moe/layers/soft_router.hpp>

// The layer in which nothing is chosen: experts work on mixtures of tokens. Read forward() first.
namespace moe {

/// Buffers of forward. Reused, they allocate nothing; a default-constructed one is ready for use.
template <class S>
struct SoftMoEWorkspace {
  SoftRouting<S> routing;       ///< logits, dispatch and combine shares
  RowBuffer<S> x_rows, y_rows;  ///< inputs and outputs of slots, by expert [live slots, d_model]
  ExpertWorkspace<S> expert_workspace;

  template <class F>
  void for_each_array(const F& f) const {
    f(routing);
    for (const RowBuffer<S>* rows : {&x_rows, &y_rows}) f(*rows);
    f(expert_workspace);
  }
};

/// What backward needs of a forward pass, and the buffers of both. Owns everything it needs: x may
/// be destroyed after forward.
template <class S>
struct SoftMoECache : SoftMoEWorkspace<S> {
  ExpertCache<S> experts;
  SoftRoutingGradient<S> gradient;  ///< what the router works in
  RowBuffer<S> d_y_rows, d_x_rows;  ///< [live slots, d_model]

  template <class F>
  void for_each_array(const F& f) const {
    SoftMoEWorkspace<S>::for_each_array(f);
    f(experts);
    f(gradient);
    for (const RowBuffer<S>* rows : {&d_y_rows, &d_x_rows}) f(*rows);
  }
};

/// Soft Mixture of Experts (Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts",
/// section 2). Every slot is a mixture of all tokens, every token's output a mixture of all slots:
///   X~ = D^T x    Y~_s = expert_e(s)(X~_s)    y = C Y~
/// x and y are [tokens, d_model]; slots = num_experts * slots_per_expert. The shares D and C are
/// SoftRouter's.
///
/// Every group of `info` has slots of its own and knows nothing of other groups. A masked token has
/// no share in any slot; its output row and d_x are zero. So it is with a poisoned token, one whose
/// row of x or of logits is not finite, but that its output row is NaN. A group without valid
/// tokens runs no expert. There are no losses, no capacity, no noise, and nothing is dropped. An
/// output depends on all tokens of its group, also on later ones: not for autoregressive decoding.
///
/// Results are bitwise the same for every executor. A layer is a value; forward is const and may
/// run on several threads at once, each with a workspace or cache of its own. Every call throws
/// std::invalid_argument when shapes do not fit; nothing is changed then but the output arguments,
/// workspaces and caches. Cost: O(tokens * slots * d_model), and experts on groups * slots rows.
/// @code
/// moe::Rng rng(1);
/// const moe::SoftMoELayer layer(
///     moe::make_experts<moe::FeedForward<float>>(8, {.d_model = 64, .d_ff = 256}, rng),
///     {.d_model = 64, .num_experts = 8, .slots_per_expert = 4}, rng);
/// assert(layer.forward(moe::Matrix<float>::Ones(10, 64)).rows() == 10);
/// @endcode
template <Expert E>
class SoftMoELayer {
 public:
  using Scalar = typename E::Scalar;
  using S = Scalar;
  using Options = SoftMoEOptions;
  using Workspace = SoftMoEWorkspace<S>;
  using Cache = SoftMoECache<S>;

  /// The router's w_slots is zero, to be filled from elsewhere, and its scale 1. Throws std::invalid_argument
  /// for sizes that are not positive, and unless the experts are as the options say.
  SoftMoELayer(std::vector<E> experts, const SoftMoEOptions& options) : router_(options) {
    require(Index(experts.size()) == num_experts(), "SoftMoELayer: ", experts.size(),
            " experts, expected num_experts = ", num_experts());
    experts_ = GroupedExperts<E>(std::move(experts), d_model(), "SoftMoELayer");
  }
  /// w_slots is normal with variance 1 / d_model.
  SoftMoELayer(std::vector<E> experts, const SoftMoEOptions& options, Rng& rng)
      : SoftMoELayer(std::move(experts), options) {
    router_ = SoftRouter<S>(options, rng);
  }

  Index d_model() const { return router_.d_model(); }
  Index num_experts() const { return router_.num_experts(); }
  Index slots_per_expert() const { return router_.slots_per_expert(); }
  Index num_slots() const { return router_.num_slots(); }
  const Options& options() const { return router_.options(); }
  std::span<E> experts() { return experts_.all(); }
  std::span<const E> experts() const { return experts_.all(); }
  SoftRouter<S>& router() { return router_; }
  const SoftRouter<S>& router() const { return router_; }

  // ---- Inference: const.

  /// y [tokens, d_model] for x [tokens, d_model]. Allocates y and its buffers.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, const BatchInfo& info = {}, const Ex& executor = {}) const {
    Workspace workspace;
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, workspace, info, executor);
    return y;
  }

  /// y is a Matrix<S>, which is resized, or a view of the right shape: see Output. But for that nothing is
  /// allocated once the workspace has had such a call with as many tokens and groups. x, y and the workspace
  /// lie apart. So it is in all that follows: no argument that is written overlaps another. workspace.routing
  /// shows logits, dispatch and combine.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, const Output<S>& y, Workspace& workspace,
               const BatchInfo& info = {}, const Ex& executor = {}) const {
    check_forward(x, y, workspace, "the workspace", info);
    router_.mix(x, info, workspace.routing, workspace.x_rows, executor);
    experts_.forward(workspace.x_rows, workspace.routing.expert_begin, workspace.y_rows,
                     workspace.expert_workspace, executor);
    router_.unmix(workspace.y_rows, workspace.routing, y, executor);
  }

  /// Makes room in a workspace for batches of up to so many tokens, in as many groups as `info` has: by a
  /// forward pass of that many zeros.
  template <Executor Ex = DefaultExecutor>
  void reserve(Workspace& workspace, Index max_tokens, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    require(max_tokens >= 0, "reserve: max_tokens = ", max_tokens, ", expected 0 or more");
    Matrix<S> y;
    forward(Matrix<S>::Zero(max_tokens, d_model()), y, workspace, info, executor);
  }

  // ---- Differentiable forward: the same values, and a cache for backward.

  /// y [tokens, d_model]; `cache` is what backward needs.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> forward(const ConstMatrixRef<S>& x, Cache& cache, const BatchInfo& info = {},
                    const Ex& executor = {}) const {
    Matrix<S> y(x.rows(), x.cols());
    forward(x, y, cache, info, executor);
    return y;
  }

  /// The same into y.
  template <Executor Ex = DefaultExecutor>
  void forward(const ConstMatrixRef<S>& x, const Output<S>& y, Cache& cache, const BatchInfo& info = {},
               const Ex& executor = {}) const {
    static_assert(TrainableExpert<E>, "a differentiable forward pass needs a TrainableExpert");
    check_forward(x, y, cache, "the cache", info);
    router_.mix(x, info, cache.routing, cache.x_rows, executor);
    experts_.forward(cache.x_rows, cache.routing.expert_begin, cache.y_rows, cache.experts, executor);
    router_.unmix(cache.y_rows, cache.routing, y, executor);
  }

  // ---- What is none of these: one error of the compiler's in place of a list of all.

  /// Does not compile: x is not a matrix of the layer's scalar.
  template <NotAMatrixOf<S> X, class... Rest>
  Matrix<S> forward(X&&, Rest&&...) const {
    static_assert(kNever<X>, "SoftMoELayer::forward: x is not a matrix of the layer's scalar");
    return {};
  }
  /// Does not compile: these are not arguments of a forward pass.
  template <class Layer = SoftMoELayer>
  Matrix<S> forward(...) const {
    static_assert(kNever<Layer>,
                  "SoftMoELayer::forward takes (x), (x, y, workspace), (x, cache), (x, y, cache), "
                  "each with info and executor behind them");
    return {};
  }
  /// Does not compile: these are not arguments of a backward pass.
  template <class Layer = SoftMoELayer>
  Matrix<S> backward(...) const {
    static_assert(kNever<Layer>,
                  "SoftMoELayer::backward takes (d_y, cache, grad), (d_y, cache, grad, d_x), each with an "
                  "executor behind them");
    return {};
  }

  // ---- Backward.

  /// d_x [tokens, d_model] from d_y; adds the parameters' gradients to `grad`, a layer made by
  /// zeros_like(layer). May be called again on the same cache. Exact: nothing here is discrete.
  template <Executor Ex = DefaultExecutor>
  Matrix<S> backward(const ConstMatrixRef<S>& d_y, Cache& cache, SoftMoELayer& grad,
                     const Ex& executor = {}) const {
    Matrix<S> d_x(d_y.rows(), d_y.cols());
    backward(d_y, cache, grad, d_x, executor);
    return d_x;
  }

  /// The same into d_x.
  template <Executor Ex = DefaultExecutor>
  void backward(const ConstMatrixRef<S>& d_y, Cache& cache, SoftMoELayer& grad, const Output<S>& d_x,
                const Ex& executor = {}) const {
    check_backward(d_y, cache, grad, d_x);
    if (cache.routing.live.empty()) {  // no valid token
      d_x.of_shape(d_y.rows(), d_model(), "SoftMoELayer::backward", "d_x").setZero();
      return;
    }
    router_.unmix_backward(d_y, cache.routing, cache.gradient, cache.d_y_rows, executor);
    experts_.backward(cache.x_rows, cache.routing.expert_begin, cache.d_y_rows, cache.experts, cache.d_x_rows,
                      grad.experts_, executor);
    router_.mix_backward(cache.d_x_rows, cache.routing, cache.gradient, grad.router_, d_x, executor);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    const SoftMoELayer& first = std::get<0>(std::tie(self...));
    (require(self.num_experts() == first.num_experts(), "SoftMoELayer::visit: a layer of ",
             self.num_experts(), " experts beside one of ", first.num_experts()),
     ...);
    SoftRouter<S>::visit(f, self.router_...);
    GroupedExperts<E>::visit(f, self.experts_...);
  }

 private:
  template <class Buffers>
  void check_forward(const ConstMatrixRef<S>& x, const Output<S>& y, const Buffers& buffers, const char* what,
                     const BatchInfo& info) const {
    constexpr const char* kWhere = "SoftMoELayer::forward";
    router_.check_forward(x, info, kWhere);
    y.check(x.rows(), d_model(), kWhere, "y");
    require_apart(kWhere, "y", y, "x", x, what, buffers);
    require_apart(kWhere, what, buffers, "x", x);
  }

  void check_backward(const ConstMatrixRef<S>& d_y, const Cache& cache, const SoftMoELayer& grad,
                      const Output<S>& d_x) const {
    constexpr const char* kWhere = "SoftMoELayer::backward";
    router_.check_backward(cache.routing, kWhere);
    require_shape(d_y, cache.routing.num_tokens(), d_model(), kWhere, "d_y");
    d_x.check(d_y.rows(), d_model(), kWhere, "d_x");
    require(&grad != this, kWhere, ": grad is the layer of ", num_experts(),
            " experts itself, expected another one");
    require(grad.d_model() == d_model() && grad.num_experts() == num_experts(), kWhere,
            ": grad is a layer with d_model = ", grad.d_model(), " and ", grad.num_experts(),
            " experts, expected ", d_model(), " and ", num_experts());
    require_apart(kWhere, "d_x", d_x, "d_y", d_y, "the cache", cache);
    require_apart(kWhere, "the cache", cache, "d_y", d_y);
    visit([&](const ParameterInfo&, const auto&,
              const auto& g) { require_apart(kWhere, "grad", g, "d_y", d_y, "d_x", d_x); },
          *this, grad);  // throws where shapes differ, before anything is added to grad
    const std::span<const Index> begin = cache.routing.expert_begin;
    cache.experts.check(experts(), begin, kWhere);
    require(cache.x_rows.rows() == begin.back(), kWhere, ": the cache's x_rows has ", cache.x_rows.rows(),
            " rows, expected ", begin.back(), " of slots");
  }

  SoftRouter<S> router_;
  GroupedExperts<E> experts_;
};

}  // namespace moe
