#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turns moe_bench's JSON, of one run or of several, into tables in Markdown, one for each layer:
moe_bench --benchmark_filter=Packed/ --benchmark_format=json >run.json; bench/table.py run.json"""
import json
import sys

COUNTERS = ["roofline", "vs_eigen", "vs_blas", "vs_onednn", "vs_onednn_bf16", "vs_uniform", "GFLOPs",
            "GBps", "overhead", "overhead_us"]

layers = {}
for path in sys.argv[1:]:
    with open(path) as file:
        rows = json.load(file)["benchmarks"]
    for row in rows:
        group, shape, weights, *keys = row["name"].split("/iterations")[0].split("/")
        if group != "Packed" or "error_occurred" in row:
            continue
        layers.setdefault(f"{shape}, {weights}", []).append((keys, row))

for layer, rows in layers.items():
    print(f"\n{layer}\n")
    timed = [(dict(key.split(":") for key in keys), row) for keys, row in rows if keys != ["pack"]]
    for keys, row in rows:
        if keys == ["pack"]:
            print(f"Packing took {row['real_time'] / 1e3:.1f} s. Memory: {row['packed_MB']:.0f} MB packed, "
                  f"at most {row['memory_over_MB']:.0f} MB beside it; an expert in float has "
                  f"{row['expert_MB']:.0f} MB.\n")
    shown = [c for c in COUNTERS if any(c in row for _, row in timed)]
    if timed:
        print("| threads | tokens | routing | ms | " + " | ".join(shown) + " |")
        print("|---" * (4 + len(shown)) + "|")
    for key, row in timed:
        cells = [key["threads"], key["tokens"], key["routing"], f"{row['real_time']:.3g}"]
        for c in shown:
            number = f"{row[c]:.0f}" if c in row and row[c] >= 100 else f"{row.get(c, 0):.2f}"
            cells.append(number if c in row else "")
        print("| " + " | ".join(cells) + " |")
