"""The adapters that are served, under their names, and the way from a request to its tokens."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from moe_medical.errors import ConfigError, MoeMedicalError
from moe_medical.serving.adapted import Adapted, SharedBase
from moe_medical.serving.batching import Batching, End, QueueFull, Request
from moe_medical.serving.continuous import Continuous, check_continuous
from moe_medical.serving.detokenizer import Wording
from moe_medical.serving.protocol import NAME_PATTERN, ApiError, ChatRequest, TextRequest, Wanted


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
        self._base, self._batching, self._max_tokens = base, batching, max_tokens
        self._root = None if adapter_root is None else adapter_root.resolve()
        self._adapters: dict[str, Adapted] = {}
        self._lock = threading.Lock()
        for name, folder in adapters.items():
            self._adapters[name] = self._load(name, folder)

    def health(self) -> dict[str, Any]:
        """Whether and how busily it answers."""
        waiting, running = self._batching.load()
        return {"status": "ok", "waiting": waiting, "running": running}

    def models(self) -> list[str]:
        """Adapters, and each task of those that know tasks."""
        found = []
        for name, adapted in list(self._adapters.items()):
            tasks = adapted.tasks if adapted.config.knows_tasks else ()
            found += [name, *(f"{name}/{task}" for task in tasks)]
        return found

    def add_adapter(self, name: str, path: str) -> None:
        """Load an adapter; one of that name is replaced, and finishes what it has begun."""
        folder = (self._changeable() / path).resolve()
        if not folder.is_relative_to(self._changeable()):
            raise ApiError(403, "path must be below the server's adapter root", "path_not_allowed", "path")
        try:
            adapted = self._load(name, folder)
        except MoeMedicalError as e:
            raise ApiError(400, f"the adapter cannot be used: {e}", "invalid_adapter", "path") from None
        with self._lock:
            old, self._adapters[name] = self._adapters.get(name), adapted
        if old is not None:
            self._batching.forget(old)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away; it finishes what it has begun."""
        self._changeable()
        with self._lock:
            old = self._adapters.pop(name, None)
        if old is None:
            raise _unknown_model(name)
        self._batching.forget(old)

    def begin(self, wanted: Wanted) -> Answer:
        """Put a request into the queue."""
        name, _, task = wanted.model.partition("/")
        adapted = self._adapters.get(name)
        if adapted is None:
            raise _unknown_model(wanted.model)
        try:
            tasks = adapted.task_numbers(wanted.task or task or None, "task")
            ids = _prompt_ids(adapted, wanted)
        except ConfigError as e:
            problem = e.problems[0]
            raise ApiError(400, f"{problem.path} {problem.rule}", "invalid_value", problem.path) from None
        return Answer(adapted, ids, tasks, self._room(adapted, ids, wanted), wanted, self._batching)

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._batching.close()

    def _load(self, name: str, folder: Path) -> Adapted:
        adapted = self._base.adapt(folder)
        if isinstance(self._batching, Continuous):
            check_continuous(name, adapted)
        return adapted

    def _changeable(self) -> Path:
        if self._root is None:
            raise ApiError(403, "adapters may not be changed on this server", "changes_not_allowed")
        return self._root

    def _room(self, adapted: Adapted, ids: list[int], wanted: Wanted) -> int:
        """New tokens that the request may have."""
        room = adapted.context_length - len(ids)
        most = wanted.most_tokens
        if room < (most or 1):
            rule = f"prompt ({len(ids)} tokens) and max_tokens ({most or 1}) must fit into"
            message = f"{rule} {adapted.context_length} tokens"
            raise ApiError(400, message, "context_length_exceeded", "max_tokens")
        return most or min(room, self._max_tokens)


class Answer:
    """One answer while it is made; for the event loop that began it."""

    def __init__(
        self,
        adapted: Adapted,
        ids: list[int],
        tasks: tuple[int, ...],
        max_new_tokens: int,
        wanted: Wanted,
        batching: Batching,
    ) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[str | tuple[End]]()

        def tell(event: str | tuple[End]) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.reason: End = "error"
        self.num_prompt_tokens = len(ids)
        self._wording = Wording(adapted.chat, tell, wanted.stops, strip=isinstance(wanted, ChatRequest))
        self._request = Request(
            adapted, ids, tasks, max_new_tokens, wanted.sampling, self._wording, lambda end: tell((end,))
        )
        try:
            batching.submit(self._request)
        except QueueFull:
            raise ApiError(429, "too many requests wait; try again later", "queue_full") from None
        except ConfigError as e:
            raise ApiError(400, e.problems[0].rule, "unsupported", e.problems[0].path) from None

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes; `reason` tells afterwards how it ended. Cancels the request if left early."""
        try:
            while isinstance(event := await self._events.get(), str):
                yield event
            self.reason = event[0]
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
        made = self._wording.num_tokens
        total = self.num_prompt_tokens + made
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": total,
        }


def named_adapter(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or `FOLDER`, whose own name is then the adapter's."""
    found = re.fullmatch(f"({NAME_PATTERN})=(.+)", text)
    name, folder = found.groups() if found else (Path(text).resolve().name, text)
    return name, Path(folder)


def _prompt_ids(adapted: Adapted, wanted: Wanted) -> list[int]:
    if isinstance(wanted, ChatRequest):
        return adapted.chat_ids([message.plain() for message in wanted.messages])
    assert isinstance(wanted, TextRequest)
    return adapted.chat.encode_text(wanted.prompt)


def _unknown_model(name: str) -> ApiError:
    return ApiError(404, f"the model {name!r} does not exist", "model_not_found", "model")
