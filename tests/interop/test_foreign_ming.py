"""MING's three artefacts become `ming_moe`, with the logits of its equation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.foreign import (
    ATTENTION,
    FFN,
    PREFIX,
    Loop,
    imported_logits,
    linears,
    logits,
    put,
    top_k_gates,
    write_ming,
)
from support.tiny import write_tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

from moe_medical.adapters.folder import load_adapter
from moe_medical.errors import ConfigError, SecurityRefusal
from moe_medical.interop.foreign.importing import import_adapter

EXPERTS, SCALING = 4, 2.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def published(base: Path, state: dict[str, Tensor], prefix: str = PREFIX, scaling: float = SCALING) -> Tensor:
    """y = W x + s sum_{i in top 2} g_i B_i A_i x + s B_s A_s x on the MLPs, plain LoRA on attention."""
    model = LlamaForCausalLM.from_pretrained(base)
    for name, linear in linears(model, FFN).items():
        own = f"{prefix}{name}"
        deltas = [_delta(state, f"{own}.experts.{i}.lora_A_{i}", scaling) for i in range(EXPERTS)]
        loop = Loop(linear, top_k_gates(state[f"{own}.switch.weight"], state[f"{own}.switch.bias"]), deltas)
        if f"{own}.share_experts.lora_A.weight" in state:
            linear.weight.data += _delta(state, f"{own}.share_experts.lora_A", scaling)
        put(model, name, loop)
    for name, linear in linears(model, ATTENTION).items():
        if f"{PREFIX}{name}.lora_A.weight" in state:
            linear.weight.data += _delta(state, f"{PREFIX}{name}.lora_A", scaling)
    return logits(model)


def _delta(state: dict[str, Tensor], name_of_A: str, scaling: float) -> Tensor:
    name_of_B = name_of_A.replace("lora_A", "lora_B")
    return scaling * state[f"{name_of_B}.weight"] @ state[f"{name_of_A}.weight"]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "form", [{}, {"shared": 1}, {"shared": 3}, {"attention": False, "prefix": ""}], ids=str
)
def test_ming_becomes_ming_moe(base: Path, tmp_path: Path, form: dict[str, object]) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    state = write_ming(tmp_path / "ming", model, **form)  # type: ignore[arg-type]
    report = import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base), allow_pickle=True)
    expected = published(base, state, str(form.get("prefix", PREFIX)))
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)
    config = report.config
    assert (config.preset, config.num_experts, config.top_k, config.router_bias) == ("ming_moe", 4, 2, True)
    assert config.shared_experts == form.get("shared", 0)
    assert report.num_parameters == sum(t.numel() for t in state.values())


def test_rs_lora_and_the_balance_loss_come_along(base: Path, tmp_path: Path) -> None:
    state = write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base))
    edit(tmp_path / "ming" / "adapter_config.json", use_rslora=True)
    edit(tmp_path / "ming" / "config.json", use_lbl_loss=True, lbl_loss_coeff=0.01)
    report = import_adapter(tmp_path / "ming", tmp_path / "ours", "ming", str(base), allow_pickle=True)
    torch.testing.assert_close(
        imported_logits(tmp_path / "ours", base), published(base, state, scaling=4.0), atol=5e-5, rtol=1e-4
    )
    assert report.config.balance_coefficient == 0.01


def test_a_pickle_needs_leave(base: Path, tmp_path: Path) -> None:
    write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base))
    with pytest.raises(SecurityRefusal, match="--convert-pickle"):
        import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base))
    assert not (tmp_path / "ours").exists()


def test_a_step_checkpoint_without_its_routers_is_refused(base: Path, tmp_path: Path) -> None:
    """As the published trainer writes them."""
    state = write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base), attention=False)
    kept = {name: tensor for name, tensor in state.items() if "switch" not in name}
    torch.save(kept, tmp_path / "ming" / "non_lora_trainables.bin")
    with pytest.raises(ConfigError) as caught:
        import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base), allow_pickle=True)
    assert {problem.path for problem in caught.value.problems} == set(state) - set(kept)
    assert {problem.rule for problem in caught.value.problems} == {"is missing"}
    assert not (tmp_path / "ours").exists()


def test_more_experts_than_the_config_says_are_refused(base: Path, tmp_path: Path) -> None:
    write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base))
    edit(tmp_path / "ming" / "config.json", num_experts=3)
    with pytest.raises(ConfigError, match=r"experts\.3\.lora_A_3\.weight is not expected"):
        import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("expert_selection", "sampling"), ("num_experts", None), ("num_experts", 10**9), ("share_expert", 1)],
)
def test_a_setting_that_we_cannot_hold_is_named(base: Path, tmp_path: Path, name: str, value: object) -> None:
    write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base))
    edit(tmp_path / "ming" / "config.json", **{name: value})
    with pytest.raises(ConfigError, match=name):
        import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base), allow_pickle=True)


def test_the_state_holds_every_number(base: Path, tmp_path: Path) -> None:
    state = write_ming(tmp_path / "ming", LlamaForCausalLM.from_pretrained(base), shared=2)
    import_adapter(tmp_path / "ming", tmp_path / "ours", "auto", str(base), allow_pickle=True)
    ours, module = load_adapter(tmp_path / "ours")[2], "model.layers.1.mlp.up_proj"
    theirs = [state[f"{PREFIX}{module}.experts.{i}.lora_A_{i}.weight"] for i in range(EXPERTS)]
    assert torch.equal(ours[f"{module}.lora_A"], torch.stack(theirs))
    assert torch.equal(ours[f"{module}.router.weight"], state[f"{PREFIX}{module}.switch.weight"])
    shared = state[f"{PREFIX}{module}.share_experts.lora_B.weight"]
    assert torch.equal(torch.cat(list(ours[f"{module}.shared_B"]), dim=1), shared)
