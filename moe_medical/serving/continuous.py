"""transformers' own continuous batching: a request joins the batch that runs, and leaves when it has ended.

Decisions: one manager, thread and key-value cache for each adapter that was asked. Tokens of all requests are
packed into one row, so routers that need to know a token's task or where its prompt ends cannot tell: such
adapters are refused. A seed is refused too: the library draws from one generator for all requests. A manager
whose thread has failed ends its requests, and the next request gets another.
"""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from moe_medical.errors import ConfigError, Problem
from moe_medical.serving.adapted import Adapted
from moe_medical.serving.batching import End, Load, QueueFull, Request

_PAGE = 32
"""Tokens of a page of the cache."""
_CACHE_TOKENS = 32768
"""Tokens that the cache of one adapter holds, at most, unless a single request may need more."""
_POLL_SECONDS = 0.05
"""Between two checks whether the library's thread still runs."""


class ContinuousBatching:
    """See `Batching`.

    Args:
        batch_rows: Requests of one adapter that are computed at once, at most.
        queue: Requests that may wait.
    """

    def __init__(self, batch_rows: int, queue: int) -> None:
        self._batch_rows = batch_rows
        self._queue = queue
        self._managers: dict[Adapted, _Manager] = {}
        self._lock = threading.Lock()

    def check(self, name: str, adapted: Adapted) -> None:
        """See `Batching`."""
        if adapted.needs_rows or adapted.config.router_kind.decides_per == "text":
            rule = (
                f"must be together, for the {adapted.config.router} router of {name} needs to know whole rows"
            )
            raise ConfigError("serve", [Problem("--batching", rule, "continuous")])

    def submit(self, request: Request) -> None:
        """See `Batching`; a seed is refused, unless the answer is greedy."""
        if request.sampling.seed is not None and request.sampling.temperature > 0:
            rule = "must be left out: this server's batching draws from one generator for all requests"
            raise ConfigError("serve", [Problem("seed", rule)])
        with self._lock:
            if sum(manager.load().waiting for manager in self._managers.values()) >= self._queue:
                raise QueueFull
            manager = self._managers.get(request.adapted)
            if manager is None or not manager.add(request):
                if manager is not None:
                    manager.stop()  # first, for it gives the model its old attention back
                manager = self._managers[request.adapted] = _Manager(request.adapted, self._batch_rows)
                manager.add(request)

    def load(self) -> Load:
        """See `Batching`."""
        with self._lock:
            loads = [manager.load() for manager in self._managers.values()]
        return Load(sum(load.waiting for load in loads), sum(load.running for load in loads))

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
        self._batch_rows = batch_rows
        self._end_id = adapted.chat.end_id
        self._vocabulary = int(adapted.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._requests: dict[str, Request] = {}
        self._ended = False
        self._lock = threading.Lock()  # guards the two above
        self._names = count()
        init: Any = adapted.model.init_continuous_batching
        self._library: Any = init(_generation_config(adapted), _cache_config(adapted, batch_rows))
        self._library.start()
        self._thread = threading.Thread(target=self._deliver, name="continuous")
        self._thread.start()

    def load(self) -> Load:
        """The library does not tell which requests it runs; it runs as many as it may."""
        running = min(len(self._requests), self._batch_rows)
        return Load(len(self._requests) - running, running)

    def add(self, request: Request) -> bool:
        """Hand a request to the library; False where its thread has ended, which nobody would answer."""
        name = str(next(self._names))
        with self._lock:
            if self._ended:
                return False
            self._requests[name] = request
        # All rows are sampled, as the library has one choice for all: of the likeliest one alone is greedy.
        sampling = request.sampling
        greedy = sampling.temperature == 0
        self._library.add_request(
            list(request.prompt_ids),
            request_id=name,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            temperature=1.0 if greedy else sampling.temperature,
            top_k=1 if greedy else self._vocabulary,
            top_p=1.0 if greedy else sampling.top_p,
        )
        return True

    def stop(self) -> None:
        """Answer what there is, then end both threads."""
        self._library.stop(block=True)
        self._thread.join()

    def _deliver(self) -> None:
        """Hand tokens on until the library's thread has ended, and all that it had made is handed on."""
        while True:
            alive = self._library.is_running()  # asked first: what it makes until it ends is still there
            output = self._library.get_result(timeout=_POLL_SECONDS)
            if output is not None:
                self._hand_on(output)
            elif not alive:
                break
        with self._lock:
            self._ended = True
            left = list(self._requests.values())
            self._requests.clear()
        for request in left:  # only where the library's thread has failed
            request.end("error")

    def _hand_on(self, output: Any) -> None:
        """New tokens of a request; what the library hands out is all that it has, each time."""
        name = output.request_id
        request = self._requests.get(name)
        if request is None:
            return  # it had enough, but tokens were under way
        tokens = output.generated_tokens
        new = [token for token in tokens[request.detokenizer.num_tokens :] if token != self._end_id]
        if any(request.take(token) for token in new):
            self._library.cancel_request(name)
            self._end(name, "stop")
        elif output.error is not None:
            self._end(name, "error")
        elif output.is_finished():
            self._end(name, "stop" if tokens[-1:] == [self._end_id] else "length")

    def _end(self, name: str, reason: End) -> None:
        with self._lock:
            request = self._requests.pop(name)
        request.end(reason)


def _generation_config(adapted: Adapted) -> GenerationConfig:
    """Each number only has to differ from the library's default: then each request may have its own."""
    ids = {"pad_token_id": adapted.chat.pad_id, "eos_token_id": adapted.chat.end_id}
    return GenerationConfig(do_sample=True, temperature=0.5, top_k=1, top_p=0.5, **ids)


def _cache_config(adapted: Adapted, batch_rows: int) -> ContinuousBatchingConfig:
    longest = adapted.context_length
    tokens = max(longest, min(_CACHE_TOKENS, batch_rows * longest))
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=-(-tokens // _PAGE),  # rounded up
        max_batch_tokens=max(256, batch_rows),
        max_requests_per_batch=batch_rows,
        per_request_processors=True,
    )
