// SPDX-License-Identifier: MIT
#include "packed_step.hpp"

#include <moe/moe.hpp>
#include <moe/packed.hpp>

namespace {

using moe::Index;
using Expert = moe::GatedFeedForward<float>;
using Router = moe::TopKRouter<float>;

#ifdef _OPENMP
moe::OpenMP on_threads(int threads) { return {threads}; }
#else
moe::Sequential on_threads(int) { return {}; }
#endif

struct Step {
  moe::PackedMoELayer<Expert, Router> layer;
  moe::Matrix<float> x, y;
  moe::Routing<float> routing;
  moe::PackedWorkspace workspace;
};

void fill(moe::Matrix<float>& m, std::uint32_t state) {
  for (Index i = 0; i < m.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    m.data()[i] = (float(state >> 8) / float(1 << 23) - 1.0f) / 32.0f;
  }
}

void* make(std::ptrdiff_t d_model, std::ptrdiff_t d_ff, std::ptrdiff_t num_experts) {
  moe::Rng rng(1);
  const auto expert = [&](Index e) {
    Expert made({.d_model = d_model, .d_ff = d_ff});
    for (moe::Matrix<float>* w : {&made.w_gate, &made.w_up, &made.w_down}) fill(*w, std::uint32_t(e + 1));
    return made;
  };
  moe::PackedParts<Router> parts{
      .router = Router({.d_model = d_model, .num_experts = num_experts, .top_k = 1}, rng)};
  return new Step{moe::pack<moe::F32>(std::move(parts), expert), {}, {}, {}, {}};
}

void set_tokens(void* layer, std::ptrdiff_t tokens, std::ptrdiff_t top_k) {
  Step& step = *static_cast<Step*>(layer);
  step.x.resize(tokens, step.layer.d_model());
  fill(step.x, 99);
  step.routing = {};
  moe::Choices<float>& chosen = step.routing.chosen;
  chosen.token_begin.push_back(0);
  for (Index t = 0; t < tokens; ++t) {
    for (Index i = 0; i < top_k; ++i) {
      chosen.expert.push_back((t * top_k + i) % step.layer.num_experts());
      chosen.gate.push_back(1.0f / float(top_k));
    }
    chosen.token_begin.push_back(chosen.expert.size());
  }
  moe::DispatchPlan<float>& plan = step.routing.plan;
  plan.num_tokens = tokens;
  plan.token_state.assign(tokens, moe::TokenState::valid);
  plan.expert_begin.assign(step.layer.num_experts() + 1, 0);
  moe::dispatch_all(chosen, plan);
}

void forward(void* layer, int threads) {
  Step& step = *static_cast<Step*>(layer);
  step.layer.forward(step.x, step.routing, step.y, step.workspace, on_threads(threads));
}

const float* output(void* layer) { return static_cast<Step*>(layer)->y.data(); }
void destroy(void* layer) { delete static_cast<Step*>(layer); }

}  // namespace

extern "C" __attribute__((visibility("default"))) moe::bench::PackedStep moe_packed_step() {
  return {make, set_tokens, forward, output, destroy};
}
