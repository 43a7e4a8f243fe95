"""What travels: the requests that are understood, OpenAI's answers to them, and its form of an error.

Decision: what would change an answer and is not supported is refused, not ignored. Of OpenAI's defaults one
differs: without a `temperature` the answer is greedy. Messages about bad input never hold the input.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moe_medical.data.chat_template import Message
from moe_medical.evaluation.generate import Sampling

_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Zero = Annotated[float, Field(ge=0, le=0)]
"""Penalties: clients send their default, 0, unasked; any other would change the answer."""
NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"


class _Strict(BaseModel):
    # A key that is not known here may well be one that would change the answer.
    model_config = ConfigDict(extra="forbid")


class _StreamOptions(_Strict):
    include_usage: bool = False


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    name: str | None = None

    def plain(self) -> Message:
        """As the model's chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        # `developer` is OpenAI's later name of the system role, which no template of an open model knows.
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class GenerationRequest(_Strict):
    """What both kinds of request have in common."""

    model: str
    task: str | None = None
    """Ours: whose weights of the experts a task gate uses; several with commas."""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _Stop | list[_Stop] | None = Field(None)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 4:  # OpenAI's own limit
            raise ValueError("must be four strings at most")
        return stop

    @property
    def sampling(self) -> Sampling:
        """Greedy where no temperature is given."""
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        """Strings before the first of which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """New tokens that the client allows."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream tells at its end how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most_tokens(self) -> int | None:
        """New tokens that the client allows; `max_tokens` is the older name."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str = Field(min_length=1)


class AdapterRequest(_Strict):
    """POST /v1/adapters."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    path: str = Field(min_length=1)


class ApiError(Exception):
    """A request that is refused, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        if self.status == 429:
            kind = "rate_limit_error"  # after which OpenAI's clients wait and try again
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_input(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """All that is wrong with a body, without what was in it."""
    places = []
    for error in errors:
        # `loc` begins with "body"; of broken JSON it goes on with a position in it.
        parts = error["loc"][1:] if error["type"] != "json_invalid" else ()
        places.append(".".join(map(str, parts)) or "body")
    message = "; ".join(f"{place}: {error['msg']}" for place, error in zip(places, errors, strict=True))
    return ApiError(400, message, "invalid_value", places[0])


class Reply:
    """The JSON objects of one answer, whole or in pieces.

    Args:
        kind: `chat` or `text`.
        model: As the client named it.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str) -> None:
        self._is_chat = kind == "chat"
        self._stream_kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._model = model
        self._created = int(time.time())
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": text}}
            return self._object("chat.completion", content, reason, usage=usage)
        return self._object("text_completion", {"text": text}, reason, usage=usage)

    def piece(self, text: str = "", reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """The next of a stream: a piece of text, or the end."""
        if not self._is_chat:
            return self._object(self._stream_kind, {"text": text}, reason)
        # The role comes once, with the first piece, even where the answer is empty.
        role = {"role": "assistant"} if first else {}
        content = {"content": text} if text or first else {}
        return self._object(self._stream_kind, {"delta": role | content}, reason)

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last of a stream, where it was asked for; it has no choice."""
        return self._object(self._stream_kind, None, None, usage=usage)

    def _object(
        self, kind: str, content: Mapping[str, Any] | None, reason: str | None, **more: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": reason}
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": [] if content is None else [choice],
            **more,
        }
