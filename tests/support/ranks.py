"""Run a function of a test module on N real processes joined by gloo.

    results = on_ranks(2, _my_function, tmp_path, {"stage": 2})

The function takes the arguments (JSON values) and returns a JSON value; it runs in a process of its own with
the launcher's environment. Output is tagged with the rank; the death or the time-out of one ends the others.

Processes are forked from servers that have imported everything (`support.rank_server`): one for even ranks,
one for odd ones, so that ranks differ in Python's hash seed as those of a launcher do.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from moe_medical.ports import free_port

TESTS = Path(__file__).parents[1]
_SERVERS = 2


def on_ranks(
    world: int,
    function: Callable[..., Any],
    tmp_path: Path,
    *arguments: Any,
    timeout: float = 180,
    fresh: bool = False,
) -> list:
    """Results of all ranks in order; AssertionError with every rank's output if one fails.

    With `fresh` each has a server of its own, begun now: settings of the C library are read at its start.
    """
    folder = _play(world, function, tmp_path, arguments, timeout, fresh)
    return [json.loads((folder / f"result-{r}.json").read_text(encoding="utf-8")) for r in range(world)]


def train_on_ranks(run_file: Path, tmp_path: Path, *overrides: str, timeout: float = 180) -> str:
    """`moe-medical train` on two ranks as a launcher starts them; all that they have printed.

    For runs of which only the numbers matter: ranks that a launcher starts import for eight seconds each.
    """
    folder = _play(2, _train, tmp_path, [["train", str(run_file), *overrides]], timeout)
    return "".join(_output(folder, rank).read_text(encoding="utf-8") for rank in range(2))


def _train(arguments: list[str]) -> None:
    from moe_medical.cli import main

    code = main(arguments)
    if code:
        sys.exit(code)


def _play(
    world: int,
    function: Callable[..., Any],
    tmp_path: Path,
    arguments: Sequence[Any],
    timeout: float,
    fresh: bool = False,
) -> Path:
    """The folder with the results and the output of ranks that have all ended well."""
    folder = tmp_path / f"ranks-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    port = free_port()
    argv = [inspect.getfile(function), function.__name__, str(folder)]
    servers = [_Server() if fresh else _server(r % _SERVERS) for r in range(world)]
    ranks = [
        server.start(_output(folder, r), rank_environment(r, world, port), argv)
        for r, server in enumerate(servers)
    ]
    failure = _wait(ranks, timeout)
    texts = [_output(folder, r).read_text(encoding="utf-8", errors="replace") for r in range(world)]
    tagged = "".join(f"[rank {r}] {line}\n" for r, text in enumerate(texts) for line in text.splitlines())
    sys.stdout.write(tagged)
    assert failure is None, f"{failure}\n{tagged}"
    return folder


def _output(folder: Path, rank: int) -> Path:
    return folder / f"output-{rank}.txt"


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
        """End it if it still runs."""
        # The server has not reaped it as long as there is no code, so that the number is still its own.
        if self.poll() is None:
            with suppress(ProcessLookupError):  # reaped just now
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
            assert self._heard.wait_for(lambda: self._pids or self.process.poll() is not None, timeout=600)
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


def start_servers() -> None:
    """Let the servers import while something else is done."""
    for number in range(_SERVERS):
        _server(number)


@cache
def _server(number: int) -> _Server:
    return _Server()


def _wait(ranks: list[_Rank], timeout: float) -> str | None:
    """What went wrong, if anything did; all ranks have ended afterwards."""
    deadline = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            if failed := _failed(ranks):
                return failed
            if time.monotonic() > deadline:
                late = [r for r, rank in enumerate(ranks) if rank.poll() is None]
                return f"ranks not done after {timeout} s: {late}"
            time.sleep(0.02)
        return _failed(ranks)
    finally:  # pytest's own time-out comes as an exception
        for rank in ranks:
            rank.kill()


def _failed(ranks: list[_Rank]) -> str | None:
    codes = {r: rank.poll() for r, rank in enumerate(ranks) if rank.poll()}
    return f"ranks failed: {codes}" if codes else None
