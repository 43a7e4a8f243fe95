"""A run that was killed or told to stop goes on as if nothing had happened; what cannot go on is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

from support.launches import (
    LAUNCH,
    UndisturbedRun,
    adapter_bytes,
    checkpoint_steps,
    launched,
    reached,
    rows,
    run_to_end,
    survivors,
)
from support.ranks import on_ranks
from support.tiny import write_tiny_run


def _command(run: UndisturbedRun, folder: Path, *overrides: str) -> list[str]:
    return [*LAUNCH, str(run.run_file), f"run.dir={folder}", *overrides]


def _assert_same(folder: Path, undisturbed: UndisturbedRun) -> None:
    assert rows(folder) == rows(undisturbed.folder)
    assert adapter_bytes(folder) == adapter_bytes(undisturbed.folder)
    assert _table(folder) == _table(undisturbed.folder)


def _table(folder: Path) -> object:
    return json.loads((folder / "results.json").read_text())


def test_the_undisturbed_run_has_what_the_others_are_compared_by(undisturbed: UndisturbedRun) -> None:
    seen = rows(undisturbed.folder)
    assert [row["step"] for row in seen if "loss" in row] == [*range(3, 40, 3), 40]
    assert [row["step"] for row in seen if "eval/macro_loss" in row] == [0, 10, 20, 30, 40]
    assert seen[-1]["eval/macro_loss"] < seen[0]["eval/macro_loss"]


def test_kill_9_then_the_same_command(undisturbed: UndisturbedRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = _command(undisturbed, folder)
    with launched(command, tmp_path / "output") as run:
        run.wait_until(lambda: reached(folder) >= 10)  # the evaluation after the second checkpoint
        ranks = run.ranks()
        run.process.kill()
        assert survivors(ranks) == []  # nobody told them: they die with their supervisor
    assert len(ranks) == 2
    assert max(checkpoint_steps(folder)) < 40
    assert not (folder / "adapter").exists()
    code, output = run_to_end(command, tmp_path / "output-again")
    assert code == 0, output
    assert re.search(r"resumed at step (8|12|16|20|24|28|32|36) of 40", output)
    _assert_same(folder, undisturbed)


def test_told_to_stop_twice(undisturbed: UndisturbedRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = _command(undisturbed, folder)
    for signum, after in ((signal.SIGTERM, 3), (signal.SIGINT, 15)):
        with launched(command, tmp_path / signum.name) as run:
            run.wait_until(lambda after=after: reached(folder) >= after)  # type: ignore[misc]
            _interrupt(run.process.pid, signum)
            assert run.end() == 75, run.output
        told = re.search(r"stopped after step (\d+) of 40", run.output)
        assert told is not None, run.output
        step = int(told[1])
        assert after <= step < 40
        assert max(checkpoint_steps(folder)) == step
        assert reached(folder) in (step, step - step % 3)
        assert run.output.count("stopped after step") == 1
        assert "Traceback" not in run.output
    code, output = run_to_end(command, tmp_path / "output")
    assert code == 0, output
    _assert_same(folder, undisturbed)


def _interrupt(pid: int, signum: int) -> None:
    """SIGTERM as a scheduler sends it, to the launcher alone; SIGINT as a terminal does, to its group."""
    if signum == signal.SIGINT:
        os.killpg(pid, signum)
    else:
        os.kill(pid, signum)


def test_a_finished_run_ends_at_once_and_changed_data_is_refused(
    undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    code, output = run_to_end(_command(undisturbed, folder), tmp_path / "output")
    assert code == 0, output
    assert "resumed at step 40 of 40" in output
    assert "evaluating" not in output
    assert _lines_of_table(output) == _lines_of_table(undisturbed.output) != []
    _assert_same(folder, undisturbed)

    changed = undisturbed.tasks / "even.train.jsonl"
    text = changed.read_text()
    changed.write_text(text.replace('"yes"', '"no"', 1))
    try:
        code, output = run_to_end(_command(undisturbed, folder), tmp_path / "output")
    finally:
        changed.write_text(text)
    assert code == 65, output
    assert output.count(f"{changed} has changed since the checkpoint") == 1
    assert "Traceback" not in output


def _lines_of_table(output: str) -> list[str]:
    return [line for line in output.splitlines() if "→" in line]


# What cannot go on, asked of one process that plays one run after the other


def _exit_codes(run: str) -> list[list]:
    """Exit code and message of runs in one folder: each line's override is tried in turn."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.errors import MoeMedicalError
    from moe_medical.training.trainer import Trainer

    topology = start_distributed(load_config(run, []).parallel)
    seen = []
    for overrides in ATTEMPTS:
        try:
            Trainer(load_config(run, overrides), topology).run()
            seen.append([0, ""])
        except MoeMedicalError as e:
            seen.append([e.exit_code, str(e)])
        lost = Path(run).parent / "run" / "evaluations" / "step-00000000.json"
        if overrides == ["checkpoint.resume=must"] and lost.exists():
            lost.write_text("")
        if overrides == []:
            for state in Path(run).parent.glob("run/checkpoints/step-*/state.json"):
                state.write_text("")
    stop_distributed()
    return seen


ATTEMPTS = [
    ["checkpoint.resume=must"],
    ["checkpoint.resume=never"],
    ["checkpoint.resume=never"],
    ["training.steps=2"],
    ["training.global_batch=4"],
    ["adapters.rank=2"],
    ["run.seed=3"],
    ["data.mix.block=8"],
    ["checkpoint.resume=must"],
    [],
    ["checkpoint.keep=3"],
]


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    run = write_tiny_run(
        tmp_path,
        parallel={"ranks": 1},
        training={"steps": 4},
        evaluation={"score_rows": 0},
        checkpoint={"every_steps": 2},
    )
    seen = on_ranks(1, _exit_codes, tmp_path, str(run))[0]
    assert [code for code, _ in seen] == [66, 0, 64, 64, 65, 65, 65, 65, 0, 65, 66]
    checkpoints = tmp_path / "run" / "checkpoints"
    for (_, message), wanted in zip(
        seen,
        [
            f"checkpoint.resume=must, but {checkpoints} has no valid checkpoint",
            "",
            f"checkpoint.resume is never, but {checkpoints} has a checkpoint of step 4",
            "training.steps must be at least 4",
            "training.global_batch was 8 in the checkpoint",
            "other shape ['model.layers.0.mlp.down_proj.lora_A",
            "run.seed was 17 in the checkpoint, is 3",
            "data.mix.block was 16 in the checkpoint, is 8",
            "",
            "step-00000000.json is lost",
            f"every checkpoint in {checkpoints} is damaged",
        ],
        strict=True,
    ):
        assert wanted in message
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0


def test_missing_checkpoints_are_no_new_run(undisturbed: UndisturbedRun, tmp_path: Path) -> None:
    """A volume that is not mounted: nothing of what is there may be lost."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    code, output = run_to_end(_command(undisturbed, folder), tmp_path / "output")
    assert code == 66, output
    assert (
        output.count(f"{folder}/metrics.jsonl tells of step 40, but {folder}/checkpoints has no checkpoint")
        == 1
    )
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_what_came_to_no_checkpoint_is_put_away_not_deleted(
    undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = (undisturbed.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = "".join(row for row in rows if json.loads(row)["step"] <= 3)
    (folder / "metrics.jsonl").write_text(early)
    code, output = run_to_end(
        _command(undisturbed, folder, "training.steps=2", "evaluation.score_rows=0"), tmp_path / "output"
    )
    assert code == 0, output
    assert "an earlier start came to no checkpoint" in output
    assert (folder / "earlier-1" / "metrics.jsonl").read_text() == early
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
