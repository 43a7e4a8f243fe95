"""The supervisor with ranks of a few lines; with real ones: test_resume.py, test_launchers.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_medical.training import supervisor

WAIT = "import signal; signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
SAVES = (
    "import signal, sys\n"
    "def save(signum, frame): open(sys.argv[1], 'a').write(signal.Signals(signum).name + ' '); sys.exit(75)\n"
    "for s in (signal.SIGTERM, signal.SIGUSR1): signal.signal(s, save)\n"
    "print(flush=True)\n"
    "signal.pause()"
)
"""Says that it is ready; on a signal writes its name to the file it is given, and leaves with 75."""


def _rank(code: str, *arguments: object, ready: bool = False) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)
    if ready:
        assert process.stdout is not None
        process.stdout.readline()
    return process


def _look_after(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    try:
        return supervisor._look_after(ranks)
    finally:
        assert all(rank.poll() is not None for rank in ranks)
        for rank in ranks:
            assert rank.stdout is not None
            rank.stdout.close()


@pytest.mark.parametrize(
    ("codes", "wanted"), [((0, 0), 0), ((0, 65), 65), ((76, 0), 76)], ids=["done", "second", "first"]
)
def test_the_code_of_a_failed_rank_survives(codes: tuple[int, int], wanted: int) -> None:
    assert _look_after([_rank(f"raise SystemExit({code})") for code in codes]) == wanted


@pytest.mark.parametrize("others", [(), (0,)], ids=["alone", "beside a finished one"])
def test_a_failed_rank_ends_those_that_wait_for_it(others: tuple[int, ...]) -> None:
    ranks = [_rank(WAIT), *(_rank("") for _ in others), _rank("raise SystemExit(65)")]
    assert _look_after(ranks) == 65
    assert ranks[0].returncode == -signal.SIGTERM


def test_a_deaf_rank_is_killed_after_the_grace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.3)
    ranks = [_rank(DEAF, ready=True), _rank("raise SystemExit(70)")]
    assert _look_after(ranks) == 70
    assert ranks[0].returncode == -signal.SIGKILL
    assert capsys.readouterr().err == "rank 0 of 2 does not stop when asked; it is killed\n"


def test_a_killed_rank_has_the_shells_code_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert _look_after([_rank(""), _rank("import os; os.kill(os.getpid(), 9)")]) == 128 + 9
    assert capsys.readouterr().err == "rank 1 of 2 was ended by SIGKILL\n"


def test_preempted_ranks_are_left_to_finish(tmp_path: Path) -> None:
    """A second signal would cut short what the slower one has yet to write."""
    finishes = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write('whole'); sys.exit(75)"
    ranks = [_rank("raise SystemExit(75)"), _rank(finishes, tmp_path / "written")]
    assert _look_after(ranks) == 75
    assert (tmp_path / "written").read_text() == "whole"


@pytest.mark.parametrize(
    ("sent", "heard"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1")]
)
def test_every_rank_hears_a_signal_once(sent: str, heard: str, tmp_path: Path) -> None:
    ranks = [_rank(SAVES, tmp_path / str(i), ready=True) for i in range(3)]
    before = signal.getsignal(signal.Signals[sent])
    sender = threading.Thread(target=_send_when_heard, args=(signal.Signals[sent], before))
    sender.start()
    assert _look_after(ranks) == 75
    sender.join()
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == [f"{heard} "] * 3
    assert signal.getsignal(signal.Signals[sent]) == before


def _send_when_heard(signum: signal.Signals, before: object) -> None:
    """Signal this process once the supervisor's handler is in place of the one before it."""
    deadline = time.monotonic() + 20
    while signal.getsignal(signum) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signum)


def test_ranks_get_what_a_launcher_tells_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pools = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
    for pool in pools:
        monkeypatch.delenv(pool, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    env = supervisor._environment(4, tmp_path)
    named = {"WORLD_SIZE": "4", "LOCAL_SIZE": "4", "MASTER_ADDR": "127.0.0.1"} | dict.fromkeys(pools, "1")
    assert named.items() <= env.items()
    assert 1024 <= int(env["MASTER_PORT"]) < 65536
    env = supervisor._environment(2, tmp_path)
    assert [env[pool] for pool in pools] == ["3", "3"]
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    env = supervisor._environment(2, tmp_path)
    assert [env[pool] for pool in pools] == ["3", "5"]


@pytest.mark.parametrize(
    ("told", "threads"),
    [
        ({"LOCAL_SIZE": "2"}, "3"),
        ({"LOCAL_WORLD_SIZE": "8"}, "1"),
        ({}, "6"),
        ({"LOCAL_SIZE": "2", "RAYON_NUM_THREADS": "5"}, "5"),
    ],
)
def test_ranks_of_other_launchers_share_the_cores(
    told: dict[str, str], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(told))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    supervisor.share_cores()
    assert os.environ["RAYON_NUM_THREADS"] == threads


def test_a_rank_whose_supervisor_is_gone_leaves_at_once() -> None:
    code = "from moe_medical.training.supervisor import die_with_supervisor as d; d(); print('alive')"
    env = os.environ | {"PYTHONPATH": str(Path(supervisor.__file__).parents[2])}

    def run(supervisor_id: int) -> tuple[int, bytes]:
        told = env | {"MOE_MEDICAL_SUPERVISOR": str(supervisor_id)}
        done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, timeout=60)
        return done.returncode, done.stdout

    assert run(os.getpid()) == (0, b"alive\n")
    assert run(1) == (76, b"")
