"""Which rank is missing, asked once a collective has failed.

A thread of every rank answers through the process group's key-value store, whatever its main thread waits
for. So a process that has ended, is stopped or cannot be reached is told from one that answers but whose
main thread hangs. The store is served by rank 0 (under torchrun by the launcher beside it): no store, no
rank 0.

This needs collectives that raise. gloo's do; NCCL's raise for a broken connection, but one that waits too
long is ended, process and all, by torch's watchdog (`TORCH_NCCL_ASYNC_ERROR_HANDLING`, 3 unless set), which
logs the collective and not the missing rank. Nothing here was run with NCCL.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

_POLL_SECONDS = 1.0
_WINDOW_SECONDS = 5.0
"""How long the others are waited for."""


class RollCall:
    """One rank's side of a roll call.

    The store holds `host/<rank>`, `open` once somebody has called, and `answers`: lines of rank, state
    and detail. An answer outlives the rank that gave it, so one that has left afterwards is not missing.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        # A connection of its own: the group's may be held by a main thread that sets up a new group.
        self._store: Any = dist.PrefixStore("roll_call", store.clone())
        self._rank = rank
        self._hosts = self._exchange_hosts(world_size)
        self._answers: dict[int, dict[str, str]] = {}
        self._news: tuple[str, str] | None = None
        self._over = False
        self._wake = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="roll-call", daemon=True)
        self._thread.start()

    def find_missing(self) -> str:
        """Call the roll, or join one that is under way; who is missing, as a sentence.

        The process is about to end, and from now on ignores SIGTERM: a launcher that has seen another rank
        leave would silence this one.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._announce("noticed", "")
        self._done.wait(_WINDOW_SECONDS + 3 * _POLL_SECONDS)
        return self._describe()

    def report_failure(self, error: str) -> None:
        """Tell the others that this rank leaves because of an error of its own."""
        self._announce("failed", error)
        self._done.wait(_POLL_SECONDS)

    def stop(self) -> None:
        """End the thread."""
        self._over = True
        self._wake.set()
        self._thread.join(2 * _POLL_SECONDS)  # it cannot end while it asks a store that does not answer

    def _exchange_hosts(self, world_size: int) -> list[str]:
        self._store.set(f"host/{self._rank}", socket.gethostname())
        return [host.decode() for host in self._store.multi_get([f"host/{r}" for r in range(world_size)])]

    def _announce(self, state: str, detail: str) -> None:
        self._news = (state, detail)
        self._wake.set()

    # The thread's part: all that may block.

    def _attend(self) -> None:
        try:
            while not (self._over or self._news or self._store.check(["open"])):
                self._wake.wait(_POLL_SECONDS)
            if not self._over:
                self._take_part()
        except RuntimeError:
            time.sleep(_POLL_SECONDS)  # if rank 0 has failed, its own message comes first
        self._done.set()

    def _take_part(self) -> None:
        self._store.set("open", "")
        self._answer("here", _main_thread_place())
        deadline = time.monotonic() + _WINDOW_SECONDS
        while not (self._over or self._all_accounted_for()) and time.monotonic() < deadline:
            if self._news:
                self._answer(*self._news)
                self._news = None
            self._read_answers()
            time.sleep(_POLL_SECONDS / 4)
        if self._rank == 0:
            time.sleep(_POLL_SECONDS)  # the store must outlive the others' last look

    def _answer(self, state: str, detail: str) -> None:
        self._store.append("answers", f"{self._rank}\t{state}\t{detail}\n")

    def _read_answers(self) -> None:
        for line in self._store.get("answers").decode().splitlines():
            rank, state, detail = line.split("\t")
            self._answers.setdefault(int(rank), {})[state] = detail

    def _all_accounted_for(self) -> bool:
        known = [answer for answer in self._answers.values() if answer.keys() & {"noticed", "failed"}]
        return len(known) == len(self._hosts)

    # The sentence.

    def _describe(self) -> str:
        if not self._answers:
            return f"{self._name([0])} has ended or does not answer"
        everyone = range(len(self._hosts))
        absent = [r for r in everyone if r not in self._answers]
        failed = [r for r in everyone if "failed" in self._answers.get(r, {})]
        parts = [f"{self._name([r])} has failed ({self._answers[r]['failed']})" for r in failed]
        if absent:
            parts.append(f"{self._name(absent)} {'have' if absent[1:] else 'has'} ended or cannot be reached")
        return "; ".join(parts or self._describe_present())

    def _describe_present(self) -> list[str]:
        busy = {r: answer["here"] for r, answer in sorted(self._answers.items()) if "noticed" not in answer}
        places = [f"{self._name([r])} does not take part: it is in {place}" for r, place in busy.items()]
        return places or ["every rank answers, but a connection between two of them has failed"]

    def _name(self, ranks: Sequence[int]) -> str:
        hosts = sorted({self._hosts[r] for r in ranks})
        numbers = ", ".join(map(str, ranks))
        plural = "s" if len(ranks) > 1 else ""
        return f"rank{plural} {numbers} of {len(self._hosts)} (host {', '.join(hosts)})"


@contextmanager
def attended_roll_call() -> Iterator[RollCall | None]:
    """Answer roll calls inside the block; None where there is no other rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    store = dist.distributed_c10d._get_default_store()
    roll_call = RollCall(store, dist.get_rank(), dist.get_world_size())
    try:
        yield roll_call
    finally:
        roll_call.stop()


def _main_thread_place() -> str:
    """Where the main thread is: its innermost line of this package, and of all."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    package = os.sep + __package__.split(".")[0] + os.sep
    places = []
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    ours = [place for place in places if package in place[0]]
    shown = dict.fromkeys([*places[:1], *ours[:1]])
    return ", called from ".join(f"{'/'.join(Path(f).parts[-2:])}:{n} ({name})" for f, n, name in shown)
