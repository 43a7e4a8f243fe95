"""transformers' own continuous batching: a request joins the batch that runs, and leaves when it has ended.

Decisions: one manager, thread and key-value cache for each adapter that was asked. Tokens of all requests are
packed into one row, so routers that need to know a token's task or where its prompt ends cannot tell: such
adapters are refused. A seed is refused too: the library draws from one generator for all requests.
"""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from moe_medical.errors import ConfigError, Problem
from moe_medical.serving.adapted import Adapted
from moe_medical.serving.batching import End, QueueFull, Request

_PAGE = 32
"""Tokens of a page of the cache."""
_CACHE_TOKENS = 32768
"""Tokens that the cache of one adapter holds, at most, unless a single request may need more."""
_POLL_SECONDS = 0.05
"""Between two looks at whether the library's thread still runs."""


def check_continuous(name: str, adapted: Adapted) -> None:
    """Raises ConfigError where an adapter's router needs to know rows."""
    if adapted.needs_rows or adapted.config.router == "xlora":
        rule = f"must be together, for the {adapted.config.router} router of {name} needs to know whole rows"
        raise ConfigError("serve", [Problem("--batching", rule, "continuous")])


class Continuous:
    """See `Batching`.

    Args:
        batch_rows: Requests of one adapter that are computed at once, at most.
        queue: Requests that may wait.
    """

    def __init__(self, batch_rows: int, queue: int) -> None:
        self._batch_rows, self._queue = batch_rows, queue
        self._managers: dict[Adapted, _Manager] = {}
        self._lock = threading.Lock()

    def submit(self, request: Request) -> None:
        """See `Batching`.

        Raises:
            ConfigError: a seed, unless the answer is greedy.
        """
        if request.sampling.seed is not None and request.sampling.temperature > 0:
            rule = "must be left out: this server's batching draws from one generator for all requests"
            raise ConfigError("serve", [Problem("seed", rule)])
        with self._lock:
            if sum(manager.waiting for manager in self._managers.values()) >= self._queue:
                raise QueueFull
            manager = self._managers.get(request.adapted)
            if manager is None:
                manager = self._managers[request.adapted] = _Manager(request.adapted, self._batch_rows)
            manager.add(request)

    def load(self) -> tuple[int, int]:
        """See `Batching`."""
        with self._lock:
            managers = list(self._managers.values())
        return sum(m.waiting for m in managers), sum(m.running for m in managers)

    def forget(self, adapted: Adapted) -> None:
        """See `Batching`; its cache is freed when its last request has been answered."""
        with self._lock:
            manager = self._managers.pop(adapted, None)
        if manager is not None:
            threading.Thread(target=manager.stop, name="forget").start()

    def close(self) -> None:
        """See `Batching`."""
        for manager in self._managers.values():
            manager.stop()


class _Manager:
    """The library's manager of one adapter, and the requests that it has."""

    def __init__(self, adapted: Adapted, batch_rows: int) -> None:
        self._batch_rows, self._end_id = batch_rows, adapted.chat.end_id
        self._vocabulary = int(adapted.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._requests: dict[str, Request] = {}
        self._names = count()
        settings = (_settings(adapted), _sizes(adapted, batch_rows))
        self._library: Any = adapted.model.init_continuous_batching(*settings)  # type: ignore[operator]
        self._library.start()
        self._thread = threading.Thread(target=self._deliver, name="continuous")
        self._thread.start()

    @property
    def waiting(self) -> int:
        return max(0, len(self._requests) - self._batch_rows)

    @property
    def running(self) -> int:
        return min(len(self._requests), self._batch_rows)

    def add(self, request: Request) -> None:
        """Hand a request to the library; top-k 1 is its greedy choice among sampled neighbours."""
        name, sampling = str(next(self._names)), request.sampling
        greedy = sampling.temperature == 0
        self._requests[name] = request
        self._library.add_request(
            list(request.prompt_ids),
            request_id=name,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            temperature=1.0 if greedy else sampling.temperature,
            top_k=1 if greedy else self._vocabulary,
            top_p=1.0 if greedy else sampling.top_p,
        )

    def stop(self) -> None:
        """Answer what there is, then end both threads."""
        self._library.stop(block=True)
        self._thread.join()

    def _deliver(self) -> None:
        while True:
            alive = self._library.is_running()
            output = self._library.get_result(timeout=_POLL_SECONDS)
            if output is not None:
                self._hand_out(output)
            elif not alive:
                break
        for request in self._requests.values():  # only where the library's thread has failed
            request.end("error")

    def _hand_out(self, output: Any) -> None:
        """New tokens of a request; what it has is all of them, each time."""
        request = self._requests.get(output.request_id)
        if request is None:
            return
        tokens = output.generated_tokens
        new = [token for token in tokens[request.wording.num_tokens :] if token != self._end_id]
        if any(request.take(token) for token in new):
            self._library.cancel_request(output.request_id)
            self._end(output.request_id, "stop")
        elif output.error is not None:
            self._end(output.request_id, "error")
        elif output.is_finished():
            self._end(output.request_id, "stop" if tokens[-1:] == [self._end_id] else "length")

    def _end(self, name: str, reason: End) -> None:
        self._requests.pop(name).end(reason)


def _settings(adapted: Adapted) -> GenerationConfig:
    """A setting that differs from the library's default is one that each request may have its own of."""
    ids = {"pad_token_id": adapted.chat.pad_id, "eos_token_id": adapted.chat.end_id}
    return GenerationConfig(do_sample=True, temperature=0.5, top_k=1, top_p=0.5, **ids)


def _sizes(adapted: Adapted, batch_rows: int) -> ContinuousBatchingConfig:
    longest = adapted.context_length
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=-(-max(longest, min(_CACHE_TOKENS, batch_rows * longest)) // _PAGE),
        max_batch_tokens=max(256, batch_rows),
        max_requests_per_batch=batch_rows,
        per_request_processors=True,
    )
