#!/usr/bin/env python3
"""Writes GGUF files with the `gguf` package of llama.cpp's authors, and what the package says of them.

Usage: gguf_files.py [--out DIR] [--fuzz DIR]

gguf_types.gguf: a tensor of every type that the library reads, of random bytes, and beside it, as F32, the numbers
that gguf.quants.dequantize gives; metadata of every type; the names that the package gives to tensors.
gguf_layer.gguf: a layer in the shape of Qwen3-30B-A3B's, quantised by the package.
gguf_split-0000N-of-00003.gguf: five tensors in three files.
In the fuzzer's directory values.gguf: metadata of every type and a block of every type.
"""

import argparse
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

# Byte positions of the halves in a block; those of a block with none hold a power of two in byte 0 (MXFP4).
HALVES = {
    Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.IQ4_NL: [0], Type.MXFP4: [],
}


def finite_halves(rng, count):
    """Halves of all kinds but infinities and NaN: zeros, subnormal and negative ones too."""
    bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] &= np.uint16(0x83FF)
    return bits


def random_blocks(kind, rows, blocks, rng):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        data[:, at:at + 2] = finite_halves(rng, len(data)).view(np.uint8).reshape(-1, 2)
    if kind == Type.MXFP4:
        data[:, 0] = np.arange(len(data)) * 5 % 255  # the package has a number for 255, OCP has NaN
        data[:3, 0] = [0, 1, 254][:len(data)]
    return data.reshape(rows, blocks * size)


def add_values(writer):
    writer.add_uint8("test.uint8", 255)
    writer.add_int8("test.int8", -128)
    writer.add_uint16("test.uint16", 65535)
    writer.add_int16("test.int16", -32768)
    writer.add_uint32("test.uint32", 4294967295)
    writer.add_int32("test.int32", -2147483648)
    writer.add_uint64("test.uint64", 18446744073709551615)
    writer.add_int64("test.int64", -9223372036854775808)
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.true", True)
    writer.add_bool("test.false", False)
    writer.add_string("test.string", "one \"line\"\nand \u00e9")
    writer.add_array("test.strings", ["a", "\"b\"", ""])
    writer.add_array("test.integers", [1, -2, 3])
    writer.add_array("test.nested", [[1, 2], [3]])
    writer.add_array("test.truths", [True, False])


# Names of Hugging Face's modules as the package's table has them, experts put together.
MODULES = {
    "LLAMA": ["block_sparse_moe.gate", "block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3",
              "block_sparse_moe.experts.w2"],
    "PHIMOE": ["block_sparse_moe.gate", "block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3",
               "block_sparse_moe.experts.w2"],
    "QWEN3MOE": ["mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    "OLMOE": ["mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    "QWEN2MOE": ["mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj",
                 "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
                 "mlp.shared_expert_gate"],
    "DEEPSEEK": ["mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj",
                 "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"],
    "DEEPSEEK2": ["mlp.gate", "mlp.gate.e_score_correction", "mlp.experts.gate_proj", "mlp.experts.up_proj",
                  "mlp.experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
                  "mlp.shared_experts.down_proj"],
    "GLM4_MOE": ["mlp.gate", "mlp.gate.e_score_correction", "mlp.experts.gate_proj", "mlp.experts.up_proj",
                 "mlp.experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
                 "mlp.shared_experts.down_proj"],
    "ERNIE4_5_MOE": ["mlp.gate", "mlp.moe_statics.e_score_correction", "mlp.experts.gate_proj",
                     "mlp.experts.up_proj", "mlp.experts.down_proj", "mlp.shared_experts.gate_proj",
                     "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"],
    "LLAMA4": ["feed_forward.router", "feed_forward.experts.gate_proj", "feed_forward.experts.up_proj",
               "feed_forward.experts.down_proj", "feed_forward.shared_expert.gate_proj",
               "feed_forward.shared_expert.up_proj", "feed_forward.shared_expert.down_proj"],
    "GPT_OSS": ["mlp.router", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"],
    "GRANITE_MOE": ["block_sparse_moe.router.layer", "block_sparse_moe.output_linear"],
    "GROK": ["router", "moe.linear", "moe.linear_v", "moe.linear_1"],
    "DBRX": ["ffn.router.layer", "ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"],
}
PATHS = {"GROK": "transformer.decoder_layer.0.", "DBRX": "transformer.blocks.0."}


def add_names(writer):
    """names.<architecture>: a module, the name of its tensor, and so on."""
    for name, modules in MODULES.items():
        arch = gguf.MODEL_ARCH[name]
        table = gguf.get_tensor_name_map(arch, 1)
        pairs = []
        for module in modules:
            module = PATHS.get(name, "model.layers.0.") + module
            pairs += [module, table.get_name(module)]
        assert None not in pairs, pairs
        writer.add_array("names." + gguf.MODEL_ARCH_NAMES[arch], pairs)


def write_types(path):
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(64)
    add_values(writer)
    add_names(writer)
    numbers = rng.standard_normal((2, 3, 64)).astype(np.float32)
    for kind, data in [(Type.F32, numbers), (Type.F16, numbers.astype(np.float16)),
                       (Type.BF16, gguf.quants.quantize(numbers, Type.BF16))]:
        writer.add_tensor(kind.name, data, raw_dtype=kind if kind == Type.BF16 else None)
        writer.add_tensor("values." + kind.name, gguf.quants.dequantize(data, kind))
    for kind in HALVES:
        blocks = 2 if gguf.GGML_QUANT_SIZES[kind][0] == 256 else 7
        data = random_blocks(kind, 6, blocks, rng)
        values = gguf.quants.dequantize(data, kind)
        writer.add_tensor(kind.name, data.reshape(2, 3, -1), raw_dtype=kind)
        writer.add_tensor("values." + kind.name, values.reshape(2, 3, -1))
    writer.add_tensor("not_read", rng.integers(0, 256, (1, 84), dtype=np.uint8), raw_dtype=Type.Q2_K)
    writer.add_tensor("integers", np.array([1, -2, 3], dtype=np.int64))
    finish(writer)


def write_layer(path):
    rng = np.random.default_rng(2)
    d_model, d_ff, experts = 64, 32, 4
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    writer.add_block_count(1)
    writer.add_embedding_length(d_model)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)

    def add(tensor, shape, kind):
        weights = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        name = gguf.TENSOR_NAMES[tensor].format(bid=0) + ".weight"
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add(gguf.MODEL_TENSOR.FFN_NORM, (d_model,), Type.F32)
    add(gguf.MODEL_TENSOR.FFN_GATE_INP, (experts, d_model), Type.F32)
    add(gguf.MODEL_TENSOR.FFN_GATE_EXP, (experts, d_ff, d_model), Type.Q4_0)
    add(gguf.MODEL_TENSOR.FFN_UP_EXP, (experts, d_ff, d_model), Type.Q4_0)
    add(gguf.MODEL_TENSOR.FFN_DOWN_EXP, (experts, d_model, d_ff), Type.Q4_0)
    finish(writer)


def write_split(path):
    writer = gguf.GGUFWriter(path, "test", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.arange(i, i + 3, dtype=np.float32))
    finish(writer)


def write_seed(path):
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "test")
    add_values(writer)
    for kind in HALVES:
        writer.add_tensor(kind.name, random_blocks(kind, 1, 1, rng), raw_dtype=kind)
    writer.add_tensor("F16", np.zeros((1, 2, 3), dtype=np.float16))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "data")
    parser.add_argument("--fuzz", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent.parent / "fuzz" / "gguf_corpus")
    arguments = parser.parse_args()
    out = arguments.out
    write_types(out / "gguf_types.gguf")
    write_layer(out / "gguf_layer.gguf")
    write_split(out / "gguf_split.gguf")
    write_seed(arguments.fuzz / "values.gguf")


if __name__ == "__main__":
    main()
