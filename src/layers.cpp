// SPDX-License-Identifier: MIT
// The layers that moe::compiled holds, on the calling thread.
#include <moe/packed/packed_moe_layer.hpp>

static_assert(MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES, "MOE_COMPILED is what Eigen aligns to");

#define MOE_DEFINE_FOR Sequential
#include <moe/layers/compiled.inc>
#include <moe/packed/compiled.inc>

namespace moe {

template compiled::PackedSwiGLU pack<F32>(const compiled::SwiGLULayer&, const PackOptions&);
template compiled::PackedSwiGLU pack<BF16>(const compiled::SwiGLULayer&, const PackOptions&);
template compiled::PackedReLU pack<F32>(const compiled::ReLULayer&, const PackOptions&);
template compiled::PackedReLU pack<BF16>(const compiled::ReLULayer&, const PackOptions&);

}  // namespace moe
