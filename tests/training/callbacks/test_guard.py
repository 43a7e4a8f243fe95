"""The guard in real runs on two ranks: what a task teaches makes its evaluation worse, and it is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.launches import adapter_bytes, rows
from support.ranks import train_on_ranks
from support.tiny import write_tiny_run

STEPS = 64
SHARES = {"even": 0.85, "last_word": 0.15}
"""In 64 steps `even` is seen 21 times, and `last_word` less than once: the guard leaves it alone."""


def _run(folder: Path, action: str, *overrides: str) -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    run = write_tiny_run(
        folder,
        training={
            "steps": STEPS,
            "learning_rate": 0.03,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "guard": {"action": action, "patience": 2, "factor": 0.5},
        },
        data={"max_length": 96, "system_prompt": None, "recipe": str(folder / "tasks" / "mixture.yaml")}
        | {"mix": {"block": 8, "max_repeats": None, "rule": "explicit", "shares": SHARES}},
        evaluation={"every_steps": 4, "score_rows": 0},
        checkpoint={"every_steps": 0},
    )
    _teach_what_is_wrong(folder / "tasks")
    return folder / "run", train_on_ranks(run, folder, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Action -> folder and output of a run that nobody disturbs."""
    return cache(lambda action: _run(tmp_path_factory.mktemp(action), action))


def _teach_what_is_wrong(tasks: Path) -> None:
    """All training rows of `even` say yes, all others no: what is learnt makes the evaluation worse."""
    for path in tasks.glob("even.*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        answer = "yes" if "train" in path.name else "no"
        path.write_text("".join(json.dumps(record | {"output": answer}) + "\n" for record in records))


def _decisions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]


def _shares(run: Path, after: int) -> dict[str, float]:
    """Share of each task in the steps after `after`."""
    found = {row["step"]: row for row in rows(run) if "mix/even" in row}
    last, first = found[max(found)], found[after]
    size, steps = 8, max(found)
    names = ("even", "last_word")
    counts = {n: last[f"mix/{n}"] * steps * size - first[f"mix/{n}"] * after * size for n in names}
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def test_reweight_lowers_the_weight_of_the_loss_and_says_why(finished: Callable) -> None:
    run, output = finished("reweight")
    first = _decisions(run)[0]
    assert (first["action"], first["task"], first["weight"]) == ("reweight", "even", 0.5)
    assert first["regret"] > first["regret_gate"]
    assert first["train_loss"] < first["train_loss_at_best"]
    assert "above its best" in first["cause"]
    assert "decision: after" in output
    weights = {row["step"]: row["loss_weight/even"] for row in rows(run) if "loss_weight/even" in row}
    assert min(weights) == first["step"] + 1
    assert weights[first["step"] + 1] == 0.5


def test_freeze_takes_the_task_out_from_a_later_block(finished: Callable) -> None:
    run, _ = finished("freeze")
    (decision,) = [d for d in _decisions(run) if d["task"] == "even"]
    effective = decision["step"] + 9  # eight steps may be read ahead, and a block has one step
    assert effective < STEPS
    assert _shares(run, effective) == {"even": 0.0, "last_word": 1.0}
    assert _shares(run, 1)["even"] > 0


def test_stop_ends_the_run_with_everything_written_and_stays_stopped(tmp_path: Path) -> None:
    run, output = _run(tmp_path / "stop", "stop", "evaluation.score_rows=2")
    (decision,) = _decisions(run)
    assert decision["action"] == "stop"
    assert max(row["step"] for row in rows(run)) == decision["step"] < STEPS
    assert json.loads((run / "checkpoints" / "latest.json").read_text())["step"] == decision["step"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert "macro average" in output
    before = (adapter_bytes(run), rows(run))
    results = json.loads((run / "results.json").read_text())
    assert results["macro_score_after"] is not None, "the last evaluation is a whole one"
    _run(tmp_path / "stop", "stop", "evaluation.score_rows=2")
    assert (adapter_bytes(run), rows(run)) == before
    assert _decisions(run) == [decision]


@pytest.mark.parametrize("action", ["reweight", "freeze"])
def test_a_resumed_run_decides_the_same(finished: Callable, tmp_path: Path, action: str) -> None:
    whole, _ = finished(action)
    part, _ = _run(tmp_path, action, "training.steps=28", "checkpoint.every_steps=14")
    train_on_ranks(tmp_path / "run.yaml", tmp_path)
    assert _decisions(part) == _decisions(whole)
    assert adapter_bytes(part) == adapter_bytes(whole)
    assert rows(part)[-1] == rows(whole)[-1]
