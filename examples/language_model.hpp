// SPDX-License-Identifier: MIT
#pragma once

// A byte-level language model around a Mixture-of-Experts layer, with its training. Everything but
// the layer is written out here, forward and backward:
//
//   x      = Embedding(the last 16 bytes)         [tokens, d_model]
//   y      = x + Layer(RmsNorm(x))                [tokens, d_model]
//   logits = Head(RmsNorm(y))                     [tokens, 256]
//
// Work is cut into blocks that do not depend on the number of threads, and sums are taken in a
// fixed order: results are bitwise the same for every number of threads.

#include <array>
#include <chrono>
#include <cmath>
#include <numbers>
#include <vector>

#include <moe/moe.hpp>

#include "text.hpp"

namespace examples {

using Matrix = moe::Matrix<float>;
using Vector = moe::Vector<float>;
using moe::ParameterInfo;

inline const moe::DefaultExecutor kExecutor{};  // OpenMP where there is OpenMP

// Contexts and the bytes that follow them, independent of each other.
struct Batch {
  moe::Matrix<Byte> context;  // [tokens, kContext], the last byte last
  std::vector<Byte> target;   // [tokens]
  std::vector<Byte> kind;     // [tokens]
  moe::BatchInfo info;        // token_ids: the last bytes, for routers that look at them

  Index tokens() const { return context.rows(); }
  void resize(Index tokens) {
    context.resize(tokens, kContext);
    target.resize(std::size_t(tokens));
    kind.resize(std::size_t(tokens));
    info.token_ids.resize(tokens);
  }
  void set(Index t, const Text& text, Index position) {
    const Byte* const byte = text.bytes.data() + position;
    std::copy(byte - kContext, byte, &context(t, 0));
    target[std::size_t(t)] = *byte;
    kind[std::size_t(t)] = text.kind_of[std::size_t(position)];
    info.token_ids[t] = byte[-1];
  }
};

// x_t = sum over the places p of the context of w[p * 256 + byte at p].
struct Embedding {
  Matrix w;  // [kContext * 256, d_model]

  Embedding(Index d_model, moe::Rng& rng) : w(kContext * kBytes, d_model) {
    moe::fill_normal(w, 1 / std::sqrt(double(kContext)), rng);
  }

  void forward(const Batch& batch, Matrix& x) const {
    x.resize(batch.tokens(), w.cols());
    moe::for_each_block(batch.tokens(), kExecutor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        x.row(t).setZero();
        for (Index p = 0; p < kContext; ++p)
          moe::add_scaled(w.cols(), 1.0f, &w(p * kBytes + batch.context(t, p), 0), &x(t, 0));
      }
    });
  }

  // A task a place: no two tasks add to the same row.
  void backward(const Batch& batch, const Matrix& d_x, Embedding& grad) const {
    kExecutor.for_each(kContext, [&](Index p, Index) {
      for (Index t = 0; t < batch.tokens(); ++t)
        moe::add_scaled(w.cols(), 1.0f, &d_x(t, 0), &grad.w(p * kBytes + batch.context(t, p), 0));
    });
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"w"}, self.w...);
  }
};

// y = scale * x / rms(x) (Zhang and Sennrich 2019).
struct RmsNorm {
  Vector scale;  // [d_model]

  struct Cache {
    Matrix x;        // [tokens, d_model]
    Vector inverse;  // 1 / rms(x) [tokens]
    Matrix d_scale;  // [blocks of tokens, d_model]
  };

  explicit RmsNorm(Index d_model) : scale(Vector::Ones(d_model)) {}

  void forward(const Matrix& x, Matrix& y, Cache& cache) const {
    const Index cols = x.cols();
    cache.x = x;
    cache.inverse.resize(x.rows());
    y.resize(x.rows(), cols);
    moe::for_each_block(x.rows(), kExecutor, [&](Index begin, Index end, Index) {
      for (Index t = begin; t < end; ++t) {
        const float mean = moe::dot(cols, &x(t, 0), &x(t, 0)) / float(cols);
        cache.inverse[t] = 1 / std::sqrt(mean + 1e-6f);
        for (Index j = 0; j < cols; ++j) y(t, j) = scale[j] * x(t, j) * cache.inverse[t];
      }
    });
  }

  // d_x = inverse * (d - u <d, u> / d_model), with u = x * inverse and d = d_y * scale.
  void backward(const Matrix& d_y, Cache& cache, Matrix& d_x, RmsNorm& grad) const {
    const Index cols = d_y.cols();
    d_x.resize(d_y.rows(), cols);
    cache.d_scale.setZero((d_y.rows() + moe::kTokenBlock - 1) / moe::kTokenBlock, cols);
    moe::for_each_block(d_y.rows(), kExecutor, [&](Index begin, Index end, Index) {
      auto d_scale = cache.d_scale.row(begin / moe::kTokenBlock);
      for (Index t = begin; t < end; ++t) {
        const float inverse = cache.inverse[t];
        float projection = 0;
        for (Index j = 0; j < cols; ++j) {
          const float u = cache.x(t, j) * inverse;
          d_scale[j] += d_y(t, j) * u;
          projection += d_y(t, j) * scale[j] * u;
        }
        projection *= inverse / float(cols);
        for (Index j = 0; j < cols; ++j)
          d_x(t, j) = inverse * (d_y(t, j) * scale[j] - cache.x(t, j) * projection);
      }
    });
    moe::bias_backward(cache.d_scale, grad.scale);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"scale"}, self.scale...);
  }
};

// logits = x w^T, and the cross entropy of their softmax.
struct Head {
  Matrix w;  // [256, d_model]

  explicit Head(Index d_model) : w(Matrix::Zero(kBytes, d_model)) {}

  // loss[t] = -log p(target of t), in nats; d_logits = gradient of the mean loss.
  void forward(const Matrix& x, const Batch& batch, std::vector<float>& loss, Matrix& d_logits) const {
    loss.resize(std::size_t(x.rows()));
    d_logits.resize(x.rows(), kBytes);
    moe::for_each_block(x.rows(), kExecutor, [&](Index begin, Index end, Index) {
      moe::linear(x.middleRows(begin, end - begin), w, d_logits.middleRows(begin, end - begin));
      for (Index t = begin; t < end; ++t) {
        const std::size_t i = std::size_t(t);
        auto row = d_logits.row(t).array();
        const float largest = row.maxCoeff(), wanted = row[batch.target[i]];
        row = (row - largest).exp();
        const float sum = row.sum();
        loss[i] = std::log(sum) + largest - wanted;
        row /= sum * float(x.rows());
        row[batch.target[i]] -= 1 / float(x.rows());
      }
    });
  }

  void backward(const Matrix& x, const Matrix& d_logits, Matrix& d_x, Head& grad) const {
    d_x.resize(x.rows(), x.cols());
    moe::for_each_block(x.rows(), kExecutor, [&](Index begin, Index end, Index) {
      moe::linear_backward_input(d_logits.middleRows(begin, end - begin), w,
                                 d_x.middleRows(begin, end - begin));
    });
    constexpr Index kRows = 64;  // of w that one task takes
    kExecutor.for_each(kBytes / kRows, [&](Index block, Index) {
      moe::linear_backward_weight(d_logits.middleCols(block * kRows, kRows), x,
                                  grad.w.middleRows(block * kRows, kRows));
    });
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_array(f, {"w"}, self.w...);
  }
};

// The layer that the MoE layer is compared with: one feed-forward network for all tokens.
struct DenseLayer {
  using Expert = moe::FeedForward<float>;
  Expert network;

  struct Cache {
    Matrix x, hidden;          // [tokens, d_model], [tokens, cache_cols()]
    std::vector<Expert> grad;  // a gradient for every part of the batch
  };

  Index d_model() const { return network.d_model(); }

  void forward(const Matrix& x, Matrix& y, Cache& cache) const {
    cache.x = x;
    cache.hidden.resize(x.rows(), network.cache_cols());
    y.resize(x.rows(), x.cols());
    moe::for_each_block(x.rows(), kExecutor, [&](Index begin, Index end, Index) {
      const Index rows = end - begin;
      network.forward(x.middleRows(begin, rows), y.middleRows(begin, rows),
                      cache.hidden.middleRows(begin, rows));
    });
  }

  void backward(const Matrix& d_y, Cache& cache, DenseLayer& grad, Matrix& d_x) const {
    constexpr Index kParts = 4;
    if (cache.grad.empty()) cache.grad.assign(kParts, moe::zeros_like(network));
    const Index rows = d_y.rows();
    d_x.resize(rows, d_y.cols());
    kExecutor.for_each(kParts, [&](Index part, Index) {
      const Index begin = rows * part / kParts, count = rows * (part + 1) / kParts - begin;
      Expert& own = cache.grad[std::size_t(part)];
      moe::set_zero(own);
      network.backward(cache.x.middleRows(begin, count), d_y.middleRows(begin, count),
                       cache.hidden.middleRows(begin, count), d_x.middleRows(begin, count), own);
    });
    for (const Expert& own : cache.grad)
      Expert::visit([](const ParameterInfo&, auto& to, const auto& from) { to += from; }, grad.network, own);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_part("network", f, self.network...);
  }
};

// Layer is a moe::MoELayer or a DenseLayer.
template <class Layer>
struct LanguageModel {
  static constexpr bool kHasRouter = requires(typename Layer::Cache cache) { cache.routing; };

  Embedding embedding;
  RmsNorm norm_in;
  Layer layer;
  RmsNorm norm_out;
  Head head;

  struct Cache {
    Matrix x, normed, y, y_normed, d_logits, d_normed, d_y, d_x;
    RmsNorm::Cache norm_in, norm_out;
    typename Layer::Cache layer;
    std::vector<float> loss;  // [tokens], in nats
  };

  LanguageModel(Layer with, moe::Rng& rng)
      : embedding(with.d_model(), rng),
        norm_in(with.d_model()),
        layer(std::move(with)),
        norm_out(layer.d_model()),
        head(layer.d_model()) {}

  // cache.loss of a batch. With an rng the router acts as in training.
  void forward(const Batch& batch, moe::Rng* rng, Cache& cache) const {
    embedding.forward(batch, cache.x);
    norm_in.forward(cache.x, cache.normed, cache.norm_in);
    if constexpr (!kHasRouter)
      layer.forward(cache.normed, cache.y, cache.layer);
    else if (rng != nullptr)
      layer.forward(cache.normed, *rng, cache.y, cache.layer, batch.info);
    else
      layer.forward(cache.normed, cache.y, cache.layer, batch.info);
    cache.y += cache.x;
    norm_out.forward(cache.y, cache.y_normed, cache.norm_out);
    head.forward(cache.y_normed, batch, cache.loss, cache.d_logits);
  }

  // Adds the gradient of the mean loss, plus `balance` times the balance loss, to grad.
  void backward(const Batch& batch, Cache& cache, double balance, LanguageModel& grad) const {
    head.backward(cache.y_normed, cache.d_logits, cache.d_normed, grad.head);
    norm_out.backward(cache.d_normed, cache.norm_out, cache.d_y, grad.norm_out);
    if constexpr (kHasRouter) {
      moe::RoutingGradient<float> extra;
      if (balance > 0) extra = float(balance) * moe::load_balancing_loss(cache.layer.routing).gradient;
      layer.backward(cache.d_y, cache.layer, grad.layer, extra, cache.d_normed);
    } else {
      layer.backward(cache.d_y, cache.layer, grad.layer, cache.d_normed);
    }
    norm_in.backward(cache.d_normed, cache.norm_in, cache.d_x, grad.norm_in);
    cache.d_x += cache.d_y;  // the residual
    embedding.backward(batch, cache.d_x, grad.embedding);
  }

  template <class F, class... Self>
  static void visit(F&& f, Self&... self) {
    moe::visit_part("embedding", f, self.embedding...);
    moe::visit_part("norm_in", f, self.norm_in...);
    moe::visit_part("layer", f, self.layer...);
    moe::visit_part("norm_out", f, self.norm_out...);
    moe::visit_part("head", f, self.head...);
  }
};

// Adam (Kingma and Ba 2015). The moments are models, visited beside the parameters.
template <class Model>
class Adam {
 public:
  explicit Adam(const Model& model) : m_(moe::zeros_like(model)), v_(moe::zeros_like(model)) {}

  // One step; sets grad to zero.
  void step(Model& model, Model& grad, double rate) {
    blocks_.clear();
    Model::visit(
        [&](const ParameterInfo& info, auto& p, auto& g, auto& m, auto& v) {
          if (info.kind != moe::Kind::parameter) return;
          for (Index i = 0; i < p.size(); i += kBlock)
            blocks_.push_back(
                {p.data() + i, g.data() + i, m.data() + i, v.data() + i, std::min(kBlock, p.size() - i)});
        },
        model, grad, m_, v_);
    ++steps_;
    constexpr float kBeta1 = 0.9f, kBeta2 = 0.999f, kEpsilon = 1e-8f;
    const float size = float(rate / (1 - std::pow(double(kBeta1), steps_)));
    const float correction = float(1 / (1 - std::pow(double(kBeta2), steps_)));
    kExecutor.for_each(Index(blocks_.size()), [&](Index i, Index) {
      using Map = Eigen::Map<Eigen::ArrayXf>;
      const Block& b = blocks_[std::size_t(i)];
      Map p(b.p, b.size), g(b.g, b.size), m(b.m, b.size), v(b.v, b.size);
      m = kBeta1 * m + (1 - kBeta1) * g;
      v = kBeta2 * v + (1 - kBeta2) * g.square();
      p -= size * m / ((correction * v).sqrt() + kEpsilon);
      g.setZero();
    });
  }

 private:
  static constexpr Index kBlock = 8192;
  struct Block {
    float *p, *g, *m, *v;
    Index size;
  };
  Model m_, v_;
  int steps_ = 0;
  std::vector<Block> blocks_;
};

struct TrainingOptions {
  Index steps = 1000;
  Index tokens = 1024;  // predictions a step
  double rate = 0.01;   // learning rate at its highest
  double balance = 0;   // coefficient of the balance loss
  std::uint64_t seed = 1;
  bool one_kind = false;  // whether a batch holds one kind of text only
};

// A short warm-up, then linearly to zero.
inline double rate_at(const TrainingOptions& options, Index step) {
  const double warm_up = std::max(1.0, 0.05 * double(options.steps));
  const double rising = double(step + 1) / warm_up;
  const double falling = double(options.steps - step) / (double(options.steps) - warm_up + 1);
  return options.rate * std::min({1.0, rising, falling});
}

// Draws a batch from the training text.
inline void draw_batch(const Text& text, bool one_kind, moe::Rng& rng, Batch& batch) {
  const std::vector<Index>& positions = text.positions(Split::train);
  std::array<Index, 2> range = {0, Index(positions.size())};
  if (one_kind) {
    const Index any = positions[std::size_t(rng.index(range[1]))];
    range = text.range_of(Split::train, text.kind_of[std::size_t(any)]);
  }
  for (Index t = 0; t < batch.tokens(); ++t)
    batch.set(t, text, positions[std::size_t(range[0] + rng.index(range[1] - range[0]))]);
}

// Trains a model. Calls after_step(step, loss in bits per byte, seconds of training so far).
template <class Model, class F>
void train(Model& model, const Text& text, const TrainingOptions& options, F&& after_step) {
  moe::Rng rng(options.seed);
  Model grad = moe::zeros_like(model);
  Adam<Model> adam(model);
  typename Model::Cache cache;
  Batch batch;
  batch.resize(options.tokens);
  double seconds = 0;
  for (Index step = 0; step < options.steps; ++step) {
    const auto start = std::chrono::steady_clock::now();
    draw_batch(text, options.one_kind, rng, batch);
    model.forward(batch, &rng, cache);
    model.backward(batch, cache, options.balance, grad);
    adam.step(model, grad, rate_at(options, step));
    double nats = 0;
    for (const float loss : cache.loss) nats += double(loss);
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    after_step(step, nats / double(options.tokens) / std::numbers::ln2, seconds);
  }
}

// Predicts the bytes at `positions` and calls f(batch, cache) for every batch.
template <class Model, class F>
void predict(const Model& model, const Text& text, const std::vector<Index>& positions, F&& f) {
  constexpr Index kTokens = 1024;
  typename Model::Cache cache;
  Batch batch;
  for (Index begin = 0; begin < Index(positions.size()); begin += kTokens) {
    batch.resize(std::min(kTokens, Index(positions.size()) - begin));
    for (Index t = 0; t < batch.tokens(); ++t) batch.set(t, text, positions[std::size_t(begin + t)]);
    model.forward(batch, nullptr, cache);
    f(batch, cache);
  }
}

}  // namespace examples
