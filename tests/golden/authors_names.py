"""V-MoE's and Soft MoE's golden files under the names of their authors' parameters.

generate.py calls make(), after authors_routers.py has made the files with this library's names and orientation. Here
the weights and their gradients get the names and shapes that they have in the authors' whole model, of which a small
one tells its names and shapes. No number changes.
"""

import importlib
import json

import flax.traverse_util
import jax
import safetensors
import safetensors.torch

import generate

LAYER = 1  # of two
PREFIX = f"Encoder/encoderblock_{LAYER}/Moe/"
NAMES = {
    "w_router": "Router/dense/kernel", "w_slots": "Router/mu", "scale": "Router/scale",
    "w_up": "Mlp/Dense_0/kernel", "b_up": "Mlp/Dense_0/bias",
    "w_down": "Mlp/Dense_1/kernel", "b_down": "Mlp/Dense_1/bias",
}


def as_authors_have_it(name, value, experts):
    if name == "scale":
        return value.reshape(())
    if name == "w_router":
        return value.T
    if name == "w_slots":
        return value.T.reshape(value.shape[1], experts, -1)
    if name.startswith("b_"):
        return value
    return value.reshape(experts, -1, value.shape[1]).transpose(1, 2)


def parameters_of_the_model(d_model, d_ff, experts, slots):
    """Names and shapes in the authors' model of two layers, the second of which is the one of the file."""
    code = importlib.import_module("vmoe.nn.vit_moe")
    router = {"name": "vmoe.projects.soft_moe.router.SoftRouter", "num_slots": slots} if slots else {
        "dispatcher": {"name": "einsum", "batch_priority": False, "capacity": 4}}
    model = code.VisionTransformerMoe(
        num_classes=2, patch_size=(1, 1), hidden_size=d_model, classifier="gap", deterministic=True,
        encoder=dict(num_layers=LAYER + 1, mlp_dim=d_ff, num_heads=2,
                     moe=dict(layers=(LAYER,), num_experts=experts, group_size=4, split_rngs=True, router=router)))
    made = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 2, 3), "float32"))
    return {name: value.shape for name, value in flax.traverse_util.flatten_dict(made["params"], sep="/").items()}


def rename(path):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    stored = safetensors.torch.load_file(path)
    experts = len(stored["b_up"])
    tensors, shapes = {}, {}
    for name, value in stored.items():
        parameter = name.removeprefix("d_")
        if parameter in NAMES:
            value = as_authors_have_it(parameter, value, experts)
            shapes[PREFIX + NAMES[parameter]] = tuple(value.shape)
            name = name.removesuffix(parameter) + PREFIX + NAMES[parameter]
        tensors[name] = value.contiguous()
    made = parameters_of_the_model(stored["x"].shape[1], config["d_ff"], experts, config.get("slots_per_expert"))
    assert shapes == {name: shape for name, shape in made.items() if name.startswith(PREFIX)}, (path, shapes, made)
    config |= {"layer": LAYER, "tensor_prefix": PREFIX}
    generate.write(path, tensors, metadata | {"config": json.dumps(config, sort_keys=True)})
    print(f"{path.stem}: {path.stat().st_size} bytes, {PREFIX}", flush=True)


def make(out, chosen=()):
    if not chosen or "vmoe" in chosen:
        for name in ("vmoe", "vmoe_prioritised", "soft_moe", "soft_moe_few_tokens"):
            rename(out / f"authors_{name}.safetensors")
