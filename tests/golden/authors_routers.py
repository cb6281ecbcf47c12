#!/usr/bin/env python3
"""Makes the golden files of routers from their authors' own code: authors_*.safetensors.

    python generate.py --sources DIR [--out DIR]

DIR holds checkouts of the authors' repositories (README.md: which, and at which commits). Their functions are called
as they are, on small random inputs; nothing here reimplements a router. Modules of theirs that the called functions
do not use, and that would need machines or packages of their own, are empty here. Where their code draws random
numbers, it is given stored ones. Gradients are those of the framework that the authors used.
"""

import os

# The same instructions on every machine, as far as the frameworks allow it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import struct
import sys
import types
from unittest import mock

import absl.logging
import flax
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import torch
import transformers

COMMITS = {
    "flaxformer": "399ea3a85e9807ada653fd0de1a9de627eb0acde",
    "vmoe": "942a78bc81d2e63199f0933733582ddae0715416",
    "vision_transformer": "c6de1e5378c9831a8477feb30994971bdc409e46",
    "tensor2tensor": "bafdc1b67730430d38d6ab802cbd51f9d053ba2e",
    "mesh": "da907937e68aa421186f1178d71eb5f736fcb069",
    "lingvo": "e0be5dc4ce9b89d91c0be343f54c5d7a5b1bcb59",
    "Megatron-LM": "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
    "ReMoE": "463c6af38ffaa841941ea834470ee09f8d515652",
    "Dynamic_MoE": "f56bc20db176f22ab51cb56b7dcb96403fb2cd8a",
    "ParlAI": "a29567f7ce76992fd1f03c51ba9e3b155a37ea51",
    "tutel": "82af7aad9fc3ec981395ba97e7242a480984a55e",
}
D_MODEL, EXPERTS = 16, 8
MARGIN = 1e-3  # smallest distance of two ranked scores
SEEDS = 20000


class Nothing:
    """What an empty module gives for any name: it can be called, subclassed and written in a type."""

    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self.__name__}.{name}")

    def __call__(self, *arguments, **named):
        return Nothing(f"{self.__name__}()")

    def __mro_entries__(self, bases):
        return (object,)

    def __getitem__(self, key):
        return self


class EmptyModule(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        whole_name = f"{self.__name__}.{name}"
        return importlib.import_module(whole_name) if whole_name in self.__loader__.real else Nothing(whole_name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `real` modules in a checkout; every other module of `packages` is empty but for what is `given`."""

    def __init__(self, root, packages, real, given):
        self.root, self.packages, self.real, self.given = root, packages, real, given

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.packages:
            return None
        if name in self.real:
            file = self.root / name.replace(".", "/")
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module):
        for name, value in self.given.get(module.__name__, {}).items():
            setattr(module, name, value)


def load(root, name, real=(), absent=(), given=None):
    """The authors' module `name`; of their package only it and `real` are theirs, and `absent` packages are empty."""
    packages = {name.split(".")[0], *absent}
    for loaded in [other for other in sys.modules if other.split(".")[0] in packages]:
        del sys.modules[loaded]
    finder = Finder(root, packages, {name, *real}, given or {})
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)


class Draw:
    """Random inputs. Products and sums of few of them are exact, so logits are the same everywhere."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def uniform(self, *shape, steps=8, largest=1.0):
        return np.float32(self.generator.integers(-steps, steps + 1, shape) * (largest / steps))

    def normal(self, *shape):
        return np.float32(np.round(self.generator.standard_normal(shape) * 64) / 64)

    def unit(self, *shape):
        return np.float32(self.generator.integers(1, 64, shape) / 64)


def softmax(z):
    e = np.exp(np.float64(z) - np.max(z, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def ranked_apart(scores, k):
    """Whether the k best scores of each row and the best one not among them are apart."""
    best = -np.sort(-np.float64(scores), axis=-1)[..., :k + 1]
    return bool((best[..., :-1] - best[..., 1:] > MARGIN).all())


def all_apart(values):
    return bool((np.diff(np.sort(np.float64(values), axis=-1), axis=-1) > MARGIN).all())


def write(out, name, source, module, seed, config, tensors):
    """A safetensors file whose header has one fixed order."""
    types_of = {"float32": "F32", "float64": "F64", "int64": "I64"}
    version = {
        "jax": f"jax {jax.__version__}, flax {flax.__version__}",
        "tf": f"tensorflow {tf.__version__}",
        "torch": f"torch {torch.__version__.split('+')[0]}",
        "several": "several",
    }[config.pop("framework")]
    metadata = {
        "commit": COMMITS.get(source, "several"),
        "config": json.dumps(config, sort_keys=True),
        "framework": version,
        "module": module,
        "seed": str(seed),
    }
    header, data = {"__metadata__": metadata}, b""
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    for key, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        assert np.isfinite(array).all(), (name, key)
        values = array.tobytes()
        header[key] = {
            "dtype": types_of[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(values)],
        }
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = out / f"authors_{name}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    print(f"authors_{name}: seed {seed}, {path.stat().st_size} bytes", flush=True)


def first_seed(attempt):
    """The first seed whose inputs are good ones, and what was made of them."""
    for seed in range(1, SEEDS):
        made = attempt(seed)
        if made is not None:
            return seed, made
    raise RuntimeError("no seed")


def floats(value):
    return np.float32(np.asarray(value))


def loss(value):
    return np.float32(np.asarray(value)).reshape(1)


def whole(value):
    return np.int64(np.asarray(value))


def draw_layer(draw, experts, d_ff, gated):
    """Weights of a router and of experts without biases, in the order in which layers use them."""
    return {
        "w_router": draw.uniform(experts, D_MODEL),
        **({"w_gate": draw.uniform(experts, d_ff, D_MODEL, largest=0.5)} if gated else {}),
        "w_up": draw.uniform(experts, d_ff, D_MODEL, largest=0.5),
        "w_down": draw.uniform(experts, D_MODEL, d_ff, largest=0.5),
    }


def turned(weight):
    return np.swapaxes(weight, -1, -2)


def in_rows(tensors):
    """Matrices of several experts, one below the other."""
    return {name: floats(value).reshape(-1, np.shape(value)[-1]) for name, value in tensors.items()}


def with_gradients(weights, gradients):
    return {**in_rows(weights), **{f"d_{name}": value for name, value in in_rows(gradients).items()}}


# ---- google/flaxformer: Switch, ST-MoE, Expert Choice


def flaxformer(sources, out):
    routing = load(sources / "flaxformer", "flaxformer.architectures.moe.routing",
                   real=("flaxformer.components.dense", "flaxformer.activation_partitioning", "flaxformer.types"),
                   absent=("aqt",))
    groups, tokens = 2, 12

    def attempt(seed, router, scatter, capacity, bias):
        draw = Draw(seed)
        x = draw.uniform(groups, tokens, D_MODEL)
        w = draw.uniform(EXPERTS, D_MODEL)
        b = draw.uniform(EXPERTS, largest=0.5)
        d_gates = draw.uniform(groups, tokens, EXPERTS)
        p = softmax(x @ w.T + (b if bias else 0))
        if router.keywords:
            k = router.keywords["num_selected_experts"]
            if not ranked_apart(p, k) or not all_apart(p.max(axis=-1)):
                return None
        elif not ranked_apart(np.swapaxes(p, 1, 2), capacity):
            return None

        def run(module, x, w, b):
            weights = routing.RouterWeights(use_bias=bias, dtype=jnp.float32)
            module = module(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32, ignore_padding_tokens=False)
            parameters = {"kernel": w.T, "bias": b} if bias else {"kernel": w.T}
            return module.apply({"params": {"router_weights": {"w": parameters}}}, x, EXPERTS, capacity,
                                apply_jitter=False)

        def value(x, w, b):
            result = run(router, x, w, b)
            gates = result.combine_array.sum(axis=-1)
            return (gates * d_gates).sum() + result.auxiliary_loss + result.router_z_loss, (result, gates)

        (_, (result, gates)), d = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(x, w, b)
        dispatch = np.asarray(result.dispatch_mask).any(axis=-1)
        tensors = {
            "x": x.reshape(-1, D_MODEL), "w_router": w, "d_gates": d_gates.reshape(-1, EXPERTS),
            "gates": floats(gates).reshape(-1, EXPERTS), "dispatch": whole(dispatch).reshape(-1, EXPERTS),
            "z_loss": loss(result.router_z_loss), "d_x": floats(d[0]).reshape(-1, D_MODEL), "d_w_router": floats(d[1]),
        }
        if bias:
            tensors["b_router"], tensors["d_b_router"] = b, floats(d[2])
        if scatter is None:  # experts choose: some token is left alone, some token is taken twice
            taken = dispatch.sum(axis=-1)
            return tensors if (taken == 0).any() and (taken > 1).any() else None
        indices = run(scatter, x, w, b)
        tensors["experts"] = whole(indices.dispatch_indices[..., 0]).reshape(groups * tokens, k)
        tensors["balance_loss"] = loss(result.auxiliary_loss)
        assert abs(float(indices.auxiliary_loss) - float(result.auxiliary_loss)) < 1e-6
        dropped = k * groups * tokens - dispatch.sum()
        lost = (dispatch.sum(axis=-1) == 0).sum()
        assert dropped == (np.asarray(indices.combine_weights) == 0).sum()
        return tensors if dropped >= 4 and lost >= 1 else None

    def partial(name, **options):
        module = getattr(routing, name)
        made = lambda **more: module(**options, **more)  # noqa: E731
        made.keywords = options
        return made

    def make(name, kind, capacity, bias, **options):
        masked = partial(f"{kind}MaskedRouter", **options)
        scatter = partial(f"{kind}ScatterRouter", **options) if options else None
        seed, tensors = first_seed(lambda seed: attempt(seed, masked, scatter, capacity, bias))
        config = {"framework": "jax", "groups": groups, "capacity": capacity, **options}
        write(out, f"flaxformer_{name}", "flaxformer", f"{routing.__name__}.{kind}MaskedRouter", seed, config, tensors)

    make("switch", "TokensChoose", 2, True, num_selected_experts=1, batch_prioritized_routing=False)
    make("top2", "TokensChoose", 3, True, num_selected_experts=2, batch_prioritized_routing=False)
    make("top2_prioritised", "TokensChoose", 3, True, num_selected_experts=2, batch_prioritized_routing=True)
    make("expert_choice", "ExpertsChoose", 3, False)


def load_flaxformer_layers(sources):
    prefix = "flaxformer.architectures.moe"
    return load(sources / "flaxformer", f"{prefix}.moe_layers", absent=("aqt",),
                real=(f"{prefix}.routing", f"{prefix}.scatter_utils", "flaxformer.components.dense",
                      "flaxformer.activation_partitioning", "flaxformer.types"))


# Layers with experts, in training but for jitter and dropout. Their code wants a multiple of the experts as groups.
def flaxformer_layers(sources, out):
    moe_layers = load_flaxformer_layers(sources)
    experts, tokens, d_ff = 4, 11, 12

    def attempt(seed, kind, gated, capacity_factor, min_expert_capacity, **options):
        draw = Draw(seed)
        x, d_y = draw.uniform(experts, tokens, D_MODEL), draw.uniform(experts, tokens, D_MODEL)
        weights = draw_layer(draw, experts, d_ff, gated)
        router = getattr(moe_layers.routing, f"{kind}MaskedRouter")(
            router_weights=moe_layers.routing.RouterWeights(use_bias=False, dtype=jnp.float32), jitter_noise=0.0,
            dtype=jnp.float32, ignore_padding_tokens=False, **options)
        expert = moe_layers.dense.MlpBlock(
            use_bias=False, intermediate_dim=d_ff, activations=("gelu", "linear") if gated else ("relu",),
            intermediate_dropout_rate=0.0, final_dropout_rate=0.0)
        layer = moe_layers.MoeLayer(
            num_experts=experts, max_group_size=tokens, train_capacity_factor=capacity_factor,
            eval_capacity_factor=capacity_factor, expert=expert, router=router, num_expert_partitions=experts,
            num_model_partitions=1, min_expert_capacity=min_expert_capacity, dropout_rate=0.0, dtype=jnp.float32,
            strict_group_size=True)
        names = {"w_gate": "wi_0", "w_up": "wi_1", "w_down": "wo"} if gated else {"w_up": "wi", "w_down": "wo"}

        def value(x, w):
            parameters = {
                "router": {"router_weights": {"w": {"kernel": w["w_router"].T}}},
                "expert": {theirs: {"kernel": jnp.swapaxes(w[ours], 1, 2)} for ours, theirs in names.items()},
            }
            y, kept = layer.apply({"params": parameters}, x, mutable=["intermediates"],
                                  capture_intermediates=lambda module, method: module.name == "router")
            kept = kept["intermediates"]
            losses = {name: kept[name][0].sum() for name in ("auxiliary_loss", "router_z_loss")}
            return (y * d_y).sum() + sum(losses.values()), (y, losses, kept["router"]["__call__"][0])

        (_, (y, losses, result)), d = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, weights)
        p = softmax(x @ weights["w_router"].T)
        if not ranked_apart(p if options else np.swapaxes(p, 1, 2), 1 if options else result.dispatch_mask.shape[-1]):
            return None
        dispatch = np.asarray(result.dispatch_mask).any(axis=-1)
        taken = dispatch.sum(axis=-1)
        if not ((taken == 0).any() if options else (taken == 1).any() and (taken > 2).any()):
            return None
        as_rows = lambda value: value.reshape(experts * tokens, -1)  # noqa: E731
        tensors = {
            "x": as_rows(x), "d_y": as_rows(d_y), "y": as_rows(floats(y)), "d_x": as_rows(floats(d[0])),
            "gates": as_rows(floats(result.combine_array.sum(axis=-1))), "dispatch": as_rows(whole(dispatch)),
            "z_loss": loss(losses["router_z_loss"]), **with_gradients(weights, d[1]),
        }
        return {**tensors, "balance_loss": loss(losses["auxiliary_loss"])} if options else tensors

    top_1 = dict(num_selected_experts=1, batch_prioritized_routing=False)
    cases = {
        "switch_c": dict(kind="TokensChoose", gated=False, capacity_factor=1.0, min_expert_capacity=2, **top_1),
        "switch_xxl": dict(kind="TokensChoose", gated=True, capacity_factor=1.25, min_expert_capacity=2, **top_1),
        "experts_choose": dict(kind="ExpertsChoose", gated=False, capacity_factor=2.0, min_expert_capacity=4),
    }
    for name, options in cases.items():
        seed, tensors = first_seed(lambda seed: attempt(seed, **options))
        write(out, f"flaxformer_layer_{name}", "flaxformer", f"{moe_layers.__name__}.MoeLayer", seed,
              {"framework": "jax", "groups": experts, "d_ff": d_ff, **options}, tensors)


# ---- google-research/vmoe: V-MoE, Soft MoE


def given_normal(noise):
    """jax.random.normal gives these numbers."""
    draw = lambda key, shape=None, dtype=None: jnp.asarray(noise).reshape(shape)  # noqa: E731
    return mock.patch.object(jax.random, "normal", draw)


def draw_experts(draw, experts, d_ff):
    return {
        "w_up": draw.uniform(experts, d_ff, D_MODEL, largest=0.5),
        "b_up": draw.uniform(experts, d_ff, largest=0.5),
        "w_down": draw.uniform(experts, D_MODEL, d_ff, largest=0.5),
        "b_down": draw.uniform(experts, D_MODEL, largest=0.5),
    }


def flax_experts(w):
    return {
        "Dense_0": {"kernel": jnp.swapaxes(w["w_up"], 1, 2), "bias": w["b_up"]},
        "Dense_1": {"kernel": jnp.swapaxes(w["w_down"], 1, 2), "bias": w["b_down"]},
    }


def vmoe(sources, out):
    sys.path[:0] = [str(sources / "vmoe"), str(sources / "vision_transformer")]
    block = importlib.import_module("vmoe.nn.vit_moe")
    routing = importlib.import_module("vmoe.nn.routing")
    soft = importlib.import_module("vmoe.projects.soft_moe.router")
    moe = importlib.import_module("vmoe.moe")
    tokens, d_ff, capacity, k = 16, 12, 4, 2

    def sparse(seed, prioritised):
        draw = Draw(seed)
        x = draw.uniform(1, tokens, D_MODEL)
        weights = {"w_router": draw.uniform(EXPERTS, D_MODEL), **draw_experts(draw, EXPERTS, d_ff)}
        noise, d_y = draw.normal(1, tokens, EXPERTS), draw.uniform(1, tokens, D_MODEL)
        z = x @ weights["w_router"].T
        p = softmax(z + noise / EXPERTS)
        if not ranked_apart(p, k) or not all_apart(p.max(axis=-1)):
            return None
        if (np.argsort(-z)[..., :k] == np.argsort(-p)[..., :k]).all():
            return None  # the noise changes a choice
        options = dict(num_selected_experts=k, noise_std=1.0, gshard_loss_weight=1.0, importance_loss_weight=1.0,
                       load_loss_weight=1.0, deterministic=False,
                       dispatcher={"name": "einsum", "batch_priority": prioritised, "capacity": capacity})
        layer = block.MlpMoeBlock(mlp_dim=d_ff, num_experts=EXPERTS, group_size=tokens, deterministic=True,
                                  router=options)
        router = routing.NoisyTopExpertsPerItemRouter(num_experts=EXPERTS, **options)
        rngs = {"gating": jax.random.key(0)}

        def value(x, w):
            dense = {"dense": {"kernel": w["w_router"].T}}
            y, metrics = layer.apply({"params": {"Router": dense, "Mlp": flax_experts(w)}}, x, rngs=rngs)
            return (y * d_y).sum() + metrics["auxiliary_loss"].sum(), (y, metrics)

        with given_normal(noise):
            (_, (y, metrics)), d = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, weights)
            dispatcher, _ = router.apply({"params": {"dense": {"kernel": weights["w_router"].T}}}, x, rngs=rngs)
        dispatch = np.asarray(dispatcher.dispatch_weights).any(axis=-1)
        dropped = k * tokens - dispatch.sum()
        if dropped < 3 or not (dispatch.sum(axis=-1) == 0).any():
            return None
        return {
            "x": x[0], "noise": noise[0], "d_y": d_y[0], "y": floats(y)[0],
            "gates": floats(dispatcher.combine_weights.sum(axis=-1))[0], "dispatch": whole(dispatch)[0],
            "balance_loss": loss(metrics["gshard_loss"]), "importance_loss": loss(metrics["importance_loss"]),
            "load_loss": loss(metrics["load_loss"]), "d_x": floats(d[0])[0],
            **in_rows(weights), **{f"d_{name}": value for name, value in in_rows(d[1]).items()},
        }

    for name, prioritised in (("vmoe", False), ("vmoe_prioritised", True)):
        seed, tensors = first_seed(lambda seed: sparse(seed, prioritised))
        config = {"framework": "jax", "top_k": k, "capacity": capacity, "batch_priority": prioritised, "d_ff": d_ff}
        write(out, name, "vmoe", "vmoe.nn.vit_moe.MlpMoeBlock", seed, config, tensors)

    def items_per_expert(seed):
        draw = Draw(seed)
        x, w = draw.uniform(1, tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL)
        d_gates = draw.uniform(1, tokens, EXPERTS)
        if not ranked_apart(np.swapaxes(softmax(x @ w.T), 1, 2), capacity):
            return None
        router = routing.NoisyTopItemsPerExpertRouter(num_experts=EXPERTS, deterministic=True,
                                                      dispatcher={"name": "einsum", "capacity": capacity})

        def value(x, w):
            dispatcher, _ = router.apply({"params": {"dense": {"kernel": w.T}}}, x)
            gates = dispatcher.combine_weights.sum(axis=-1)
            return (gates * d_gates).sum(), (dispatcher, gates)

        (_, (dispatcher, gates)), d = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, w)
        dispatch = np.asarray(dispatcher.dispatch_weights).any(axis=-1)
        if not (dispatch.sum(axis=-1) == 0).any():
            return None
        return {"x": x[0], "w_router": w, "d_gates": d_gates[0], "gates": floats(gates)[0],
                "dispatch": whole(dispatch)[0], "d_x": floats(d[0])[0], "d_w_router": floats(d[1])}

    seed, tensors = first_seed(items_per_expert)
    write(out, "vmoe_expert_choice", "vmoe", "vmoe.nn.routing.NoisyTopItemsPerExpertRouter", seed,
          {"framework": "jax", "groups": 1, "capacity": capacity}, tensors)

    # The authors' dispatcher of Soft MoE rounds to bfloat16. Here the one inside it is called, in float32.
    def soft_moe(groups, tokens, experts, slots):
        draw = Draw(1)
        x, scale = draw.uniform(groups, tokens, D_MODEL), np.float32(3.25)
        weights = {"w_slots": draw.uniform(experts, slots, D_MODEL), **draw_experts(draw, experts, d_ff)}
        d_y = draw.uniform(groups, tokens, D_MODEL)
        router = soft.SoftRouter(num_experts=experts, num_slots=slots, deterministic=True)
        layer = moe.sparse_moe_spmd(block.MlpBlock, variable_axes={"params": 0}, split_rngs={})(
            mlp_dim=d_ff, deterministic=True)

        def value(x, scale, w):
            mu = jnp.transpose(w["w_slots"], (2, 0, 1))
            dispatcher, _ = router.apply({"params": {"mu": mu, "scale": scale}}, x)
            dispatcher = dispatcher.dispatcher
            y = layer.apply({"params": flax_experts(w)}, dispatcher, x)
            return (y * d_y).sum(), (y, dispatcher)

        (_, (y, dispatcher)), d = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(x, scale, weights)
        as_rows = lambda value: floats(value).reshape(groups * tokens, -1)  # noqa: E731
        return {
            "x": as_rows(x), "scale": scale.reshape(1), "d_y": as_rows(d_y), "y": as_rows(y),
            "dispatch": as_rows(dispatcher.dispatch_weights), "combine": as_rows(dispatcher.combine_weights),
            "d_x": as_rows(d[0]), "d_scale": floats(d[1]).reshape(1),
            **in_rows(weights), **{f"d_{name}": value for name, value in in_rows(d[2]).items()},
        }

    # Their code multiplies the smaller one of tokens and slots by the scale: slots, then tokens.
    for name, groups, of_group, experts, slots in (("soft_moe", 2, 10, 4, 2), ("soft_moe_few_tokens", 1, 5, 4, 3)):
        config = {"framework": "jax", "groups": groups, "num_experts": experts, "slots_per_expert": slots, "d_ff": d_ff}
        write(out, name, "vmoe", "vmoe.projects.soft_moe.router.SoftRouter", 1, config,
              soft_moe(groups, of_group, experts, slots))


# ---- tensorflow/tensor2tensor: Shazeer et al. 2017


def tensor2tensor(sources, out):
    layers = types.SimpleNamespace(should_generate_summaries=lambda: False)
    utils = load(sources / "tensor2tensor", "tensor2tensor.utils.expert_utils",
                 given={"tensor2tensor.layers": {"common_layers": layers}})
    tokens = 16

    def attempt(seed, k, train):
        draw = Draw(seed)
        inputs = {"x": draw.uniform(tokens, D_MODEL), "w_gate": draw.uniform(EXPERTS, D_MODEL),
                  "w_noise": draw.uniform(EXPERTS, D_MODEL, largest=0.25), "noise": draw.normal(tokens, EXPERTS),
                  "d_gates": draw.uniform(tokens, EXPERTS)}
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            x, d_gates = tf.constant(inputs["x"]), tf.constant(inputs["d_gates"])
            with mock.patch.object(utils.tf, "random_normal", lambda shape: tf.constant(inputs["noise"])):
                gates, load_of = utils.noisy_top_k_gating(x, EXPERTS, train, k)
            w_gate, w_noise = tf.compat.v1.global_variables()
            session.run([w_gate.assign(inputs["w_gate"].T), w_noise.assign(inputs["w_noise"].T)])
            importance_loss = utils.cv_squared(tf.reduce_sum(gates, 0))
            load_loss = utils.cv_squared(load_of)
            value = tf.reduce_sum(gates * d_gates) + importance_loss + load_loss
            d_x, d_w_gate, d_w_noise = tf.gradients(value, [x, w_gate, w_noise])
            made = session.run([gates, load_of, importance_loss, load_loss, d_x, d_w_gate, d_w_noise])
        z = inputs["x"] @ inputs["w_gate"].T
        stddev = (np.logaddexp(0, inputs["x"] @ inputs["w_noise"].T) + 1e-2) * train
        noisy = z + inputs["noise"] * stddev
        if not ranked_apart(noisy, k) or not ranked_apart(softmax(noisy), k):
            return None
        if train and (np.argsort(-z)[..., :k] == np.argsort(-noisy)[..., :k]).all():
            return None
        return {
            "x": inputs["x"], "w_router": inputs["w_gate"], "w_noise": inputs["w_noise"], "noise": inputs["noise"],
            "d_gates": inputs["d_gates"], "gates": floats(made[0]), "dispatch": whole(made[0] > 0),
            "load": floats(made[1]), "importance_loss": loss(made[2]), "load_loss": loss(made[3]),
            "d_x": floats(made[4]), "d_w_router": floats(made[5].T), "d_w_noise": floats(made[6].T),
        }

    for name, k, train in (("top2", 2, True), ("top4", 4, True), ("eval", 2, False)):
        seed, tensors = first_seed(lambda seed: attempt(seed, k, train))
        if not train:  # their gradient by the noise of inference is of no use
            tensors = {key: value for key, value in tensors.items() if not key.startswith("d_")}
        write(out, f"tensor2tensor_{name}", "tensor2tensor", f"{utils.__name__}.noisy_top_k_gating", seed,
              {"framework": "tf", "top_k": k, "train": train, "noise_epsilon": 1e-2}, tensors)


# A layer with experts. Theirs multiply outputs by sqrt(d_model / d_ff), which is 2 here and is in `w_down`.
def tensor2tensor_layer(sources, out):
    utils = load(sources / "tensor2tensor", "tensor2tensor.utils.expert_utils", absent=("tensorflow_probability",),
                 real=("tensor2tensor.layers.common_layers",))
    tokens, k, d_ff, scale = 16, 4, 4, 2

    def attempt(seed):
        draw = Draw(seed)
        x, d_y, noise = draw.uniform(tokens, D_MODEL), draw.uniform(tokens, D_MODEL), draw.normal(tokens, EXPERTS)
        weights = draw_layer(draw, EXPERTS, d_ff, False)
        w_noise = draw.uniform(EXPERTS, D_MODEL, largest=0.25)
        z = x @ weights["w_router"].T
        noisy = z + noise * (np.logaddexp(0, x @ w_noise.T) + 1e-2)
        if not ranked_apart(noisy, k) or not ranked_apart(softmax(noisy), k):
            return None
        if (np.argsort(-z)[..., :k] == np.argsort(-noisy)[..., :k]).all():
            return None
        seen, gating = {}, utils.noisy_top_k_gating

        def see(*arguments, **named):
            seen["gates"], load_of = gating(*arguments, **named)
            return seen["gates"], load_of

        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            x_tensor = tf.constant(x)
            with mock.patch.object(utils.tf, "random_normal", lambda shape: tf.constant(noise)), \
                    mock.patch.object(utils.common_layers, "should_generate_summaries", lambda: False), \
                    mock.patch.object(utils, "noisy_top_k_gating", see):
                y, balance = utils.local_moe(x_tensor, True, utils.ffn_expert_fn(D_MODEL, [d_ff], D_MODEL), EXPERTS, k,
                                             loss_coef=1.0, hparams=types.SimpleNamespace(gating_type="topk"))
            w_router, w_noisy, *of_experts = variables = tf.compat.v1.global_variables()
            session.run([w_router.assign(turned(weights["w_router"])), w_noisy.assign(turned(w_noise))])
            for e in range(EXPERTS):
                session.run([of_experts[2 * e].assign(weights["w_up"][e].T),
                             of_experts[2 * e + 1].assign(weights["w_down"][e].T / scale)])
            gradients = tf.gradients(tf.reduce_sum(y * d_y) + balance, [x_tensor, *variables])
            y, gates, balance, d_x, d_router, d_noise, *d_experts = session.run([y, seen["gates"], balance, *gradients])
        return {
            "x": x, "noise": noise, "d_y": d_y, "y": floats(y), "gates": floats(gates), "dispatch": whole(gates > 0),
            "sum_of_losses": loss(balance), "d_x": floats(d_x),
            **with_gradients({**weights, "w_noise": w_noise}, {
                "w_router": d_router.T, "w_noise": d_noise.T, "w_up": turned(np.stack(d_experts[::2])),
                "w_down": turned(np.stack(d_experts[1::2])) / scale}),
        }

    seed, tensors = first_seed(attempt)
    write(out, "tensor2tensor_layer", "tensor2tensor", f"{utils.__name__}.local_moe", seed,
          {"framework": "tf", "top_k": k, "d_ff": d_ff, "noise_epsilon": 1e-2}, tensors)


# ---- tensorflow/lingvo: GShard


def load_lingvo(sources, **more):
    utils = Nothing("py_utils")
    utils.GetShape = lambda tensor: tensor.shape.as_list()
    return load(sources / "lingvo", "lingvo.core.gshard_layers",
                given={"lingvo": {"compat": tf.compat.v1}, "lingvo.core": {"py_utils": utils}}, **more)


def lingvo(sources, out):
    layers = load_lingvo(sources)
    tokens, k, capacity = 16, 2, 3

    def attempt(seed, policy, legacy, pads, threshold):
        draw = Draw(seed)
        x, w = draw.uniform(1, tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL)
        d_gates, uniform = draw.uniform(1, tokens, EXPERTS), draw.unit(1, tokens)
        padding = np.zeros((1, tokens), np.float32)
        padding[:, tokens - pads:] = 1
        p = softmax(x @ w.T)
        if not ranked_apart(p, k):
            return None
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            x_tensor, w_tensor = tf.constant(x), tf.constant(w)
            logits = tf.einsum("gsm,em->gse", x_tensor, w_tensor)
            with mock.patch.object(tf.compat.v1.random, "uniform", lambda shape, dtype: tf.constant(uniform)):
                aux_loss, combine, dispatch = layers.Top2GatingOnLogits(
                    None, tf.constant(padding), logits, 1, EXPERTS, capacity, tf.float32, use_xla_sharding=False,
                    second_expert_policy=policy, second_expert_threshold=threshold, legacy_mtf_behavior=legacy)
            gates = tf.reduce_sum(combine, -1)
            value = tf.reduce_sum(gates * d_gates) + aux_loss
            gradients = tf.gradients(value, [x_tensor, w_tensor])
            made = session.run([gates, tf.reduce_sum(dispatch, -1), aux_loss, *gradients])
        # What the uniform numbers are compared with, to keep away from it.
        first, second = -np.sort(-p, axis=-1)[..., 0], -np.sort(-p, axis=-1)[..., 1]
        if policy == "random":
            odds = second / (first + second) / threshold
            if np.abs(uniform - odds).min() < MARGIN or (uniform >= odds).sum() < 4:
                return None
        taken = made[1].sum(axis=-1)[0, :tokens - pads]
        if not ((taken == 0).any() and (taken == 1).sum() >= 3):
            return None
        return {
            "x": x[0], "w_router": w, "d_gates": d_gates[0], "mask": whole(1 - padding)[0], "uniform": uniform[0],
            "gates": floats(made[0])[0], "dispatch": whole(made[1])[0], "balance_loss": loss(made[2]),
            "d_x": floats(made[3])[0], "d_w_router": floats(made[4]),
        }

    for name, policy, legacy, pads, threshold in (("all", "all", True, 0, 0.0), ("all_masked", "all", True, 3, 0.0),
                                                  ("after", "all", False, 0, 0.0), ("random", "random", True, 0, 0.75)):
        seed, tensors = first_seed(lambda seed: attempt(seed, policy, legacy, pads, threshold))
        if policy != "random":
            del tensors["uniform"]
        config = {"framework": "tf", "top_k": k, "capacity": capacity, "second_expert_policy": policy,
                  "second_expert_threshold": threshold, "legacy_mtf_behavior": legacy, "epsilon": 1e-9}
        write(out, f"lingvo_{name}", "lingvo", "lingvo.core.gshard_layers.Top2GatingOnLogits", seed, config, tensors)


# A layer with experts, the second one at random.
def lingvo_layer(sources, out):
    with mock.patch.object(tf.compat.v1.nn, "gelu", tf.nn.gelu, create=True):  # their table of activations has it
        names = ("activations", "gshard_utils", "py_utils_flags", "thread_local_utils")
        layers = load_lingvo(sources, absent=("sentencepiece",), real=tuple(f"lingvo.core.{name}" for name in names))
    tokens, d_ff, threshold, capacity_factor = 16, 12, 0.5, 2.0

    def attempt(seed):
        draw = Draw(seed)
        x, d_y, uniform = draw.uniform(1, tokens, D_MODEL), draw.uniform(1, tokens, D_MODEL), draw.unit(1, tokens)
        weights = draw_layer(draw, EXPERTS, d_ff, False)
        p = softmax(x @ weights["w_router"].T)
        first, second = -np.sort(-p, axis=-1)[..., 0], -np.sort(-p, axis=-1)[..., 1]
        odds = second / (first + second) / threshold
        if not ranked_apart(p, 2) or np.abs(uniform - odds).min() < MARGIN or (uniform >= odds).sum() < 4:
            return None
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            tensors = {name: tf.constant(value) for name, value in {"x": x, **weights}.items()}
            logits = tf.einsum("gsm,em->gse", tensors["x"], tensors["w_router"])
            with mock.patch.object(tf.compat.v1.random, "uniform", lambda shape, dtype: tf.constant(uniform)):
                made = layers.Top2GatingOnLogits(
                    None, tf.zeros((1, tokens)), logits, 1, EXPERTS, 0, tf.float32, use_xla_sharding=False,
                    second_expert_policy="random", second_expert_threshold=threshold, legacy_mtf_behavior=True,
                    capacity_factor=capacity_factor)
            aux_loss, combine, dispatch = made
            gating = types.SimpleNamespace(aux_loss=aux_loss, combine_tensor=combine, dispatch_tensor=dispatch)
            y, aux_loss = layers.FeedForwardNetworksApplyGating(
                gating, tensors["x"], tensors["x"], tf.transpose(tensors["w_up"], (0, 2, 1)),
                tf.transpose(tensors["w_down"], (0, 2, 1)), num_devices=1, num_groups=1)
            gradients = tf.gradients(tf.reduce_sum(y * d_y) + aux_loss, list(tensors.values()))
            y, gates, dispatch, aux_loss, d_x, *gradients = session.run(
                [y, tf.reduce_sum(combine, -1), tf.reduce_sum(tf.cast(dispatch, tf.float32), -1), aux_loss, *gradients])
        taken = dispatch.sum(axis=-1)
        if not ((taken == 0).any() and ((taken == 1) & (uniform < odds)).any()):
            return None
        return {"x": x[0], "uniform": uniform[0], "d_y": d_y[0], "y": floats(y)[0], "gates": floats(gates)[0],
                "dispatch": whole(dispatch)[0], "balance_loss": loss(aux_loss), "d_x": floats(d_x)[0],
                **with_gradients(weights, dict(zip(weights, gradients)))}

    seed, tensors = first_seed(attempt)
    write(out, "lingvo_layer", "lingvo", f"{layers.__name__}.FeedForwardNetworksApplyGating", seed,
          {"framework": "tf", "top_k": 2, "capacity_factor": capacity_factor, "d_ff": d_ff,
           "second_expert_policy": "random", "second_expert_threshold": threshold, "legacy_mtf_behavior": True,
           "epsilon": 1e-9}, tensors)


# ---- tensorflow/mesh: Switch, ST-MoE


@functools.cache  # gin takes the name of a layer once
def load_mesh(sources):
    names = ("beam_search", "layers", "ops", "ops_with_redefined_builtins", "optimize", "placement_mesh_impl", "utils")
    v1 = importlib.import_module("tensorflow.compat.v1")
    with mock.patch.object(v1, "estimator", Nothing("estimator"), create=True):
        return load(sources / "mesh", "mesh_tensorflow.transformer.moe",
                    real=("mesh_tensorflow", *(f"mesh_tensorflow.{name}" for name in names)))


def mesh_values(mtf, one, weights, results):
    """Values of their tensors, where the variables of the mesh are these weights, in order."""
    lowering = mtf.Lowering(one.graph, {one: mtf.placement_mesh_impl.PlacementMeshImpl([], [], [""])})
    results = [lowering.export_to_tf_tensor(result) for result in results]
    with tf.compat.v1.Session() as session:
        session.run(tf.compat.v1.global_variables_initializer())
        for variable, weight in zip(one.graph.trainable_variables, weights, strict=True):
            session.run(variable.get_master().assign(turned(weight)))
        session.run(lowering.copy_masters_to_slices())
        return session.run(results)


class MeshCall:
    """A call of one of their layers in training, and what its routing function was given and gave."""

    def __init__(self, moe, layer, x, uniform=None):
        mtf = moe.mtf
        self.one = mtf.Mesh(mtf.Graph(), "one")
        dims = [mtf.Dimension(name, size) for name, size in zip(("batch", "length", "d_model"), x.shape)]
        tensor = lambda value, shape: mtf.import_tf_tensor(self.one, tf.constant(value), shape)  # noqa: E731
        self.x = tensor(x, mtf.Shape(dims))
        model = types.SimpleNamespace(ensemble_dim=None, model_dim=dims[-1], layout="", mesh_shape="")
        context = types.SimpleNamespace(
            model=model, length_dim=dims[1], train=True, variable_dtype=mtf.VariableDType(tf.float32),
            nonpadding=tensor(np.ones(x.shape[:2], np.float32), mtf.Shape(dims[:2])), num_microbatches=1, losses=[])
        self.summaries = {}

        def see(gating):
            def call(**named):
                self.capacity = named["expert_capacity_dim"]
                self.dispatch, self.combine, loss = gating(**named)
                return self.dispatch, self.combine, loss

            return call

        def given(mesh, shape, **between):
            return tensor(uniform.reshape(mtf.Shape(shape).to_integer_list), shape)

        with mock.patch.multiple(moe, _switch_gating=see(moe._switch_gating), _top_2_gating=see(moe._top_2_gating)), \
                mock.patch.object(mtf.layers.mtf, "random_uniform", given), \
                mock.patch.multiple(mtf, random_uniform=given, scalar_summary=self.summaries.__setitem__):
            self.y = layer.call(context, self.x)
        self.loss, = context.losses


def mesh(sources, out):
    moe = load_mesh(sources)
    mtf = moe.mtf
    tokens, capacity, threshold = 16, 3, 0.375

    def attempt(seed):
        draw = Draw(seed)
        x, w, d_gates = draw.uniform(tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL), draw.uniform(tokens, EXPERTS)
        p = -np.sort(-softmax(x @ w.T), axis=-1)
        second = p[:, 1] / (p[:, 0] + p[:, 1])
        if not ranked_apart(p, 2) or np.abs(second - threshold).min() < MARGIN or (second <= threshold).sum() < 4:
            return None
        with tf.Graph().as_default():
            one = mtf.Mesh(mtf.Graph(), "one")
            dims = {name: mtf.Dimension(name, size) for name, size in
                    (("tokens", tokens), ("d_model", D_MODEL), ("experts", EXPERTS), ("capacity", capacity))}
            inputs = mtf.import_tf_tensor(one, tf.constant(x), mtf.Shape([dims["tokens"], dims["d_model"]]))
            hparams = moe.HParams(moe_use_second_place_loss=False, moe_second_policy_train="threshold",
                                  moe_second_threshold_train=threshold)
            dispatch, combine, balance = moe._top_2_gating(
                inputs, [], dims["experts"], dims["capacity"], hparams, True, mtf.VariableDType(tf.float32))
            d = mtf.import_tf_tensor(one, tf.constant(d_gates), mtf.Shape([dims["tokens"], dims["experts"]]))
            gates = mtf.reduce_sum(combine, reduced_dim=dims["capacity"])
            taken = mtf.reduce_sum(dispatch, reduced_dim=dims["capacity"])
            value = mtf.reduce_sum(gates * d) + balance
            variable, = one.graph.trainable_variables
            gradients = mtf.gradients([value], [inputs, variable.value])
            made = mesh_values(mtf, one, [w], [gates, taken, balance, *gradients])
        used = made[1].sum(axis=-1)
        if not (used == 0).any():
            return None
        return {"x": x, "w_router": w, "d_gates": d_gates, "gates": floats(made[0]), "dispatch": whole(made[1]),
                "balance_loss": loss(made[2]), "d_x": floats(made[3]), "d_w_router": floats(made[4].T)}

    seed, tensors = first_seed(attempt)
    write(out, "mesh_threshold", "mesh", f"{moe.__name__}._top_2_gating", seed,
          {"framework": "tf", "top_k": 2, "capacity": capacity, "second_policy": "threshold",
           "second_threshold": threshold, "epsilon": 1e-9}, tensors)

    # Whole layers in training.
    d_ff, jitter = 12, 1e-2

    def layer(seed, gated, groups, group_size, **options):
        draw = Draw(seed)
        x, d_y = draw.uniform(groups, group_size, D_MODEL), draw.uniform(groups, group_size, D_MODEL)
        uniform, weights = draw.unit(groups, group_size), draw_layer(draw, EXPERTS, d_ff, gated)
        top_2 = options["moe_gating"] == "top_2"
        if not top_2:  # what the router's inputs are multiplied by
            uniform = 1 + draw.uniform(groups, group_size, D_MODEL, steps=40, largest=40 / 4096)
            assert np.abs(uniform - 1).max() <= jitter
        p = softmax((x if top_2 else x * uniform) @ weights["w_router"].T)
        if not ranked_apart(p, 2 if top_2 else 1):
            return None
        if top_2:  # what the uniform numbers are compared with, to keep away from it
            first, second = -np.sort(-p, axis=-1)[..., 0], -np.sort(-p, axis=-1)[..., 1]
            odds = second / (first + second) / options["second_threshold_train"]
            if np.abs(uniform - odds).min() < MARGIN or (uniform >= odds).sum() < 4:
                return None
            if ((uniform < odds) & (uniform > odds / 1.5)).sum() < 3:
                return None  # another threshold leaves out others
        module = moe.MoE1D(num_experts=EXPERTS, loss_coef=1.0, hidden_size=d_ff, group_size=group_size,
                           activation=["gelu", "linear"] if gated else "relu", switch_jitter=jitter, **options)
        with tf.Graph().as_default():
            call = MeshCall(moe, module, x, uniform)
            over = dict(reduced_dim=call.capacity)
            value = mtf.reduce_sum(call.y * mtf.import_tf_tensor(call.one, tf.constant(d_y), call.y.shape)) + call.loss
            losses = {"balance_loss": call.loss} if top_2 else {  # with the z-loss, their loss is the sum
                "balance_loss": call.summaries["aux_loss"], "z_loss": call.summaries["switch_gating/z_loss"]}
            variables = [variable.value for variable in call.one.graph.trainable_variables]
            made = mesh_values(mtf, call.one, weights.values(), [
                call.y, mtf.reduce_sum(call.combine, **over), mtf.reduce_sum(call.dispatch, **over),
                *mtf.gradients([value], [call.x, *variables]), *losses.values()])
        as_rows = lambda value: value.reshape(groups * group_size, -1)  # noqa: E731
        y, gates, dispatch, d_x = (as_rows(value) for value in made[:4])
        taken = dispatch.sum(axis=-1)
        if not (taken == 0).any() or (top_2 and not ((taken == 1) & (uniform.flatten() < odds.flatten())).any()):
            return None
        gradients = {name: turned(value) for name, value in zip(weights, made[4:])}
        tensors = {"x": as_rows(x), "d_y": as_rows(d_y), "y": floats(y), "gates": floats(gates),
                   "dispatch": whole(dispatch), "d_x": floats(d_x), **with_gradients(weights, gradients),
                   "capacity": whole([call.capacity.size])}
        tensors.update({name: loss(value) for name, value in zip(losses, made[-len(losses):])})
        return {**tensors, "uniform" if top_2 else "jitter": as_rows(uniform)}

    cases = {
        "switch": dict(gated=False, groups=2, group_size=30, moe_gating="switch", capacity_factor_train=1.25,
                       z_loss=1.0),
        "random": dict(gated=True, groups=1, group_size=26, moe_gating="top_2", capacity_factor_train=1.25,
                       second_policy_train="random", second_threshold_train=0.2),
    }
    for name, options in cases.items():
        seed, tensors = first_seed(lambda seed: layer(seed, **options))
        write(out, f"mesh_layer_{name}", "mesh", f"{moe.__name__}.MoE1D", seed,
              {"framework": "tf", "d_ff": d_ff, **options}, tensors)


# ---- NVIDIA/Megatron-LM: its routers, losses and token dropping, and Sinkhorn


def torch_routing(x, w, d_gates, route):
    """route(logits) gives gates, dispatch and losses; returns them with the gradients of their sum."""
    x, w = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
    logits = torch.nn.functional.linear(x, w)
    gates, dispatch, losses = route(logits)
    value = (gates * torch.tensor(d_gates)).sum()
    for one in losses.values():
        value = value + one
    value.backward()
    return {
        "x": x.detach().numpy(), "w_router": w.detach().numpy(), "d_gates": d_gates,
        "gates": floats(gates.detach()), "dispatch": whole(dispatch), "d_x": floats(x.grad),
        "d_w_router": floats(w.grad), **{name: loss(one.detach()) for name, one in losses.items()},
    }


def megatron(sources, out):
    prefix = "megatron.core.transformer.moe"
    router = load(sources / "Megatron-LM", f"{prefix}.router", real=(f"{prefix}.moe_utils",))
    utils = sys.modules[f"{prefix}.moe_utils"]
    tokens, experts = 24, 16

    def top_k(seed, k, capacity_factor, largest, **options):
        draw = Draw(seed)
        x, w = draw.uniform(tokens, D_MODEL), draw.uniform(experts, D_MODEL, largest=largest)
        d_gates, bias = draw.uniform(tokens, experts), draw.uniform(experts, steps=16, largest=0.25)
        score = options.get("score_function", "softmax")
        if score != "softmax":
            options = {**options, "expert_bias": torch.tensor(bias)}
        kept = {}

        def route(logits):
            probs, chosen = utils.topk_routing_with_score_function(logits, k, **options)
            aux_map, scores = utils.compute_routing_scores_for_aux_loss(logits, k, score)
            balance = utils.switch_load_balancing_loss_func(scores, aux_map.sum(dim=0), tokens, k, experts, 1.0)
            losses = {"balance_loss": balance, "z_loss": utils.z_loss_func(logits, 1.0)}
            kept.update(demand=whole(aux_map.sum(dim=0)), chosen=whole(chosen), chosen_gates=probs.detach().numpy())
            if capacity_factor is not None:
                probs, chosen = utils.apply_router_token_dropping(probs, chosen, k, capacity_factor)
            return probs, chosen, losses

        z = x @ w.T
        p = {"softmax": softmax, "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
             "sqrtsoftplus": lambda z: np.sqrt(np.logaddexp(0, z))}[score](z)
        ranking = p + (0 if score == "softmax" else bias)
        groups, kept_groups = options.get("num_groups"), options.get("group_topk")
        plain = np.argsort(-ranking)[:, :k]
        if groups:
            of_group = ranking.reshape(tokens, groups, -1)
            of_group = -np.sort(-of_group, axis=-1)[..., :k // kept_groups].sum(axis=-1)
            if not ranked_apart(of_group, kept_groups):
                return None
            best = np.argsort(-of_group)[:, :kept_groups]
            left_out = np.repeat([[g not in row for g in range(groups)] for row in best], experts // groups, axis=1)
            ranking = np.where(left_out, np.arange(experts) * -1.0 - 1, ranking)
        if not ranked_apart(ranking, k) or not ranked_apart(p, k):
            return None
        tensors = torch_routing(x, w, d_gates, route)
        if groups and sum((kept["chosen"][t, plain[t]] == 0).any() for t in range(tokens)) < 3:
            return None  # the groups change a choice
        if capacity_factor is not None:
            gates = kept["chosen_gates"]
            if any(not all_apart(gates[gates[:, e] > 0, e]) for e in range(experts)):
                return None
            if kept["chosen"].sum() - tensors["dispatch"].sum() < 4:
                return None
        if score != "softmax":
            tensors["selection_bias"] = bias
        tensors["demand"] = kept["demand"]  # of the loss: the choices without bias and groups
        return tensors

    cases = {
        "softmax": dict(k=2, capacity_factor=1.0, largest=1.0),
        "pre_softmax": dict(k=2, capacity_factor=None, largest=1.0, use_pre_softmax=True),
        "groups_softmax": dict(k=3, capacity_factor=None, largest=1.0, use_pre_softmax=True, num_groups=4, group_topk=2,
                               scaling_factor=16.0),
        "groups_sigmoid": dict(k=4, capacity_factor=None, largest=0.5, score_function="sigmoid", num_groups=4,
                               group_topk=2, scaling_factor=2.5),
        "sqrtsoftplus": dict(k=2, capacity_factor=None, largest=0.5, score_function="sqrtsoftplus", scaling_factor=1.5),
    }
    for name, options in cases.items():
        seed, tensors = first_seed(lambda seed: top_k(seed, **options))
        config = {"framework": "torch", "top_k": options["k"],
                  **{key: value for key, value in options.items() if key not in ("k", "largest")}}
        write(out, f"megatron_{name}", "Megatron-LM", f"{utils.__name__}.topk_routing_with_score_function", seed,
              config, tensors)

    def sinkhorn(seed, k):
        draw = Draw(seed)
        x, w, d_gates = draw.uniform(tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL), draw.uniform(tokens, EXPERTS)
        config = types.SimpleNamespace(moe_aux_loss_coeff=0)
        self = types.SimpleNamespace(topk=k, training=True, config=config)
        plan = {}

        def route(logits):
            plan["plan"] = utils.sinkhorn(logits.detach())
            return *router.TopKRouter.sinkhorn_load_balancing(self, logits), {}

        tensors = torch_routing(x, w, d_gates, route)
        rows = plan["plan"].numpy() * tokens  # with a sum of about 1
        if not ranked_apart(rows, k) or not ranked_apart(softmax(x @ w.T), k):
            return None
        if (np.argsort(-rows)[:, :k] == np.argsort(-(x @ w.T))[:, :k]).all():
            return None
        tensors["plan"] = floats(plan["plan"])
        return tensors

    for name, k in (("sinkhorn", 1), ("sinkhorn_top2", 2)):
        seed, tensors = first_seed(lambda seed: sinkhorn(seed, k))
        write(out, f"megatron_{name}", "Megatron-LM", f"{router.__name__}.TopKRouter.sinkhorn_load_balancing", seed,
              {"framework": "torch", "top_k": k, "tolerance": 1e-4}, tensors)


# ---- thu-ml/ReMoE


def remoe(sources, out):
    prefix = "megatron.core.transformer.moe"
    parallel = types.SimpleNamespace(get_tensor_and_context_parallel_group=lambda: None)  # one process
    router = load(sources / "ReMoE", f"{prefix}.router", real=(f"{prefix}.moe_utils",),
                  given={"megatron.core": {"parallel_state": parallel}})
    tokens, k = 24, 2

    class Router:
        apply_l1_reg = router.ReLURouter.apply_l1_reg
        l1_reg_load_balancing = router.ReLURouter.l1_reg_load_balancing

    def attempt(seed):
        draw = Draw(seed)
        x, w, d_gates = draw.uniform(tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL), draw.uniform(tokens, EXPERTS)
        z = x @ w.T
        if np.abs(z).min() < MARGIN or not (z < 0).all(axis=1).any():
            return None  # some token uses no expert
        self, seen = Router(), {}
        self.topk, self.training, self.layer_number = k, True, 1
        self.config = types.SimpleNamespace(
            moe_relu_l1_reg_coeff=torch.tensor(1.0), moe_relu_sparsity=torch.zeros(()),
            moe_token_dispatcher_type="alltoall", num_layers=1)
        see = lambda name, value, *rest, **named: seen.update(l1=value)  # noqa: E731
        with mock.patch.object(router, "save_to_aux_losses_tracker", see):
            # The loss is in their graph already: it enters the gradient by itself.
            tensors = torch_routing(x, w, d_gates, lambda logits: (*self.l1_reg_load_balancing(logits), {}))
        return {**tensors, "l1_loss": loss(seen["l1"].detach()), "sparsity": loss(self.config.moe_relu_sparsity)}

    seed, tensors = first_seed(attempt)
    write(out, "remoe", "ReMoE", f"{router.__name__}.ReLURouter.l1_reg_load_balancing", seed,
          {"framework": "torch", "top_k": k, "coefficient": 1.0}, tensors)


# ---- ZhenweiAn/Dynamic_MoE: top-p routing


def module_gradients(module, x, d_y, call):
    leaf = torch.tensor(x, requires_grad=True)
    y = call(leaf)
    (y * torch.tensor(d_y)).sum().backward()
    gradient = {}
    for name, parameter in module.named_parameters():
        gradient[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return floats(y.detach()), floats(leaf.grad), gradient


def dynamic_moe(sources, out):
    modeling = load(sources / "Dynamic_MoE", "modeling.modeling_moe", real=("modeling.configuration_moe",))
    tokens, d_ff = 16, 12
    config = types.SimpleNamespace(expert_frequency=1, top_p_threshold=0.4, hidden_size=D_MODEL, num_experts=EXPERTS,
                                   intermediate_size=d_ff, hidden_act="silu")

    def attempt(seed):
        draw = Draw(seed)
        x, d_y = draw.uniform(1, tokens, D_MODEL), draw.uniform(1, tokens, D_MODEL)
        weights = {"w_router": draw.uniform(EXPERTS, D_MODEL, largest=0.5),
                   "w_gate": draw.uniform(EXPERTS, d_ff, D_MODEL, largest=0.5),
                   "w_up": draw.uniform(EXPERTS, d_ff, D_MODEL, largest=0.5),
                   "w_down": draw.uniform(EXPERTS, D_MODEL, d_ff, largest=0.5)}
        p = softmax(x @ weights["w_router"].T)[0]
        mass = np.cumsum(-np.sort(-p, axis=-1), axis=-1)
        used = (mass > config.top_p_threshold).argmax(axis=-1) + 1
        if not ranked_apart(p, 5) or np.abs(mass - config.top_p_threshold).min() < MARGIN or len(set(used)) < 3:
            return None
        layer = modeling.SwitchMLP(config, 0)
        state = {"router.weight": weights["w_router"]}
        for e in range(EXPERTS):
            for ours, theirs in (("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj")):
                state[f"experts.{e}.{theirs}.weight"] = weights[ours][e]
        layer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
        y, d_x, gradient = module_gradients(layer, x, d_y, layer)
        with torch.no_grad():
            scores = torch.nn.functional.softmax(layer.router(torch.tensor(x)), dim=2)
            values, experts = modeling.top_p_sampling_batched_all_sequence(scores, config.top_p_threshold)
        experts, values = experts[0].numpy(), values[0].numpy()
        dispatch, gates = np.zeros((tokens, EXPERTS), np.int64), np.zeros((tokens, EXPERTS), np.float32)
        for t in range(tokens):
            for e, gate in zip(experts[t], values[t]):
                if e >= 0:
                    dispatch[t, e], gates[t, e] = 1, gate
        tensors = {"x": x[0], "d_y": d_y[0], "y": y[0], "d_x": d_x[0], "dispatch": dispatch, "gates": gates,
                   "d_w_router": floats(gradient["router.weight"]), **in_rows(weights)}
        for ours, theirs in (("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj")):
            tensors[f"d_{ours}"] = floats(torch.cat([gradient[f"experts.{e}.{theirs}.weight"] for e in range(EXPERTS)]))
        return tensors

    seed, tensors = first_seed(attempt)
    write(out, "dynamic_moe", "Dynamic_MoE", "modeling.modeling_moe.SwitchMLP", seed,
          {"framework": "torch", "top_p": config.top_p_threshold, "d_ff": d_ff}, tensors)


# ---- facebookresearch/ParlAI: hash layers


def parlai(sources, out):
    ladder = load(sources / "ParlAI", "projects.params_vs_compute.hash_ladder.hash_ladder", absent=("parlai",))
    tokens, d_ff, vocabulary = 16, 12, 40
    draw = Draw(1)
    x, d_y = draw.uniform(1, tokens, D_MODEL), draw.uniform(1, tokens, D_MODEL)
    ids = draw.generator.integers(0, vocabulary, (1, tokens))
    weights = draw_experts(draw, EXPERTS, d_ff)
    layer = ladder.HashLayerFFN({"hash_size": EXPERTS, "dict_size": vocabulary}, D_MODEL, d_ff)
    names = {"w_up": "linears1.{}.weight", "b_up": "linears1.{}.bias", "w_down": "linears2.{}.weight",
             "b_down": "linears2.{}.bias"}
    layer.load_state_dict({name.format(e): torch.tensor(weights[ours][e])
                           for ours, name in names.items() for e in range(EXPERTS)})
    y, d_x, gradient = module_gradients(layer, x, d_y, lambda leaf: layer(leaf, torch.tensor(ids)))
    tensors = {"x": x[0], "d_y": d_y[0], "y": y[0], "d_x": d_x[0], "token_ids": whole(ids)[0],
               "table": whole(layer.hash_bin_map), **in_rows(weights)}
    for ours, name in names.items():
        stacked = torch.stack([gradient[name.format(e)] for e in range(EXPERTS)])
        tensors[f"d_{ours}"] = floats(stacked).reshape(-1, stacked.shape[-1])
    write(out, "hash_layer", "ParlAI", f"{ladder.__name__}.HashLayerFFN", 1, {"framework": "torch", "d_ff": d_ff},
          tensors)


# ---- microsoft/tutel


def load_tutel(sources):
    kernel = types.SimpleNamespace(__file__="")
    with mock.patch.object(torch.ops, "load_library", lambda path: None):
        return load(sources / "tutel", "tutel.impls.fast_dispatch",
                    real=("tutel.impls.losses", "tutel.jit_kernels.gating"),
                    given={"tutel.impls.jit_compiler": {"tutel_custom_kernel": kernel}})


def tutel(sources, out):
    module = load_tutel(sources)
    losses = sys.modules["tutel.impls.losses"]
    tokens, k, gate_noise, capacity_factor = 16, 2, 1.0, 1.0

    def attempt(seed, prioritised):
        draw = Draw(seed)
        x, w, d_gates = draw.uniform(tokens, D_MODEL), draw.uniform(EXPERTS, D_MODEL), draw.uniform(tokens, EXPERTS)
        noise = draw.normal(tokens, EXPERTS)
        kept = {}

        def route(logits):
            noisy = logits + gate_noise * torch.tensor(noise) / EXPERTS
            (_, experts, locations, gates, capacity, _), balance = module.extract_critical(
                torch.nn.functional.softmax(noisy, dim=1), k, losses.gshard_loss, capacity_factor, prioritised)
            kept["capacity"] = capacity
            combine, taken = torch.zeros(tokens, EXPERTS), torch.zeros(tokens, EXPERTS, dtype=torch.int64)
            for expert, location, gate in zip(experts, locations, gates):
                fits = location < capacity  # as their kernels ask
                expert = expert.long().unsqueeze(1)
                combine = combine.scatter_add(1, expert, (gate * fits).unsqueeze(1))
                taken = taken.scatter_add(1, expert, fits.long().unsqueeze(1))
            return combine, taken, {"balance_loss": balance}

        tensors = torch_routing(x, w, d_gates, route)
        p = softmax(x @ w.T + noise / EXPERTS)
        if not ranked_apart(p, k) or not all_apart(p.max(axis=-1)):
            return None
        if k * tokens - tensors["dispatch"].sum() < 4:
            return None
        tensors["noise"] = noise
        return {**tensors, "capacity": whole([kept["capacity"]])}

    for name, prioritised in (("tutel", False), ("tutel_prioritised", True)):
        seed, tensors = first_seed(lambda seed: attempt(seed, prioritised))
        config = {"framework": "torch", "top_k": k, "gate_noise": gate_noise, "capacity_factor": capacity_factor,
                  "batch_prioritized_routing": prioritised}
        write(out, name, "tutel", f"{module.__name__}.extract_critical", seed, config, tensors)


# ---- How many seats each of them gives an expert


def capacities(sources, out):
    cases = [(tokens, experts, k, factor) for tokens, experts in ((16, 8), (50, 8), (100, 8), (100, 16), (24, 3))
             for k in (1, 2) for factor in (1.0, 1.05, 1.25, 2.0)]
    sys.path.insert(0, str(sources / "vmoe"))
    moe = importlib.import_module("vmoe.moe")
    gshard_layers, fast_dispatch = load_lingvo(sources), load_tutel(sources)
    megatron_utils = load(sources / "Megatron-LM", "megatron.core.transformer.moe.moe_utils")
    moe_layers, mesh_moe = load_flaxformer_layers(sources), load_mesh(sources)
    routers = load(sources / "ColossalAI", "colossalai.moe.routers")

    def of_flaxformer(tokens, experts, k, factor, minimum=4):
        seen = []
        layer = types.SimpleNamespace(
            num_experts=experts, num_expert_replicas=1, max_group_size=tokens, strict_group_size=True,
            train_capacity_factor=factor, min_expert_capacity=minimum, input_hidden_dims_axes=("embed",),
            output_hidden_dims_axes=("embed",), router=moe_layers.routing.TokensChooseMaskedRouter(
                router_weights=None, jitter_noise=0.0, num_selected_experts=k, batch_prioritized_routing=False,
                dtype=jnp.float32, ignore_padding_tokens=False),
            _mask_and_dispatch_to_experts=lambda x, training, capacity, **rest: seen.append(capacity) or x)
        moe_layers.MoeLayer.__call__.__wrapped__(layer, jnp.zeros((experts, tokens, D_MODEL)))
        return seen[0]

    def of_lingvo(tokens, experts, k, factor):
        with tf.Graph().as_default():
            return gshard_layers.Top2GatingOnLogits(
                None, tf.zeros((1, tokens)), tf.zeros((1, tokens, experts)), 1, experts, 0, tf.float32,
                use_xla_sharding=False, capacity_factor=factor)[1].shape[-1]

    def of_tutel(tokens, experts, k, factor):
        return fast_dispatch.extract_critical(torch.zeros(tokens, experts), k, None, factor)[0][4]

    def of_mesh(tokens, experts, k, factor):
        module = mesh_moe.MoE1D(num_experts=experts, hidden_size=4, group_size=tokens, moe_gating="switch",
                                capacity_factor_train=factor, switch_jitter=0.0)
        with tf.Graph().as_default():
            return MeshCall(mesh_moe, module, np.zeros((1, tokens, D_MODEL), np.float32)).capacity.size

    def of_colossalai(tokens, experts, k, factor):
        router = types.SimpleNamespace(training=True, k_value=k, capacity_factor_train=factor, min_capacity=4)
        return routers.MoeRouter.get_capacity(router, (tokens, experts))

    rules = {
        "colossalai": of_colossalai,
        "flaxformer": of_flaxformer,
        "flaxformer_2": lambda *case: of_flaxformer(*case, minimum=2),
        "lingvo": of_lingvo,
        "mesh": of_mesh,
        "megatron": lambda tokens, experts, k, factor: megatron_utils.get_capacity(tokens * k, experts, factor),
        "tutel": of_tutel,
        "vmoe": lambda tokens, experts, k, factor: moe.compute_capacity(tokens * k, experts, factor),
        "vmoe_ceil": lambda tokens, experts, k, factor: moe.compute_capacity(
            tokens * k, experts, factor, "ceil", multiple_of=None),
        "vmoe_round": lambda tokens, experts, k, factor: moe.compute_capacity(
            tokens * k, experts, factor, "round", multiple_of=None),
    }
    tensors = {"cases": whole([case[:3] for case in cases]), "factor": np.float64([case[3] for case in cases])}
    for name, rule in rules.items():
        tensors[name] = whole([rule(*case) for case in cases])
    write(out, "capacities", None, "several", 0, {"framework": "several", "min_expert_capacity": 4}, tensors)


def make(sources, out, chosen=()):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
    for maker in (flaxformer, flaxformer_layers, vmoe, tensor2tensor, tensor2tensor_layer, lingvo,
                  lingvo_layer, mesh, megatron, remoe, dynamic_moe, parlai, tutel, capacities):
        if not chosen or maker.__name__ in chosen:
            maker(sources, out)
