// SPDX-License-Identifier: MIT
#pragma once

// Layers for inference, packed for the kernels of this processor.

#include <moe/moe.hpp>
#include <moe/packed/bf16.hpp>
#include <moe/packed/float32.hpp>
#include <moe/packed/format.hpp>
#include <moe/packed/packed_expert.hpp>
#include <moe/packed/packed_experts.hpp>
#include <moe/packed/packed_moe_layer.hpp>
#include <moe/packed/packed_product.hpp>
