"""The seesaw on a real model: six tasks of the quickstart, once with one task that dominates them.

Both runs read back from their W&B files hold every series that a run can show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.launches import rows
from support.ranks import train_on_ranks
from support.tiny import ROOT
from support.wandb_file import WandbRun, read_run

TASKS = (
    *("icd10cm_code_to_description", "icd10cm_laterality", "hpo_is_a"),
    *("hpo_feature_frequency", "hpo_term_to_definition", "hpo_disease_onset"),
)
STEPS = 12
DOMINATED = ["data.mix.rule=proportional", f"data.tasks.{TASKS[0]}.weight=60"]
SERIES = {
    *(f"seesaw/{name}" for name in ("index", "paid", "gain", "regress", "regressed_tasks", "worst_loss")),
    *(f"seesaw/window_{name}" for name in ("index", "paid", "gain", "regress")),
    *(f"seesaw/regret_{name}" for name in ("mean", "max", "tasks")),
    *(f"conflict/{name}" for name in ("rate", "mass", "mean_cosine", "worst_cosine", "strong_pairs")),
    *(f"router/{name}" for name in ("task_information", "effective_experts", "balance", "dead_experts")),
    *("router/collapsed_layers", "router/conflict_overlap", "eval/macro_loss", "health/memory_gib"),
    *(f"{kind}/{task}" for kind in ("eval_loss", "regret", "mix", "repeats") for task in TASKS),
    *("loss", "tokens", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "global_step"),
}


@dataclass(frozen=True)
class Finished:
    rows: list[dict[str, float]]
    wandb: WandbRun

    def last(self, name: str) -> float:
        return [row[name] for row in self.rows if name in row][-1]


def _run(folder: Path, settings: list[str]) -> Finished:
    folder.mkdir()
    of_run = {
        "run.dir": folder / "run",
        "data.only": json.dumps(TASKS),
        "data.max_length": 128,
        "training.steps": STEPS,
        "training.global_batch": 8,
        "training.schedule": "constant",
        "evaluation.loss_rows": 6,
        "evaluation.score_rows": 0,
        "evaluation.every_steps": 3,
        "checkpoint.every_steps": 0,
        "tracking.conflict_every_steps": 6,
        "tracking.routing_every_steps": 6,
        "tracking.wandb.mode": "offline",
    }
    overrides = [*(f"{key}={value}" for key, value in of_run.items()), *settings]
    train_on_ranks(ROOT / "launch" / "runs" / "quickstart.yaml", folder, *overrides, timeout=560)
    return Finished(rows(folder / "run"), read_run(folder / "run" / "wandb"))


@pytest.mark.timeout(1200)
def test_one_task_that_dominates_makes_a_seesaw_and_the_default_mixture_does_not(tmp_path: Path) -> None:
    dominated, mixed = _run(tmp_path / "dominated", DOMINATED), _run(tmp_path / "mixed", [])
    assert dominated.last("mix/icd10cm_code_to_description") > 0.8
    assert dominated.last("seesaw/window_index") > 0.3, "others pay a good part of the gain"
    assert dominated.last("seesaw/regret_tasks") >= 2
    assert mixed.last("seesaw/window_index") < dominated.last("seesaw/window_index") / 2
    assert mixed.last("seesaw/regret_tasks") < dominated.last("seesaw/regret_tasks")
    assert mixed.last("eval/macro_loss") < dominated.last("eval/macro_loss")
    for run in (dominated, mixed):
        history = run.wandb.history
        assert set().union(*history) >= SERIES
        assert any(row.get("seesaw/index") is not None for row in history)
        index = [row["seesaw/index"] for row in history if "seesaw/index" in row]
        assert index == [row["seesaw/index"] for row in run.rows if "seesaw/index" in row]
