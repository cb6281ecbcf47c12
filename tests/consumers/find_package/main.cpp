// SPDX-License-Identifier: MIT
#include <cstdio>

#include <moe/moe.hpp>

int main() {
  std::printf("moe %s\n", MOE_VERSION_STRING);
  moe::Rng rng(1);
  const moe::MoELayer layer(
      moe::make_experts<moe::GatedFeedForward<float>>(4, {.d_model = 8, .d_ff = 16}, rng),
      moe::TopKRouter<float>({.d_model = 8, .num_experts = 4}, rng));
  const moe::Matrix<float> y = layer.forward(moe::Matrix<float>::Ones(5, 8));
  return y.allFinite() && y.rows() == 5 ? 0 : 1;
}
