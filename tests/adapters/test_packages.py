"""Presets against the installed packages that have them: the same weights give the same logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from support.families import DECODER
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.config.adapters import FFN, PRESETS, MoloraConfig

IDS = torch.tensor([[5, 9, 33, 60, 7], [21, 4, 4, 50, 12]])
TASKS_OF_ROWS = torch.tensor([1, 0])
LINEARS = [*(f"{n}_proj" for n in "qkvo"), "gate_proj", "up_proj", "down_proj"]


def base_model() -> PreTrainedModel:
    """The same weights at each call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER)).eval()


def adapted(config: MoloraConfig) -> tuple[PreTrainedModel, RoutingContext, dict[str, Tensor]]:
    """Ours, with all adapters away from where they start, its context and its tensors."""
    model = base_model()
    context = attach_adapters(model, replace(config, dropout=0.0), seed=7)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(model).values():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, context, {n: p.detach() for n, p in adapter_parameters(model).items()}


def bound(context: RoutingContext) -> AbstractContextManager[RoutingContext]:
    tasks_BS = TASKS_OF_ROWS[:, None].expand(IDS.shape)
    return context.bind(BatchInputs(torch.ones_like(IDS).bool(), tasks_BS))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, base_model()(IDS).logits, atol=1e-2)


@torch.no_grad()
def copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters by full name; every name must be there."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        assert parameters[name].shape == value.shape, name
        parameters[name].copy_(value)


@pytest.mark.parametrize("settings", [{}, {"rs_lora": True}, {"dora": True}], ids=["lora", "rsLoRA", "DoRA"])
def test_lora_is_that_of_peft(settings: dict[str, bool]) -> None:
    config = replace(PRESETS["lora"], rank=4, alpha=6.0, **settings)
    ours, _, state = adapted(config)
    names = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    names["magnitude"] = "lora_magnitude_vector.default.weight"
    options = {"use_rslora": config.rs_lora, "use_dora": config.dora}
    theirs = peft.get_peft_model(
        base_model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, **options)
    )
    split = {name: name.rpartition(".") for name in state}
    copy_into(theirs, {f"base_model.model.{m}.{names[leaf]}": state[n] for n, (m, _, leaf) in split.items()})
    mine, other = ours(IDS).logits, theirs(IDS).logits
    assert_equal(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in adapter_parameters(ours).items():
        module, _, leaf = name.rpartition(".")
        wanted = gradients[f"base_model.model.{module}.{names[leaf]}"]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_task_gate_is_poly() -> None:
    """Poly weighs A and B by themselves, and each module has its own gate sigmoid(l_i) / sum_j sigmoid(l_j).

    Where all skills have all experts' A, and skill i the B of expert i alone, its product is ours. It is
    scaled by 1 / r.
    """
    config = replace(
        PRESETS["moelora"], num_tasks=2, num_experts=4, rank=16, alpha=16.0, router_scope="module"
    )
    ours, context, state = adapted(config)
    options = {"n_tasks": 2, "n_skills": 4, "n_splits": 1, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(
        base_model(), peft.PolyConfig(r=16, poly_type="poly", target_modules=LINEARS, **options)
    ).eval()
    values: dict[str, Tensor] = {}
    for name in (name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")):
        start, all_A = f"base_model.model.{name}", state[f"{name}.lora_A"].flatten(0, 1)
        own_B = [
            nn.functional.pad(B.T, (0, 0, 4 * i, 12 - 4 * i)) for i, B in enumerate(state[f"{name}.lora_B"])
        ]
        values[f"{start}.poly_lora_A.default"] = all_A.T.expand(1, 4, -1, -1)
        values[f"{start}.poly_lora_B.default"] = 16 * torch.stack(own_B)[None]
        gates = (state[f"{name}.router.embedding"] @ state[f"{name}.router.weight"].T).softmax(-1)
        values[f"{start}.poly_router.default.module_logits"] = (0.5 * gates).logit()
    copy_into(theirs, values)
    with bound(context):
        assert_equal(ours(IDS).logits, theirs(IDS, task_ids=TASKS_OF_ROWS).logits)


@pytest.mark.parametrize("layerwise", [True, False])
def test_xlora_is_that_of_peft(layerwise: bool, tmp_path: Path) -> None:
    scope = "module" if layerwise else "model"
    config = replace(PRESETS["xlora"], num_experts=3, rank=4, alpha=6.0, router_scope=scope)
    ours, context, state = adapted(config)
    adapters = {str(i): str(tmp_path / f"expert-{i}") for i in range(3)}
    for i, folder in enumerate(adapters.values()):
        expert = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS))
        experts = {n: t for n, t in state.items() if n.endswith(("lora_A", "lora_B"))}
        copy_into(expert, {f"base_model.model.{n}.default.weight": t[i] for n, t in experts.items()})
        expert.save_pretrained(folder)
    base = base_model()
    base.config.use_cache = False
    settings = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        layerwise_scalings=layerwise,
        adapters=adapters,
    )
    theirs = peft.get_peft_model(base, settings).eval()
    classifier = "base_model.internal_xlora_classifier.layers.0"
    copy_into(theirs, {f"{classifier}.{key}": state[f"xlora_classifier.{key}"] for key in ("weight", "bias")})
    with bound(context):
        assert_equal(ours(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits)


def test_mixlora_is_that_of_its_package() -> None:
    mixlora = pytest.importorskip("mixlora", reason="the package mixlora is not installed")
    config = replace(PRESETS["mixlora"], num_experts=4, rank=4, alpha=6.0)
    ours, context, state = adapted(config)
    theirs = copy.deepcopy(base_model())
    settings = mixlora.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "tiny",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": 4,
            "lora_alpha": 6,
            "lora_dropout": 1e-9,  # 0 is refused, and `eval` does not reach the experts
            "target_modules": LINEARS,
            "num_experts": 4,
            "top_k": 2,
            "act_fn": "silu",
        }
    )
    settings.dtype_ = torch.float32
    mixlora.inject_adapter_in_model(theirs, settings, mixlora_tensors(state))
    with bound(context):
        assert_equal(ours(IDS).logits, theirs.eval()(IDS).logits)


def mixlora_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the package: an expert's A and B each by itself."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        if leaf == "weight":
            found[f"mixlora.{module.removesuffix('.router')}.moe_gate.weight"] = value
        elif value.dim() == 2:
            found[f"mixlora.{module}.{leaf}.weight"] = value
        else:
            found |= {f"mixlora.{module}.experts.{i}.{leaf}.weight": of for i, of in enumerate(value)}
    return found


def test_an_expert_alone_is_a_lora_of_peft() -> None:
    config = replace(PRESETS["ming_moe"], num_experts=1, top_k=1, rank=4, alpha=6.0, molora=(FFN,), lora=())
    ours, context, state = adapted(config)
    theirs = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS[4:]))
    experts = {n: t[0] for n, t in state.items() if n.endswith(("lora_A", "lora_B"))}
    copy_into(theirs, {f"base_model.model.{n}.default.weight": t for n, t in experts.items()})
    with bound(context):
        assert_equal(ours(IDS).logits, theirs(IDS).logits)
