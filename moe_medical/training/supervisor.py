"""Starts the ranks of one machine and looks after them.

A thin stand-in for the `deepspeed` launcher on one node: the same environment for the ranks, but every
signal reaches all ranks at once, the death of one ends the others, and their exit code survives. Several
nodes are started with `deepspeed --hostfile`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from moe_medical.ports import free_port

_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m moe_medical ARGUMENTS` as ranks of one process group until all have ended.

    Returns:
        0, or the exit code of the rank that failed first (128 + n if signal n killed it).
    """
    ranks = [_start(rank, num_ranks, arguments, port) for port in [free_port()] for rank in range(num_ranks)]

    def forward(signum: int, _frame: FrameType | None) -> None:
        # The ranks have sessions of their own: a terminal's Ctrl-C comes here only and is passed on once.
        _signal_all(ranks, signal.SIGTERM if signum == signal.SIGINT else signum)

    old = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait(ranks)
    finally:
        _kill_all(ranks)
        for signum, handler in old.items():
            signal.signal(signum, handler)


def _start(rank: int, num_ranks: int, arguments: Sequence[str], port: int) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return subprocess.Popen(
        [sys.executable, "-m", "moe_medical", *arguments], env=env, start_new_session=True
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; from the first failure on the others have the grace period to end by themselves."""
    failed: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in ranks):
        if failed is None:
            failed = _first_failure(ranks)
            if failed is not None:
                deadline = time.monotonic() + _GRACE_SECONDS
                _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _kill_all(ranks)
        time.sleep(_POLL_SECONDS)
    return failed if failed is not None else (_first_failure(ranks) or 0)


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    codes = [p.returncode for p in ranks if p.poll() is not None and p.returncode != 0]
    return None if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signum)


def _kill_all(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()
