"""What leaves as a PEFT LoRA says what the adapted model says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.exporting import IDS, LORA, MLP, TASK, TASKS, TOKEN, adapted_logits, write_adapter, write_base
from support.tiny import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_medical.config.adapters import PRESETS, MoloraConfig
from moe_medical.errors import ConfigError
from moe_medical.interop.peft_export import export_peft

FORMS = {
    "lora": LORA,
    "rs_lora": replace(LORA, rs_lora=True),
    "dora": replace(LORA, dora=True),
    "task": TASK,
    "task_rs_lora": replace(TASK, rs_lora=True, rank=3),
    "task_beside_dora": replace(TASK, dora=True),
    "experts_per_layer": replace(TASK, experts_per_layer=(2, 4)),
    "top_2_shared": replace(TASK, top_k=2, shared_experts=1, shared_weight=0.6),
    "moelora": replace(PRESETS["moelora"], num_tasks=3, rank=8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def peft_logits(base: Path, folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()(IDS).logits


def peft_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_peft_says_what_we_say(form: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, FORMS[form])
    task = "report" if FORMS[form].router == "task" else None
    assert export_peft(adapter, tmp_path / "peft", [task] if task else None) == [tmp_path / "peft"]
    expected = adapted_logits(base, adapter, task)
    torch.testing.assert_close(peft_logits(base, tmp_path / "peft"), expected, rtol=1e-4, atol=1e-4)


def test_a_plain_lora_goes_out_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, replace(LORA, rs_lora=True))
    export_peft(adapter, tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "peft"))
    assert len(ours) == len(theirs) == 28
    assert all(torch.equal(theirs[f"base_model.model.{name}.weight"], t) for name, t in ours.items())
    config = peft_config(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert config["base_model_name_or_path"] == str(base)


def test_routed_modules_have_rank_E_r_and_plain_ones_their_own(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, TASK)
    export_peft(adapter, tmp_path / "peft", ["codes"])
    state, config = load_file(tmp_path / "peft/adapter_model.safetensors"), peft_config(tmp_path / "peft")
    ranks = {n: len(t) for n, t in state.items() if n.endswith("lora_A.weight")}
    assert {rank for name, rank in ranks.items() if ".mlp." in name} == {16}
    assert {rank for name, rank in ranks.items() if ".self_attn." in name} == {4}
    alphas = {config["lora_alpha"], *config["alpha_pattern"].values()}
    assert alphas == {8, 32}


def test_several_tasks_are_what_vllm_serves(base: Path, tmp_path: Path) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", base, TASK), tmp_path / "out"
    assert export_peft(adapter, out, TASKS) == [out / task for task in TASKS]
    for task in TASKS:
        expected = adapted_logits(base, adapter, task)
        torch.testing.assert_close(peft_logits(base, out / task), expected, rtol=1e-4, atol=1e-4)
        config = peft_config(out / task)
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 32, {})
        assert type(config["lora_alpha"]) is int
        state = load_file(out / task / "adapter_model.safetensors")
        assert {len(t) for n, t in state.items() if n.endswith("lora_A.weight")} == {16}
    line = (out / "vllm_lora_modules.txt").read_text().split()
    assert line[:4] == ["--enable-lora", "--max-loras=3", "--max-lora-rank=16", "--lora-modules"]
    assert line[4:] == [f"{task}={out / task}" for task in TASKS]
    index = json.loads((out / "vllm_lora_modules.json").read_text())
    assert [module["name"] for module in index["lora_modules"]] == TASKS


def test_one_lora_for_vllm_gets_a_rank_that_it_knows(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, replace(LORA, rank=5))
    assert export_peft(adapter, tmp_path / "out", for_vllm=True) == [tmp_path / "out" / "adapter"]
    assert peft_config(tmp_path / "out" / "adapter")["r"] == 8
    expected = adapted_logits(base, adapter)
    got = peft_logits(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gpt2_is_told_apart(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    for name, config in {"plain": TASK, "dora": replace(TASK, dora=True)}.items():
        adapter = write_adapter(tmp_path / name / "adapter", base, config, size=0.1)
        export_peft(adapter, tmp_path / name / "peft", ["triage"])
        assert peft_config(tmp_path / name / "peft")["fan_in_fan_out"]
        expected = adapted_logits(base, adapter, "triage")
        got = peft_logits(base, tmp_path / name / "peft")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_gate_of_the_users_own(base: Path, tmp_path: Path) -> None:
    """The task's gate, given by hand, makes the same LoRA of the experts of a token router."""
    adapter = write_adapter(tmp_path / "adapter", base, replace(TOKEN, top_k=2))
    export_peft(adapter, tmp_path / "peft", gate=[0.5, 0.0, 0.25, 0.25])
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "peft"))
    module = "model.layers.1.mlp.up_proj"
    A, B = (theirs[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    gate = torch.tensor([0.5, 0.0, 0.25, 0.25])
    delta = torch.einsum("e,efr,erd->fd", gate, ours[f"{module}.lora_B"], ours[f"{module}.lora_A"])
    torch.testing.assert_close(B @ A, delta)
    assert len(A) == 12  # an expert without weight is left out


@pytest.mark.parametrize(
    ("config", "options", "rule"),
    [
        (TOKEN, {}, "6 modules whose experts are chosen by token"),
        (TOKEN, {"gate": [1.0, 2.0]}, "must have a gate of 4 numbers"),
        (TOKEN, {"gate": [float("nan")] * 4}, "must be finite numbers"),
        (LORA, {"gate": [1.0]}, "must be finite numbers"),
        (replace(PRESETS["med_moe"], num_experts=2, molora=(MLP,)), {}, "experts of whole blocks"),
        (TASK, {"tasks": ["billing"]}, "must be one of triage"),
        (replace(TASK, rank=160), {"tasks": TASKS}, "LoRA of rank 640; vLLM serves up to 512"),
        (replace(LORA, dora=True), {"for_vllm": True}, "must not be a DoRA"),
    ],
)
def test_what_no_lora_can_hold_is_refused(
    config: MoloraConfig, options: dict, rule: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(ConfigError, match=rule):
        export_peft(adapter, tmp_path / "peft", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
