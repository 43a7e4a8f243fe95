"""MOELoRA-peft folders become `moelora`, with the logits of its equation for every task."""

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
    write_moelora,
)
from support.tiny import write_tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

from moe_medical.adapters.folder import load_adapter
from moe_medical.errors import ConfigError
from moe_medical.interop.foreign.importing import import_adapter

EXPERTS, SCALING, TASKS = 4, 2.0, ("triage", "coding", "summary")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def published(base: Path, state: dict[str, Tensor], ids: list[int], shared: bool) -> Tensor:
    """y = W x + alpha / r sum_i softmax(W_T mean of e_j)_i B_i A_i x; ids count from 1."""
    model = LlamaForCausalLM.from_pretrained(base)
    for name, linear in linears(model, (*ATTENTION, *FFN)).items():
        own, where = f"{PREFIX}{name}", "" if shared else f"{PREFIX}{name}."
        embedding = state[f"{where}lora_task_embedding.weight"][ids].mean(0)
        gate = (state[f"{where}lora_gate.GateL.weight"] @ embedding).softmax(0)
        A = [state[f"{own}.lora_A.loraA.{i}.mlp.weight"] for i in range(EXPERTS)]
        B = [state[f"{own}.lora_B.loraB.{i}.mlp.weight"] for i in range(EXPERTS)]
        deltas = [SCALING * b @ a for a, b in zip(A, B, strict=True)]
        put(model, name, Loop(linear, lambda x, gate=gate: gate.expand(*x.shape[:-1], -1), deltas))
    return logits(model)


def run(folder: Path, out: Path, base: Path, tasks: tuple[str, ...] = TASKS):  # type: ignore[no-untyped-def]
    return import_adapter(folder, out, "auto", str(base), tasks, allow_pickle=True)


@pytest.mark.parametrize("shared", [True, False], ids=["one gate", "gate per module"])
def test_moelora_becomes_moelora(base: Path, tmp_path: Path, shared: bool) -> None:
    state = write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base), shared=shared)
    report = run(tmp_path / "theirs", tmp_path / "ours", base)
    for number in range(len(TASKS)):
        ours = imported_logits(tmp_path / "ours", base, [number, number])
        expected = published(base, state, [number + 1], shared)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    two = imported_logits(tmp_path / "ours", base, [[0, 2], [0, 2]])  # type: ignore[list-item]
    torch.testing.assert_close(two, published(base, state, [1, 3], shared), atol=2e-5, rtol=1e-4)
    config = report.config
    assert (config.preset, config.router, config.rank_split, config.rank) == ("moelora", "task", True, 8)
    assert config.router_scope == ("model" if shared else "module")
    assert load_adapter(tmp_path / "ours")[1]["tasks"] == list(TASKS)


def test_dead_gates_are_dropped_and_told(base: Path, tmp_path: Path) -> None:
    """R2.2: every module keeps a gate and an embedding that no forward reads."""
    state = write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base))
    report = run(tmp_path / "theirs", tmp_path / "ours", base)
    dead = {n for n in state if n.startswith(PREFIX) and ("lora_gate" in n or "embedding" in n)}
    assert set(report.dropped) == dead
    assert f"left out {len(dead)} tensors" in str(report)
    ours = load_adapter(tmp_path / "ours")[2]
    assert sum("router" in name for name in ours) == 2


def test_narrow_embeddings_are_filled_up(base: Path, tmp_path: Path) -> None:
    state = write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base))
    narrow = {n: t[:, :10] if "GateL" in n or "embedding" in n else t for n, t in state.items()}
    torch.save({n: t.clone() for n, t in narrow.items()}, tmp_path / "theirs" / "adapter_model.bin")
    edit(tmp_path / "theirs", task_embedding_dim=10)
    run(tmp_path / "theirs", tmp_path / "ours", base)
    ours = imported_logits(tmp_path / "ours", base, [1, 1])
    torch.testing.assert_close(ours, published(base, narrow, [2], True), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tasks", [(), TASKS[:2], ("triage", "triage", "coding")])
def test_the_tasks_must_be_named(base: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base))
    with pytest.raises(ConfigError, match="--tasks must name the 3 tasks"):
        run(tmp_path / "theirs", tmp_path / "ours", base, tasks)
    assert not (tmp_path / "ours").exists()


def test_every_tensor_that_is_wrong_is_named(base: Path, tmp_path: Path) -> None:
    state = write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base))
    own = f"{PREFIX}model.layers.0.self_attn.q_proj"
    del state["lora_gate.GateL.weight"], state[f"{own}.lora_B.loraB.2.mlp.weight"]
    state[f"{own}.lora_A.loraA.1.weight"] = torch.zeros(2, 32)
    state["lora_task_embedding.weight"] = torch.zeros(3, 64)
    state["lora_value_embedding.weight"] = torch.zeros(3, 64)
    torch.save(state, tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "theirs", tmp_path / "ours", base)
    told = {problem.path.removeprefix(f"{own}."): problem.rule for problem in caught.value.problems}
    assert told == {
        "lora_gate.GateL.weight": "is missing",
        "lora_B.loraB.2.mlp.weight": "is missing",
        "lora_B.loraB.2.weight": f"must equal {own}.lora_B.loraB.2.mlp.weight",
        "lora_A.loraA.1.weight": f"must equal {own}.lora_A.loraA.1.mlp.weight",
        "lora_task_embedding.weight": "must have shape (4, 64)",
        "lora_value_embedding.weight": "is not expected",
    }


@pytest.mark.parametrize(("name", "value"), [("r", 6), ("expert_num", 0), ("task_embedding_dim", 128)])
def test_a_setting_that_we_cannot_hold_is_named(base: Path, tmp_path: Path, name: str, value: int) -> None:
    write_moelora(tmp_path / "theirs", LlamaForCausalLM.from_pretrained(base))
    edit(tmp_path / "theirs", **{name: value})
    with pytest.raises(ConfigError, match=f"{name} must be"):
        run(tmp_path / "theirs", tmp_path / "ours", base)


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
