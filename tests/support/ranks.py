"""Run a function of a test module on N real processes joined by gloo.

    results = on_ranks(2, _my_function, tmp_path, {"stage": 2})

The function takes the arguments (JSON values) and returns a JSON value; it runs in a process of its own with
the launcher's environment. Output is tagged with the rank; the death or the time-out of one ends the others.

Processes are forked from servers that have imported everything (`support.rank_server`), one for each rank,
so that ranks differ in Python's hash seed as those of a launcher do.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
    argv = [inspect.getfile(function), function.__name__, str(folder)]
    outputs = [folder / f"output-{r}.txt" for r in range(world)]
    ranks = [
        _server(r).start(output, rank_environment(r, world, port), argv) for r, output in enumerate(outputs)
    ]
    failure = _wait(ranks, timeout)
    texts = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
    tagged = "".join(f"[rank {r}] {line}\n" for r, text in enumerate(texts) for line in text.splitlines())
    sys.stdout.write(tagged)
    assert failure is None, f"{failure}\n{tagged}"
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


class _Rank:
    """A process that a server has forked."""

    def __init__(self, server: _Server, pid: int) -> None:
        self._server = server
        self.pid = pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._server.process.poll() is not None:
            return 1  # nobody is left to tell how it went
        return self._server.codes.get(self.pid)

    def kill(self) -> None:
        # The server has not reaped it as long as there is no code, so that the number is still its own.
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.005)


class _Server:
    """One `support.rank_server`."""

    def __init__(self) -> None:
        environment = rank_environment(0, 1, 0)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del environment[name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.rank_server"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._heard = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, output: Path, environment: dict[str, str], argv: list[str]) -> _Rank:
        """Fork a rank; its output goes to a file."""
        request = {"output": str(output), "environment": environment, "folder": os.getcwd(), "argv": argv}
        assert self.process.stdin is not None
        output.touch()
        with self._heard:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            assert self._heard.wait_for(lambda: self._pids or self.process.poll() is not None, timeout=120)
            assert self._pids, "the server of ranks has ended"
            return _Rank(self, self._pids.pop())

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            with self._heard:
                if "pid" in message:
                    self.codes.pop(message["pid"], None)  # the number may have been another's before
                    self._pids.append(message["pid"])
                elif "ended" in message:
                    self.codes[message["ended"]] = message["code"]
                self._heard.notify_all()


@cache
def _server(rank: int) -> _Server:
    return _Server()


def _wait(ranks: list[_Rank], timeout: float) -> str | None:
    """What went wrong, if anything did; all ranks have ended afterwards."""
    deadline = time.monotonic() + timeout
    failure = None
    while failure is None and any(rank.poll() is None for rank in ranks):
        failed = {r: rank.poll() for r, rank in enumerate(ranks) if rank.poll()}
        if failed:
            failure = f"ranks failed: {failed}"
        elif time.monotonic() > deadline:
            failure = (
                f"ranks not done after {timeout} s: {[r for r, k in enumerate(ranks) if k.poll() is None]}"
            )
        else:
            time.sleep(0.02)
    failed = {r: rank.poll() for r, rank in enumerate(ranks) if rank.poll()}
    for rank in ranks:
        rank.kill()
    return failure or (f"ranks failed: {failed}" if failed else None)
