"""Who decides for whom: the first layer that runs, in models that register their layers in another order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import DECODER
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_medical.adapters.folder import load_adapter, save_adapter
from moe_medical.adapters.model import (
    adapter_parameters,
    attach_adapters,
    deciding_layers,
    lay_out_for_answers,
    trainable_parameters,
)
from moe_medical.adapters.placement import routing_scopes
from moe_medical.adapters.routers import Choice
from moe_medical.base_model.known_shapes import llama_shape
from moe_medical.config import MoloraConfig
from moe_medical.config.adapters import PRESETS
from moe_medical.errors import ConfigError
from moe_medical.planning.adapted_model import AdaptedModel, Workload
from moe_medical.planning.cost import recommend
from moe_medical.planning.layouts import Layout

GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, "rotary_dim": 4}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
OPT |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0}
META = {"base_model": "tiny", "base_revision": None, "tasks": ["a", "b", "c"], "label_sets": {}}


def tiny(kind: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    return model


@pytest.mark.parametrize("scope", ["block", "layer", "model"])
@pytest.mark.parametrize(
    ("kind", "settings", "first"),
    [
        ("phi3", DECODER, "qkv_proj"),
        ("opt", OPT, "q_proj"),
        ("gptj", GPTJ, "q_proj"),
        ("llama", DECODER, "q_proj"),
    ],
)
def test_the_first_layer_that_runs_decides(
    kind: str, settings: dict[str, Any], first: str, scope: str
) -> None:
    model = tiny(kind, settings)
    everywhere = {"molora": (r".*\.\d+\..*",), "lora": ()}
    config = MoloraConfig(num_experts=2, rank=4, router_scope=scope, **everywhere)
    attach_adapters(model, config, 0)
    assert next(iter(deciding_layers(model))).endswith(first)
    logits = model(torch.arange(4, 10)[None]).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())


def test_the_plan_knows_who_decides_and_counts_alike() -> None:
    for changes in (
        {"router_scope": "layer"},
        {"router_scope": "model", "router": "joint", "num_tasks": 3},
        {"router": "xlora", "top_k": 0},
        {"shared_experts": 2, "learn_shared_weight": True},
        {"experts": "block", "router_scope": "block"},
        {"experts_per_layer": (2, 4), "rank_split": True},
        {"freeze_router": True, "dora": True},
    ):
        model = tiny("llama", DECODER)
        settings: dict[str, Any] = {"num_experts": 4, "rank": 8, **changes}
        config = MoloraConfig(**settings)
        attach_adapters(model, config, 0)
        planned = AdaptedModel.of(llama_shape("tiny", DECODER), config)
        assert planned.trainable == sum(p.numel() for p in trainable_parameters(model).values()), changes
        if config.experts == "linear":
            assert set(planned.deciding) == set(deciding_layers(model)), changes


def test_what_opens_a_block_comes_first_and_what_closes_it_last() -> None:
    names = ["l.0.attn.o_proj", "l.0.attn.v_proj", "l.0.attn.q_proj", "l.0.mlp.fc2", "l.0.mlp.fc1"]
    ordered = ["l.0.attn.q_proj", "l.0.attn.v_proj", "l.0.attn.o_proj", "l.0.mlp.fc1", "l.0.mlp.fc2"]
    assert list(routing_scopes(names, "layer")) == ordered


def test_a_router_for_all_layers_reads_one_width() -> None:
    patterns = (r".*\.0\.mlp\.gate_proj", r".*\.1\.mlp\.down_proj")
    config = MoloraConfig(router_scope="model", molora=patterns, lora=())
    with pytest.raises(ConfigError, match="router_scope must be narrower than `model`"):
        attach_adapters(tiny("llama", DECODER), config, 0)


def test_tokens_of_one_sample_draw_the_same_experts() -> None:
    logits, start = torch.zeros(12, 8), torch.tensor([0] * 5 + [5] * 7)
    torch.manual_seed(1)
    ids = Choice(2, sampled=True).routing(logits, True, start).expert_ids_TK
    assert (ids[:5] == ids[0]).all()
    assert (ids[5:] == ids[5]).all()
    assert (
        len({tuple(row) for row in Choice(2, sampled=True).routing(logits, True).expert_ids_TK.tolist()}) > 2
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_survives_its_folder(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]
    save_adapter(tmp_path / "a", {"x": torch.zeros(1)}, config, META)
    assert load_adapter(tmp_path / "a")[0] == config


def test_a_folder_with_values_that_no_setting_has_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", {"x": torch.zeros(1)}, MoloraConfig(router="zzz", rank=0, top_k=99), META)
    with pytest.raises(ConfigError) as refused:
        load_adapter(tmp_path / "a")
    told = str(refused.value)
    assert all(f"adapters.{key} must be" in told for key in ("router", "rank", "top_k"))


def test_laid_out_for_answers_nothing_changes_but_the_strides() -> None:
    model = tiny("llama", DECODER)
    attach_adapters(model, MoloraConfig(num_experts=4, rank=4), 0)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(std=0.2)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits
        lay_out_for_answers(model)
        torch.testing.assert_close(model(torch.arange(9)[None]).logits, logits)
    after = adapter_parameters(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    B = after["model.layers.0.mlp.up_proj.lora_B"]
    assert B.movedim(-2, 0).reshape(B.shape[1], -1).data_ptr() == B.data_ptr()


@pytest.mark.parametrize("preset", ["med_moe", "mixlora", "hydralora", "mola", "xlora"])
def test_no_layout_is_recommended_that_a_run_would_refuse(preset: str) -> None:
    model = AdaptedModel.of(llama_shape("tiny", DECODER), replace(PRESETS[preset], num_experts=4))
    best = recommend(model, Layout(8, 8), Workload("float32", 2, 64, 64), 1e12).estimate.layout
    assert best.ep_size == 1
    assert model.allows(best.zero.stage)
    assert model.allows(3) is (preset not in ("med_moe", "xlora"))
