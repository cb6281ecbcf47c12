// SPDX-License-Identifier: MIT
#include <cstdio>

#include <moe/moe.hpp>
#include <moe/packed.hpp>

int main() {
  std::printf("moe %s\n", MOE_VERSION_STRING);
  moe::Rng rng(1);
  const moe::MoELayer layer(
      moe::make_experts<moe::GatedFeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
      moe::TopKRouter<float>({.d_model = 8, .num_experts = 4}, rng));
  const moe::Matrix<float> x = moe::Matrix<float>::Ones(5, 8), y = layer.forward(x);
  return y.allFinite() && y.rows() == 5 && moe::pack<moe::F32>(layer).forward(x).isApprox(y) ? 0 : 1;
}
