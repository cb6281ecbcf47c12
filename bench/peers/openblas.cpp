// SPDX-License-Identifier: MIT
#include "peers.hpp"

#include <cblas.h>

namespace moe::bench {
namespace {

class OpenBlasPeer : public Peer {
 public:
  OpenBlasPeer(const PeerWeights& weights, int max_threads)
      : weights_(weights), rows_(std::size_t(max_threads)) {}

 protected:
  void begin(int threads, Spread spread) override {
    openblas_set_num_threads(spread == Spread::products ? threads : 1);
  }
  void end() override { openblas_set_num_threads(1); }

  void expert(Index e, const Matrix<float>& x, Index rows, const Index* token, float* out,
              Index worker) override {
    PeerRows& r = rows_[std::size_t(worker)];
    r.gather(x, rows, token, weights_.d_ff);
    const std::size_t i = weights_.of(e);
    if (weights_.gated) multiply(rows, r.x.data(), weights_.gate[i], r.gate.data());
    multiply(rows, r.x.data(), weights_.up[i], r.up.data());
    r.activate(weights_.gated);
    multiply(rows, r.up.data(), weights_.down[i], out);
  }

 private:
  // y [rows, out] = x [rows, in] w^T; a single row is a product with a vector.
  static void multiply(Index rows, const float* x, const Matrix<float>& w, float* y) {
    const int out = int(w.rows()), in = int(w.cols());
    if (rows == 1)
      cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1, w.data(), in, x, 1, 0, y, 1);
    else
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(rows), out, in, 1, x, in, w.data(), in, 0, y,
                  out);
  }

  const PeerWeights& weights_;
  std::vector<PeerRows> rows_;
};

}  // namespace

std::unique_ptr<Peer> openblas_peer(const PeerWeights& weights, int max_threads) {
  return std::make_unique<OpenBlasPeer>(weights, max_threads);
}

}  // namespace moe::bench
