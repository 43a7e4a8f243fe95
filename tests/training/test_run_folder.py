"""A run folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.tiny import ROOT

from moe_medical.errors import StorageError
from moe_medical.training.run_folder import RunFolder

OWNER = (
    "import sys, pathlib\n"
    "from moe_medical.training.run_folder import RunFolder\n"
    "with RunFolder(pathlib.Path(sys.argv[1])).claimed():\n"
    "    print(flush=True)\n"
    "    sys.stdin.read()\n"
)


@contextmanager
def _owner(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", OWNER, str(root)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    with _owner(root) as process:
        with pytest.raises(StorageError) as caught, RunFolder(root).claimed():
            pass
        assert str(caught.value) == (
            f"{root} is in use by another run (process {process.pid} on {socket.gethostname()}). "
            "Use a new run.name."
        )
        with RunFolder(tmp_path / "runs" / "two").claimed():  # another folder is free
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunFolder(root).claimed():
            (root / "metrics.jsonl").touch()
    assert (root / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run").claimed():
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).claimed():
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: no locks on this file system, so nothing keeps a second run out"
    ]


def test_a_decision_is_kept_once_and_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    decisions = [{"step": step, "action": "freeze", "task": "a", "cause": "why"} for step in (4, 8)]
    assert [folder.add_decision(d) for d in (*decisions, decisions[0])] == [True, True, False]
    with folder.decisions.open("a") as file:
        file.write('{"step": 12, "acti')
    folder.forget_after(6)
    assert folder.decisions.read_text() == json.dumps(decisions[0]) + "\n"
    folder.decisions.write_text('{"step": 1')
    assert folder.add_decision(decisions[1])
    assert folder.decisions.read_text() == json.dumps(decisions[1]) + "\n"
