"""Requests that come at any time, and static batching: the waiting ones of one adapter are one batch.

Decisions: one thread computes, for one device has nothing to gain from more. A batch is all that waits for
the adapter of the oldest request, up to a number of rows; what comes while it runs waits for the next. The
queue is bounded: a request that finds it full is refused at once. Nothing of a request's text is logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from moe_medical.evaluation.generate import EndReason, Row, Sampling
from moe_medical.serving.adapted import Adapted
from moe_medical.serving.detokenizer import Detokenizer

_LOG = logging.getLogger(__name__)

End = EndReason | Literal["error"]


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Request:
    """One prompt, who is to continue it, and what has come of it."""

    adapted: Adapted
    prompt_ids: Sequence[int]
    tasks: tuple[int, ...]
    """Numbers of the prompt's tasks, from `Adapted.task_numbers`."""
    max_new_tokens: int
    sampling: Sampling
    detokenizer: Detokenizer
    ended: Callable[[End], None]
    """Called once, from another thread, unless the request was cancelled."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by who asked; no batch is stopped for it, but its row ends with its next token."""

    def take(self, token: int) -> bool:
        """The next token; True when there need be no more."""
        return self.cancelled.is_set() or self.detokenizer.take(token)

    def end(self, reason: End) -> None:
        """No more tokens come."""
        if not self.cancelled.is_set():
            if reason != "error":
                self.detokenizer.finish()
            self.ended(reason)


class Load(NamedTuple):
    """Numbers of requests."""

    waiting: int
    running: int


class Batching(Protocol):
    """A way to answer requests that come at any time."""

    def check(self, name: str, adapted: Adapted) -> None:
        """Refuse an adapter whose requests cannot be answered this way.

        Raises:
            ConfigError: It is one.
        """

    def submit(self, request: Request) -> None:
        """Answer it as soon as may be.

        Raises:
            QueueFull: Too many wait.
            ConfigError: It asks for what this way cannot give.
        """

    def load(self) -> Load:
        """Requests that wait, and that are being answered."""

    def forget(self, adapted: Adapted) -> None:
        """No more requests for this adapter will come: free what was kept for it, if anything was."""

    def close(self) -> None:
        """Answer what waits, then stop."""


class StaticBatching:
    """Requests of one adapter that wait together are one batch, which runs to its end.

    Args:
        batch_rows: Of a batch, at most.
        queue: Requests that may wait.
    """

    def __init__(self, batch_rows: int, queue: int) -> None:
        self._batch_rows = batch_rows
        self._queue = queue
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._open = True
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._work, name="answers")
        self._thread.start()

    def check(self, name: str, adapted: Adapted) -> None:
        """See `Batching`; any adapter can be answered."""

    def submit(self, request: Request) -> None:
        """See `Batching`."""
        with self._changed:
            if len(self._waiting) >= self._queue:
                raise QueueFull
            self._waiting.append(request)
            self._changed.notify()

    def load(self) -> Load:
        """See `Batching`."""
        with self._changed:
            running = sum(not request.cancelled.is_set() for request in self._running)
            return Load(len(self._waiting), running)

    def forget(self, adapted: Adapted) -> None:
        """See `Batching`; nothing is kept for an adapter."""

    def close(self) -> None:
        """See `Batching`."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            _run(batch)
            with self._changed:
                self._running = []

    def _next_batch(self) -> list[Request]:
        """Waits for one; empty once all is done and closed."""
        with self._changed:
            while True:
                self._waiting = [request for request in self._waiting if not request.cancelled.is_set()]
                if self._waiting or not self._open:
                    break
                self._changed.wait()
            # All of one adapter, for adapters share a base but no forward pass. The oldest decides whose turn
            # it is, so that no adapter waits for ever behind a busier one.
            same = [r for r in self._waiting if r.adapted is self._waiting[0].adapted]
            self._running = same[: self._batch_rows]
            self._waiting = [request for request in self._waiting if request not in self._running]
            return self._running


def _run(batch: Sequence[Request]) -> None:
    """Answer requests of one adapter; a failure ends those that had not ended."""
    left = set(batch)

    def row(request: Request) -> Row:
        def ended(reason: EndReason) -> None:
            left.discard(request)
            request.end(reason)

        return Row(request.prompt_ids, request.max_new_tokens, request.sampling, request.take, ended)

    try:
        tasks = [request.tasks for request in batch]
        batch[0].adapted.continue_rows([row(request) for request in batch], tasks)
    except Exception as e:  # whatever a model can raise: the server has other requests to answer
        # The type alone: a message could hold a part of the input.
        _LOG.error("a batch of %d requests failed: %s", len(batch), type(e).__name__)
        for request in left:
            request.end("error")
