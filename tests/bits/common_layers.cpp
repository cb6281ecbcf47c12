// SPDX-License-Identifier: MIT
// What most programs call: layers that moe::compiled has.
#include <moe/packed.hpp>

template <class Expert>
moe::Matrix<float> use(const moe::MoELayer<Expert, moe::TopKRouter<float>>& layer,
                       const moe::Matrix<float>& x, moe::Rng& rng) {
  using Layer = moe::MoELayer<Expert, moe::TopKRouter<float>>;
  typename Layer::Cache cache;
  Layer grad = moe::zeros_like(layer);
  const moe::Matrix<float> y = layer.forward(x, rng, cache);
  return layer.backward(y, cache, grad) + layer.forward(x) + moe::pack<moe::F32>(layer).forward(x) +
         moe::pack<moe::BF16>(layer).forward(x);
}

template moe::Matrix<float> use(const moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>&,
                                const moe::Matrix<float>&, moe::Rng&);
template moe::Matrix<float> use(const moe::MoELayer<moe::FeedForward<float>, moe::TopKRouter<float>>&,
                                const moe::Matrix<float>&, moe::Rng&);
