"""Adapters in tiny random models of every supported family: step 0, gradients, files, checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.adapter_summary import summarize_adapters
from support.families import DECODER, GPT2
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_medical.adapters.folder import load_adapter, save_adapter
from moe_medical.adapters.layer import LoraLinear, MoloraLinear
from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.adapters.losses import router_gradients, routing_sums
from moe_medical.adapters.model import (
    adapter_parameters,
    attach_adapters,
    check_trainable,
    load_adapter_state,
)
from moe_medical.adapters.routing import BatchInputs
from moe_medical.config.adapters import PRESETS, MoloraConfig
from moe_medical.errors import ConfigError

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")
CONV1D = ("c_attn", "c_proj"), ("c_fc", "c_proj")
# family -> (attention linears, MLP linears) of one decoder layer
FAMILIES = {
    "llama": SPLIT,
    "qwen2": SPLIT,
    "qwen3": SPLIT,
    "mistral": SPLIT,
    "phi3": FUSED,
    "gemma": SPLIT,
    "gemma2": SPLIT,
    "gemma3_text": SPLIT,
    "gpt2": CONV1D,
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights at each call."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**({**GPT2, "eos_token_id": 2} if family == "gpt2" else DECODER))
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def tiny_ids(rows: int = 2, positions: int = 7) -> torch.Tensor:
    return torch.randint(3, 64, (rows, positions), generator=torch.Generator().manual_seed(1))


CONFIG = MoloraConfig(num_experts=4, top_k=2, rank=3, alpha=6.0)
META = {"base_model": "tiny", "base_revision": None, "tasks": ["a"], "label_sets": {"a": ["yes", "no"]}}


def randomise_B(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith(".lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted_model(family: str = "llama", config: MoloraConfig = CONFIG) -> PreTrainedModel:
    model = tiny_model(family)
    attach_adapters(model, config, seed=7)
    return randomise_B(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_modules_and_step_zero_is_the_base(family: str):
    model, ids = tiny_model(family), tiny_ids()
    base_logits = model(ids).logits
    attach_adapters(model, CONFIG, seed=7)
    attention, mlp = FAMILIES[family]
    found = {"attention": [], "mlp": []}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | MoloraLinear):
            kind = "mlp" if ".mlp." in name else "attention"
            assert isinstance(module, MoloraLinear if kind == "mlp" else LoraLinear)
            found[kind].append(name.rpartition(".")[2])
    assert sorted(found["attention"]) == sorted(2 * attention)
    assert sorted(found["mlp"]) == sorted(2 * mlp)
    summary = summarize_adapters(model)
    assert (summary.num_molora, summary.num_lora) == (2 * len(mlp), 2 * len(attention))
    assert torch.equal(model(ids).logits, base_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_parameter_gets_a_gradient_and_the_base_none(family: str):
    model, ids = adapted_model(family).train(), tiny_ids()
    before = copy.deepcopy(model.state_dict())
    model(ids, labels=ids).loss.backward()
    adapters = adapter_parameters(model)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapters)
    torch.optim.SGD(adapters.values(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_into_a_fresh_model_gives_equal_logits(family: str, tmp_path: Path):
    model, ids = adapted_model(family), tiny_ids()
    save_adapter(tmp_path / "adapter", adapter_parameters(model), CONFIG, META)
    config, meta, state = load_adapter(tmp_path / "adapter")
    assert (config, meta) == (CONFIG, META)
    fresh = tiny_model(family)
    attach_adapters(fresh, config, seed=99)
    assert not torch.equal(fresh(ids).logits, model(ids).logits)
    load_adapter_state(fresh, state)
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_generation_with_cache_equals_greedy_without():
    model, ids = adapted_model(), tiny_ids(rows=3)
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    assert cached.shape[1] > ids.shape[1]


def train_step(checkpointing: bool | None, coefficient: float = 0.0) -> tuple[dict, dict[str, Tensor]]:
    """Routings and gradients of one step; `checkpointing` is None for off, else use_reentrant."""
    model = tiny_model()
    context = attach_adapters(model, CONFIG, seed=7)
    randomise_B(model).train()
    model.enable_input_require_grads()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids, mask = tiny_ids(), torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    torch.manual_seed(5)  # dropout
    with context.bind(BatchInputs(mask)):
        loss = model(ids, labels=ids).loss
        with torch.no_grad():
            sums = routing_sums(context.record.routings.values(), context.inputs.token_mask_T)
        weights, each = LossWeights(coefficient, coefficient), 1 / float(sums.num_tokens)
        context.record.gradients = router_gradients(sums, context.record.routings, weights, each)
        loss.backward()
        routings = {name: routing.expert_ids_TK.clone() for name, routing in context.record.routings.items()}
    assert context.record.routings == {}
    return routings, {name: p.grad for name, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 10.0])
def test_activation_checkpointing_changes_no_routing_and_no_gradient(use_reentrant: bool, coefficient: float):
    routings, gradients = train_step(None, coefficient)
    again, recomputed = train_step(use_reentrant, coefficient)
    assert len(routings) == 6
    assert routings.keys() == again.keys()
    assert all(torch.equal(routings[name], again[name]) for name in routings)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


def test_router_losses_reach_every_router_the_first_layer_included():
    _, without = train_step(None)
    _, with_losses = train_step(None, 10.0)
    routers = [name for name in without if ".router." in name]
    assert len(routers) == 12
    assert all((with_losses[name] - without[name]).abs().sum() > 0 for name in routers)


def test_initial_values_do_not_depend_on_the_order_or_number_of_adapters():
    whole = adapter_parameters(adapted_model())
    part_config = MoloraConfig(num_experts=4, top_k=2, rank=3, molora=(r".*\.1\.mlp\.up_proj",), lora=())
    part_model = tiny_model()
    attach_adapters(part_model, part_config, seed=7)
    part = {name: p for name, p in adapter_parameters(part_model).items() if not name.endswith("lora_B")}
    assert sorted(name.split("up_proj.")[1] for name in part) == ["lora_A", "router.bias", "router.weight"]
    assert all(torch.equal(whole[name], value) for name, value in part.items())


def test_lora_preset_has_no_router():
    model = tiny_model()
    context = attach_adapters(model, PRESETS["lora"], seed=7)
    summary = summarize_adapters(model)
    assert (summary.num_molora, summary.num_lora, summary.num_router_parameters) == (0, 14, 0)
    with context.bind(BatchInputs(torch.ones(2, 7, dtype=torch.bool))):
        model(tiny_ids())
        assert context.record.routings == {}


def test_summary_counts_by_hand():
    # Llama: q 32x32, k and v 32x16, o 32x32; gate and up 32x48, down 48x32; rank 3; 4 experts; 2 layers
    lora = 3 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))
    experts = 4 * 3 * 3 * (32 + 48)
    routers = 2 * (32 * 4 + 4) + (48 * 4 + 4)
    summary = summarize_adapters(adapted_model())
    assert summary.num_router_parameters == 2 * routers
    assert summary.num_parameters == 2 * (lora + experts + routers)


def test_the_output_head_is_never_adapted_and_bad_patterns_are_reported():
    with pytest.raises(ConfigError, match=r"adapters.molora\[0\]"):
        attach_adapters(tiny_model(), MoloraConfig(molora=("lm_head",)), seed=0)
    greedy = tiny_model()
    attach_adapters(greedy, MoloraConfig(molora=(".*",), lora=()), seed=0)
    assert isinstance(greedy.lm_head, torch.nn.Linear)
    assert not greedy.lm_head.weight.requires_grad


def test_attaching_twice_is_refused():
    with pytest.raises(ConfigError, match="attached already"):
        attach_adapters(adapted_model(), CONFIG, seed=0)


def test_a_frozen_router_or_a_thawed_base_is_noticed():
    model = adapted_model()
    model.model.layers[0].mlp.up_proj.router.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"2 parameters: model.layers.0.mlp.up_proj.router.weight, model.norm"
    ):
        check_trainable(model)


def test_loading_is_strict_both_ways_and_all_or_nothing():
    model = adapted_model()
    state = {name: p.detach().clone() + 1 for name, p in adapter_parameters(model).items()}
    before = copy.deepcopy(model.state_dict())
    prefix = "model.layers.0.self_attn.q_proj"
    del state[f"{prefix}.lora_A"]
    state[f"{prefix}.lora_B"] = torch.zeros(32, 4)
    state["extra.lora_A"] = torch.zeros(1)
    with pytest.raises(ConfigError) as error:
        load_adapter_state(model, state, source="runs/x/adapter")
    assert str(error.value).splitlines() == [
        "runs/x/adapter has 3 problems:",
        "  extra.lora_A is not in the model.",
        f"  {prefix}.lora_A is missing in the state.",
        f"  {prefix}.lora_B must have shape (32, 3), got (32, 4).",
    ]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
