"""The adapters that are served, under their names, and the way from a request to its tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.errors import ConfigError, MoeMedicalError
from moe_medical.serving.adapted import Adapted, SharedBase
from moe_medical.serving.batching import Batching, End, QueueFull, Request
from moe_medical.serving.detokenizer import Detokenizer
from moe_medical.serving.protocol import ApiError, ChatRequest, GenerationRequest, TextRequest


class Service:
    """What the endpoints do.

    Args:
        base: Of all adapters.
        adapters: Name -> folder, of the first ones.
        batching: Who answers.
        max_tokens: Of an answer, where the client does not say.
        adapter_root: Adapters below this folder may be loaded while serving; None allows no changes.

    Raises:
        ConfigError: an adapter that does not fit.
    """

    def __init__(
        self,
        base: SharedBase,
        adapters: dict[str, Path],
        batching: Batching,
        max_tokens: int,
        adapter_root: Path | None = None,
    ) -> None:
        self._base = base
        self._batching = batching
        self._max_tokens = max_tokens
        self._root = None if adapter_root is None else adapter_root.resolve()
        self._lock = threading.Lock()  # endpoints that change adapters run on threads of their own
        self._adapters = {name: self._load(name, folder) for name, folder in adapters.items()}

    def health(self) -> dict[str, Any]:
        """Whether and how busily it answers."""
        load = self._batching.load()
        return {"status": "ok", "waiting": load.waiting, "running": load.running}

    def models(self) -> list[str]:
        """Adapters, and each task of those that know tasks."""
        found = []
        for name, adapted in list(self._adapters.items()):  # a copy: adapters come and go
            tasks = adapted.tasks if adapted.config.router_kind.knows_tasks else ()
            found += [name, *(f"{name}/{task}" for task in tasks)]
        return found

    def add_adapter(self, name: str, path: str) -> None:
        """Load an adapter; one of that name is replaced, and finishes what it has begun."""
        root = self._changeable_root()
        # Resolved first: neither `..` nor a link may lead out of the root.
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise ApiError(403, "path must be below the server's adapter root", "path_not_allowed", "path")
        try:
            adapted = self._load(name, folder)
        except MoeMedicalError as e:
            raise ApiError(400, f"the adapter cannot be used: {e}", "invalid_adapter", "path") from None
        with self._lock:
            old = self._adapters.get(name)
            self._adapters[name] = adapted
        if old is not None:
            self._batching.forget(old)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away; it finishes what it has begun."""
        self._changeable_root()
        with self._lock:
            old = self._adapters.pop(name, None)
        if old is None:
            raise _unknown_model(name)
        self._batching.forget(old)

    def begin(self, asked: GenerationRequest) -> Answer:
        """Put a request into the queue.

        Raises:
            ApiError: It is refused; nothing of it is in the queue.
        """
        name, _, task = asked.model.partition("/")
        adapted = self._adapters.get(name)
        if adapted is None:
            raise _unknown_model(asked.model)
        try:
            tasks = adapted.task_numbers(asked.task or task or None, "task")
            if isinstance(asked, ChatRequest):
                ids = adapted.chat_ids([message.plain() for message in asked.messages])
            else:
                assert isinstance(asked, TextRequest), f"a {type(asked).__name__} has no prompt"
                ids = adapted.chat.encode_text(asked.prompt)
        except ConfigError as e:
            # Without the actual value, which is the client's own text.
            problem = e.problems[0]
            raise ApiError(400, f"{problem.path} {problem.rule}", "invalid_value", problem.path) from None
        room = adapted.context_length - len(ids)
        most = asked.most_tokens
        if room < (most or 1):
            rule = f"prompt ({len(ids)} tokens) and max_tokens ({most or 1}) must fit into"
            message = f"{rule} {adapted.context_length} tokens"
            raise ApiError(400, message, "context_length_exceeded", "max_tokens")
        answer = Answer(adapted, ids, tasks, most or min(room, self._max_tokens), asked)
        answer.submit(self._batching)
        return answer

    def _load(self, name: str, folder: Path) -> Adapted:
        adapted = self._base.adapt(folder)
        self._batching.check(name, adapted)
        return adapted

    def _changeable_root(self) -> Path:
        if self._root is None:
            raise ApiError(403, "adapters may not be changed on this server", "changes_not_allowed")
        return self._root


@dataclass(frozen=True)
class _Ended:
    """The last event of an answer, after its pieces of text."""

    reason: End


class Answer:
    """One answer while it is made; for the event loop that began it."""

    def __init__(
        self,
        adapted: Adapted,
        ids: list[int],
        tasks: tuple[int, ...],
        max_new_tokens: int,
        asked: GenerationRequest,
    ) -> None:
        self.reason: End = "error"
        self.num_prompt_tokens = len(ids)
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[str | _Ended]()
        # A chat's turn begins and ends with text; what continues a text may well begin with a space.
        strip = isinstance(asked, ChatRequest)
        self._detokenizer = Detokenizer(adapted.chat, self._post, asked.stops, strip)
        self._request = Request(
            adapted=adapted,
            prompt_ids=ids,
            tasks=tasks,
            max_new_tokens=max_new_tokens,
            sampling=asked.sampling,
            detokenizer=self._detokenizer,
            ended=lambda reason: self._post(_Ended(reason)),
        )

    def submit(self, batching: Batching) -> None:
        """Put it into the queue.

        Raises:
            ApiError: It is refused.
        """
        try:
            batching.submit(self._request)
        except QueueFull:
            raise ApiError(429, "too many requests wait; try again later", "queue_full") from None
        except ConfigError as e:
            raise ApiError(400, e.problems[0].rule, "unsupported", e.problems[0].path) from None

    def _post(self, event: str | _Ended) -> None:
        """From the thread that computes; asyncio's queues are no threads' business."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes; `reason` tells afterwards how it ended. Cancels the request if left early."""
        try:
            while isinstance(event := await self._events.get(), str):
                yield event
            self.reason = event.reason
        finally:
            self.cancel()

    async def whole(self) -> str:
        """The whole text."""
        return "".join([piece async for piece in self.pieces()])

    def cancel(self) -> None:
        """Nobody waits for it any more; nothing happens where it has ended."""
        self._request.cancelled.set()

    @property
    def usage(self) -> dict[str, int]:
        made = self._detokenizer.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.num_prompt_tokens + made,
        }


def _unknown_model(name: str) -> ApiError:
    return ApiError(404, f"the model {name!r} does not exist", "model_not_found", "model")
