// SPDX-License-Identifier: MIT
// The layers that moe::compiled holds, on a team of OpenMP. A unit of its own: programs without OpenMP do not
// link it.
#include <moe/packed/packed_moe_layer.hpp>

static_assert(MOE_COMPILED == EIGEN_MAX_ALIGN_BYTES, "MOE_COMPILED is what Eigen aligns to");

#define MOE_DEFINE_FOR OpenMP
#include <moe/layers/compiled.inc>
#include <moe/packed/compiled.inc>
