// SPDX-License-Identifier: MIT

// An expert of your own: what a type needs to satisfy moe::TrainableExpert, how to check its
// backward pass, and how to use it in a layer, alone or beside the library's experts.

#include <cstdio>

#include <moe/moe.hpp>

// y = (x w_in^T) w_out^T with few columns between: a linear map of low rank. A layer of such
// experts is piecewise linear in x.
template <class S>
class LowRank {
 public:
  using Scalar = S;

  // Options and this constructor are only for moe::make_experts.
  struct Options {
    moe::Index d_model = 0;
    moe::Index rank = 0;
  };

  LowRank(const Options& options, moe::Rng& rng)
      : w_in(moe::lecun_normal<S>(options.rank, options.d_model, rng)),
        w_out(moe::lecun_normal<S>(options.d_model, options.rank, rng)) {}

  moe::Index d_model() const { return w_in.cols(); }

  // For inference; enough for moe::Expert.
  void forward(const moe::ConstMatrixRef<S>& x, moe::MatrixRef<S> y) const {
    moe::Matrix<S> cache(x.rows(), cache_cols());
    forward(x, y, cache);
  }

  // For training: the layer keeps cache_cols() scalars a row from forward to backward.
  moe::Index cache_cols() const { return 2 * w_in.rows(); }

  void forward(const moe::ConstMatrixRef<S>& x, moe::MatrixRef<S> y, moe::MatrixRef<S> cache) const {
    auto inner = cache.leftCols(w_in.rows());  // [rows, rank]
    moe::linear(x, w_in, inner);
    moe::linear(inner, w_out, y);
  }

  // Writes d_x and adds to the weights of grad, which is a LowRank too.
  void backward(const moe::ConstMatrixRef<S>& x, const moe::ConstMatrixRef<S>& d_y, moe::MatrixRef<S> cache,
                moe::MatrixRef<S> d_x, LowRank& grad) const {
    const auto inner = cache.leftCols(w_in.rows());
    auto d_inner = cache.rightCols(w_in.rows());
    moe::linear_backward_weight(d_y, inner, grad.w_out);
    moe::linear_backward_input(d_y, w_out, d_inner);
    moe::linear_backward_weight(d_inner, x, grad.w_in);
    moe::linear_backward_input(d_inner, w_in, d_x);
  }

  // Names the weights, for optimisers, zeros_like and check_gradients.
  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"w_in"}, self.w_in...);
    moe::visit_array(f, {"w_out"}, self.w_out...);
  }

  moe::Matrix<S> w_in;   // [rank, d_model]
  moe::Matrix<S> w_out;  // [d_model, rank]
};

static_assert(moe::TrainableExpert<LowRank<float>>);

// Compares the backward pass with central differences. A correct one is off by less than 1e-6.
template <class Thing>
bool check(const char* name, const Thing& thing, moe::Index d_model) {
  moe::Rng rng(1);
  moe::Matrix<double> x(5, d_model);  // [tokens, d_model]
  moe::fill_normal(x, 1.0, rng);
  const moe::GradientReport report = moe::check_gradients(thing, x);
  const bool ok = report.worst < 1e-6 && report.crossed == 0;
  std::printf("%s: %td gradients, %s\n", name, report.checked, ok ? "correct" : "WRONG");
  return ok;
}

// Trains a layer to apply one of four maps of rank 4, by the first coordinate of a token.
template <class Layer>
void train(const char* name, Layer layer) {
  moe::Rng rng(2);
  const moe::Index d_model = layer.d_model(), tokens = 256;
  std::vector<LowRank<float>> maps = moe::make_experts<LowRank<float>>(4, {d_model, 4}, rng);
  typename Layer::Cache cache;
  moe::Matrix<float> x(tokens, d_model), wanted(tokens, d_model);
  std::printf("%s\n  error relative to the target at steps 0, 200, 400, 600:", name);
  for (int step = 0; step <= 600; ++step) {
    moe::fill_normal(x, 1.0, rng);
    for (moe::Index t = 0; t < tokens; ++t) {
      x.row(t).head(4).setConstant(-1);
      x(t, t % 4) = 3;
      maps[std::size_t(t % 4)].forward(x.row(t), wanted.row(t));
    }
    const moe::Matrix<float> error = layer.forward(x, rng, cache) - wanted;
    if (step % 200 == 0) std::printf(" %.2f", error.squaredNorm() / wanted.squaredNorm());
    Layer grad = moe::zeros_like(layer);
    const auto balance = moe::load_balancing_loss(cache.routing);
    layer.backward(error / float(tokens), cache, grad, 0.01f * balance.gradient);
    Layer::visit([](auto, auto& p, const auto& g) { p -= 0.1f * g; }, layer, grad);
  }
  std::printf("\n  tokens per expert in the last step (4 maps need 4 experts):");
  for (const moe::Index load : moe::tokens_per_expert(cache.routing)) std::printf(" %td", load);
  std::printf("\n");
}

int main() {
  moe::Rng rng(42);
  bool ok = check("expert", LowRank<double>({.d_model = 6, .rank = 2}, rng), 6);

  // A layer of experts of two kinds: four of low rank, four feed-forward networks.
  using Mixed = moe::VariantExpert<LowRank<float>, moe::FeedForward<float>>;
  std::vector<Mixed> mixed;
  for (int i = 0; i < 4; ++i) {
    mixed.push_back(LowRank<float>({.d_model = 32, .rank = 4}, rng));
    mixed.push_back(moe::FeedForward<float>({.d_model = 32, .d_ff = 64}, rng));
  }

  const auto router = [&](moe::Index experts) {
    return moe::TopKRouter<float>({.d_model = 32, .num_experts = experts, .top_k = 1}, rng);
  };
  train("8 experts of low rank",
        moe::MoELayer{moe::make_experts<LowRank<float>>(8, {.d_model = 32, .rank = 4}, rng), router(8)});
  train("4 experts of low rank and, in turn, 4 feed-forward", moe::MoELayer{std::move(mixed), router(8)});

  // The whole layer can be checked the same way.
  ok &= check("layer",
              moe::MoELayer{moe::make_experts<LowRank<double>>(4, {.d_model = 6, .rank = 2}, rng),
                            moe::TopKRouter<double>({.d_model = 6, .num_experts = 4}, rng)},
              6);
  return ok ? 0 : 1;
}
