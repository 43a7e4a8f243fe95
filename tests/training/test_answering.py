"""Answers of an adapter whose experts are chosen by task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import write_tiny_model

from moe_medical.adapters.interop import save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError
from moe_medical.training.answering import answer_prompts, load_answering_model

TASKS = ["colour", "size"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    model_folder = write_tiny_model(folder / "model")
    model = load_base(locate_base(ModelSection(str(model_folder))), "float32")
    config = MoloraConfig(router="task", num_tasks=2, num_experts=4, top_k=4, rank=4, alpha=8.0, dropout=0.0)
    attach_adapters(model, config, seed=1)
    torch.manual_seed(2)
    state = {name: torch.randn_like(p) * 0.3 for name, p in adapter_parameters(model).items()}
    meta = {"base_model": str(model_folder), "base_revision": None, "tasks": TASKS, "label_sets": {}}
    save_adapter(folder / "adapter", state, config, meta | {"system_prompt": None})
    return folder / "adapter"


def test_the_task_decides(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2\nw3 w4 w5\nw6\n")
    printed = []
    for task, rows in (("colour", 2), ("size", 2), ("colour", 1)):
        answer_prompts(adapter, prompts, None, 8, rows, task)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[2]
    assert printed[0] != printed[1]


def test_a_task_is_bound_only_while_answering(adapter: Path) -> None:
    model, _, bound = load_answering_model(adapter, task="size")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), bound:
        inside = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(inside, model(ids).logits)


@pytest.mark.parametrize(
    ("task", "rule"), [(None, "must be given"), ("shape", "must be one of colour, size")]
)
def test_a_gate_without_a_known_task_is_refused(adapter: Path, task: str | None, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_answering_model(adapter, task=task)
