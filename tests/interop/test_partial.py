"""A part of an adapter attaches and loads by itself, and is what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.exporting import IDS, TASKS, write_base
from torch import Tensor

from moe_medical.adapters.model import (
    adaptable_modules,
    adapter_parameters,
    attach_adapters,
    load_adapter_state,
)
from moe_medical.adapters.routing import BatchInputs
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.adapters import PRESETS, MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError
from moe_medical.interop.partial import restrict_adapter

ATTENTION, MLP = r".*\.self_attn\.\w+", r".*\.mlp\.\w+"
TOKEN = MoloraConfig(num_experts=3, rank=4, alpha=8.0, molora=(MLP,), lora=(ATTENTION,))
SHARED = replace(TOKEN, shared_experts=2, learn_shared_weight=True)
MOELORA = replace(PRESETS["moelora"], num_tasks=3, rank=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def fresh(base: Path) -> torch.nn.Module:
    return load_base(locate_base(ModelSection(str(base))), "float32")


def trained(base: Path, config: MoloraConfig) -> dict[str, Tensor]:
    model = fresh(base)
    attach_adapters(model, config, seed=0)
    torch.manual_seed(11)
    return {n: p.detach() + 0.2 * torch.randn_like(p) for n, p in adapter_parameters(model).items()}


@torch.no_grad()
def logits(base: Path, config: MoloraConfig, state: dict[str, Tensor], task: int | None = None) -> Tensor:
    model = fresh(base)
    context = attach_adapters(model, config, seed=0)
    load_adapter_state(model, state)
    with context.bind(BatchInputs.of_rows(None if task is None else torch.tensor([task] * len(IDS)))):
        return model.eval()(IDS).logits


def without(state: dict[str, Tensor], wrong: tuple[str, ...]) -> dict[str, Tensor]:
    """The same, but what stands in a name with one of these parts adds nothing."""
    return {n: torch.zeros_like(t) if any(w in n for w in wrong) else t for n, t in state.items()}


NO_ATTENTION = (".self_attn.q_proj.lora_B", ".k_proj.lora_B", ".v_proj.lora_B", ".o_proj.lora_B")
NO_FFN = (".gate_proj.lora_B", ".up_proj.lora_B", ".down_proj.lora_B")
OTHER_SHARED = ("gate_proj.shared_B", "down_proj.shared_B")
CASES = {
    "attention": (TOKEN, ["attention"], NO_FFN),
    "ffn": (TOKEN, ["ffn"], NO_ATTENTION),
    "routed": (SHARED, ["routed"], (*NO_ATTENTION, "shared_B")),
    "plain": (SHARED, ["plain"], (*NO_FFN, "shared_B")),
    "shared": (SHARED, ["shared"], (*NO_ATTENTION, *NO_FFN)),
    "shared of a fixed weight": (
        replace(SHARED, learn_shared_weight=False, shared_weight=0.4, rs_lora=True),
        ["shared"],
        (*NO_ATTENTION, *NO_FFN),
    ),
    "pattern": (TOKEN, [r".*\.down_proj"], (*NO_ATTENTION, *NO_FFN[:2])),
    "patterns add up": (TOKEN, [r".*\.down_proj", "attention"], NO_FFN[:2]),
    "role of a pattern": (SHARED, ["shared", r".*\.up_proj"], (*NO_ATTENTION, *NO_FFN, *OTHER_SHARED)),
    "block, attention": (
        replace(PRESETS["mixlora"], num_experts=3, rank=4),
        ["attention"],
        NO_FFN,
    ),
    "block, ffn": (replace(PRESETS["mixlora"], num_experts=3, rank=4), ["ffn"], NO_ATTENTION),
    "model scope, attention": (MOELORA, ["attention"], NO_FFN),
    "model scope, ffn": (MOELORA, ["ffn"], NO_ATTENTION),
    "layer scope, ffn": (replace(MOELORA, router_scope="layer"), ["ffn"], NO_ATTENTION),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_the_whole_without_the_rest(case: str, base: Path) -> None:
    config, only, wrong = CASES[case]
    state = trained(base, config)
    part_config, part = restrict_adapter(config, state, only, adaptable_modules(fresh(base)))
    task = TASKS.index("codes") if config.router == "task" else None
    expected = logits(base, config, without(state, wrong), task)
    torch.testing.assert_close(logits(base, part_config, part, task), expected, rtol=1e-5, atol=1e-5)
    assert (logits(base, config, state, task) - expected).abs().max() > 0.01
    assert len(part) < len(state)


def test_the_shared_router_stands_where_the_part_runs_first(tmp_path: Path) -> None:
    """OPT registers k_proj before q_proj, which runs first and has the router of the whole model."""
    base = write_base(tmp_path / "base", "opt")
    config = replace(MOELORA, molora=(ATTENTION, r".*\.fc[12]"), lora=())
    state = trained(base, config)
    part_config, part = restrict_adapter(config, state, [ATTENTION], adaptable_modules(fresh(base)))
    owners = {name.partition(".router.")[0] for name in part if ".router." in name}
    assert owners == {"model.decoder.layers.0.self_attn.q_proj"}
    expected = logits(base, config, without(state, (".fc1.lora_B", ".fc2.lora_B")), 1)
    torch.testing.assert_close(logits(base, part_config, part, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "only", "rule"),
    [
        (TOKEN, ["atention"], "must select a module"),
        (TOKEN, ["shared"], "must select a module"),
        (replace(TOKEN, lora=()), ["plain"], "must select a module"),
        (TOKEN, ["routed", "attention"], "must select a module"),
        (TOKEN, ["routed", "plain"], "at most one of"),
        (TOKEN, ["("], "or a pattern"),
        (replace(TOKEN, router_scope="layer"), [r".*\.down_proj"], r"must keep .*gate_proj, whose input"),
    ],
)
def test_what_selects_nothing_or_tears_apart_is_refused(
    config: MoloraConfig, only: list[str], rule: str, base: Path
) -> None:
    state = trained(base, config)
    with pytest.raises(ConfigError, match=rule):
        restrict_adapter(config, state, only, adaptable_modules(fresh(base)))
