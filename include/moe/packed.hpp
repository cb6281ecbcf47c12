// SPDX-License-Identifier: MIT
#pragma once

// Layers for inference, packed for the kernels of this processor.

#include <moe/moe.hpp>
#include <moe/packed/bf16.hpp>
#include <moe/packed/block_format.hpp>
#include <moe/packed/block_matrix.hpp>
#include <moe/packed/expert_formats.hpp>
#include <moe/packed/expert_parts.hpp>
#include <moe/packed/fit_integers.hpp>
#include <moe/packed/float32.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/fp8.hpp>
#include <moe/packed/importance.hpp>
#include <moe/packed/int4.hpp>
#include <moe/packed/int8.hpp>
#include <moe/packed/keep_experts.hpp>
#include <moe/packed/mxfp4.hpp>
#include <moe/packed/pack_options.hpp>
#include <moe/packed/packed_expert.hpp>
#include <moe/packed/packed_experts.hpp>
#include <moe/packed/packed_format.hpp>
#include <moe/packed/packed_moe_layer.hpp>
#include <moe/packed/packed_output.hpp>
#include <moe/packed/packed_product.hpp>
