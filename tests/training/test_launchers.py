"""Every launcher makes the same run, and the death of a rank ends the launch without orphans."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.launches import (
    LAUNCH,
    UndisturbedRun,
    adapter_bytes,
    launched,
    reached,
    rows,
    run_to_end,
    survivors,
)

from moe_medical.ports import free_port

BIN = Path(sys.executable).parent
DEEPSPEED = ["deepspeed", "--num_gpus", "2", "--master_port", "{port}", "--module", "moe_medical", "train"]
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}", "-m", "moe_medical", "train"]


@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=lambda command: command[0])
def test_another_launcher_makes_the_same_run(
    launcher: list[str], undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    program, *arguments = [part.format(port=free_port()) for part in launcher]
    command = [str(BIN / program), *arguments, str(undisturbed.run_file), f"run.dir={tmp_path / 'run'}"]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    code, output = run_to_end(command, tmp_path / "output", DS_ACCELERATOR="cpu", PATH=path)
    assert code == 0, output
    assert rows(tmp_path / "run") == rows(undisturbed.folder)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(undisturbed.folder)
    assert output.count("macro average") == 1


def test_the_death_of_a_rank_ends_the_launch(undisturbed: UndisturbedRun, tmp_path: Path) -> None:
    """Until then a second launch of the run is refused."""
    folder = tmp_path / "run"
    command = [*LAUNCH, str(undisturbed.run_file), f"run.dir={folder}", "training.steps=10000"]
    with launched(command, tmp_path / "output") as run:
        run.wait_until(lambda: reached(folder) >= 3)
        code, output = run_to_end([*command, "parallel.ranks=1"], tmp_path / "second output")
        assert (code, output.startswith(f"{folder} is in use by another run (process ")) == (74, True)
        ranks = run.ranks()
        victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
        victim.kill()
        assert run.end() == 128 + 9, run.output
        lines = run.output.splitlines()
        # Rank 0 may be about something else than a collective, and then hears the supervisor first.
        if lines[-1].endswith("SIGTERM: stopping after this step"):
            lines.pop()
        assert lines[-1] == "rank 1 of 2 was ended by SIGKILL"
        assert survivors(ranks, within_seconds=0) == []
    assert len(ranks) == 2
    assert not (folder / "adapter").exists()
