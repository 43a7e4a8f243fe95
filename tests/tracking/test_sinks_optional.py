"""TensorBoard and trackio hold what `metrics.jsonl` holds, and only in the run's folder."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_medical.config import RunConfig
from moe_medical.tracking.sinks import open_sinks

Series = dict[str, list[tuple[int, float]]]


def write(folder: Path, sink: str, steps: range, first_step: int = 0, scale: float = 1.0) -> None:
    """Rows of the steps, each of 1 + its step."""
    config = RunConfig()
    config.run.name, config.run.dir = "tiny", str(folder)
    config.tracking.wandb.enabled = False
    config.tracking.sinks = [sink]
    sinks = open_sinks(config, folder, first_step)
    for step in steps:
        sinks.log({"tokens": 10 * step, "train_loss/ner": scale * (1.0 + step)}, step)
    sinks.heat_map("conflict/cosine", [("a", "b", 0.5)], 1)
    sinks.table("seesaw/tasks", ["task"], [["a"]], 1)
    sinks.alert("task regressed", "ner by 3 %")
    sinks.close(0)


def tensorboard_series(folder: Path) -> Series:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def trackio_rows(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """Run, step and numbers of each row, in the order of their steps."""
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, step, json.loads(metrics)) for run, step, metrics in found]


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    write(tmp_path, "tensorboard", range(5))
    assert tensorboard_series(tmp_path) == {
        "tokens": [(step, 10.0 * step) for step in range(5)],
        "train_loss/ner": [(step, 1.0 + step) for step in range(5)],
    }


def test_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, "tensorboard", range(1, 6))
    write(tmp_path, "tensorboard", range(4, 8), first_step=3, scale=2.0)
    losses = tensorboard_series(tmp_path)["train_loss/ner"]
    assert losses == [(1, 2), (2, 3), (3, 4), (4, 10), (5, 12), (6, 14), (7, 16)]


def test_a_folder_that_tensorboard_cannot_write_costs_only_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    write(tmp_path, "tensorboard", range(3))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [r.getMessage().partition(" (")[0] for r in caplog.records if r.levelno == logging.WARNING] == [
        "TensorBoard failed",
        "TensorBoard: 6 rows lost. metrics.jsonl is complete.",
    ]


WRITE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from tracking.test_sinks_optional import write
write(Path(sys.argv[1]), "trackio", range(5))
write(Path(sys.argv[1]), "trackio", range(4, 6), first_step=3)
"""


@pytest.mark.timeout(120)
def test_trackio_holds_every_number_and_writes_nowhere_else(tmp_path: Path) -> None:
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    environ = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home / "hub")}
    environ |= {
        "TRACKIO_SERVER_URL": "http://127.0.0.1:9",
        "TRACKIO_SPACE_ID": "a/b",
        "TRACKIO_DIR": str(home),
    }
    tests = str(Path(__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", WRITE, str(run), tests],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (child.stdout, child.stderr) == ("", "")
    rows = trackio_rows(run)
    assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4, 4, 5]
    assert all(values == {"tokens": 10.0 * n, "train_loss/ner": 1.0 + n} for _, n, values in rows)
    assert [path for path in home.rglob("*") if path.is_file()] == []
