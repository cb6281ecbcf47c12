// SPDX-License-Identifier: MIT
#include "peers.hpp"

namespace moe::bench {
namespace {

class EigenPeer : public Peer {
 public:
  EigenPeer(const PeerWeights& weights, int max_threads)
      : weights_(weights), rows_(std::size_t(max_threads)) {}

 protected:
  void begin(int threads, Spread spread) override {
    Eigen::setNbThreads(spread == Spread::products ? threads : 1);
  }
  void end() override { Eigen::setNbThreads(0); }

  void expert(Index e, const Matrix<float>& x, Index rows, const Index* token, float* out,
              Index worker) override {
    PeerRows& r = rows_[std::size_t(worker)];
    r.gather(x, rows, token, weights_.d_ff);
    const std::size_t i = weights_.of(e);
    if (weights_.gated) r.gate.matrix().noalias() = r.x.matrix() * weights_.gate[i].transpose();
    r.up.matrix().noalias() = r.x.matrix() * weights_.up[i].transpose();
    r.activate(weights_.gated);
    Eigen::Map<Matrix<float>>(out, rows, weights_.d_model).noalias() =
        r.up.matrix() * weights_.down[i].transpose();
  }

 private:
  const PeerWeights& weights_;
  std::vector<PeerRows> rows_;
};

}  // namespace

std::unique_ptr<Peer> eigen_peer(const PeerWeights& weights, int max_threads) {
  return std::make_unique<EigenPeer>(weights, max_threads);
}

}  // namespace moe::bench
