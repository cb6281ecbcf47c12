// SPDX-License-Identifier: MIT

// Prints the published models that the library knows: their layers' sizes, and the parameters of the whole
// model as they follow from them beside those that its authors publish.

#include <cstdio>
#include <optional>
#include <string>

#include <moe/models/published/all.hpp>

namespace {

std::string billions(double count) {
  char text[32];
  std::snprintf(text, sizeof text, count < 10e9 ? "%.2f" : "%.1f", count / 1e9);
  return text;
}

// What follows from the sizes, what is published, and the difference.
std::string compared(std::optional<moe::Index> computed, double published) {
  if (!computed) {
    const std::string text = "not counted";
    return published == 0 ? text : text + " (" + billions(published) + "B)";
  }
  const double count = double(*computed);
  if (published == 0) return billions(count) + "B";
  char difference[32];
  std::snprintf(difference, sizeof difference, "%+.1f%%", 100 * (count / published - 1));
  return billions(count) + "B (" + billions(published) + "B, " + difference + ")";
}

template <class M>
void print_row(const M& model, const std::string& top_k, moe::Index shared, const std::string& total,
               const std::string& active) {
  const auto number = [](moe::Index i) { return static_cast<long>(i); };
  std::printf("%-22s %7ld %6ld %7ld %5s %7ld   %-25s %s\n", model.name.data(), number(model.d_model()),
              number(model.d_ff), number(model.num_experts()), top_k.c_str(), number(shared), total.c_str(),
              active.c_str());
}

}  // namespace

int main() {
  std::printf("%-22s %7s %6s %7s %5s %7s   %-25s %s\n", "model", "d_model", "d_ff", "experts", "top_k",
              "shared", "parameters (published)", "active for a token (published)");
  moe::for_each_model([](const auto& model) {
    const double active = model.published.active;
    print_row(model, std::to_string(model.experts_per_token()), model.shared_experts * model.shared_d_ff,
              compared(model.total_parameters(), model.published.total),
              active > 0 ? compared(model.active_parameters(), active) : "-");
  });
  moe::for_each_soft_model([](const auto& model) {
    print_row(model, "all", 0, compared(model.total_parameters(), model.published.total), "-");
  });
}
