#include <cstdio>
#include <moe/moe.hpp>

int main() {
  moe::Rng rng(42);
  moe::MoELayer layer{moe::make_experts<moe::GatedFeedForward<float>>(8, {.d_model = 64, .d_ff = 128}, rng),
                      moe::TopKRouter<float>({.d_model = 64, .num_experts = 8, .top_k = 2}, rng)};
  using Layer = decltype(layer);
  moe::Matrix<float> x(100, 64);  // [tokens, d_model]
  moe::fill_normal(x, 1.0, rng);

  // Training: learn to copy the input, with a balance loss.
  Layer::Cache cache;
  for (int step = 0; step <= 40; ++step) {
    const moe::Matrix<float> error = layer.forward(x, rng, cache) - x;
    const auto balance = moe::load_balancing_loss(cache.routing);
    if (step % 20 == 0) std::printf("step %2d: error %.2f\n", step, error.squaredNorm() / 6400);
    Layer grad = moe::zeros_like(layer);
    layer.backward(error / 100, cache, grad, 0.01f * balance.gradient);
    Layer::visit(
        [](const moe::ParameterInfo& info, auto& p, const auto& g) {
          if (info.kind == moe::Kind::parameter) p -= 0.1f * g;
        },
        layer, grad);
  }

  // Inference, and who worked on the first token.
  const moe::Matrix<float> y = layer.forward(x);
  std::printf("token 0: x %.1f, y %.1f\n", x(0, 0), y(0, 0));
  for (const auto& used : moe::trace(layer.route(x), 0))
    std::printf("token 0: expert %td with gate %.2f\n", used.expert, used.gate);
}
