"""Experts that start from trained LoRAs, and a router from a fitted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import DECODER
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.folder import save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.warm_start import start_from
from moe_medical.config import MoloraConfig
from moe_medical.config.adapters import ATTENTION, FFN
from moe_medical.errors import ConfigError

META = {"base_model": "tiny", "base_revision": None, "tasks": [], "label_sets": {}}
IDS = torch.arange(10).view(1, -1)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER)).eval()


def trained_lora(folder: Path, seed: int, alpha: float = 8.0) -> tuple[Path, Tensor]:
    """A LoRA with values in it, and the logits of its model."""
    model = base()
    config = MoloraConfig(preset="lora", molora=(), lora=(FFN, ATTENTION), rank=4, alpha=alpha, dropout=0.0)
    attach_adapters(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    state = adapter_parameters(model)
    for parameter in state.values():
        parameter.data.normal_(std=0.2, generator=generator)
    save_adapter(folder, state, config, META)
    with torch.no_grad():
        return folder, model(IDS).logits


def started(folders: list[Path], noise: float, shard: ExpertShard | None = None, **changes: object):
    model = base()
    settings = {"num_experts": 2, "top_k": 2, "rank": 4, "alpha": 16.0, "dropout": 0.0, **changes}
    config = MoloraConfig(**settings, experts_from=tuple(map(str, folders)), start_noise=noise)
    attach_adapters(model, config, 3, shard)
    start_from(model, config, 3, shard)
    return model


@pytest.mark.parametrize("experts", ["linear", "block"])
def test_copies_of_one_lora_are_that_lora_whatever_the_gates(experts: str, tmp_path: Path) -> None:
    folder, logits = trained_lora(tmp_path / "lora", 1)
    scope = {"experts": "block", "router_scope": "block"} if experts == "block" else {}
    model = started([folder], 0.0, **scope)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_noise_parts_the_copies_and_is_the_same_on_every_shard(tmp_path: Path) -> None:
    folder, _ = trained_lora(tmp_path / "lora", 1)
    name = "model.layers.0.mlp.up_proj.lora_A"
    both = adapter_parameters(started([folder], 0.1))[name]
    spread = both.detach().std(0).mean()
    assert 0.02 < spread / both.detach().std() < 0.2
    for index in (0, 1):
        shard = ExpertShard(index, 2)
        own = adapter_parameters(started([folder], 0.1, shard))[name]
        torch.testing.assert_close(own, both[index : index + 1])
    shared = adapter_parameters(started([folder], 0.1, shared_a=True))
    assert shared[name].shape == (4, 32)
    first, second = shared["model.layers.0.mlp.up_proj.lora_B"].detach()
    assert not torch.equal(first, second)


def test_one_lora_for_each_expert(tmp_path: Path) -> None:
    folders = [trained_lora(tmp_path / str(i), i, alpha=4.0 * i)[0] for i in (1, 2)]
    logits = [trained_lora(tmp_path / str(i), i, alpha=4.0 * i)[1] for i in (1, 2)]
    model = started(folders, 0.1, lora=(), molora=(FFN, ATTENTION))
    for chosen in (0, 1):
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("router.weight"):
                parameter.data.zero_()
            if name.endswith("router.bias"):
                parameter.data.copy_(torch.tensor([50.0, -50.0]) * (1 - 2 * chosen))
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits[chosen], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path) -> None:
    folder, _ = trained_lora(tmp_path / "lora", 1)
    with pytest.raises(ConfigError, match=r"must have an expert's rank \(8\), got 4"):
        started([folder], 0.1, rank=8)
    config = MoloraConfig(num_experts=2, top_k=2, rank=4)
    save_adapter(tmp_path / "routed", {"x.lora_A": torch.zeros(1)}, config, META)
    with pytest.raises(ConfigError, match="must be an adapter of plain LoRA layers only"):
        started([tmp_path / "routed"], 0.1)


def test_a_dora_started_from_a_lora_is_that_lora(tmp_path: Path) -> None:
    folder, logits = trained_lora(tmp_path / "lora", 1)
    model = started([folder], 0.0, molora=(), lora=(FFN, ATTENTION), dora=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
