// SPDX-License-Identifier: MIT
// Calls that do not compile. What the compiler says of them is looked at by
// check_wrong_arguments.cmake, which reads here what it should name.
#include <vector>

#include <moe/packed.hpp>

using Layer = moe::MoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;
using Packed = moe::PackedMoELayer<moe::GatedFeedForward<float>, moe::TopKRouter<float>>;
using Soft = moe::SoftMoELayer<moe::GatedFeedForward<float>>;

void call(const Layer& layer, const Packed& packed, const Soft& soft, const moe::Matrix<float>& x) {
  moe::Matrix<float> y;
  moe::Matrix<double> doubles;
  const moe::Matrix<float> fixed;
  Eigen::MatrixXf columns;
  std::vector<float> numbers;
  Layer::Workspace workspace;
  Soft::Workspace soft_workspace;
  layer.forward(x, doubles, workspace);      // deleted double
  layer.forward(x, fixed, workspace);        // deleted const
  layer.forward(x, columns, workspace);      // deleted float
  layer.forward(x, 2 * y, workspace);        // deleted CwiseBinaryOp
  layer.forward(doubles, y, workspace);      // x is not a matrix of the layer's scalar
  layer.forward(numbers);                    // x is not a matrix of the layer's scalar
  layer.forward(x, workspace, y);            // MoELayer::forward takes
  packed.forward(x, y);                      // PackedMoELayer::forward takes
  soft.forward(doubles, y, soft_workspace);  // SoftMoELayer::forward: x is not
  layer.backward(y, layer);                  // MoELayer::backward takes
}
