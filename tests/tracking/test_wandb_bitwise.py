"""W&B changes no number of a run, not even with a server that never answers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from support.launches import LAUNCH, adapter_bytes, rows, run_to_end
from support.tiny import write_tiny_run
from support.wandb_file import read_run, run_files


@pytest.mark.timeout(240)
def test_numbers_are_those_of_a_run_without_wandb(tmp_path: Path) -> None:
    run = write_tiny_run(
        tmp_path,
        adapters={"dropout": 0.1},
        training={"steps": 4},
        parallel={"ranks": 1},
        evaluation={"score_rows": 2, "max_new_tokens": 2},
    )
    plain, followed = tmp_path / "plain", tmp_path / "followed"
    settings = yaml.safe_load(run.read_text())
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        for folder, enabled in ((plain, False), (followed, True)):
            settings["run"]["dir"] = str(folder)
            settings["tracking"] = {"wandb": {"enabled": enabled}, "sinks": ["tensorboard"] * enabled}
            run.write_text(yaml.safe_dump(settings))
            code, output = run_to_end(
                [*LAUNCH, str(run)],
                tmp_path / "output",
                WANDB_API_KEY="0" * 40,
                WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
                NO_PROXY="*",
            )
            assert code == 0, output
    assert rows(followed) == rows(plain)
    assert adapter_bytes(followed) == adapter_bytes(plain)
    # On a machine that is busy enough the patience with W&B, or with its process, ends first; that is told.
    told = any(words in output for words in ("left behind", "W&B is off", "W&B did not finish"))
    assert told or _rows_in_wandb(followed) == len(rows(followed)), output


def _rows_in_wandb(folder: Path) -> int:
    return len(read_run(run_files(folder)[-1]).rows())
