"""Folders of MixLoRA and MoE-PEFT become our presets, with the logits of their equations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.foreign import (
    ATTENTION,
    FFN,
    BlockLoop,
    Loop,
    imported_logits,
    linears,
    logits,
    put,
    top_k_gates,
    write_moe_peft,
)
from support.tiny import write_tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

from moe_medical.adapters.folder import load_adapter
from moe_medical.errors import ConfigError
from moe_medical.interop.foreign.importing import ImportReport, import_adapter

EXPERTS, PRESET = 4, {"mixlora": "mixlora", "mola": "mola", "loramoe": "lora_moe"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def run(folder: Path, out: Path, base: Path, kind: str = "auto") -> ImportReport:
    return import_adapter(folder, out, kind, str(base), allow_pickle=True)  # type: ignore[arg-type]


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def published(
    base: Path, state: dict[str, Tensor], kind: str, scaling: float = 2.0, own: float = 2.0
) -> Tensor:
    """A gate for each FFN block (mixlora), or for each linear with experts; `own` scales the experts."""
    model = LlamaForCausalLM.from_pretrained(base)
    for name, linear in linears(model, (*ATTENTION, *FFN)).items():
        module = f"{kind}.{name.removeprefix('model.')}"
        if f"{module}.lora_A.weight" in state:
            linear.weight.data += (
                scaling * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
            )
        elif kind != "mixlora":
            gates = top_k_gates(state[f"{module}.moe_gate.weight"], k=EXPERTS if kind == "loramoe" else 2)
            put(model, name, Loop(linear, gates, _deltas(state, module, own)))
    if kind == "mixlora":
        for number, layer in enumerate(model.model.layers):
            block = f"mixlora.layers.{number}.mlp"
            deltas = {leaf: _deltas(state, f"{block}.{leaf}", own) for leaf in FFN}
            layer.mlp = BlockLoop(layer.mlp, top_k_gates(state[f"{block}.moe_gate.weight"]), deltas)
    return logits(model)


def _deltas(state: dict[str, Tensor], module: str, scaling: float) -> list[Tensor]:
    own = [f"{module}.experts.{i}" for i in range(EXPERTS)]
    if f"{own[0]}.lora_A.weight" not in state:
        return [torch.zeros(()) for _ in own]
    return [scaling * state[f"{e}.lora_B.weight"] @ state[f"{e}.lora_A.weight"] for e in own]


@pytest.mark.parametrize("kind", PRESET)
def test_each_kind_becomes_its_preset(base: Path, tmp_path: Path, kind: str) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), kind)
    report = run(tmp_path / "theirs", tmp_path / "ours", base)
    expected = published(base, state, kind)
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(LlamaForCausalLM.from_pretrained(base)), atol=1e-2)
    assert (report.config.preset, report.config.router_bias) == (PRESET[kind], False)
    assert report.num_parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("expert_rank", [2, 6])
def test_experts_of_another_rank_and_scaling(base: Path, tmp_path: Path, expert_rank: int) -> None:
    """Attention of rank 4 and alpha 8, experts with alpha 3 times their rank."""
    model = LlamaForCausalLM.from_pretrained(base)
    state = write_moe_peft(tmp_path / "theirs", model, "mixlora", expert_rank=expert_rank)
    report = run(tmp_path / "theirs", tmp_path / "ours", base, "mixlora")
    expected = published(base, state, "mixlora", own=3.0)
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=5e-5, rtol=1e-4)
    assert report.config.rank == max(4, expert_rank)


def test_the_first_layout_of_mixlora(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    old = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    renamed = {}
    for name, tensor in state.items():
        if ".mlp." in name:
            start, _, rest = name.partition(".mlp.")
            parts = rest.split(".")  # moe_gate.weight, or PROJ.experts.I.lora_A.weight
            new = (
                ["gate", "weight"]
                if parts[0] == "moe_gate"
                else ["experts", parts[2], old[parts[0]], *parts[3:]]
            )
            name = ".".join([start, *new])
        renamed[name] = tensor
    torch.save(renamed, tmp_path / "theirs" / "adapter_model.bin")
    edit(tmp_path / "theirs", routing_strategy="mixtral", target_modules=[*ATTENTION, *old.values()])
    run(tmp_path / "theirs", tmp_path / "ours", base)
    expected = published(base, state, "mixlora")
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)


def test_a_tensor_under_both_layouts_names_is_refused(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    state["mixlora.layers.0.gate.weight"] = torch.zeros(EXPERTS, 32)
    torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
    rule = r"layers\.0\.gate\.weight must not be there beside mixlora\.layers\.0\.mlp\.moe_gate\.weight"
    with pytest.raises(ConfigError, match=rule):
        run(tmp_path / "theirs", tmp_path / "ours", base)


def test_only_some_projections_of_a_block(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    state = {n: t for n, t in state.items() if not any(x in n for x in ("up_proj", "k_proj", "o_proj"))}
    torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
    targets = {"q_proj": True, "v_proj": True, "gate_proj": True, "down_proj": True, "up_proj": False}
    edit(tmp_path / "theirs", target_modules=targets)
    run(tmp_path / "theirs", tmp_path / "ours", base)
    expected = published(base, state, "mixlora")
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)


def test_its_plain_lora_is_a_peft_folder(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mola")
    plain = {
        name.replace("mola.", "base_model.model.model.").replace(".experts.0", ""): tensor
        for name, tensor in state.items()
        if ".experts.0." in name
    }
    torch.save(plain, tmp_path / "theirs" / "adapter_model.bin")
    path = tmp_path / "theirs" / "adapter_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("top_k", "num_experts")}
    del config["routing_strategy"]
    path.write_text(json.dumps(config | {"peft_type": "LORA"}))
    assert run(tmp_path / "theirs", tmp_path / "ours", base, "moe-peft").config.preset == "lora"
    ours = load_adapter(tmp_path / "ours")[2]
    name = "layers.1.mlp.up_proj"
    assert torch.equal(ours[f"model.{name}.lora_B"], state[f"mola.{name}.experts.0.lora_B.weight"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("routing_strategy", "mixlora-dynamic"),
        ("use_dora", True),
        ("act_fn", "gelu_new"),
        ("expert_lora", {"use_dora": True}),
        ("num_experts", 0),
        ("top_k", 9),
        ("target_modules", "q_proj"),
        ("expert_capacity", 32),
    ],
)
def test_a_setting_that_we_cannot_hold_is_named(
    base: Path, tmp_path: Path, setting: str, value: object
) -> None:
    write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    edit(tmp_path / "theirs", **{setting: value})
    with pytest.raises(ConfigError, match="use_dora" if setting == "expert_lora" else setting):
        run(tmp_path / "theirs", tmp_path / "ours", base)
    assert not (tmp_path / "ours").exists()


def test_every_tensor_that_is_wrong_is_named(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    del state["mixlora.layers.0.mlp.moe_gate.weight"]
    state["mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight"] = torch.zeros(3, 32)
    state["classifier.weight"] = torch.zeros(2, 32)
    torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "theirs", tmp_path / "ours", base)
    assert {problem.path: problem.rule for problem in caught.value.problems} == {
        "mixlora.layers.0.mlp.moe_gate.weight": "is missing",
        "mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight": "must have shape (4, 32)",
        "classifier.weight": "is not expected",
    }


def test_another_base_is_one_line(base: Path, tmp_path: Path) -> None:
    state = write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    deeper = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in state.items()}
    torch.save(deeper, tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(ConfigError, match="modules that it has not") as caught:
        run(tmp_path / "theirs", tmp_path / "ours", base)
    assert len(caught.value.problems) == 1


def test_the_package_mixlora_says_the_same(base: Path, tmp_path: Path) -> None:
    mixlora = pytest.importorskip("mixlora")
    write_moe_peft(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), "mixlora")
    edit(tmp_path / "theirs", base_model_name_or_path=str(base))
    model, _ = mixlora.MixLoraModelForCausalLM.from_pretrained(str(tmp_path / "theirs"))
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()  # they are no submodules, so that the model's own eval() leaves dropout on
    run(tmp_path / "theirs", tmp_path / "ours", base)
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), logits(model), atol=2e-5, rtol=1e-4)
