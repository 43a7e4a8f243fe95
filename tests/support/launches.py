"""Real runs, started by a launcher as a user would: their processes, and what they have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support.tiny import ROOT

TIMINGS = {
    "step_seconds",
    "tokens_per_second",
    "health/data_wait_seconds",
    "health/memory_gib",
    "health/useful_positions",
}
LAUNCH = [sys.executable, "-m", "moe_medical", "launch"]
PATIENCE_SECONDS = 120.0


@dataclass
class Launched:
    """A launcher in a session of its own, with its output in a file."""

    process: subprocess.Popen[bytes]
    output_file: Path

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The launcher's descendants."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, patience: float = PATIENCE_SECONDS) -> int:
        """Wait so many seconds at most for the launcher; its exit code."""
        return self.process.wait(patience)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """AssertionError with the output if the launcher ends, or time runs out, before the condition."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.output}"
            assert time.monotonic() < deadline, f"still waiting\n{self.output}"
            time.sleep(0.005)


@contextmanager
def launched(command: list[str], output_file: Path, **environment: str) -> Iterator[Launched]:
    """Start a launcher; nothing that it has started is left at the end of the block."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    with output_file.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    run = Launched(process, output_file)
    family: list[psutil.Process] = []
    try:
        yield run
    finally:
        if process.poll() is None:
            family = run.ranks()
            process.kill()
        process.wait()
        survivors(family, within_seconds=0)


def run_to_end(
    command: list[str], output_file: Path, patience: float = PATIENCE_SECONDS, **environment: str
) -> tuple[int, str]:
    """Exit code and output of a launcher that is left alone."""
    with launched(command, output_file, **environment) as run:
        return run.end(patience), run.output


def survivors(processes: list[psutil.Process], within_seconds: float = 20.0) -> list[psutil.Process]:
    """Those that still run after a while; they are killed."""
    deadline = time.monotonic() + within_seconds
    while (alive := [p for p in processes if _runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in alive:
        process.kill()
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # an orphan may wait long for its reaper
    except psutil.NoSuchProcess:
        return False


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl without the timings; a torn last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def reached(folder: Path) -> int:
    """The last step in a run's metrics.jsonl, -1 without one."""
    return max((row["step"] for row in rows(folder)), default=-1)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of a run's published checkpoints."""
    names = [p.name.removeprefix("step-") for p in (folder / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@dataclass(frozen=True)
class UndisturbedRun:
    """A finished run of 40 steps, ZeRO-2 on 2 ranks, with dropout.

    Evaluations are due at other steps than checkpoints, and log lines carry sums over several steps.
    """

    run_file: Path
    folder: Path
    tasks: Path
    output: str
