"""`moe-medical eval`, as a user starts it: the numbers of the run itself, on any number of ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import run_to_end
from support.ranks import train_on_ranks
from support.tiny import write_tiny_run

from moe_medical.adapters.folder import CONFIG_FILE, load_adapter, save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.cli import main
from moe_medical.config import load_config

EVAL = [sys.executable, "-m", "moe_medical", "eval"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a run of three steps, which is done."""
    folder = tmp_path_factory.mktemp("eval")
    evaluation = {"choices": "likelihood", "resamples": 50, "max_new_tokens": 3, "every_steps": 0}
    path = write_tiny_run(folder, training={"steps": 3, "learning_rate": 0.03}, evaluation=evaluation)
    train_on_ranks(path, folder)
    return path


def _adapter(run: Path) -> Path:
    return run.parent / "run" / "adapter"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the tasks' results agree, losses to four digits."""
    assert list(found) == list(expected)
    return all(
        result[key] == (pytest.approx(value, rel=1e-4) if "loss" in key else value)
        for result, wanted in zip(found.values(), expected.values(), strict=True)
        for key, value in wanted.items()
    )


def test_one_rank_and_two_tell_what_the_run_saw_at_its_end(run: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.json"
        command = [
            *EVAL,
            str(run),
            "--adapter",
            str(_adapter(run)),
            "--json",
            str(path),
            f"parallel.ranks={ranks}",
        ]
        code, output = run_to_end(command, tmp_path / f"{ranks}.txt")
        assert code == 0, output
        assert output.count("macro average") == 1
        assert "exact_match" in output
        found.append(_read(path))
    assert found[0] == found[1]
    assert found[0]["unknown_tasks"] == []
    own = _read(run.parent / "run" / "evaluations" / "step-00000003.json")
    assert found[0]["step"] == 3
    assert _same(found[0]["tasks"], own["tasks"])
    before = _read(run.parent / "run" / "evaluations" / "step-00000000.json")
    assert not _same(before["tasks"], own["tasks"])


def test_an_error_of_all_ranks_is_told_once(run: Path, tmp_path: Path) -> None:
    command = [*EVAL, str(run), "--adapter", str(tmp_path / "none"), "parallel.ranks=2"]
    code, output = run_to_end(command, tmp_path / "output.txt")
    assert code == 64
    assert output.count("Name an adapter folder") == 1


def test_the_base_model_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "base.json"
    assert main(["eval", str(run), "--json", str(path), "parallel.ranks=1"]) == 0
    own = _read(run.parent / "run" / "evaluations" / "step-00000000.json")
    found = _read(path)
    assert (found["step"], found["adapter"]) == (0, None)
    assert _same(found["tasks"], own["tasks"])  # adapters begin without an effect
    assert "last_word" in capsys.readouterr().out


def test_part_of_an_adapter_is_the_adapter_without_the_rest(run: Path, tmp_path: Path) -> None:
    config, meta, state = load_adapter(_adapter(run))
    rest = {
        name: torch.zeros_like(t) if ".mlp." in name and "lora_B" in name else t for name, t in state.items()
    }
    save_adapter(tmp_path / "silenced", rest, config, meta)
    settings = ["parallel.ranks=1", "evaluation.score_rows=0"]
    asked = (
        ["--adapter", str(_adapter(run)), "--only", "attention"],
        ["--adapter", str(tmp_path / "silenced")],
    )
    found = []
    for number, which in enumerate((*asked, asked[0][:2])):
        path = tmp_path / f"{number}.json"
        assert main(["eval", str(run), *which, "--json", str(path), *settings]) == 0
        found.append([result["loss"] for result in _read(path)["tasks"].values()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-4)


def test_answers_are_written_only_where_text_is_allowed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    command = ["eval", str(run), "--predictions", str(path), "evaluation.score_rows=2"]
    assert main(command) == 64
    assert "privacy.allow_text must be true" in " ".join(capsys.readouterr().err.split())
    assert not path.exists()
    assert main([*command, "privacy.allow_text=true", "parallel.ranks=1"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["task"], row["row"]) for row in rows] == [
        (t, i) for t in ("last_word", "even") for i in (0, 1)
    ]
    written = [json.loads(line) for line in (run.parent / "tasks" / "even.validation.jsonl").open()][:2]
    assert [row["target"] for row in rows[2:]] == [row["output"] for row in written]
    assert all(row["prompt"].startswith("Is it even?") for row in rows[2:])
    assert all(isinstance(row["prediction"], str) for row in rows)


def test_tasks_that_the_adapter_does_not_know_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(_adapter(run), folder)
    document = _read(folder / CONFIG_FILE)
    document["meta"] |= {"tasks": ["other", "last_word"], "system_prompt": "You know."}
    (folder / CONFIG_FILE).write_text(json.dumps(document))
    command = [
        "eval",
        str(run),
        "--adapter",
        str(folder),
        "--json",
        str(tmp_path / "e.json"),
        "parallel.ranks=1",
    ]
    assert main(command) == 0
    assert _read(tmp_path / "e.json")["unknown_tasks"] == ["even"]
    told = capsys.readouterr().err
    assert "not trained on: even" in told
    assert "trained with system_prompt 'You know.', the run file has None" in told


def _task_gated(run: Path, tasks: list[str], folder: Path) -> Path:
    """An adapter with a task gate, as it begins but for its weights."""
    config = load_config(run, ["adapters.router=task", "adapters.balance_coefficient=0"])
    model, adapters = (
        load_base(locate_base(config.model), "float32"),
        config.adapters.for_tasks(len(tasks)),
    )
    attach_adapters(model, adapters, seed=0)
    state = {name: p.detach() + 0.1 for name, p in adapter_parameters(model).items()}
    meta = {"base_model": config.model.name, "base_revision": None, "tasks": tasks, "label_sets": {}}
    save_adapter(folder, state, adapters, meta)
    return folder


def test_a_task_gate_goes_by_the_adapters_numbers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for tasks in (["last_word", "even"], ["even", "last_word"], ["last_word", "other"]):
        folder = _task_gated(run, tasks, tmp_path / "-".join(tasks))
        path = folder.with_suffix(".json")
        command = ["eval", str(run), "--adapter", str(folder), "--json", str(path), "parallel.ranks=1"]
        if "other" in tasks:
            assert main(command) == 64
            assert "unknown: even" in " ".join(capsys.readouterr().err.split())
            command.append("data.only=[last_word]")
        assert main(command) == 0
        losses[tasks[0], tasks[1]] = {k: v["loss"] for k, v in _read(path)["tasks"].items()}
    first, swapped, alone = losses.values()
    assert first["last_word"] != swapped["last_word"]
    assert first["last_word"] == pytest.approx(alone["last_word"], rel=1e-5)
    assert list(alone) == ["last_word"]
