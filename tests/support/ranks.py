"""Run a function of a test module on N real processes joined by gloo.

    results = on_ranks(2, _my_function, tmp_path, {"stage": 2})

The function takes the arguments (JSON values) and returns a JSON value; it runs in a fresh interpreter
with the launcher's environment. Output is tagged with the rank; the death or the time-out of one ends
the others.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from moe_medical.ports import free_port

TESTS = Path(__file__).parents[1]


def on_ranks(
    world: int, function: Callable[..., Any], tmp_path: Path, *arguments: Any, timeout: float = 180
) -> list:
    """Results of all ranks in order; AssertionError with every rank's output if one fails."""
    folder = tmp_path / f"ranks-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "support.rank_child",
        inspect.getfile(function),
        function.__name__,
        str(folder),
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=rank_environment(r, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world)
    ]
    lines: list[str] = []
    readers = [threading.Thread(target=_tag, args=(p.stdout, r, lines)) for r, p in enumerate(ranks)]
    for reader in readers:
        reader.start()
    failure = _wait(ranks, timeout)
    for reader in readers:
        reader.join()
    sys.stdout.write("".join(lines))
    assert failure is None, f"{failure}\n{''.join(lines)}"
    return [json.loads((folder / f"result-{r}.json").read_text()) for r in range(world)]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank of a one-machine run."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }


def _tag(stream: TextIO, rank: int, lines: list[str]) -> None:
    for line in stream:
        lines.append(f"[rank {rank}] {line}")


def _wait(ranks: list[subprocess.Popen[str]], timeout: float) -> str | None:
    deadline = time.monotonic() + timeout
    failure = None
    while failure is None and any(p.poll() is None for p in ranks):
        codes = {r: p.returncode for r, p in enumerate(ranks) if p.poll()}
        if codes:
            failure = f"ranks failed: {codes}"
        elif time.monotonic() > deadline:
            failure = (
                f"ranks not done after {timeout} s: {[r for r, p in enumerate(ranks) if p.poll() is None]}"
            )
        else:
            time.sleep(0.02)
    codes = {r: p.returncode for r, p in enumerate(ranks) if p.poll()}
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()
    return failure or (f"ranks failed: {codes}" if codes else None)
