"""Golden layers from the authors' own published code, called where it stands in checkouts of their repositories.

generate.py calls make(). Nothing of a layer is reimplemented. What an import of the authors' asks for and a layer
never calls (kernels for GPUs, attention) is replaced by an empty module, and process groups by those of one process.
See README.md for repositories, commits and the table.
"""

import os

# As in generate.py: the same instructions on every machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false")

import contextlib
import hashlib
import importlib
import json
import re
import sys
import types
import unittest.mock

import numpy
import safetensors.torch
import torch

import generate
from generate import D_MODEL, MARGIN, SEQUENCES, SWIGLU, TOKENS, TOKENS_PER_SEQUENCE


STAND_INS = set()  # names in sys.modules


def module(name, path=None, **members):
    """An empty module; with a path a package whose __init__ is not run."""
    made = types.ModuleType(name)
    if path is not None:
        made.__path__ = [str(path)]
    vars(made).update(members)
    sys.modules[name] = made
    STAND_INS.add(name)
    return made


def never_called(*arguments, **named):
    raise AssertionError("a layer called what stands in for something it does not need")


class Recorder(generate.Recorder):
    """Keeps further results of torch calls, by torch's name of the function."""

    def __init__(self, router_weight):
        super().__init__(router_weight)
        self.results = {"softmax": [], "sigmoid": [], "einsum": [], "matmul": []}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "histc":  # fairseq's log counts integers with it, which torch does on GPUs only
            args = (args[0].float(), *args[1:])
        result = super().__torch_function__(function, types, args, kwargs)
        if name in self.results:
            self.results[name].append(result)
        return result


# The authors' layers. Each of these functions takes the checkout's folder and returns a new layer.


def deepseek_v3(source):
    module("kernel", act_quant=never_called, weight_dequant=never_called, fp8_gemm=never_called)
    module("authors_deepseek_v3", source / "inference")
    code = importlib.import_module("authors_deepseek_v3.model")
    code.Linear.dtype = torch.float32  # bfloat16 in the released configuration
    arguments = code.ModelArgs(dim=D_MODEL, moe_inter_dim=12, n_routed_experts=16, n_shared_experts=1,
                               n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, score_func="sigmoid",
                               route_scale=2.5)
    layer = code.MoE(arguments)
    layer.gate.bias = torch.nn.Parameter(torch.zeros(16))  # the authors make one where dim is 7168
    return layer


def mixtral(source):
    module("xformers")
    module("xformers.ops")
    module("xformers.ops.fmha", memory_efficient_attention=never_called)
    masks = ("AttentionBias", "BlockDiagonalMask", "BlockDiagonalCausalMask",
             "BlockDiagonalCausalWithOffsetPaddedKeysMask")
    module("xformers.ops.fmha.attn_bias", **{mask: object for mask in masks})
    module("mistral_inference", source / "src" / "mistral_inference")
    code = importlib.import_module("mistral_inference.transformer_layers")
    experts = [code.FeedForward(dim=D_MODEL, hidden_dim=24) for _ in range(8)]
    gate = torch.nn.Linear(D_MODEL, 8, bias=False)  # as in the authors' TransformerBlock
    return code.MoeLayer(experts, gate, code.MoeArgs(num_experts=8, num_experts_per_tok=2))


def gpt_oss(source):
    module("gpt_oss", source / "gpt_oss")
    code = importlib.import_module("gpt_oss.torch.model")
    config = code.ModelConfig(num_experts=8, experts_per_token=4, hidden_size=D_MODEL, intermediate_size=16)
    layer = code.MLPBlock(config).float()
    layer.norm = torch.nn.Identity()  # the norm before the layer is no part of it
    return layer


def llama4(source):
    import fairscale.nn.model_parallel.initialize as parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel.initialize_model_parallel(1)
    module("authors_llama4", source / "models" / "llama4")
    code = importlib.import_module("authors_llama4.moe")
    arguments = code.MoEArgs(num_experts=8, top_k=1, auto_scale_F=False)
    return code.MoE(dim=D_MODEL, hidden_dim=18, ffn_dim_multiplier=1.0, multiple_of=4, moe_args=arguments)  # width 12


def deepseek_v2(method, groups, top_k, sequence_loss):
    def build(source):
        import transformers.models.llama.modeling_llama as llama

        llama.LlamaFlashAttention2 = None  # attention of older versions of transformers
        module("authors_deepseek_vl2", source / "deepseek_vl2" / "models")
        code = importlib.import_module("authors_deepseek_vl2.modeling_deepseek")
        config = code.DeepseekV2Config(
            hidden_size=D_MODEL, moe_intermediate_size=12, n_routed_experts=16 if groups else 8, n_shared_experts=2,
            num_experts_per_tok=top_k, topk_method=method, n_group=4 if groups else None,
            topk_group=2 if groups else None, norm_topk_prob=False, routed_scaling_factor=16.0 if groups else 1.0,
            scoring_func="softmax", seq_aux=sequence_loss, aux_loss_alpha=0.5)
        return code.DeepseekV2MoE(config)  # in training: with a loss, and with gradients

    return build


def dbrx(source):
    module("authors_dbrx", source / "model")
    code = importlib.import_module("authors_dbrx.modeling_dbrx")
    config = code.DbrxFFNConfig(ffn_hidden_size=12, moe_num_experts=8, moe_top_k=4, moe_jitter_eps=0.0,
                                moe_normalize_expert_weights=1)
    return code.DbrxFFN(D_MODEL, config).eval()


def jetmoe(source):
    module("authors_jetmoe", source / "jetmoe" / "utils")
    code = importlib.import_module("authors_jetmoe.moe")
    layer = code.MoE(D_MODEL, 12, num_experts=8, top_k=2, bias=True, activation=torch.nn.functional.silu)
    return layer  # in training: with a loss


def moe_plus_plus(source):
    module("authors_moe_plus_plus", source / "MoE++")
    code = importlib.import_module("authors_moe_plus_plus.moe_plus_plus_layer")
    models = importlib.import_module("authors_moe_plus_plus.modeling_moe_plus_plus")
    expert = models.MLPMoE(types.SimpleNamespace(hidden_size=D_MODEL, intermediate_size=12))
    # 4 of these, 2 constant ones, 1 copy, 1 zero.
    return code.MOE(D_MODEL, expert, num_experts=8, moe_use_mixtral_gating=True, moe_2layer_gate=False)


def openmoe(source):
    code = source / "colossalai"
    module("colossalai", code)
    module("colossalai.utils", get_current_device=lambda: torch.device("cpu"))
    module("colossalai.kernel")
    module("colossalai.kernel.triton")
    module("colossalai.kernel.triton.llama_act_combine_kernel", HAS_TRITON=False)
    module("colossalai.context", code / "context")
    module("colossalai.shardformer")
    module("colossalai.shardformer.layer")
    # Only draws first weights, which are replaced.
    module("colossalai.shardformer.layer.utils",
           Randomizer=lambda seed: types.SimpleNamespace(fork_rng=lambda enable_cpu: contextlib.nullcontext()))
    module("colossalai.tensor", code / "tensor")
    module("colossalai.moe", code / "moe")
    module("colossalai.moe.load_balance", LoadBalancer=never_called)
    layers = importlib.import_module("colossalai.moe.layers")
    return layers.SparseMLP(num_experts=8, hidden_size=D_MODEL, intermediate_size=12, router_top_k=2,
                            mlp_activation="swiglu", mlp_gated=True)  # in training: with losses


def openmoe_loss(kind):
    return lambda run: getattr(sys.modules["colossalai.moe.manager"].MOE_MANAGER, kind)[-1]


def nllb(fraction, prioritised=False):
    def build(source):
        code = source / "fairseq"
        utils = module("fairseq.distributed_utils", get_moe_group=lambda experts: (0, None),
                       get_all2all_group=lambda experts: (0, None), get_world_size=lambda group: 1,
                       get_data_parallel_rank=lambda: 0)
        module("fairseq", code, distributed_utils=utils)
        modules = module("fairseq.modules", code / "modules")
        for name, members in (("layer_norm", ["LayerNorm"]), ("gelu", ["gelu", "gelu_accurate"])):
            found = importlib.import_module("fairseq.modules." + name)
            vars(modules).update({member: getattr(found, member) for member in members})
        modules.MultiheadAttention = never_called
        layers = importlib.import_module("fairseq.modules.transformer_layer")
        config = types.SimpleNamespace(
            moe_expert_count=8, batch_size_valid=SEQUENCES, activation_fn="relu", activation_dropout=0.0,
            relu_dropout=0.0, dropout=0.0, quant_noise=types.SimpleNamespace(pq=0.0, pq_block_size=8))
        gate = layers.Top2Gate(D_MODEL, 8, use_fp32=True, second_expert_policy="all",
                               moe_eval_capacity_token_fraction=fraction, batch_prioritized_routing=prioritised)
        experts = layers.make_experts(config, D_MODEL, 24, None)
        return layers.MOELayer(gate, experts, config, tok_dropout=0.2).eval()

    return build


class JaxFunction(torch.autograd.Function):
    """A function of JAX for torch's autograd."""

    @staticmethod
    def forward(context, function, *values):
        context.function, context.values = function, [value.numpy() for value in values]
        return torch.from_numpy(numpy.array(function(*context.values)))

    @staticmethod
    def backward(context, d_y):
        import jax

        gradients = jax.vjp(context.function, *context.values)[1](d_y.numpy())
        return None, *(torch.from_numpy(numpy.array(gradient)) for gradient in gradients)


class JaxLayer(torch.nn.Module):
    """A layer of JAX. `call` takes the weights by name and x; `shown` is what it has shown of its routing."""

    def __init__(self, call, shapes, shown):
        super().__init__()
        self.call, self.shown = call, shown
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        weights = dict(self.named_parameters())
        return JaxFunction.apply(lambda x, *values: self.call(dict(zip(weights, values)), x), x, *weights.values())


def grok_1(source):
    import haiku
    import jax

    module("authors_grok_1", source)
    # Of JAX at the authors' time; newer versions have neither. There is no mesh around the layer.
    no_mesh = types.SimpleNamespace(env=types.SimpleNamespace(physical_mesh=types.SimpleNamespace(empty=True)))
    jax.experimental.maps = module("jax.experimental.maps", thread_resources=no_mesh)
    with unittest.mock.patch.object(jax.config, "update"):  # jax_spmd_mode, for several processes
        code = importlib.import_module("authors_grok_1.model")
    # The authors round gates and outputs to bfloat16.
    code.jnp = types.SimpleNamespace(**{**vars(jax.numpy), "bfloat16": jax.numpy.float32})
    mesh = jax.sharding.Mesh(numpy.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    shown = {}

    class Router(code.Router):
        def compute_routing_prob(self, *arguments):
            probabilities, logits, zero = super().compute_routing_prob(*arguments)
            shown.update(logits=logits)
            return probabilities, logits, zero

    def layer(x):
        def expert(x):  # two thirds of 2.25 * 16: width 24
            return code.DenseBlock(num_q_heads=2, num_kv_heads=2, key_size=8, widening_factor=2.25, mesh=mesh)(x)

        router = Router(num_selected_experts=2, mesh=mesh, name="router")
        return code.MoELayer(num_experts=8, layer_fn=expert, router=router, mesh=mesh)(x, None)

    def call(weights, x):
        # Experts are read as 8-bit weights and their scales. Here the weights are not rounded, and scales are 1.
        parameters = {"router": {"w": weights["router/w"]}}
        for name in ("moe/linear", "moe/linear_v", "moe/linear_1"):
            weight = weights[name + "/w"]
            scales = numpy.ones((8, 1, weight.shape[2]), numpy.float32)
            parameters[name] = {"w": code.QuantizedWeight8bit(weight, scales)}
        top_k = jax.lax.top_k

        def seen_top_k(values, k):
            shown["top_k"] = top_k(values, k)
            return shown["top_k"]

        try:
            jax.lax.top_k = seen_top_k
            return haiku.without_apply_rng(haiku.transform(layer)).apply(parameters, x)
        finally:
            jax.lax.top_k = top_k

    shapes = {"router/w": (D_MODEL, 8), "moe/linear/w": (8, D_MODEL, 24), "moe/linear_v/w": (8, D_MODEL, 24),
              "moe/linear_1/w": (8, 24, D_MODEL)}
    return JaxLayer(call, shapes, shown)


# Chosen experts and gates, each [tokens, k], of a run.


def of_gate(gates, experts):
    """Where the gate returns both."""
    return lambda run: (run.gate_output[experts], run.gate_output[gates])


def mixtral_routing(run):
    return run.record.ranked[0][2], run.record.gates


def softmax_of_chosen(run):
    return run.record.ranked[0][2], run.record.results["softmax"][0]


def llama4_routing(run):
    experts = run.record.ranked[0][2]
    return experts, run.record.results["sigmoid"][0].transpose(0, 1).gather(1, experts)


def two_choices(run):
    # The two choices before the capacity; a dropped choice has gate 0.
    experts = torch.cat([ranked[2].view(TOKENS, 1) for ranked in run.record.ranked], dim=-1)
    return experts, run.gate_output[1].sum(-1).gather(1, experts)


def grok_1_routing(run):
    gates, experts = (torch.from_numpy(numpy.array(values)).view(TOKENS, 2) for values in run.block.shown["top_k"])
    return experts.long(), gates


def grok_1_logits(run):
    return torch.from_numpy(numpy.array(run.block.shown["logits"]))


def llama4_logits(run):
    return run.record.results["matmul"][0].detach()


# From the authors' names and shapes to those of the published checkpoint; for weights and gradients.


def same(tensors):
    return tensors


def renamed(*rules):
    def rename(tensors):
        for pattern, replacement in rules:
            tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
        return tensors

    return rename


def gpt_oss_names(tensors):
    turned = {name: value.transpose(1, 2) if value.dim() == 3 else value for name, value in tensors.items()}
    return renamed(("^gate", "router"), ("^mlp1_weight", "experts.gate_up_proj"), ("^mlp2_weight", "experts.down_proj"),
                   ("^mlp1_bias", "experts.gate_up_proj_bias"), ("^mlp2_bias", "experts.down_proj_bias"))(turned)


def llama4_names(tensors):
    fused = {"router.weight": tensors["router_DE"].transpose(0, 1),
             "experts.gate_up_proj": torch.cat([tensors["experts.w1"], tensors["experts.w3"]], dim=-1),
             "experts.down_proj": tensors["experts.w2"]}
    for author, checkpoint in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        fused[f"shared_expert.{checkpoint}.weight"] = tensors[f"shared_expert.{author}.weight"]
    return fused


def moe_plus_plus_names(tensors):
    # Gate residuals, which come from the layer before, are not given.
    return {name: value for name, value in tensors.items() if "gate_map" not in name}


DEEPSEEK_V3_NAMES = renamed((r"gate\.bias", "gate.e_score_correction_bias"), (r"\.w1\.", ".gate_proj."),
                            (r"\.w2\.", ".down_proj."), (r"\.w3\.", ".up_proj."))
NLLB_NAMES = renamed(("^gate.wg", "router.classifier"), (r"^experts\.", "experts.expert_"))


# Conditions on the inputs.


def no_condition(layer, run):
    return True


def deepseek_v3_condition(layer, run):
    """The bias, the groups and the kind of mask each change choices: at least three tokens would choose otherwise if
    groups left out had score 0 in place of minus infinity. So they choose experts with negative scores."""
    masked, k, chosen = run.record.ranked[-1]
    by_zero = masked.masked_fill(masked == float("-inf"), 0.0).topk(k).indices
    changed = (by_zero.sort(-1).values != chosen.sort(-1).values).any(-1).sum()
    bias_changes = (run.experts.sort(-1).values != run.unbiased.experts.sort(-1).values).any(-1).sum()
    away_from_zero = masked.abs().min() > MARGIN
    return (changed >= 3 and bias_changes >= 3 and bool(away_from_zero) and
            generate.ranking_is_clear(run.unbiased.record) and generate.groups_change_choices(layer, run))


def every_kind_is_chosen(layer, run):
    return bool((run.experts.flatten().bincount(minlength=8)[4:] >= 2).all())


def grok_1_condition(layer, run):
    return generate.gaps_are_clear(run.logits.softmax(-1), 3)


def order_changes_drops(layer, run):
    """Seats in order of the largest probability go to other tokens than in token order, and to the same ones as in
    order of the largest gate: where a token's two experts are the only ones, its probabilities are its gates."""
    best = run.logits.softmax(-1).max(-1).values.sort().values
    dropped, in_order = run.gates == 0, run.unbiased.gates == 0
    only_two = torch.full_like(run.logits, float("-inf")).scatter(1, run.experts, run.logits.gather(1, run.experts))
    function = sys.modules["fairseq.modules.moe.top2gate"].top2gating
    with Recorder(run.logits):
        combine = function(only_two, None, True, "all", False, True, 0.25, True)[1]
    by_gate = combine.sum(-1).gather(1, run.experts) == 0
    return (generate.nllb_drops(layer, run) and bool((best[1:] - best[:-1] > MARGIN).all()) and
            bool(((dropped != in_order).sum(0) >= 2).all()) and torch.equal(dropped, by_gate))


class Layer:
    def __init__(self, name, repository, cls, build, prefix, d_ff, experts, top_k, options, routing,
                 router_weight="gate.weight", gate="gate", names=same, condition=no_condition, gains=None, shift=None,
                 loss=None, other=None, output=None, logits=None, flat=False, loss_in_gradient=0.0, add_loss=False,
                 z_loss=None):
        self.name = name
        self.repository = repository
        self.commit, self.file, self.blob = SOURCES[repository]
        self.cls = cls  # the authors' class
        self.build = build
        self.prefix = prefix  # beginning of the names in the checkpoint
        self.d_ff, self.experts, self.top_k = d_ff, experts, top_k
        self.options = options
        self.routing = routing
        self.router_weight, self.gate = router_weight, gate
        self.names = names
        self.condition = condition
        self.gains, self.shift = gains or {}, shift or {}
        self.shared_direction = 0.0
        self.loss, self.z_loss = loss, z_loss  # without coefficients
        self.other = other  # changes a layer into the one that conditions compare with
        self.output = output  # takes the output from a run, where it is not what forward returns
        self.logits = logits  # takes the router's logits from a run, where they are not from a linear layer
        self.flat = flat  # whether forward takes [tokens, d_model]
        self.loss_in_gradient = loss_in_gradient  # the gradients are of the output and of the losses times this,
        self.add_loss = add_loss  # which are added here where the layer's own backward pass does not


class Run:
    """One forward pass of a layer with everything it has shown."""

    def __init__(self, layer, block, x):
        torch.manual_seed(1)
        self.block, shown = block, {}
        gate = dict(block.named_modules()).get(layer.gate)
        hook = gate.register_forward_hook(lambda *a: shown.update(output=a[-1])) if gate is not None else None
        with Recorder(dict(block.named_parameters())[layer.router_weight]) as self.record:
            output = block(x if layer.flat else x.view(SEQUENCES, TOKENS_PER_SEQUENCE, -1))
        if hook is not None:
            hook.remove()
        self.gate_output = shown.get("output")
        if layer.output is not None:
            output = layer.output(self)
        self.output = output
        self.y = (output[0] if isinstance(output, tuple) else output).reshape(TOKENS, -1)
        logits = self.record.logits if layer.logits is None else layer.logits(self)
        self.logits = logits.reshape(TOKENS, -1).clone()
        experts, gates = layer.routing(self)
        self.experts, self.gates = experts.detach().clone(), gates.detach().clone()


def find_inputs(layer, block):
    """As generate.find_inputs: the first seed whose tokens and weights make a good test."""
    for seed in range(generate.FIRST_SEED, generate.FIRST_SEED + generate.SEEDS):
        generator = torch.Generator().manual_seed(seed)
        state = generate.draw_weights(layer, block, generator)
        state = {name: value + layer.shift.get(name, 0.0) for name, value in state.items()}
        x = generate.draw(generator, (TOKENS, D_MODEL), 1.0)
        d_y = generate.draw(generator, (TOKENS, D_MODEL), 1.0)
        with torch.no_grad():
            block.load_state_dict(state)
            run = Run(layer, block, x.clone())
            if not generate.ranking_is_clear(run.record):
                continue
            if layer.other is not None:
                undo = layer.other(block)
                run.unbiased = Run(layer, block, x.clone())
                undo()
            if layer.condition(layer, run):
                return seed, state, x, d_y
    raise RuntimeError(f"no seed for {layer.name}")


def without_bias(block):
    bias = block.gate.bias.clone()
    block.gate.bias.zero_()
    return lambda: block.gate.bias.copy_(bias)


def in_token_order(block):
    block.gate.batch_prioritized_routing = False
    return lambda: setattr(block.gate, "batch_prioritized_routing", True)


def results(layer, source, state, x, d_y):
    """What a new layer with these weights computes, under the names of a golden file."""
    block = layer.build(source)
    block.load_state_dict(state)
    leaf = x.clone().requires_grad_(True)
    run = Run(layer, block, leaf)
    objective = (run.y * d_y).sum()
    if layer.add_loss:
        for loss in (layer.loss, layer.z_loss):
            objective = objective + layer.loss_in_gradient * loss(run) if loss is not None else objective
    objective.backward()
    tensors = {layer.prefix + name: value.contiguous() for name, value in layer.names(state).items()}
    tensors["golden.x"], tensors["golden.d_y"] = x, d_y
    tensors["golden.y"] = run.y.detach().clone()
    tensors["golden.experts"], tensors["golden.gates"] = run.experts, run.gates
    tensors["golden.router_logits"] = run.logits
    tensors["golden.d_x"] = leaf.grad.clone()
    if layer.loss is not None:
        tensors["golden.balance_loss"] = layer.loss(run).detach().reshape(1).double()
    if layer.z_loss is not None:
        tensors["golden.z_loss"] = layer.z_loss(run).detach().reshape(1).double()
    # An expert without a token, and a router that is cut off, have no gradient in torch; it is zero.
    gradients = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                 for name, parameter in block.named_parameters()}
    for name, value in layer.names(gradients).items():
        if "e_score_correction_bias" not in name:
            tensors["golden.grad." + layer.prefix + name] = value.contiguous()
    return tensors


def check_source(layer, source):
    data = (source / layer.file).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if blob != layer.blob:
        raise RuntimeError(f"{source / layer.file} is {blob}, not {layer.blob} of commit {layer.commit}")


def write(layer, path, seed, tensors):
    config = {"d_model": D_MODEL, "d_ff": layer.d_ff, "num_experts": layer.experts, "top_k": layer.top_k,
              "sequences": SEQUENCES, "tokens_per_sequence": TOKENS_PER_SEQUENCE, "tensor_prefix": layer.prefix,
              "loss_in_gradient": layer.loss_in_gradient, **layer.options}
    metadata = {"model": layer.name, "module": f"{layer.file}: {layer.cls}", "repository": layer.repository,
                "commit": layer.commit, "torch": torch.__version__.split("+")[0], "seed": str(seed),
                "config": json.dumps(config, sort_keys=True)}
    generate.write(path, tensors, metadata)


def make(sources, out, chosen=()):
    """All files into the folder `out`, from checkouts of repositories in the folder `sources`."""
    for layer in LAYERS:
        if chosen and layer.name not in chosen:
            continue
        source = sources / layer.repository.split("/")[1]
        check_source(layer, source)
        seed, state, x, d_y = find_inputs(layer, layer.build(source))
        tensors = results(layer, source, state, x, d_y)
        path = out / f"{layer.name}.safetensors"
        write(layer, path, seed, tensors)
        stored = safetensors.torch.load_file(path)
        again = results(layer, source, state, stored["golden.x"], stored["golden.d_y"])
        assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in again)
        print(f"{layer.name}: seed {seed}, {path.stat().st_size} bytes, {layer.prefix}", flush=True)
    for name in STAND_INS:
        del sys.modules[name]


# Of each repository the commit, the file with the layer, and what `git hash-object` says of that file.
SOURCES = {
    "deepseek-ai/DeepSeek-V3": ("9b4e9788e4a3a731f7567338ed15d3ec549ce03b", "inference/model.py",
                                "886849975d3b146bfb84f8ea5fdff265c210fcec"),
    "deepseek-ai/DeepSeek-VL2": ("ef9f91e2b6426536b83294c11742c27be66361b1",
                                 "deepseek_vl2/models/modeling_deepseek.py",
                                 "1a84a0187a0602d529ecd2dafdc6b472f63a2cc1"),
    "mistralai/mistral-inference": ("2557e12d0e1878a1562ece30434820f80aa3e12a", "src/mistral_inference/moe.py",
                                    "9ce8a8a9c62e9a8edff797c0262b393c30ea38e7"),
    "openai/gpt-oss": ("7b583341fe16729127f6d5b94a7b09ccae97e1a1", "gpt_oss/torch/model.py",
                       "9180d4936860cfd2a95447245904a893a6aa607e"),
    "meta-llama/llama-models": ("a9c89c471f793423afd4cc3ca8671d6e56fe64cb", "models/llama4/moe.py",
                                "d66afdb562250e7397d9b1f00e287da2447fa63a"),
    "databricks/dbrx": ("a3200393e678387a6f30f3e903108c650625eb21", "model/modeling_dbrx.py",
                        "05641659a92e8619b05fb17faa641ffebe632c67"),
    "xai-org/grok-1": ("7050ed204b8206bb8645c7b7bbef7252f79561b0", "model.py",
                       "87d700d9b5fde6d86dda2883192861195b7312ae"),
    "myshell-ai/JetMoE": ("0a9bc5a32386af9ea7abe9e32298976a94da908a", "jetmoe/utils/moe.py",
                          "5f6be99fef727ce1410d758d99d9462c79892279"),
    "SkyworkAI/MoE-plus-plus": ("7f439675dd015fa307a31443544f76fa3525ba92", "MoE++/moe_plus_plus_layer.py",
                                "a4cb387f51e65cf3e9cb3f721c347bdbc706dfdb"),
    "hpcaitech/ColossalAI": ("3c08f173480ddc11c61c8bfbe909d04ede9fdc2a", "colossalai/moe/layers.py",
                             "b768fb94a585ffdef847eb9e55bbf4863bbe8737"),
    "facebookresearch/fairseq": ("ec0ae71a24fbc2f42252f37735f59dd6547eba38", "fairseq/modules/moe/moe_layer.py",
                                 "faf38604c2768d2333bbfa5eb92db826d9fb2f6b"),
}

DEEPSEEK_V2 = dict(repository="deepseek-ai/DeepSeek-VL2", cls="DeepseekV2MoE", prefix="model.layers.1.mlp.", d_ff=12,
                   top_k=6, routing=of_gate(gates=1, experts=0), loss=lambda run: run.gate_output[2] / 0.5,
                   loss_in_gradient=0.5)
NLLB = dict(repository="facebookresearch/fairseq", cls="MOELayer", prefix="model.encoder.layers.3.ffn.", d_ff=24,
            experts=8, top_k=2, routing=two_choices, router_weight="gate.wg.weight", names=NLLB_NAMES,
            loss=lambda run: run.gate_output[0])
NLLB_OPTIONS = dict(expert="mlp", activation="relu", layer=3, expert_bias=True, scoring="softmax", norm_topk_prob=True,
                    normalize_gate_prob_before_dropping=False, second_expert_policy="all", capacity_per="batch",
                    moe_eom=0.2)

LAYERS = [
    Layer("authors_deepseek_v3", "deepseek-ai/DeepSeek-V3", "MoE", deepseek_v3, "model.layers.3.mlp.", 12, 16, 4,
          dict(SWIGLU, layer=3, scoring="sigmoid", selection_bias=True, n_group=4, topk_group=2,
               group_score="sum_of_top_2", norm_topk_prob=True, norm_epsilon=0.0, routed_scaling_factor=2.5,
               n_shared_experts=1, shared_expert_d_ff=12),
          of_gate(gates=0, experts=1), names=DEEPSEEK_V3_NAMES, condition=deepseek_v3_condition,
          gains={"gate.bias": 0.2}, shift={"gate.bias": -0.6}, other=without_bias),
    Layer("authors_deepseek_v2", build=deepseek_v2("group_limited_greedy", True, 6, True), experts=16,
          condition=generate.groups_change_choices, gains={"down_proj": 0.7}, **DEEPSEEK_V2,
          options=dict(SWIGLU, layer=1, scoring="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=2,
                       group_score="max", norm_topk_prob=False, routed_scaling_factor=16.0, n_shared_experts=2,
                       shared_expert_d_ff=24, seq_aux=True)),
    Layer("authors_deepseek_v2_lite", build=deepseek_v2("greedy", False, 6, False), experts=8, **DEEPSEEK_V2,
          options=dict(SWIGLU, layer=1, scoring="softmax", topk_method="greedy", norm_topk_prob=False,
                       routed_scaling_factor=1.0, n_shared_experts=2, shared_expert_d_ff=24, seq_aux=False)),
    Layer("authors_mixtral", "mistralai/mistral-inference", "MoeLayer", mixtral, "model.layers.0.block_sparse_moe.",
          24, 8, 2, dict(SWIGLU, layer=0, scoring="softmax_over_chosen"), mixtral_routing, flat=True),
    Layer("authors_gpt_oss", "openai/gpt-oss", "MLPBlock", gpt_oss, "model.layers.0.mlp.", 16, 8, 4,
          dict(layer=0, scoring="softmax_over_chosen", router_bias=True, expert="gpt_oss_swiglu",
               activation_alpha=1.702, activation_limit=7.0, expert_bias=True, gate_up_interleaved=True),
          softmax_of_chosen, names=gpt_oss_names, condition=generate.clamps_are_active, flat=True,
          gains={"mlp1_bias": 1.0, "mlp1_weight": 4.0, "mlp2_bias": 0.5, "mlp2_weight": 0.2},
          output=lambda run: run.record.results["einsum"][-1]),  # what the block adds to its residual
    Layer("authors_llama4", "meta-llama/llama-models", "MoE", llama4, "language_model.model.layers.0.feed_forward.",
          12, 8, 1,
          dict(SWIGLU, layer=0, scoring="sigmoid", gate_applied_to="input", n_shared_experts=1, shared_expert_d_ff=12,
               expert_inputs_detached=True),
          llama4_routing, router_weight="router_DE", names=llama4_names, logits=llama4_logits),
    Layer("authors_dbrx", "databricks/dbrx", "DbrxFFN", dbrx, "transformer.blocks.0.ffn.", 12, 8, 4,
          dict(SWIGLU, layer=0, scoring="softmax", norm_topk_prob=True, norm_epsilon=0.0,
               moe_normalize_expert_weights=1),
          of_gate(gates=1, experts=2), router_weight="router.layer.weight", gate="router"),
    Layer("authors_grok_1", "xai-org/grok-1", "MoELayer", grok_1, "transformer/decoder_layer_0/", 24, 8, 2,
          dict(layer=0, expert="geglu", activation="gelu_tanh", scoring="softmax", norm_topk_prob=False),
          grok_1_routing, router_weight="router/w", condition=grok_1_condition, logits=grok_1_logits),
    Layer("authors_jetmoe", "myshell-ai/JetMoE", "MoE", jetmoe, "model.layers.0.mlp.", 12, 8, 2,
          dict(SWIGLU, layer=0, scoring="softmax_over_chosen", output_bias=True, z_loss_in_balance_loss=0.1),
          softmax_of_chosen, router_weight="router.layer.weight", loss=lambda run: run.output[1],
          loss_in_gradient=0.5, add_loss=True),
    Layer("authors_moe_plus_plus", "SkyworkAI/MoE-plus-plus", "MOE", moe_plus_plus, "model.layers.0.mlp.", 12, 8, 2,
          dict(SWIGLU, layer=0, scoring="softmax_over_chosen", moe_use_mixtral_gating=True, moe_2layer_gate=False,
               experts=["feed_forward"] * 4 + ["constant"] * 2 + ["copy", "zero"]),
          softmax_of_chosen, router_weight="moe.gate.wg.weight", names=moe_plus_plus_names,
          condition=every_kind_is_chosen, gains={"constant": 4.0}),
    Layer("authors_openmoe", "hpcaitech/ColossalAI", "SparseMLP", openmoe, "model.layers.5.mlp.", 12, 8, 2,
          dict(layer=5, expert="three_way", activation="silu", scoring="softmax", norm_topk_prob=False,
               expert_capacity=4, capacity_per="batch"),
          two_choices, router_weight="gate_weight", gate="router", condition=generate.nllb_drops,
          loss=openmoe_loss("router_aux_loss"), z_loss=openmoe_loss("router_z_loss"), loss_in_gradient=0.5,
          add_loss=True),
    Layer("authors_nllb_moe", build=nllb(1.0), condition=generate.nothing_drops, **NLLB,
          options=dict(NLLB_OPTIONS, expert_capacity=12, batch_prioritized_routing=False)),
    Layer("authors_nllb_moe_drop", build=nllb(0.25), condition=generate.nllb_drops, **NLLB,
          options=dict(NLLB_OPTIONS, expert_capacity=3, batch_prioritized_routing=False)),
    Layer("authors_nllb_moe_priority", build=nllb(0.25, True), condition=order_changes_drops, other=in_token_order,
          **NLLB, options=dict(NLLB_OPTIONS, expert_capacity=3, batch_prioritized_routing=True)),
]
