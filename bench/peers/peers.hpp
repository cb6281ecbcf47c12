// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include <moe/moe.hpp>

// What a C++ programmer would write without this library: a loop over experts that gathers an expert's
// tokens, runs its products and activation and adds the rows to the output, with somebody's products.
namespace moe::bench {

/// Weights of experts, [out, in] each. Expert e has those of e % gate.size(), so that experts far
/// larger than a cache need not all be in memory.
struct PeerWeights {
  Index d_model = 0, d_ff = 0, num_experts = 0;
  bool gated = true;  ///< SwiGLU; otherwise ReLU between two products
  std::vector<Matrix<float>> gate, up, down;

  std::size_t of(Index expert) const { return std::size_t(expert) % up.size(); }
};

/// Where the threads are: in every product, or each with experts of its own.
enum class Spread { products, experts };

/// Runs f(i, worker) for each i in [0, n).
inline void run_on(int threads, Index n, const std::function<void(Index, Index)>& f) {
#ifdef _OPENMP
  OpenMP{threads}.for_each(n, f);
#else
  (void)threads;
  Sequential{}.for_each(n, f);
#endif
}

/// The loop; its products are left to who derives from it.
class Peer {
 public:
  virtual ~Peer() = default;

  /// What can be done before the time counts, for batches of such a plan.
  virtual void prepare(const DispatchPlan<float>&, int, Spread) {}

  void forward(const Matrix<float>& x, const DispatchPlan<float>& plan, int threads, Spread spread,
               Matrix<float>& y) {
    const Index d_model = x.cols();
    y.setZero(x.rows(), d_model);
    out_.resize(plan.num_assignments(), d_model);
    begin(threads, spread);
    const auto run = [&](Index e, Index worker) {
      const Index first = plan.expert_begin[e], rows = plan.rows_of(e);
      if (rows > 0) expert(e, x, rows, plan.token.data() + first, out_.row(first), worker);
    };
    const auto add = [&](Index e, Index column, Index columns) {
      for (Index a = plan.expert_begin[e]; a < plan.expert_begin[e + 1]; ++a)
        y.row(plan.token[a]).segment(column, columns) +=
            plan.gate[a] * out_.matrix().row(a).segment(column, columns);
    };
    if (spread == Spread::products) {
      for (Index e = 0; e < plan.num_experts(); ++e) {
        run(e, 0);
        add(e, 0, d_model);
      }
    } else {
      run_on(threads, plan.num_experts(), run);
      run_on(threads, threads, [&](Index part, Index) {
        const Index column = d_model * part / threads;
        for (Index e = 0; e < plan.num_experts(); ++e)
          add(e, column, d_model * (part + 1) / threads - column);
      });
    }
    end();
  }

 protected:
  /// Sets the threads of the products, and back.
  virtual void begin(int threads, Spread spread) = 0;
  virtual void end() = 0;
  /// out [rows, d_model] = the expert on the rows token[0], ... of x.
  virtual void expert(Index e, const Matrix<float>& x, Index rows, const Index* token, float* out,
                      Index worker) = 0;

 private:
  RowBuffer<float> out_;
};

/// What a worker needs for an expert in float.
struct PeerRows {
  RowBuffer<float> x, gate, up;

  void gather(const Matrix<float>& from, Index rows, const Index* token, Index d_ff) {
    x.resize(rows, from.cols());
    gate.resize(rows, d_ff);
    up.resize(rows, d_ff);
    for (Index i = 0; i < rows; ++i) x.matrix().row(i) = from.row(token[i]);
  }
  void activate(bool gated) {
    auto g = gate.matrix().array();
    auto u = up.matrix().array();
    if (gated)
      u *= g / (1 + (-g).exp());
    else
      u = u.max(0.0f);
  }
};

std::unique_ptr<Peer> eigen_peer(const PeerWeights& weights, int max_threads);

// Where they were found; with weights of their own, except OpenBLAS.
std::unique_ptr<Peer> openblas_peer(const PeerWeights& weights, int max_threads);
std::unique_ptr<Peer> onednn_peer(const PeerWeights& weights, int max_threads, bool bf16);

}  // namespace moe::bench
