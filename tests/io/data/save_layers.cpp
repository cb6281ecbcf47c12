// SPDX-License-Identifier: MIT

// Writes files for this folder: see README.md.

#include <string>

#include <moe/io.hpp>

#include "../saved_layers.hpp"

int main(int, char** argv) {
  io_test::for_each_saved_layer([&](const std::string& name, const auto& layer) {
    moe::save_layer(std::string(argv[1]) + "/" + name, layer);
  });
}
