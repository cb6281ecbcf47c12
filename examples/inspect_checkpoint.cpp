// SPDX-License-Identifier: MIT

// Loads one Mixture-of-Experts layer out of a published checkpoint, shows what of it could be read where
// the file has it and what had to be copied, runs tokens through it and shows who works on them:
//   inspect_checkpoint MODEL CHECKPOINT [LAYER]
// CHECKPOINT is a .safetensors file, an index of several, or the folder that holds them. Tokens are
// random: hidden states of real text come out of the model's other layers.

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <moe/io.hpp>
#include <moe/models/published/all.hpp>
#include <moe/moe.hpp>

namespace {

constexpr moe::Index kTokens = 64;

void print_names() {
  std::printf("models:\n");
  moe::for_each_model([](const auto& model) {
    std::printf("  %s%s\n", model.name.data(),
                model.tensors.w_router.empty() ? " (its tensor names are not known)" : "");
  });
  moe::for_each_soft_model([](const auto& model) { std::printf("  %s\n", model.name.data()); });
}

// Tensors and their values by what became of them.
void print_storage(const std::vector<moe::LoadedTensor>& tensors) {
  std::map<std::string, std::pair<long, moe::Index>> sums;
  for (const moe::LoadedTensor& tensor : tensors) {
    auto& [count, values] = sums[tensor.copied];
    ++count;
    values += tensor.values;
  }
  for (const auto& [copied, sum] : sums)
    std::printf("  %s: %ld, of %.3f million values\n",
                copied.empty() ? "mapped tensors" : ("copied tensors (" + copied + ")").c_str(), sum.first,
                double(sum.second) / 1e6);
}

moe::Matrix<float> random_tokens(moe::Index d_model) {
  moe::Rng rng(1);
  moe::Matrix<float> x(kTokens, d_model);
  moe::fill_normal(x, 1.0, rng);
  return x;
}

void print_sizes(const moe::Matrix<float>& x, const moe::Matrix<float>& y) {
  std::printf("root mean square of x %.3f, of y %.3f\n", double(x.norm()) / std::sqrt(double(x.size())),
              double(y.norm()) / std::sqrt(double(y.size())));
}

template <class Model>
void inspect(const Model& published, const moe::Checkpoint& checkpoint, moe::Index layer_index) {
  const Model model = moe::sized_as(published, checkpoint, layer_index);
  std::printf("%s: d_model %ld, %ld experts of d_ff %ld, %ld for a token, shared d_ff %ld\n",
              model.name.data(), long(model.d_model()), long(model.num_experts()), long(model.d_ff),
              long(model.experts_per_token()), long(model.shared_experts * model.shared_d_ff));
  const auto [layer, tensors] = moe::load_mapped_layer<float>(model, checkpoint, layer_index);
  std::printf("layer %ld: %.1f million parameters\n", long(layer_index),
              double(moe::num_parameters(layer)) / 1e6);
  for (const auto& [part, text] : moe::describe(layer)) std::printf("  %s: %s\n", part.c_str(), text.c_str());
  const moe::Losses& losses = model.losses;
  std::printf("  losses in training:");
  for (const auto& [name, coefficient] : {std::pair{"balance", losses.balance},
                                          {"z", losses.z},
                                          {"importance", losses.importance},
                                          {"load", losses.load},
                                          {"device", losses.device}})
    if (coefficient != 0) std::printf(" %s %g", name, coefficient);
  std::printf(losses.balance == 0 && losses.importance == 0 ? " none known\n" : "\n");
  print_storage(tensors);

  const moe::Matrix<float> x = random_tokens(model.d_model());
  const auto routing = layer.route(x);
  const moe::Matrix<float> y = layer.forward(x, routing);
  for (moe::Index t = 0; t < 4; ++t) {
    std::printf("token %ld:", long(t));
    for (const auto& [expert, gate] : moe::trace(routing, t))
      std::printf("  expert %ld x %.3f", long(expert), double(gate));
    std::printf("\n");
  }
  const moe::IndexVector load = moe::tokens_per_expert(routing);
  std::printf("of %ld tokens: largest load over mean %.2f, standard deviation over mean %.2f\n",
              long(kTokens), moe::max_over_mean(load), moe::coefficient_of_variation(load));
  print_sizes(x, y);
}

// A layer of Soft MoE: every token has a share in every slot.
template <class Unit>
void inspect(const moe::SoftModel<Unit>& published, const moe::Checkpoint& checkpoint,
             moe::Index layer_index) {
  const auto model = moe::sized_as(published, checkpoint, layer_index);
  std::printf("%s: d_model %ld, %ld experts of d_ff %ld, %ld slots for each\n", model.name.data(),
              long(model.d_model()), long(model.num_experts()), long(model.d_ff),
              long(model.layer.slots_per_expert));
  const auto layer = moe::load_layer<float>(model, checkpoint, layer_index);
  std::printf("layer %ld: %.1f million parameters\n", long(layer_index),
              double(moe::num_parameters(layer)) / 1e6);

  const moe::Matrix<float> x = random_tokens(model.d_model());
  moe::Matrix<float> y;
  moe::SoftMoEWorkspace<float> workspace;
  layer.forward(x, y, workspace);
  for (moe::Index t = 0; t < 4; ++t) {
    moe::Index slot = 0;
    const float share = workspace.routing.combine.row(t).maxCoeff(&slot);
    std::printf("token %ld: most of slot %ld, of expert %ld, x %.3f\n", long(t), long(slot),
                long(slot / layer.slots_per_expert()), double(share));
  }
  print_sizes(x, y);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::printf("usage: inspect_checkpoint MODEL CHECKPOINT [LAYER]\n");
    print_names();
    return argc == 2 && std::strcmp(argv[1], "--help") == 0 ? 0 : 2;
  }
  try {
    moe::Index layer = 0;
    if (argc == 4) {
      const char* const end = argv[3] + std::strlen(argv[3]);
      if (std::from_chars(argv[3], end, layer).ptr != end || layer < 0) {
        std::fprintf(stderr, "inspect_checkpoint: LAYER is %s, expected a number\n", argv[3]);
        return 2;
      }
    }
    bool found = false;
    const auto inspect_named = [&](const auto& model) {
      if (model.name != argv[1]) return;
      found = true;
      inspect(model, moe::Checkpoint::open(argv[2]), layer);
    };
    moe::for_each_model(inspect_named);
    moe::for_each_soft_model(inspect_named);
    if (!found) {
      std::fprintf(stderr, "inspect_checkpoint: no model is called %s\n", argv[1]);
      print_names();
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "inspect_checkpoint: %s\n", error.what());
    return 1;
  }
}
