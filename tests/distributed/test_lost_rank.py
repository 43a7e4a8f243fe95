"""A rank is killed, stopped, hangs or fails: the others stop within the limit and say which one it was."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from support.launches import reached
from support.ranks import on_ranks, rank_environment
from support.tiny import write_tiny_run

from moe_medical.distributed.topology import naming_lost_peers
from moe_medical.errors import PeerLostError
from moe_medical.ports import free_port

WORLD = 4
LIMIT_SECONDS = 8
PATIENCE_SECONDS = 60
HOST = socket.gethostname()

SCENARIOS = {
    "kill": (3, f"rank 3 of 4 (host {HOST}) has ended or cannot be reached"),
    "stop": (3, f"rank 3 of 4 (host {HOST}) has ended or cannot be reached"),
    "kill main": (0, f"rank 0 of 4 (host {HOST}) has ended or does not answer"),
    "stop main": (0, f"rank 0 of 4 (host {HOST}) has ended or does not answer"),
    "fail": (3, f"rank 3 of 4 (host {HOST}) has failed (ZeroDivisionError)"),
    "hang": (3, f"rank 3 of 4 (host {HOST}) does not take part: it is in "),
    "never join": (3, "not all 4 ranks have joined the run ("),
    "train": (1, f"rank 1 of 4 (host {HOST}) has ended or cannot be reached"),
}
"""What happens to which rank, and what the others say. `train` is an expert-parallel run; 1 is stopped."""


def _play(folder: str, run: str) -> dict[str, list[str]]:
    """What the survivors of each scenario say; four processes each, forked when everything is imported."""
    import moe_medical.training.run  # noqa: F401

    told = Path(folder) / "told"
    told.mkdir()
    talks = [name for name in SCENARIOS if name != "train"]
    _wait_for_survivors(told, talks, [pid for name in talks for pid in _fork_ranks(name, told, run)])
    _wait_for_survivors(told, ["train"], _train_and_stop_one(told, run))
    return {name: [path.read_text() for path in sorted(told.glob(f"{name}-*"))] for name in SCENARIOS}


def _train_and_stop_one(told: Path, run: str) -> list[int]:
    pids = _fork_ranks("train", told, run)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while reached(Path(run).parent / "run") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pids[SCENARIOS["train"][0]], signal.SIGSTOP)
    return pids


def _wait_for_survivors(told: Path, names: list[str], pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    wanted = (WORLD - 1) * len(names)
    while sum(len(list(told.glob(f"{name}-?"))) for name in names) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork_ranks(name: str, told: Path, run: str) -> list[int]:
    port = free_port()
    return [_fork_rank(name, rank, port, told, run) for rank in range(WORLD)]


def _fork_rank(name: str, rank: int, port: int, told: Path, run: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ.update(rank_environment(rank, WORLD, port))
        try:
            _run_rank(name, rank, told, run)
        finally:
            os._exit(0)
    return pid


def _run_rank(name: str, rank: int, told: Path, run: str) -> None:
    from moe_medical.config import load_config
    from moe_medical.errors import PeerLostError
    from moe_medical.training.run import train_and_report

    victim = rank == SCENARIOS[name][0]
    try:
        if name == "train":
            train_and_report(load_config(run))
        else:
            _talk(name if victim else "")
    except PeerLostError as e:
        if not victim:
            draft = told.with_name(f"{name}-{rank}")
            draft.write_text(str(e))
            draft.rename(told / draft.name)


def _talk(fate: str) -> None:
    """Collectives in subgroups of two and of all, as expert parallelism has them, until fate strikes."""
    import torch
    import torch.distributed as dist

    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.topology import limit_waiting, naming_lost_peers, start_distributed

    section = ParallelSection(device="cpu", timeout_seconds=LIMIT_SECONDS)
    if fate == "never join":
        return
    topology = start_distributed(section)
    with naming_lost_peers():
        made = [dist.new_group(pair) for pair in ([0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3])]
        groups = [group for group in made if group is not dist.GroupMember.NON_GROUP_MEMBER]
        limit_waiting(section)
        for step in range(100):
            for group in groups:
                dist.all_reduce(torch.ones(8), group=group)
            if step == 3:
                _strike(fate)
        raise AssertionError(topology)


def _strike(fate: str) -> None:
    if fate.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fate == "fail":
        raise ZeroDivisionError
    elif fate == "hang":
        threading.Event().wait()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("lost")
    run = write_tiny_run(
        folder,
        training={"steps": 10_000, "global_batch": 8, "micro_batch": 1},
        data={"max_bad_fraction": 0, "mix": {"max_repeats": None}},
        parallel={"ranks": WORLD, "ep_size": 2, "exchange": "weights", "timeout_seconds": LIMIT_SECONDS},
        evaluation={"score_rows": 0},
    )
    (found,) = on_ranks(1, _play, folder, str(folder), str(run))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_survivor_stops_and_names_the_rank(name: str, told: dict[str, list[str]]) -> None:
    assert len(told[name]) == WORLD - 1
    assert all(said.startswith(SCENARIOS[name][1]) for said in told[name]), told[name]


def test_a_lost_peer_is_named() -> None:
    with pytest.raises(PeerLostError, match="another rank of"), naming_lost_peers():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_lost_peers():
        raise RuntimeError("shapes differ")
