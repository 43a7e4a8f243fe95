"""Starts the ranks of one machine and looks after them.

A thin stand-in for the `deepspeed` launcher on one node: the same environment for the ranks, but every
signal reaches all ranks at once, the death of one ends the others, no rank outlives the supervisor, their
exit code survives, an error is told once, and a rank that was killed is named. Several nodes are started
with `deepspeed --hostfile`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from moe_medical.console import complain
from moe_medical.errors import PeerLostError, PreemptedError
from moe_medical.ports import free_port
from moe_medical.training.stopping import STOP_SIGNALS

_CLAIM = "MOE_MEDICAL_ERROR_CLAIM"
"""Variable that names a file; the rank that creates it tells the launch's error."""
_SUPERVISOR = "MOE_MEDICAL_SUPERVISOR"
"""Variable that holds the supervisor's process id."""
_TOKENIZER_THREADS = "RAYON_NUM_THREADS"
"""Without this variable the tokenizers of every rank start a thread per core."""
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m moe_medical ARGUMENTS` as ranks of one process group until all have ended.

    Returns:
        0, or the exit code of the rank that failed first (128 + n if signal n killed it).
    """
    with tempfile.TemporaryDirectory(prefix="moe-medical-") as folder:
        env = _environment(num_ranks, Path(folder))

        def tell(text: str) -> None:
            if _is_first(Path(env[_CLAIM])):
                complain(text)

        return _look_after([_start(rank, arguments, env) for rank in range(num_ranks)], tell)


def may_tell_error() -> bool:
    """Whether this process is the one that tells an error which may have hit several ranks.

    Under `run_ranks` the first rank that asks: it may be the only one with the error, and the others may be
    ended before they get so far. Under another launcher the first rank of each machine.
    """
    claim = os.environ.get(_CLAIM)
    return os.environ.get("LOCAL_RANK", "0") == "0" if claim is None else _is_first(Path(claim))


def _is_first(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_with_supervisor() -> None:
    """In a rank that `run_ranks` started: have the kernel kill it when the supervisor is gone (Linux)."""
    supervisor = os.environ.get(_SUPERVISOR)
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(supervisor):  # it was gone before we asked
        os._exit(PeerLostError.exit_code)


def share_cores() -> None:
    """In a rank of any launcher, before it tokenises: its tokenizers take a rank's share of the cores."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"  # deepspeed, torchrun
    os.environ.setdefault(_TOKENIZER_THREADS, _cores_each(int(local)))


def _look_after(ranks: Sequence[subprocess.Popen[bytes]], tell: Callable[[str], None] = complain) -> int:
    def forward(signum: int, _frame: FrameType | None) -> None:
        # The ranks have sessions of their own: a terminal's Ctrl-C comes here only and is passed on once.
        _signal_all(ranks, signal.SIGTERM if signum == signal.SIGINT else signum)

    old = {s: signal.signal(s, forward) for s in STOP_SIGNALS}
    try:
        return _wait(ranks, tell)
    finally:
        _kill_all(ranks)
        for signum, handler in old.items():
            signal.signal(signum, handler)


def _environment(num_ranks: int, folder: Path) -> dict[str, str]:
    """What all ranks are told."""
    env = os.environ | {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        _CLAIM: str(folder / "error"),
        _SUPERVISOR: str(os.getpid()),
    }
    for pool in ("OMP_NUM_THREADS", _TOKENIZER_THREADS):
        env.setdefault(pool, _cores_each(num_ranks))
    return env


def _cores_each(num_ranks: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // max(1, num_ranks)))


def _start(rank: int, arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_medical", *arguments],
        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        start_new_session=True,
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], tell: Callable[[str], None]) -> int:
    """Wait for all; from the first failure on the others have the grace period to end by themselves."""
    failed: int | None = None
    deadline = float("inf")
    while True:
        running = any(p.poll() is None for p in ranks)
        if failed is None and (failed := _first_failure(ranks)) is not None:
            _tell_killed(ranks, tell)
            deadline = time.monotonic() + _GRACE_SECONDS
            if failed != PreemptedError.exit_code:  # preempted ranks all stop by themselves
                _signal_all(ranks, signal.SIGTERM)
        if not running:
            return failed or 0
        if time.monotonic() > deadline:
            _tell_deaf(ranks)
            _kill_all(ranks)
        time.sleep(_POLL_SECONDS)


def _tell_killed(ranks: Sequence[subprocess.Popen[bytes]], tell: Callable[[str], None]) -> None:
    """A rank that a signal has ended cannot say so itself."""
    for rank, process in enumerate(ranks):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            tell(f"rank {rank} of {len(ranks)} was ended by {name}")


def _tell_deaf(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(ranks):
        if process.poll() is None:
            complain(f"rank {rank} of {len(ranks)} does not stop when asked; it is killed")


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    codes = [p.returncode if p.returncode > 0 else 128 - p.returncode for p in ranks if p.poll()]
    causes = [code for code in codes if code != PeerLostError.exit_code]  # the others only felt it
    return next(iter(causes + codes), None)


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signum)


def _kill_all(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()
