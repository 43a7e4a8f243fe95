"""A real run with all its looks: files and series are there, and the training is that of a run without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.launches import adapter_bytes, rows
from support.ranks import train_on_ranks
from support.tiny import write_tiny_run

from moe_medical.tracking.conflict import Conflict
from moe_medical.tracking.routing_stats import RoutingStats
from moe_medical.tracking.run_paths import RunPaths

STEPS = 8
LOOKS = {"conflict_every_steps": 3, "routing_every_steps": 2, "conflict_rows": 3}


def _run(folder: Path, **tracking: Any) -> Path:
    folder.mkdir()
    run = write_tiny_run(
        folder,
        training={"steps": STEPS},
        evaluation={"every_steps": 2, "score_rows": 2, "max_new_tokens": 2},
        checkpoint={"every_steps": 0},
        tracking={"wandb": {"enabled": False}, **tracking},
    )
    train_on_ranks(run, folder)
    return folder / "run"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("watched") / "run", **LOOKS)


def _series(run: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(run) if name in row}


def test_every_evaluation_has_its_seesaw(watched: Path) -> None:
    assert list(_series(watched, "seesaw/worst_loss")) == [0, 2, 4, 6, 8]
    for name in ("index", "paid", "gain", "regress", "regressed_tasks", "window_index", "regret_mean"):
        assert list(_series(watched, f"seesaw/{name}")) == [2, 4, 6, 8], name
    losses = _series(watched, "eval_loss/even")
    regret = _series(watched, "regret/even")
    best = min(losses[step] for step in (0, 2, 4))
    assert regret[4] == pytest.approx((losses[4] - best) / best)


def test_routing_and_conflict_are_looked_at_when_due_and_at_the_end(watched: Path) -> None:
    paths = RunPaths(watched)
    steps = {
        kind: [json.loads(path.read_text())["step"] for path in paths.of_each_step(getattr(paths, kind)(0))]
        for kind in ("routing", "conflict")
    }
    assert steps == {"routing": [2, 4, 6, 8], "conflict": [3, 6, 8]}
    assert list(_series(watched, "router/effective_experts")) == steps["routing"]
    assert list(_series(watched, "conflict/rate")) == steps["conflict"]
    assert list(_series(watched, "router/conflict_overlap")) == [4, 6, 8]  # the first look at angles is at 3


def test_files_can_be_read_back(watched: Path) -> None:
    paths = RunPaths(watched)
    routing = RoutingStats.from_json(json.loads(paths.routing(8).read_text()))
    conflict = Conflict.from_json(json.loads(paths.conflict(8).read_text()))
    assert list(routing.tasks) == list(conflict.tasks) == ["last_word", "even"]
    assert routing.counts_LTE.shape == (6, 2, 4)
    # The file rounds gate masses to three digits behind the point.
    balance = pytest.approx(_series(watched, "router/balance")[8], rel=1e-5)
    assert routing.values()["router/balance"] == balance
    assert conflict.values()["conflict/worst_cosine"] == _series(watched, "conflict/worst_cosine")[8]
    assert conflict.cosine_TT[0, 0] == pytest.approx(1)


def test_looks_change_nothing(watched: Path, tmp_path: Path) -> None:
    blind = _run(tmp_path / "blind", conflict_every_steps=0, routing_every_steps=0)
    assert not [row for row in rows(blind) if any(name.startswith(("router/", "conflict/")) for name in row)]
    assert _series(watched, "loss") == _series(blind, "loss")
    assert _series(watched, "grad_norm") == _series(blind, "grad_norm")
    assert adapter_bytes(watched) == adapter_bytes(blind)
