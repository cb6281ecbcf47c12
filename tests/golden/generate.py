#!/usr/bin/env python3
"""Makes the golden files of the published MoE layers.

    python generate.py [--out DIR] [--sources DIR] [MODEL ...]

For each model a tiny network of the model's own class in Hugging Face transformers is built. Its first
MoE block gets random weights and is run on random tokens. The file holds what the block itself computed:
outputs, chosen experts, gates and autograd gradients. Nothing here reimplements a layer; the checks below
only decide whether drawn inputs are good test inputs. See README.md for the versions and the table.
With --sources the files from the authors' own code are made instead: see authors_layers.py,
authors_routers.py and authors_names.py.
"""

import os

# The same instructions on every machine, so that the files come out the same byte for byte.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["MKL_CBWR"] = "COMPATIBLE"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import math
import pathlib
import struct
import sys
import warnings

import safetensors.torch
import torch
import transformers
from torch.overrides import TorchFunctionMode

SEQUENCES, TOKENS_PER_SEQUENCE, D_MODEL = 2, 6, 16
TOKENS = SEQUENCES * TOKENS_PER_SEQUENCE
MARGIN = 1e-3  # smallest distance of two ranked scores, and of a value from a threshold
FIRST_SEED, SEEDS = 1, 20000


class Recorder(TorchFunctionMode):
    """Sees every torch call of a block while it runs, and keeps those that tell how it routed."""

    def __init__(self, router_weight):
        super().__init__()
        self.router_weight = router_weight
        self.logits = None  # what the router's linear map gave
        self.ranked = []  # (scores, k, indices) of every topk and argmax over scores
        self.one_hot = []  # arguments of one_hot: the chosen experts
        self.gates = None  # the tensor [tokens, k] of which blocks of Mixtral's kind take gates[token, slot, None]
        self.clamped = []  # (values, smallest, largest) of every clamp
        self.drawn = {"exponential_": [], "rand_like": [], "uniform_": []}  # random numbers by torch's name

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "linear" and args[1].data_ptr() == self.router_weight.data_ptr():
            self.logits = result.detach().clone()
        elif name == "topk":
            k = kwargs["k"] if "k" in kwargs else args[1]
            self.ranked.append((args[0].detach().clone(), k, result[1].clone()))
        elif name == "argmax" and args[0].is_floating_point():
            self.ranked.append((args[0].detach().clone(), 1, result.unsqueeze(-1).clone()))
        elif name == "one_hot":
            self.one_hot.append(args[0].clone())
        elif name == "__getitem__" and isinstance(args[1], tuple) and len(args[1]) == 3 and args[1][2] is None:
            if args[0].dim() == 2:
                self.gates = args[0].detach().clone()
        elif name == "clamp":
            self.clamped.append((args[0].detach().clone(), kwargs.get("min"), kwargs.get("max")))
        elif name in self.drawn:
            self.drawn[name].append(result.clone())
        return result


# How to read the chosen experts and the gates from what a block has shown. Each takes the recorder and the
# output of the block's router submodule and returns (experts [tokens, k], gates [tokens, k]).


def loop_routing(record, router_output):
    return record.one_hot[0], record.gates


def deepseek_routing(record, router_output):
    return router_output[0], router_output[1]


def dbrx_routing(record, router_output):
    return router_output[2], router_output[1]


def gpt_oss_routing(record, router_output):
    scores, experts = router_output
    return experts, scores.gather(1, experts)


def llama4_routing(record, router_output):
    scores, _ = router_output
    experts = record.ranked[-1][2]
    return experts, scores.gather(1, experts)


def granite_routing(record, router_output):
    # The router returns the gates in the order of the experts; put them back into the order of the tokens.
    order, _, sorted_gates, expert_sizes, _ = router_output
    experts, gates = torch.empty_like(order), torch.empty_like(sorted_gates)
    experts[order] = torch.repeat_interleave(torch.arange(len(expert_sizes)), torch.tensor(expert_sizes))
    gates[order] = sorted_gates
    return experts.view(TOKENS, -1), gates.view(TOKENS, -1)


def switch_routing(record, router_output):
    # The choice before the capacity; a dropped token keeps its choice and has gate 0.
    kept, probability, _ = router_output
    experts = record.ranked[0][2].reshape(TOKENS, 1)
    kept = kept.reshape(TOKENS, -1).gather(1, experts)
    return experts, probability.reshape(TOKENS, 1) * kept


def nllb_routing(record, router_output):
    # The two choices before the capacity; a dropped choice has gate 0.
    _, combine_weights = router_output
    experts = torch.cat([record.ranked[0][2], record.ranked[1][2]], dim=-1)
    return experts, combine_weights.gather(1, experts)


# The balance loss of the family, called on this one layer.


def logits_loss(function, model, run):
    return function((run.logits,), model.experts, model.top_k)


def dbrx_loss(function, model, run):
    return function((run.router_output[0],), model.experts, model.top_k, None)


def switch_loss(function, model, run):
    logits = run.logits.view(SEQUENCES, TOKENS_PER_SEQUENCE, model.experts)
    return function(torch.nn.Softmax(dim=-1)(logits), run.experts.view(SEQUENCES, TOKENS_PER_SEQUENCE))


def nllb_loss(function, model, run):
    probabilities = torch.nn.Softmax(dim=-1)(run.logits)
    return function(probabilities.view(1, TOKENS, model.experts), run.experts[:, 0].view(1, TOKENS))


# Conditions on the inputs of every model.


def gaps_are_clear(scores, count):
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).values
    gaps = best[..., :-1] - best[..., 1:]
    return bool((gaps[torch.isfinite(gaps)] > MARGIN).all())


def ranking_is_clear(record):
    """The chosen ones are apart from each other and from the best one not chosen."""
    for scores, k, _ in record.ranked:
        if scores.dim() == 3 and k == 2:
            continue  # the best two of a group, of which only the sum is used
        if not gaps_are_clear(scores, k + 1):
            return False
    return True


# Further conditions on the inputs of one model. They look at recorded values only.


def no_condition(model, run):
    return True


def bias_changes_choices(model, run):
    """At least three tokens choose other experts than without the selection bias; every biased score is above 0."""
    biased = run.record.ranked[-1][0]
    changed = (run.experts.sort(-1).values != run.unbiased.experts.sort(-1).values).any(-1).sum()
    positive = (biased > MARGIN) | (biased == 0)  # 0 marks the groups that are left out
    return changed >= 3 and bool(positive.all()) and ranking_is_clear(run.unbiased.record)


def groups_change_choices(model, run):
    """At least two tokens would choose other experts without groups, and two with the other group score."""
    scores = run.record.ranked[0][0]
    if scores.dim() == 3:  # sum of the best two of each group: [tokens, groups, experts of a group]
        kept, per_expert = run.record.ranked[1], scores.flatten(1)
        other = scores.max(-1).values.topk(model.options["topk_group"]).indices
    else:  # the best of each group
        kept, per_expert = run.record.ranked[0], run.logits.softmax(-1)
        grouped = per_expert.view(TOKENS, model.options["n_group"], -1)
        other = grouped.topk(2).values.sum(-1).topk(model.options["topk_group"]).indices
    free = per_expert.topk(model.top_k).indices.sort(-1).values
    without_groups = (free != run.experts.sort(-1).values).any(-1).sum()
    with_other_score = (other.sort(-1).values != kept[2].sort(-1).values).any(-1).sum()
    return without_groups >= 2 and with_other_score >= 2


def deepseek_v3_condition(model, run):
    return bias_changes_choices(model, run) and groups_change_choices(model, run)


def clamps_are_active(model, run):
    """Gates above the limit, gates below minus the limit (not clamped), ups beyond both; none at a limit."""
    gates = torch.cat([values for values, low, high in run.record.clamped if low is None])
    ups = torch.cat([values for values, low, high in run.record.clamped if low is not None])
    limit = run.record.clamped[0][2]
    seen = [gates > limit, gates < -limit, ups > limit, ups < -limit]
    clear = [(values.abs() - limit).abs().min() > MARGIN for values in (gates, ups)]
    return all(hits.sum() >= 5 for hits in seen) and all(clear)


def thresholds_are_clear(model, run):
    """PhiMoE: the best logits are apart, and none is near the threshold below which a pick leaves it out."""
    if not gaps_are_clear(run.logits, 3):
        return False
    scores = run.logits
    for pick in range(2):
        best = scores.max(-1, keepdim=True).values
        distance = (best - run.logits) / run.logits.abs().clamp(min=best) - 2 * model.options["router_jitter_noise"]
        if (distance[torch.isfinite(scores)].abs() < MARGIN).any():
            return False
        scores = scores.scatter(-1, run.experts[:, pick : pick + 1], float("-inf"))
    return True


def near_ties(model, run):
    """In both picks several tokens share the weight among near ties and several do not."""
    shared, alone = (run.gates < 0.99).sum(0), (run.gates == 1).sum(0)
    return thresholds_are_clear(model, run) and bool((shared >= 3).all()) and bool((alone >= 3).all())


def estimator_cases(model, run):
    """Training of PhiMoE: in each pick samples off the best expert, both with factor 1 and with factor 1/3."""
    noise, uniform = phimoe_draws(run)["noise"], phimoe_draws(run)["uniform"]
    scores = run.logits
    for pick in range(2):
        best = scores.max(-1, keepdim=True).values
        distance = (best - run.logits) / run.logits.abs().clamp(min=best)
        masked = scores.masked_fill(distance > 2 * model.options["router_jitter_noise"], float("-inf"))
        first, second = (masked - noise[pick].log()).topk(2, dim=-1).values.unbind(-1)
        off = run.experts[:, pick] != masked.argmax(-1)
        high = uniform[pick].squeeze(-1) > 0.75
        if (off & high).sum() < 2 or (off & ~high).sum() < 2 or (first - second).min() < MARGIN:
            return False
        if (uniform[pick] - 0.75).abs().min() < MARGIN:
            return False
        scores = scores.scatter(-1, run.experts[:, pick : pick + 1], float("-inf"))
    return thresholds_are_clear(model, run)


def phimoe_draws(run):
    """What the module has drawn: for each pick exponential numbers, minus whose logarithm is added to the logits,
    and one uniform number per token, which must exceed 0.75 for factor 1 off the best expert."""
    drawn = run.record.drawn
    return {"noise": torch.stack(drawn["exponential_"]),
            "uniform": torch.stack([drawn["rand_like"][0], drawn["uniform_"][0]])}


def switch_drops(model, run):
    """Some tokens are dropped, all of them by expert 0: where the module's own loss agrees with the paper's."""
    dropped = run.gates == 0
    return dropped.sum() >= 2 and bool((run.experts[dropped] == 0).all())


def nllb_drops(model, run):
    """First choices and second choices are dropped, for one token both."""
    dropped = run.gates == 0
    return bool((dropped.sum(0) >= 2).all()) and bool((dropped.sum(1) == 2).any())


def nothing_drops(model, run):
    return bool((run.gates > 0).all())


class Model:
    def __init__(self, name, network, block, config, routing, d_ff, experts, top_k, options, router="gate",
                 router_weight=None, loss=None, condition=no_condition, gains=None, arguments=None,
                 shared_direction=0.0, training=False, draws=None):
        self.name = name
        self.network = network  # class of the whole network, which gives the names of the tensors
        self.block = block  # class of the MoE block
        self.config = config  # arguments of the network's configuration
        self.routing = routing
        self.d_ff, self.experts, self.top_k = d_ff, experts, top_k
        self.options = options  # routing options in plain words, for the metadata
        self.router = router  # submodule of the block that routes
        self.router_weight = router_weight or router + ".weight"
        self.loss = loss
        self.condition = condition
        self.gains = gains or {}  # part of a tensor name -> standard deviation of its product with unit inputs
        self.arguments = arguments or {}  # further arguments of the block's forward
        self.shared_direction = shared_direction  # brings the logits of a token close together, far from zero
        self.training = training
        self.draws = draws  # random numbers of a training run, for the file

    def build(self):
        """The block with its name in the whole network."""
        network_class = getattr(transformers, self.network)
        network = network_class(network_class.config_class(**self.config)).eval()
        for name, module in network.named_modules():
            if type(module).__name__ == self.block:
                return name + ".", module.train(self.training)
        raise ValueError(f"{self.network} has no {self.block}")


class Run:
    """One forward pass of a block with everything it has shown."""

    def __init__(self, model, block, x, seed):
        torch.manual_seed(seed)
        shown = {}
        parts = dict(block.named_modules())
        tensors = dict(block.named_parameters())
        hook = parts[model.router].register_forward_hook(lambda module, inputs, output: shown.update(output=output))
        with Recorder(tensors[model.router_weight]) as self.record:
            output = block(x.view(SEQUENCES, TOKENS_PER_SEQUENCE, -1), **model.arguments)
        hook.remove()
        self.y = (output[0] if isinstance(output, tuple) else output).reshape(TOKENS, -1)
        self.logits = self.record.logits.reshape(TOKENS, -1)
        self.router_output = shown["output"]
        self.experts, self.gates = model.routing(self.record, self.router_output)
        self.experts, self.gates = self.experts.detach().clone(), self.gates.detach().clone()


def draw(generator, shape, deviation):
    """Uniform numbers: they come from the generator's bits alone and are the same on every machine."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * (deviation * math.sqrt(3))


def draw_weights(model, block, generator):
    state = {}
    for name, tensor in sorted(block.state_dict().items()):
        gain = next((gain for part, gain in model.gains.items() if part in name), None)
        if "e_score_correction_bias" in name:
            state[name] = draw(generator, tensor.shape, gain or 0.05)
        elif "bias" in name:
            state[name] = draw(generator, tensor.shape, gain or 0.5)
        else:
            default = 1.5 if name == model.router_weight else 1.3
            state[name] = draw(generator, tensor.shape, (gain or default) / math.sqrt(D_MODEL))
    if model.shared_direction:
        common = draw(generator, (D_MODEL,), model.shared_direction)
        state[model.router_weight] = state[model.router_weight] + common
    return state


def write(path, tensors, metadata):
    """A safetensors file whose header has one fixed order (the library's own writer has none)."""
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
    header, data = {"__metadata__": dict(sorted(metadata.items()))}, b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        assert tensor.is_contiguous() and bool(torch.isfinite(tensor).all()), name
        values = tensor.numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(values)],
        }
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def find_inputs(model, block):
    """The first seed whose tokens and weights make a good test."""
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        generator = torch.Generator().manual_seed(seed)
        state = draw_weights(model, block, generator)
        x = draw(generator, (TOKENS, D_MODEL), 1.0)
        if model.shared_direction:
            x = x + torch.sign(state[model.router_weight].mean(0)) * 0.5
        d_y = draw(generator, (TOKENS, D_MODEL), 1.0)
        block.load_state_dict(state)
        with torch.no_grad():
            run = Run(model, block, x.clone(), seed)
            if not ranking_is_clear(run.record):
                continue
            if "e_score_correction_bias" in "".join(state):
                flat = {name: value * (0 if "e_score_correction_bias" in name else 1) for name, value in state.items()}
                block.load_state_dict(flat)
                run.unbiased = Run(model, block, x.clone(), seed)
                block.load_state_dict(state)
            if model.condition(model, run):
                return seed, state, x, d_y
    raise RuntimeError(f"no seed for {model.name}")


def generate(model, path):
    prefix, block = model.build()
    seed, state, x, d_y = find_inputs(model, block)

    block.load_state_dict(state)
    leaf = x.clone().requires_grad_(True)
    run = Run(model, block, leaf, seed)
    (run.y * d_y).sum().backward()

    tensors = {prefix + name: value.clone() for name, value in state.items()}
    tensors["golden.x"] = x
    tensors["golden.y"] = run.y.detach().clone()
    tensors["golden.experts"] = run.experts
    tensors["golden.gates"] = run.gates
    tensors["golden.router_logits"] = run.logits
    tensors["golden.d_y"] = d_y
    tensors["golden.d_x"] = leaf.grad.clone()
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            # An expert without a token has no gradient in torch; it is zero.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            tensors["golden.grad." + prefix + name] = gradient.detach().clone()
    if model.loss is not None:
        function = sys.modules[type(block).__module__].load_balancing_loss_func
        loss = model.loss(function, model, run)
        tensors["golden.balance_loss"] = loss.detach().reshape(1).double()
    if hasattr(sys.modules[type(block).__module__], "router_z_loss_func"):
        function = sys.modules[type(block).__module__].router_z_loss_func
        logits = run.logits.view(SEQUENCES, TOKENS_PER_SEQUENCE, model.experts)
        tensors["golden.z_loss"] = function(logits).reshape(1).double()

    if model.draws is not None:
        for name, values in model.draws(run).items():
            tensors["golden." + name] = values

    config = {
        "d_model": D_MODEL,
        "d_ff": model.d_ff,
        "num_experts": model.experts,
        "top_k": model.top_k,
        "sequences": SEQUENCES,
        "tokens_per_sequence": TOKENS_PER_SEQUENCE,
        "tensor_prefix": prefix,
        "training": model.training,
        **model.options,
    }
    metadata = {
        "model": model.name,
        "module": f"{type(block).__module__}.{type(block).__name__}",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "seed": str(seed),
        "config": json.dumps(config, sort_keys=True),
    }
    write(path, tensors, metadata)
    verify(model, path, prefix, seed)
    return seed, config


def verify(model, path, prefix, seed):
    """The file alone, given to a new block, gives the stored outputs and gradients again."""
    stored = safetensors.torch.load_file(path)
    found, block = model.build()
    assert found == prefix
    block.load_state_dict({name[len(prefix):]: value for name, value in stored.items() if name.startswith(prefix)})
    x = stored["golden.x"].clone().requires_grad_(True)
    run = Run(model, block, x, seed)
    (run.y * stored["golden.d_y"]).sum().backward()
    assert torch.equal(run.y, stored["golden.y"])
    assert torch.equal(run.experts, stored["golden.experts"])
    assert torch.equal(run.gates, stored["golden.gates"])
    assert torch.equal(x.grad, stored["golden.d_x"])
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, stored["golden.grad." + prefix + name])


SWIGLU = {"expert": "swiglu", "activation": "silu"}
SMALL = dict(hidden_size=D_MODEL, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=32)
SMALL_MLA = dict(hidden_size=D_MODEL, num_attention_heads=2, num_key_value_heads=2, vocab_size=32, q_lora_rank=8,
                 kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)

MODELS = [
    Model("mixtral", "MixtralForCausalLM", "MixtralSparseMoeBlock",
          dict(SMALL, intermediate_size=24, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2),
          loop_routing, 24, 8, 2, loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=True, norm_epsilon=0.0)),
    Model("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeSparseMoeBlock",
          dict(SMALL, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=1, num_experts=8,
               num_experts_per_tok=4, norm_topk_prob=True),
          loop_routing, 12, 8, 4, loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=True, norm_epsilon=0.0)),
    Model("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeSparseMoeBlock",
          dict(SMALL, intermediate_size=40, moe_intermediate_size=12, shared_expert_intermediate_size=24,
               num_hidden_layers=1, num_experts=8, num_experts_per_tok=4, norm_topk_prob=False),
          loop_routing, 12, 8, 4, loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=False, shared_expert_d_ff=24,
                       shared_expert_gate="sigmoid")),
    Model("olmoe", "OlmoeForCausalLM", "OlmoeSparseMoeBlock",
          dict(SMALL, intermediate_size=12, num_hidden_layers=1, num_experts=8, num_experts_per_tok=4,
               norm_topk_prob=False),
          loop_routing, 12, 8, 4, loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=False)),
    Model("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3MoE",
          dict(SMALL_MLA, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=4, first_k_dense_replace=3,
               n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
               norm_topk_prob=True, routed_scaling_factor=2.5),
          deepseek_routing, 12, 16, 4, condition=deepseek_v3_condition, gains={"e_score": 0.08},
          options=dict(SWIGLU, layer=3, scoring="sigmoid", selection_bias=True, n_group=4, topk_group=2,
                       group_score="sum_of_top_2", norm_topk_prob=True, norm_epsilon=1e-20,
                       routed_scaling_factor=2.5, n_shared_experts=1, shared_expert_d_ff=12)),
    Model("gpt_oss", "GptOssForCausalLM", "GptOssMLP",
          dict(SMALL, intermediate_size=16, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=4),
          gpt_oss_routing, 16, 8, 4, router="router", loss=logits_loss, condition=clamps_are_active,
          gains={"gate_up_proj_bias": 1.0, "gate_up_proj": 4.0, "down_proj_bias": 0.5, "down_proj": 0.2},
          options=dict(layer=0, scoring="softmax_over_chosen", router_bias=True, expert="gpt_oss_swiglu",
                       activation_alpha=1.702, activation_limit=7.0, expert_bias=True, gate_up_interleaved=True)),
    Model("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2MoE",
          dict(SMALL_MLA, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, first_k_dense_replace=1,
               n_routed_experts=16, n_shared_experts=2, num_experts_per_tok=6, n_group=4, topk_group=2,
               topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0),
          deepseek_routing, 12, 16, 6, condition=groups_change_choices, gains={"down_proj": 0.7},
          options=dict(SWIGLU, layer=1, scoring="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=2,
                       group_score="max", norm_topk_prob=False, routed_scaling_factor=16.0, n_shared_experts=2,
                       shared_expert_d_ff=24)),
    Model("llama4", "Llama4ForConditionalGeneration", "Llama4TextMoe",
          dict(text_config=dict(SMALL, intermediate_size=12, intermediate_size_mlp=40, num_hidden_layers=1,
                                num_local_experts=8, num_experts_per_tok=1, interleave_moe_layer_step=1,
                                pad_token_id=0),
               vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                  vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)),
          llama4_routing, 12, 8, 1, router="router",
          options=dict(SWIGLU, layer=0, scoring="sigmoid", gate_applied_to="input", n_shared_experts=1,
                       shared_expert_d_ff=12)),
    Model("dbrx", "DbrxForCausalLM", "DbrxFFN",
          dict(d_model=D_MODEL, n_heads=2, n_layers=1, vocab_size=32, attn_config=dict(kv_n_heads=2, clip_qkv=8),
               ffn_config=dict(ffn_hidden_size=12, moe_num_experts=8, moe_top_k=4, moe_jitter_eps=0,
                               moe_normalize_expert_weights=1)),
          dbrx_routing, 12, 8, 4, router="router", router_weight="router.layer.weight", loss=dbrx_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=True, norm_epsilon=0.0,
                       moe_normalize_expert_weights=1)),
    Model("granitemoe", "GraniteMoeForCausalLM", "GraniteMoeMoE",
          dict(SMALL, intermediate_size=12, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=4),
          granite_routing, 12, 8, 4, router="router", router_weight="router.layer.weight", loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax_over_chosen")),
    Model("jetmoe", "JetMoeForCausalLM", "JetMoeMoE",
          dict(hidden_size=D_MODEL, num_key_value_heads=2, kv_channels=8, vocab_size=32, intermediate_size=12,
               num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2),
          granite_routing, 12, 8, 2, router="router", router_weight="router.layer.weight", loss=logits_loss,
          options=dict(SWIGLU, layer=0, scoring="softmax_over_chosen", output_bias=True)),
    Model("phimoe", "PhimoeForCausalLM", "PhimoeSparseMoeBlock",
          dict(SMALL, intermediate_size=12, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2,
               router_jitter_noise=0.01, input_jitter_noise=0.01),
          loop_routing, 12, 8, 2, loss=logits_loss, condition=near_ties, gains={"gate": 0.25},
          shared_direction=0.5,
          options=dict(SWIGLU, layer=0, scoring="sparsemixer", router_jitter_noise=0.01)),
    Model("phimoe_train", "PhimoeForCausalLM", "PhimoeSparseMoeBlock",
          dict(SMALL, intermediate_size=12, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2,
               router_jitter_noise=0.01, input_jitter_noise=0.0),
          loop_routing, 12, 8, 2, loss=logits_loss, condition=estimator_cases, gains={"gate": 0.25},
          shared_direction=0.5, training=True, draws=phimoe_draws,
          options=dict(SWIGLU, layer=0, scoring="sparsemixer", router_jitter_noise=0.01)),
    Model("switch_transformers", "SwitchTransformersForConditionalGeneration", "SwitchTransformersSparseMLP",
          dict(d_model=D_MODEL, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
               num_sparse_decoder_layers=1, num_heads=2, vocab_size=32, num_experts=8, expert_capacity=64),
          switch_routing, 24, 8, 1, router="router", router_weight="router.classifier.weight", loss=switch_loss,
          condition=nothing_drops,
          options=dict(expert="mlp", activation="relu", layer=1, scoring="softmax", norm_topk_prob=False,
                       expert_capacity=64, capacity_per="sequence")),
    Model("switch_transformers_drop", "SwitchTransformersForConditionalGeneration", "SwitchTransformersSparseMLP",
          dict(d_model=D_MODEL, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
               num_sparse_decoder_layers=1, num_heads=2, vocab_size=32, num_experts=8, expert_capacity=2),
          switch_routing, 24, 8, 1, router="router", router_weight="router.classifier.weight", loss=switch_loss,
          condition=switch_drops,
          options=dict(expert="mlp", activation="relu", layer=1, scoring="softmax", norm_topk_prob=False,
                       expert_capacity=2, capacity_per="sequence")),
    Model("nllb_moe", "NllbMoeForConditionalGeneration", "NllbMoeSparseMLP",
          dict(d_model=D_MODEL, encoder_layers=4, encoder_ffn_dim=24, encoder_attention_heads=2, decoder_layers=4,
               decoder_ffn_dim=24, decoder_attention_heads=2, vocab_size=32, num_experts=8, expert_capacity=64,
               encoder_sparse_step=4, decoder_sparse_step=4, moe_token_dropout=0.2),
          nllb_routing, 24, 8, 2, router="router", router_weight="router.classifier.weight", loss=nllb_loss,
          condition=nothing_drops, arguments=dict(padding_mask=None),
          options=dict(expert="mlp", activation="relu", layer=3, expert_bias=True, scoring="softmax",
                       norm_topk_prob=True, normalize_router_prob_before_dropping=False, second_expert_policy="all",
                       batch_prioritized_routing=False, moe_eval_capacity_token_fraction=1.0,
                       expert_capacity=12, capacity_per="batch", moe_token_dropout=0.2)),
    Model("nllb_moe_drop", "NllbMoeForConditionalGeneration", "NllbMoeSparseMLP",
          dict(d_model=D_MODEL, encoder_layers=4, encoder_ffn_dim=24, encoder_attention_heads=2, decoder_layers=4,
               decoder_ffn_dim=24, decoder_attention_heads=2, vocab_size=32, num_experts=8, expert_capacity=64,
               encoder_sparse_step=4, decoder_sparse_step=4, moe_token_dropout=0.2,
               moe_eval_capacity_token_fraction=0.25),
          nllb_routing, 24, 8, 2, router="router", router_weight="router.classifier.weight", loss=nllb_loss,
          condition=nllb_drops, arguments=dict(padding_mask=None),
          options=dict(expert="mlp", activation="relu", layer=3, expert_bias=True, scoring="softmax",
                       norm_topk_prob=True, normalize_router_prob_before_dropping=False, second_expert_policy="all",
                       batch_prioritized_routing=False, moe_eval_capacity_token_fraction=0.25,
                       expert_capacity=3, capacity_per="batch", moe_token_dropout=0.2)),
    Model("deepseek_v2_lite", "DeepseekV2ForCausalLM", "DeepseekV2MoE",
          dict(SMALL_MLA, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, first_k_dense_replace=1,
               n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=6, topk_method="greedy",
               norm_topk_prob=False, routed_scaling_factor=1.0),
          deepseek_routing, 12, 8, 6,
          options=dict(SWIGLU, layer=1, scoring="softmax", topk_method="greedy", norm_topk_prob=False,
                       routed_scaling_factor=1.0, n_shared_experts=2, shared_expert_d_ff=24)),
    Model("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeSparseMoeBlock",
          dict(SMALL, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, moe_num_experts=8, moe_k=4,
               moe_num_shared_experts=2, moe_layer_start_index=1, moe_norm_min=1e-12, use_bias=False),
          loop_routing, 12, 8, 4, loss=logits_loss, condition=bias_changes_choices,
          options=dict(SWIGLU, layer=1, scoring="softmax", selection_bias=True, norm_topk_prob=True,
                       norm_minimum=1e-12, n_shared_experts=2, shared_expert_d_ff=24)),
    Model("glm4_moe", "Glm4MoeForCausalLM", "Glm4MoeMoE",
          dict(SMALL, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, first_k_dense_replace=1,
               n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=4, n_group=1, topk_group=1,
               norm_topk_prob=True, routed_scaling_factor=2.5),
          deepseek_routing, 12, 8, 4, condition=bias_changes_choices, gains={"e_score": 0.08},
          options=dict(SWIGLU, layer=1, scoring="sigmoid", selection_bias=True, n_group=1, topk_group=1,
                       group_score="sum_of_top_2", norm_topk_prob=True, norm_epsilon=1e-20,
                       routed_scaling_factor=2.5, n_shared_experts=1, shared_expert_d_ff=12)),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent / "data")
    parser.add_argument("models", nargs="*", help="names of models; all when none is given")
    parser.add_argument("--sources", type=pathlib.Path, help="folder with checkouts of the authors' repositories")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if arguments.sources is not None:
        import authors_layers
        import authors_names
        import authors_routers

        authors_layers.make(arguments.sources, arguments.out, arguments.models)
        authors_routers.make(arguments.sources, arguments.out, arguments.models)
        return authors_names.make(arguments.out, arguments.models)
    for model in MODELS:
        if arguments.models and model.name not in arguments.models:
            continue
        path = arguments.out / f"{model.name}.safetensors"
        seed, config = generate(model, path)
        print(f"{model.name}: seed {seed}, {path.stat().st_size} bytes, {config['tensor_prefix']}", flush=True)


if __name__ == "__main__":
    main()
