from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.families import DECODER
from transformers import LlamaConfig, LlamaForCausalLM

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.placement import match_modules
from moe_medical.config.adapters import ATTENTION, PRESETS, MoloraConfig
from moe_medical.errors import ConfigError

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
]


def test_ming_moe_puts_experts_on_the_mlp_and_lora_on_attention():
    assert match_modules(NAMES, PRESETS["ming_moe"]) == {
        "model.layers.0.self_attn.q_proj": "lora",
        "model.layers.0.mlp.up_proj": "molora",
        "model.layers.1.self_attn.q_proj": "lora",
        "model.layers.1.mlp.up_proj": "molora",
    }


def test_molora_wins_and_the_whole_name_must_match():
    config = MoloraConfig(
        molora=(r".*\.1\.mlp\.up_proj",), lora=(r".*up_proj", r"model\.layers\.0\.self_attn\.q_proj")
    )
    assert match_modules(NAMES, config) == {
        "model.layers.0.self_attn.q_proj": "lora",
        "model.layers.0.mlp.up_proj": "lora",
        "model.layers.1.mlp.up_proj": "molora",
    }


def test_every_useless_pattern_is_reported_at_once_with_names_that_exist():
    config = MoloraConfig(molora=(r".*\.up_proj", "up_proj"), lora=("(", r".*\.wq"))
    with pytest.raises(ConfigError) as error:
        match_modules(NAMES, config)
    problems = {problem.path: str(problem) for problem in error.value.problems}
    assert list(problems) == ["adapters.molora[1]", "adapters.lora[0]", "adapters.lora[1]"]
    assert "model.layers.0.mlp.up_proj" in problems["adapters.molora[1]"]
    assert "regular expression" in problems["adapters.lora[0]"]
    assert "'.*\\\\.wq'" in problems["adapters.lora[1]"]


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(ConfigError, match="name no layer"):
        match_modules(NAMES, MoloraConfig(molora=(), lora=()))


def test_placement_does_not_import_torch():
    code = "import sys, moe_medical.adapters.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_whole_blocks_are_ffn_blocks_and_may_be_adapted_in_part():
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    block = {"experts": "block", "router_scope": "block", "num_experts": 2, "top_k": 2, "lora": ()}
    with pytest.raises(
        ConfigError, match=r"adapters.molora must name linears of plain FFN blocks .*self_attn"
    ):
        attach_adapters(model, MoloraConfig(**block, molora=(ATTENTION,)), 0)
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    attach_adapters(model, MoloraConfig(**block, molora=(r".*\.down_proj",)), 0)
    assert adapter_parameters(model)["model.layers.0.mlp.router.weight"].shape == (2, DECODER["hidden_size"])
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, DECODER["vocab_size"])
