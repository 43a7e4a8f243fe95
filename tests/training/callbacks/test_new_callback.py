"""A callback of somebody else's: what CONTRIBUTING.md says suffices, state in the checkpoint included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.launches import rows
from support.ranks import on_ranks
from support.tiny import write_tiny_run

from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.training.callback import Callback
from moe_medical.training.step import StepResult

STEPS, STOP, ENOUGH = 8, 3, 6


class LargestNorm(Callback):
    """Logs the largest gradient norm so far, asks for an evaluation after step 2, and ends the run."""

    name = "largest_norm"

    def __init__(self) -> None:
        self.largest, self.evaluated = 0.0, list[int]()

    def wants_evaluation(self, done: int) -> bool:
        return done == 2

    def after_evaluation(self, evaluation: Evaluation, is_new: bool) -> None:
        self.evaluated.append(evaluation.step)

    def before_step(self, step: int) -> None:
        self.ends_run = step + 1 == ENOUGH

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        self.largest = max(self.largest, result.grad_norm)
        return {"largest_norm": self.largest}

    def state(self, done: int) -> float:
        return self.largest

    def load_state(self, state: float) -> None:
        self.largest = state


def _train(run: str) -> list[Any]:
    """A run that is stopped and resumed, with the callback; what it saw in each part."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    seen = []
    topology = start_distributed(load_config(run).parallel)
    for steps in (STOP, STEPS):
        trainer = Trainer(load_config(run, [f"training.steps={steps}"]), topology)
        callback = LargestNorm()
        trainer.callbacks.append(callback)
        trainer.run()
        seen.append(callback.evaluated)
    stop_distributed()
    return seen


def test_a_new_callback_logs_keeps_its_state_and_ends_the_run(tmp_path: Path) -> None:
    run = write_tiny_run(
        tmp_path,
        training={"schedule": "constant", "warmup_ratio": 0.0},
        evaluation={"loss_rows": 2, "score_rows": 0},
        checkpoint={"every_steps": 0},
    )
    first, second = on_ranks(2, _train, tmp_path, str(run))[0]
    assert first == [0, 2, STOP]
    assert second == [0, ENOUGH]
    of_step = {row["step"]: row for row in rows(tmp_path / "run") if "largest_norm" in row}
    assert list(of_step) == list(range(1, ENOUGH + 1))
    norms = [row["grad_norm"] for row in of_step.values()]
    assert [row["largest_norm"] for row in of_step.values()] == [max(norms[: i + 1]) for i in range(ENOUGH)]
    (newest,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1:]
    assert json.loads((newest / "state.json").read_text())["callbacks"]["largest_norm"] == max(norms)
