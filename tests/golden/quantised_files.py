#!/usr/bin/env python3
"""Writes quantised.safetensors: experts as quantisers store them, and the numbers that they stand for.

Usage: quantised_files.py [--out DIR]

Layer n of a Qwen3 model of one expert is one way of storing, of CASES; "values." and the name of a matrix are its
numbers in F32. Those of compressed-tensors are stored and multiplied out by its own compressors (0.20.1), with scales
as floats. The others follow the packing code of AutoGPTQ (QuantLinear.pack; AutoRound's has no g_idx) and AutoAWQ
(WQLinear_GEMM.from_linear), ModelOpt's NVFP4 and DeepSeek-V4's MXFP4, and are multiplied out by the formula
(code - zero) * scale.
"""

import argparse
import pathlib

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file

CASES = ["int4_g32_bf16", "int4_g128", "int4_g32_zeros", "int8_packed", "int8", "int8_zeros", "fp8", "mxfp4",
         "nvfp4", "nvfp4_modelopt", "mxfp4_deepseek", "gptq", "gptq_order", "awq", "gptq_8", "int4_order"]


def numbers(generator, rows, cols):
    return torch.randn(rows, cols, generator=generator) / 8


def scales_of(weight, group, levels, dtype):
    groups = weight.reshape(weight.shape[0], -1, group)
    return (groups.abs().amax(-1) / levels).to(dtype)


def compressed(kind, weight, args, scale, zero_point=None, **more):
    """What the compressor of a kind stores, and what it makes of that."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(kind)
    state = {"weight": weight.to(scale.dtype), "weight_scale": scale, **more}
    if zero_point is not None:
        state["weight_zero_point"] = zero_point
    stored = compressor.compress(state, scheme)
    again = dict(stored)
    if stored["weight_scale"].dtype in (torch.float16, torch.bfloat16):
        again["weight_scale"] = stored["weight_scale"].float()
    if "weight_global_scale" in stored:  # its decompress gives bfloat16
        values = dequantize(fp4(stored["weight_packed"]), stored["weight_scale"].float(), args=scheme.weights,
                            global_scale=stored["weight_global_scale"], dtype=torch.float32)
    else:
        values = compressor.decompress(again, scheme)["weight"]
    return {"weight" + name.removeprefix("weight"): tensor for name, tensor in stored.items()}, values.float()


def integers(generator, shape, below):
    return torch.randint(0, below, shape, generator=generator).numpy().astype(np.uint32)


def packed(numbers_of_all, bits, order=None):
    """Along the last dimension, lowest bits first."""
    per = 32 // bits
    order = order or range(per)
    words = np.zeros((*numbers_of_all.shape[:-1], numbers_of_all.shape[-1] // per), dtype=np.uint32)
    for i, column in enumerate(order):
        words |= numbers_of_all[..., column::per] << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32).copy())


def multiplied(codes, zeros, scales, group_of):
    """Of [in, out]: the matrix [out, in]."""
    difference = codes.astype(np.float32) - zeros.astype(np.float32)[group_of]
    return torch.from_numpy(np.ascontiguousarray((difference * scales.numpy().astype(np.float32)[group_of]).T))


def gptq(generator, rows, cols, bits=4, group=32, ordered=False, awq=False):
    codes = integers(generator, (cols, rows), 1 << bits)
    groups = cols // group
    zeros = np.full((groups, rows), 128) if bits == 8 else integers(generator, (groups, rows), 15) + 1
    zeros = zeros.astype(np.uint32)
    scales = (torch.rand(groups, rows, generator=generator) / 64 + 1e-3).half()
    group_of = np.arange(cols) // group
    if ordered:
        group_of = group_of[torch.randperm(cols, generator=generator).numpy()]
    values = multiplied(codes, zeros, scales, group_of)
    if awq:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {"qweight": packed(codes, bits, order), "qzeros": packed(zeros, bits, order),
                "scales": scales}, values
    stored = {"qweight": packed(codes.T, bits).T.contiguous(), "qzeros": packed(zeros - 1, bits),
              "scales": scales}
    if ordered:
        stored["g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return stored, values


def fp4(codes):
    return unpack_fp4_from_uint8(codes, codes.shape[0], codes.shape[1] * 2, dtype=torch.float32)


def stored_as(case, generator, rows, cols):
    weight = numbers(generator, rows, cols)
    half, group32 = torch.float16, dict(num_bits=4, type="int", strategy="group", group_size=32)
    if case == "int4_g32_bf16":
        return compressed("pack-quantized", weight, group32, scales_of(weight, 32, 7.5, torch.bfloat16))
    if case == "int4_g128":
        return compressed("pack-quantized", weight, {**group32, "group_size": 128},
                          scales_of(weight, 128, 7.5, half))
    if case == "int4_g32_zeros":
        zeros = torch.randint(-8, 8, (rows, cols // 32), generator=generator).to(torch.int8)
        return compressed("pack-quantized", weight, {**group32, "symmetric": False},
                          scales_of(weight, 32, 7.5, half), zeros)
    if case == "int8_packed":
        return compressed("pack-quantized", weight, {**group32, "num_bits": 8},
                          scales_of(weight, 32, 127.5, half))
    channel = dict(num_bits=8, type="int", strategy="channel")
    if case == "int8":
        return compressed("int-quantized", weight, channel, scales_of(weight, cols, 127.5, half))
    if case == "int8_zeros":
        zeros = torch.randint(-20, 20, (rows, 1), generator=generator).to(torch.int8)
        return compressed("naive-quantized", weight, {**channel, "symmetric": False},
                          scales_of(weight, cols, 127.5, torch.bfloat16), zeros)
    if case == "fp8":
        return compressed("float-quantized", weight, {**channel, "type": "float"},
                          scales_of(weight, cols, 448, torch.bfloat16))
    float4 = dict(num_bits=4, type="float")
    if case == "mxfp4":
        scale = torch.exp2(torch.floor(torch.log2(scales_of(weight, 32, 4, torch.float32))))
        return compressed("mxfp4-pack-quantized", weight, {**float4, "strategy": "group", "group_size": 32},
                          scale)
    if case == "nvfp4":
        scale = scales_of(weight, 16, 6, torch.float32) * 777
        return compressed("nvfp4-pack-quantized", weight,
                          {**float4, "strategy": "tensor_group", "group_size": 16},
                          scale.to(torch.float8_e4m3fn).float(),
                          weight_global_scale=torch.tensor([777.0]))
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator).to(torch.uint8)
    if case == "nvfp4_modelopt":
        scale = scales_of(weight, 16, 6, torch.float32).mul(700).to(torch.float8_e4m3fn)
        factor = torch.tensor(1 / 777, dtype=torch.float32)
        values = fp4(codes).reshape(rows, -1, 16) * (scale.float() * factor).unsqueeze(-1)
        return {"weight": codes, "weight_scale": scale, "weight_scale_2": factor,
                "input_scale": torch.tensor(0.5)}, values.reshape(rows, cols)
    if case == "mxfp4_deepseek":
        bits = torch.randint(118, 125, (rows, cols // 32), generator=generator)
        values = fp4(codes).reshape(rows, -1, 32) * torch.exp2(bits.float() - 127).unsqueeze(-1)
        return {"weight": codes.view(torch.int8),
                "scale": bits.to(torch.uint8).view(torch.float8_e8m0fnu)}, values.reshape(rows, cols)
    if case == "int4_order":
        # As versions of compressed-tensors before 0.13 stored activation order.
        stored, _ = compressed("pack-quantized", weight, group32, scales_of(weight, 32, 7.5, half))
        order = (torch.arange(cols) // 32)[torch.randperm(cols, generator=generator)]
        nibbles = stored["weight_packed"].view(torch.uint8)
        codes = torch.stack((nibbles & 15, nibbles >> 4), -1).reshape(rows, cols).float() - 8
        return {**stored, "weight_g_idx": order.to(torch.int32)}, codes * stored["weight_scale"].float()[:, order]
    return gptq(generator, rows, cols, bits=8 if case == "gptq_8" else 4, ordered=case == "gptq_order",
                awq=case == "awq")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "data")
    out = parser.parse_args().out
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer, case in enumerate(CASES):
        d_model, d_ff = (128, 128) if case == "int4_g128" else (64, 32)
        mlp = f"model.layers.{layer}.mlp."
        tensors[mlp + "gate.weight"] = numbers(generator, 1, d_model)
        for name, rows, cols in [("gate_proj", d_ff, d_model), ("up_proj", d_ff, d_model),
                                 ("down_proj", d_model, d_ff)]:
            module = mlp + "experts.0." + name + "."
            stored, values = stored_as(case, generator, rows, cols)
            for part, tensor in stored.items():
                tensors[module + part] = tensor.contiguous()
            tensors["values." + module + "weight"] = values.contiguous()
    save_file(tensors, out / "quantised.safetensors", metadata={"cases": " ".join(CASES)})


if __name__ == "__main__":
    main()
