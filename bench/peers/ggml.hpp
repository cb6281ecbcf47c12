// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "packed/layers.hpp"

// The CPU backend of ggml, the library under llama.cpp, on a layer's experts.
namespace moe::bench {

/// The experts of a layer in a type of ggml.
class GgmlLayer {
 public:
  virtual ~GgmlLayer() = default;

  /// The buffer type that holds the weights: CPU, or one for which they are repacked.
  virtual std::string buffer_type() const = 0;
  /// Sets y and returns the seconds that ggml took to compute it. Every token has chosen as many experts.
  virtual double forward(const Matrix<float>& x, const Choices<float>& chosen, int threads) = 0;

  Matrix<float> y;
};

/// A layer in one of the types that stand beside a format of ours, and what a row measures of it.
struct GgmlForm {
  std::string type;      ///< by ggml's name
  std::string counter;   ///< the start of its counters' names: ggml; of a second type ggml_<type>
  double largest_error;  ///< relative, to our output in F32
  std::unique_ptr<GgmlLayer> layer;
  double error = 0;
  std::vector<double> over_ours = {};  ///< its time over ours in every round
};

/// Of the weights that our layer has, too. None where there is no such type or no ggml.
#ifdef MOE_BENCH_GGML
std::vector<GgmlForm> ggml_forms(const Shape& shape, const std::string& format);
#else
inline std::vector<GgmlForm> ggml_forms(const Shape&, const std::string&) { return {}; }
#endif

}  // namespace moe::bench
