// SPDX-License-Identifier: MIT
#pragma once

// Checkpoint files: tensors by name, layers of published models, layers of one's own. Needs nlohmann_json.

#include <moe/io/block_types.hpp>
#include <moe/io/checkpoint.hpp>
#include <moe/io/checksum.hpp>
#include <moe/io/dtype.hpp>
#include <moe/io/file.hpp>
#include <moe/io/find_matrix.hpp>
#include <moe/io/gguf.hpp>
#include <moe/io/gguf_blocks.hpp>
#include <moe/io/gguf_names.hpp>
#include <moe/io/grouped_matrix.hpp>
#include <moe/io/header.hpp>
#include <moe/io/json_events.hpp>
#include <moe/io/layer_file.hpp>
#include <moe/io/load_layer.hpp>
#include <moe/io/load_packed.hpp>
#include <moe/io/options.hpp>
#include <moe/io/packed_file.hpp>
#include <moe/io/packed_integers.hpp>
#include <moe/io/packed_pages.hpp>
#include <moe/io/quantisation.hpp>
#include <moe/io/read_options.hpp>
#include <moe/io/read_tensor.hpp>
#include <moe/io/safetensors.hpp>
#include <moe/io/scaled_blocks.hpp>
#include <moe/io/shards.hpp>
#include <moe/io/small_floats.hpp>
#include <moe/moe.hpp>
