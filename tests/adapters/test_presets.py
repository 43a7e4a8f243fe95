"""Every preset against its published equation: outputs and gradients; and what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from support import published
from support.configs import config_problems
from support.families import DECODER
from support.published import Gate, Side, choose, tensors_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_medical.adapters.model import adapter_parameters, attach_adapters, trainable_parameters
from moe_medical.adapters.routing import BatchInputs, RoutingContext, Sequences
from moe_medical.config.adapters import PRESETS, MoloraConfig

IDS = torch.tensor([[5, 9, 33, 60, 7], [21, 4, 4, 50, 12]])
SAMPLES = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]])
TASKS = torch.tensor([[0, 0, 0, 2, 2], [1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
PROMPTS = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]).bool()
MLP = ("gate_proj", "up_proj", "down_proj")


def preset(name: str, **settings: object) -> MoloraConfig:
    """With small ranks, three tasks, and no dropout."""
    rank = 16 if name == "moelora" else 4
    config = replace(PRESETS[name], **{"rank": rank, "alpha": 6.0, "dropout": 0.0, **settings})
    return replace(config, num_tasks=3) if config.router_kind.knows_tasks else config


CASES = {
    **{name: preset(name) for name in PRESETS},
    "ming_moe with a shared expert": preset("ming_moe", shared_experts=2, shared_weight=0.7),
    "ming_moe with a learned shared weight": preset("ming_moe", shared_experts=2, learn_shared_weight=True),
    "ming_moe of temperature 2": preset("ming_moe", temperature=2.0),
    "ming_moe, gates not renormalised": preset("ming_moe", renormalise=False),
    "ming_moe, routers shared by blocks": preset("ming_moe", router_scope="block"),
    "ming_moe with rsLoRA": preset("ming_moe", rs_lora=True),
    "lora with rsLoRA": preset("lora", rs_lora=True),
    "lora with DoRA": preset("lora", dora=True),
    "token and task, routers shared by layers": preset("moelora", router="joint", router_scope="layer"),
    "token and task, one router": preset("ming_moe", router="joint", router_scope="model"),
    "moelora, sparse, a gate for each module": preset("moelora", top_k=2, router_scope="module"),
    "ming_moe, grouped": preset("ming_moe", path="grouped", shared_experts=1),
    "hydralora, top 2 of 4": preset("hydralora", num_experts=4, top_k=2),
    "moelora, sparse, grouped": preset("moelora", path="grouped", top_k=2, router_scope="block", rank=32),
    "adamole, grouped": preset("adamole", path="grouped"),
    "expert of experts": preset("ming_moe", router="hierarchical", groups=2),
    "expert of experts, dense, no bias": preset("lora_moe", router="hierarchical", groups=4),
    "by sequence": preset("ming_moe", router="sequence"),
    "by sequence, shared by the model": preset(
        "mola", experts_per_layer=(), router="sequence", router_scope="model"
    ),
    "mixlora by task": preset("mixlora", router="task"),
    "mixlora, top 1": preset("mixlora", top_k=1, renormalise=False),
    "mixlora, dense": preset("mixlora", top_k=0, num_experts=3),
    "med_moe, top 2, no meta expert": preset("med_moe", top_k=2, renormalise=True, shared_experts=0),
    "med_moe with a learned meta weight": preset("med_moe", learn_shared_weight=True, freeze_router=False),
    "hydralora, threshold": preset("hydralora", router="threshold", num_experts=4),
    "xlora with one scaling for all layers": preset("xlora", router_scope="model", freeze_experts=False),
    "xlora, top 2": preset("xlora", top_k=2, renormalise=False),
}


@cache
def base_state() -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER)).state_dict()


def base_model() -> PreTrainedModel:
    """The same weights at each call."""
    model = LlamaForCausalLM(LlamaConfig(**DECODER, attn_implementation="eager")).eval()
    model.load_state_dict(base_state())
    return model


def adapted(config: MoloraConfig) -> tuple[PreTrainedModel, RoutingContext]:
    """A model whose adapters are all moved from where they start, so that no zero hides a path."""
    model = base_model()
    context = attach_adapters(model, config, seed=7)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        by = 0.02 if config.experts == "ffn" and name.endswith("proj.weight") else 0.2
        parameter.data.add_(by * torch.randn(parameter.shape, generator=generator))
    return model, context


def bound(context: RoutingContext) -> AbstractContextManager[RoutingContext]:
    everywhere = torch.ones_like(TASKS).bool()
    return context.bind(BatchInputs(everywhere, TASKS, sequences=Sequences.of(POSITIONS, PROMPTS)))


# From a config and tensors by name to reference modules


def scaling_of(config: MoloraConfig) -> float:
    return config.alpha / (config.rank**0.5 if config.rs_lora else config.rank)


def choice_of(config: MoloraConfig) -> Callable[[Tensor], Tensor]:
    return partial(choose, top_k=config.top_k, renormalise=config.renormalise, temperature=config.temperature)


def gate_of(config: MoloraConfig, router: Mapping[str, Tensor]) -> Gate:
    kinds = {
        "token": published.token_gate,
        "task": published.task_gate,
        "joint": published.joint_gate,
        "sequence": published.sequence_gate,
        "hierarchical": partial(published.hierarchical_gate, groups=config.groups),
        "xlora": published.hidden_gate,
    }
    if config.router == "threshold":
        return published.threshold_gate(router)
    return kinds[config.router](router, choose_from=choice_of(config))


def scope_of(config: MoloraConfig, name: str) -> str:
    parts = name.split(".")  # model.layers.0.mlp.up_proj
    return ".".join({"module": parts, "block": parts[:4]}.get(config.router_scope, parts[:3]))


def gates_of(config: MoloraConfig, state: Mapping[str, Tensor], names: list[str]) -> Iterator[Gate]:
    """The gate of each of the routed modules, which are in the order in which they run."""
    known: dict[str, Gate] = {}
    for i, name in enumerate(names):
        if config.router == "xlora":
            known[str(i)] = xlora_gate(config, state, i)
            yield known[str(i)]
            continue
        scope = scope_of(config, name)
        if scope not in known:
            lender = names[0] if config.router_scope == "model" else name
            known[scope] = published.once(scope, gate_of(config, tensors_of(state, f"{lender}.router")))
        yield known[scope]


def xlora_gate(config: MoloraConfig, state: Mapping[str, Tensor], i: int) -> Gate:
    first = 0 if config.router_scope == "model" else i * config.num_experts
    mine = slice(first, first + config.num_experts)
    classifier = tensors_of(state, "xlora_classifier")
    return gate_of(config, {key: value[mine] for key, value in classifier.items()})


def reference_modules(config: MoloraConfig, state: Mapping[str, Tensor], side: Side) -> dict[str, nn.Module]:
    base, scaling = base_model(), scaling_of(config)
    linears = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
    linears += [f"model.layers.{i}.mlp.{n}" for i in range(2) for n in MLP]
    linears.sort(key=lambda name: name.split(".")[2])
    made: dict[str, nn.Module] = {}
    for name in linears:
        of = tensors_of(state, name)
        if of and of.get("lora_B", of.get("weight")).dim() == 2:
            kind = published.Dora if "magnitude" in of else published.Plain
            made[name] = kind(base.get_submodule(name), of, scaling, side)
    if config.experts != "linear":
        return made | blocks(config, state, side, base, scaling)
    routed = [name for name in linears if name not in made and tensors_of(state, name)]
    for name, gate in zip(routed, gates_of(config, state, routed), strict=True):
        of = {key: value for key, value in tensors_of(state, name).items() if "." not in key}
        made[name] = published.Experts(
            base.get_submodule(name), of, scaling, side, gate, config.shared_weight
        )
    return made


def blocks(
    config: MoloraConfig, state: Mapping[str, Tensor], side: Side, base: PreTrainedModel, scaling: float
) -> dict[str, nn.Module]:
    names = [f"model.layers.{i}.mlp" for i in range(2) if tensors_of(state, f"model.layers.{i}.mlp")]
    made: dict[str, nn.Module] = {}
    for name, gate in zip(names, gates_of(config, state, names), strict=True):
        block, of = base.get_submodule(name), tensors_of(state, name)
        if config.experts == "block":
            linears = {linear: tensors_of(of, linear) for linear in MLP}
            made[name] = published.FusedBlock(block, linears, scaling, side, gate)
        else:
            made[name] = full_block(config, block, of, side, gate)
    return made


def full_block(
    config: MoloraConfig, block: nn.Module, of: Mapping[str, Tensor], side: Side, gate: Gate, **how: bool
) -> published.FullBlock:
    ffns = [{n: of[f"{n}.weight"][i] for n in MLP} for i in range(len(of["up_proj.weight"]))]
    weights = of.get("shared_gate", torch.full((config.shared_experts,), config.shared_weight))
    experts, metas = ffns[: config.num_experts], ffns[config.num_experts :]
    return published.FullBlock(block, experts, metas, side, gate, weights, **how)


def reference_logits(config: MoloraConfig, state: Mapping[str, Tensor]) -> Tensor:
    model = base_model()
    side = Side(tasks=TASKS, samples=SAMPLES, prompt=PROMPTS)
    side.hidden = model.model(IDS).last_hidden_state.detach()
    published.put(model, reference_modules(config, state, side))
    return model(IDS, use_cache=False).logits


def scalar(logits: Tensor) -> Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum()


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_equation(case: str) -> None:
    config = CASES[case]
    model, context = adapted(config)
    state = published.leaves_of(adapter_parameters(model))
    expected = reference_logits(config, state)
    scalar(expected).backward()
    with bound(context):
        logits = model(IDS, use_cache=False).logits
        scalar(logits).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, base_model()(IDS).logits, atol=1e-2)
    for name, parameter in trainable_parameters(model).items():
        wanted = state[name].grad
        assert wanted is not None, name
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def test_the_published_med_moe_changes_the_model_at_step_zero_and_ours_does_not() -> None:
    config = preset("med_moe")
    model = base_model()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    dense = model.model.layers[0].mlp
    attach_adapters(model, config, seed=7)
    of = tensors_of(adapter_parameters(model), "model.layers.0.mlp")
    gate = gate_of(config, tensors_of(of, "router"))
    ours = full_block(config, dense, of, Side(), gate)(x)
    published_form = full_block(config, dense, of, Side(), gate, preserving=False)(x)
    share = gate(x, Side()).sum(-1, keepdim=True)
    torch.testing.assert_close(model.model.layers[0].mlp(x), ours, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours, base_model().model.layers[0].mlp(x), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(published_form, (1 + share) * ours, rtol=1e-5, atol=1e-7)


STARTS = {
    **{name: preset(name) for name in PRESETS},
    "lora with DoRA": preset("lora", dora=True),
    "ming_moe with a shared expert": preset("ming_moe", shared_experts=2),
    "expert of experts": preset("ming_moe", router="hierarchical", groups=2),
}


@pytest.mark.parametrize("case", STARTS)
def test_step_zero_is_the_base(case: str) -> None:
    config = STARTS[case]
    model = base_model()
    with bound(attach_adapters(model, config, seed=7)):
        logits, base = model(IDS).logits.detach(), base_model()(IDS).logits.detach()
    if config.experts == "linear":
        assert torch.equal(logits, base)
    else:  # a sum of gates that is 1 up to rounding
        torch.testing.assert_close(logits, base, rtol=1e-6, atol=1e-6 * float(base.abs().max()))


ALONE = {"molora": (r".*mlp\.\w+",), "lora": ()}
PATHS = {
    "lora": preset("lora", dropout=0.5),
    "dora": preset("lora", dora=True, dropout=0.5),
    "experts": preset("ming_moe", dropout=0.5, path="concat", **ALONE),
    "experts, grouped": preset("ming_moe", dropout=0.5, path="grouped", **ALONE),
    "one A": preset("hydralora", dropout=0.5),
    "shared expert": preset("ming_moe", dropout=0.5, shared_experts=1, **ALONE),
    "block": preset("mixlora", dropout=0.5, **ALONE),
    "threshold": preset("adamole", dropout=0.5),
    "xlora": preset("xlora", dropout=0.5),
}


@pytest.mark.parametrize("case", PATHS)
def test_dropout_acts_in_training_on_every_path_and_nowhere_else(case: str) -> None:
    model, context = adapted(PATHS[case])
    if case == "shared expert":  # or the others' dropout would hide that it has none
        for name, parameter in adapter_parameters(model).items():
            parameter.data.mul_(0 if name.endswith("lora_B") else 1)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with bound(context):
            return model(IDS, use_cache=False).logits.detach()

    assert torch.equal(logits(1), logits(2))
    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2), atol=1e-3)


SAMPLED = {
    **{name: preset(name, dropout=0.0 if name == "med_moe" else 0.3) for name in PRESETS if name != "lora"},
    "sampled, with jitter, for blocks": preset(
        "ming_moe", selection="sample", jitter=0.1, router_scope="block", dropout=0.3
    ),
    "by sequence, shared by layers": preset("mola", router="sequence", router_scope="layer", dropout=0.3),
}


@pytest.mark.parametrize("case", SAMPLED)
def test_activation_checkpointing_changes_no_routing_and_no_gradient(case: str) -> None:
    gates, gradients = trained_once(SAMPLED[case], None)
    assert gates
    # Reentrant recomputation cannot go through X-LoRA's gates, which all blocks share; the config refuses it.
    for use_reentrant in (False,) if case == "xlora" else (False, True):
        gates_then, gradients_then = trained_once(SAMPLED[case], use_reentrant)
        assert gates.keys() == gates_then.keys()
        assert all(torch.equal(gates[name], gates_then[name]) for name in gates)
        assert gradients.keys() == gradients_then.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_then[name], gradient, rtol=1e-5, atol=1e-7)


def trained_once(
    config: MoloraConfig, use_reentrant: bool | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gates after backward, which may have run forward again, and gradients."""
    model, context = adapted(config)
    model.train().enable_input_require_grads()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    with bound(context):
        loss = scalar(model(IDS, use_cache=False).logits)
        first = {name: routing.weights_TK for name, routing in context.record.routings.items()}
        loss.backward()
        gates = {
            name: routing.weights_TK.detach().clone() for name, routing in context.record.routings.items()
        }
        assert all(torch.equal(first[name], gates[name]) for name in gates)
    return gates, {n: p.grad for n, p in trainable_parameters(model).items() if p.grad is not None}


PUBLISHED = {
    # rank, alpha, scaling, experts, active, dropout
    "lora": (16, 32, 2, 1, 1, 0.05),
    "ming_moe": (16, 32, 2, 8, 2, 0.05),
    "moelora": (16, 32, 2, 8, 8, 0.1),
    "med_moe": (16, 32, 2, 4, 1, 0.0),
    "hydralora": (16, 32, 2, 2, 2, 0.05),
    "mixlora": (16, 32, 2, 8, 2, 0.05),
    "lora_moe": (4, 32, 8, 8, 8, 0.05),
    "mola": (8, 16, 2, 8, 2, 0.05),
    "adamole": (16, 32, 2, 8, 8, 0.05),
    "xlora": (16, 32, 2, 8, 8, 0.05),
}


def test_settings_are_the_published_ones() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()
    for name, values in PUBLISHED.items():
        of = PRESETS[name]
        found = (of.rank, of.alpha, of.scaling, of.max_experts, of.active(), of.dropout)
        assert found == values, name
    assert PRESETS["moelora"].expert_rank() == 2
    assert [PRESETS["mola"].at_depth(layer, 32).num_experts for layer in (0, 7, 8, 16, 24, 31)] == [
        *(2, 2, 4, 6, 8, 8)
    ]


CONTRADICTIONS = {
    "adapters.experts_from must name one adapter with shared_a": [
        "shared_a=true",
        "num_experts=2",
        "experts_from=[.,.]",
    ],
    "adapters.selection must be `top_k` under a task gate": ["preset=moelora", "top_k=2", "selection=sample"],
    "adapters.path must be `auto` or `concat` where experts share A": ["preset=hydralora", "path=grouped"],
    "adapters.rank must be a multiple of num_experts (8)": ["preset=moelora", "rank=12"],
    "adapters.top_k must be at most num_experts (4)": ["num_experts=4", "top_k=5"],
    "adapters.top_k must be at most 2": ["preset=mola", "top_k=3"],
    "adapters.experts_per_layer must be left out": ["preset=mola", "router_scope=model"],
    "adapters.groups must be at least 2 and divide num_experts (8)": ["router=hierarchical", "groups=3"],
    "adapters.groups must be 1 under a token router": ["groups=2"],
    "adapters.top_k must be 0 under a threshold router": ["preset=adamole", "top_k=2"],
    "adapters.selection must be `top_k`": ["preset=lora_moe", "selection=sample"],
    "adapters.shared_a must be false with rank_split": ["preset=moelora", "shared_a=true"],
    "adapters.shared_experts must be 0 with `experts: block`": ["preset=mixlora", "shared_experts=1"],
    "adapters.learn_shared_weight must be false": ["learn_shared_weight=true"],
    "adapters.dora must be false": ["preset=moelora", "dora=true"],
    "adapters.freeze_router must come with adapters.router_from": ["preset=med_moe"],
    "adapters.freeze_experts must come with adapters.experts_from": ["preset=xlora"],
    "adapters.router_scope must be `module` or `model`": ["preset=xlora", "router_scope=block"],
    "adapters.temperature must be finite and > 0": ["temperature=0"],
    "adapters.preset must be one of": ["preset=ming"],
}


@pytest.mark.parametrize("rule", CONTRADICTIONS)
def test_overrides_that_contradict_a_preset_are_refused(rule: str, tmp_path: Path) -> None:
    overrides = [f"adapters.{override}" for override in CONTRADICTIONS[rule]]
    assert any(problem.startswith(rule) for problem in config_problems(tmp_path, *overrides, stage=2))


def test_every_preset_that_needs_no_folder_is_accepted(tmp_path: Path) -> None:
    for name in PRESETS.keys() - {"med_moe", "xlora"}:
        assert config_problems(tmp_path, f"adapters.preset={name}") == []
