"""Prompt and target as text -> token ids in the base model's chat format, with the border between them.

Decisions:
- The chat template is rendered once, around markers, and split into the constant texts before the prompt,
  between prompt and target, and after the target. Rendering at other texts has to agree, or the template
  cannot be used. So encoding is plain concatenation, and a date in the template is that of the start.
- Prompt and target are stripped of surrounding white space; many templates do that themselves.
- The prompt's tokens are those that generation starts from. The target is tokenised behind the constant text
  in front of it, so that it gets the tokens it would get in the whole text.
- Trained are the target and the token that ends the assistant's turn, not the newline some templates add.
- An over-long sample loses tokens from the middle of the user's text, never of the template or the target.
A special token spelled out in a record is a special token, as in transformers.
Does not pad or make tensors: see `batches.py`. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moe_medical.data.chat_template import (
    PLAIN_TEMPLATE,
    Message,
    Render,
    compile_template,
    read_special_tokens,
    read_template,
)
from moe_medical.errors import ConfigError, DataError, Problem

_MARKERS = ("prompt-marker-7", "target-marker-7")
_MIN_PROMPT_TOKENS = 8
"""Of a longer prompt, so many tokens are kept at least."""
_PROBES = (("What is 2?", "two"), ("Fever\n38.5\n\n发热 <b>?", 'Ja, "so" & {{x}}; é'))
"""Texts at which the split of the template is checked."""


class TargetTooLong(DataError):
    """A target that leaves no room for the prompt; the caller sets the record aside."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tokens: prompt, then target, then the token that ends the turn."""

    input_ids: list[int]
    num_prompt_tokens: int
    """The loss is on input_ids[num_prompt_tokens:]."""
    num_truncated: int
    """Tokens cut from the middle of the prompt."""


@dataclass(frozen=True)
class _Frame:
    """The constant texts of a chat template: header PROMPT footer lead TARGET tail."""

    header: str
    footer: str
    """From the prompt's end to where generation starts."""
    lead: str
    """What the template puts between the start of the generation and the target, mostly nothing."""
    tail: str
    """Ends with the token that ends the turn."""


class ChatFormat:
    """The token format of one base model. Make it with `from_folder`."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, frame: _Frame, pad_id: int, end_id: int, max_length: int
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._frame = frame
        self.pad_id = pad_id
        self.end_id = end_id
        self.max_length = max_length
        self._footer_ids = self._ids(frame.footer)
        overhead = len(self._ids(frame.header)) + len(self._footer_ids)
        self.max_target_tokens = max_length - overhead - _MIN_PROMPT_TOKENS
        """Longest target, counted with the tokens around it that are trained, the end of turn for one."""

    @classmethod
    def from_folder(cls, folder: Path, system_prompt: str | None, max_length: int) -> ChatFormat:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Args:
            folder: of a base model; without a chat template the format is `PLAIN_TEMPLATE`.
            system_prompt: first message of each chat; None passes none.
            max_length: tokens of a sample at most.

        Raises:
            ConfigError: no tokenizer.json, a template that fails, drops the system prompt, or does not start
                the full text with the prompt's, no token that ends a turn, or too small a max_length.
        """
        tokenizer = _read_tokenizer(folder)
        special = read_special_tokens(folder)
        frame = _read_frame(folder, _read_render(folder, tokenizer, special), system_prompt)
        frame, end_id = _end_turn(folder, tokenizer, frame, special)
        pad_id = tokenizer.token_to_id(special.get("pad_token") or "")
        chat = cls(folder, tokenizer, frame, end_id if pad_id is None else pad_id, end_id, max_length)
        if chat.max_target_tokens < 1:
            rule = f"must exceed the {max_length - chat.max_target_tokens} tokens of the chat template"
            raise _error(folder, "data.max_length", rule, max_length)
        return chat

    def encode(self, prompt: str, target: str) -> Encoded:
        """Tokens of one training sample, at most `max_length`.

        Raises:
            TargetTooLong: where the target alone does not fit.
        """
        target_ids = self._target_ids(target.strip())
        prompt_ids, num_truncated = self._prompt_ids(prompt.strip(), len(target_ids))
        return Encoded(prompt_ids + target_ids, len(prompt_ids), num_truncated)

    def encode_many(self, samples: Sequence[tuple[str, str]]) -> list[Encoded]:
        """`encode` of many (prompt, target) pairs, on all cores and without Python's lock.

        Raises:
            TargetTooLong: where the target of one of them does not fit.
        """
        frame = self._frame
        border = len(self._footer_ids)
        pairs = [(prompt.strip(), target.strip()) for prompt, target in samples]
        starts = self._many_ids([frame.header + prompt + frame.footer for prompt, _ in pairs])
        ends = self._many_ids([frame.footer + frame.lead + target + frame.tail for _, target in pairs])
        encoded = []
        for (prompt, target), start, end in zip(pairs, starts, ends, strict=True):
            size = len(end) - border
            fits = size <= self.max_target_tokens and len(start) + size <= self.max_length
            if fits and end[:border] == self._footer_ids:
                encoded.append(Encoded(start + end[border:], len(start), 0))
            else:  # too long, or merged over the border
                encoded.append(self.encode(prompt, target))
        return encoded

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that tokens of a text depend on."""
        frame = self._frame
        settings = [frame.header, frame.footer, frame.lead, frame.tail, self.max_length]
        text = json.dumps([self._tokenizer.to_str(), settings])
        return hashlib.sha256(text.encode()).hexdigest()

    def fits(self, target: str) -> bool:
        """Whether `encode` takes this target."""
        return self.fits_many([target])[0]

    def fits_many(self, targets: Sequence[str]) -> list[bool]:
        """`fits` of many targets, on all cores."""
        frame = self._frame
        border = len(self._footer_ids)
        most = self.max_target_tokens
        completions = [frame.lead + target.strip() + frame.tail for target in targets]
        # No token is less than a character of ASCII, so most targets need no tokenizer.
        fits = [text.isascii() and len(text) < most for text in completions]
        unknown = [i for i, known in enumerate(fits) if not known]
        for i, ids in zip(
            unknown, self._many_ids([frame.footer + completions[i] for i in unknown]), strict=True
        ):
            merged = ids[:border] != self._footer_ids
            size = len(self._target_ids(targets[i].strip())) if merged else len(ids) - border
            fits[i] = size <= most
        return fits

    def encode_prompt(self, prompt: str, reserve: int = 0) -> list[int]:
        """Tokens that generation starts from: the assistant's header is the end.

        Args:
            prompt: the user's text.
            reserve: tokens of `max_length` to leave for the answer.

        Raises:
            TargetTooLong: where that leaves no room for the prompt.
        """
        return self._prompt_ids(prompt.strip(), reserve)[0]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that the next answer of a longer chat starts from; nothing is cut.

        Args:
            messages: `role` and `content` of each; the system prompt is one of them, if there is to be one.

        Raises:
            ConfigError: the model's chat template refuses them.
        """
        return self._ids(self._render([m | {"content": m["content"].strip()} for m in messages], True))

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text that is no chat, with what the tokenizer itself puts around it."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without the special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_stream(self) -> Callable[[int], str]:
        """Of one text: a function from its next token to the characters that are now complete."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    @cached_property
    def _render(self) -> Render:
        return _read_render(self._folder, self._tokenizer, read_special_tokens(self._folder))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _many_ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _target_ids(self, target: str) -> list[int]:
        # Tokenised behind the footer, so that it gets the tokens that it has in the whole text.
        completion = self._frame.lead + target + self._frame.tail
        ids = self._ids(self._frame.footer + completion)
        border = len(self._footer_ids)
        # A tokenizer may merge over the border; generation cannot, so then the target stands alone.
        return ids[border:] if ids[:border] == self._footer_ids else self._ids(completion)

    def _prompt_ids(self, prompt: str, reserve: int) -> tuple[list[int], int]:
        """Tokens up to the start of generation, and how many were cut to leave `reserve` tokens."""
        if reserve > self.max_target_tokens:
            room = f"data.max_length ({self.max_length}) has room for {self.max_target_tokens}"
            raise TargetTooLong(f"an answer of {reserve} tokens does not fit: {room}")
        frame = self._frame
        encoding = self._tokenizer.encode(frame.header + prompt + frame.footer, add_special_tokens=False)
        ids: list[int] = encoding.ids
        surplus = len(ids) + reserve - self.max_length
        if surplus <= 0:
            return ids, 0
        start = len(frame.header)
        end = len(frame.header) + len(prompt)
        first, last = _cut(encoding.offsets, start, end, surplus)
        return ids[:first] + ids[last:], last - first


def _cut(offsets: Sequence[tuple[int, int]], start: int, end: int, surplus: int) -> tuple[int, int]:
    """Range of tokens to drop: in the middle of the characters [start, end), never half a character."""
    inside = [i for i, (a, b) in enumerate(offsets) if a >= start and b <= end]
    low = inside[0]
    high = inside[-1] + 1
    first = low + (len(inside) - surplus + 1) // 2
    last = first + surplus
    # Byte-level tokens of one character overlap in characters: all of them go or none.
    while first > low and offsets[first][0] < offsets[first - 1][1]:
        first -= 1
    while last < high and offsets[last][0] < offsets[last - 1][1]:
        last += 1
    return first, last


def _read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        fix = "Save a fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        raise _error(folder, "tokenizer.json", "is missing", fix=fix)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises plain Exception
        raise _error(folder, "tokenizer.json", f"cannot be read ({e})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_render(folder: Path, tokenizer: Tokenizer, special: dict[str, Any]) -> Render:
    bos = special.get("bos_token")
    leading = bos if bos and tokenizer.encode("a").tokens[:1] == [bos] else ""
    variables = {**special, "leading_token": leading}
    return compile_template(folder, read_template(folder) or PLAIN_TEMPLATE, variables)


def _read_frame(folder: Path, render: Render, system_prompt: str | None) -> _Frame:
    first: list[Message] = []
    if system_prompt is not None:
        first = [{"role": "system", "content": system_prompt}]
        _check_system(folder, render, system_prompt)
    frame = _split(folder, render, first, *_MARKERS)
    # Everything later is concatenation, so the split must not depend on what is in between.
    for prompt, target in _PROBES:
        if _split(folder, render, first, prompt, target) != frame:
            raise _error(folder, "chat template", "must treat every prompt and target alike")
    return frame


def _check_system(folder: Path, render: Render, system_prompt: str) -> None:
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": _MARKERS[0]}]
    fix = "Set data.system_prompt: null."
    try:
        text = render(messages, True)
    except ConfigError as e:
        rule = f"is refused by the model's chat template ({e.problems[0].rule})"
        raise _error(folder, "data.system_prompt", rule, fix=fix) from None
    if system_prompt.strip() not in text:
        raise _error(folder, "data.system_prompt", "is dropped by the model's chat template", fix=fix)


def _split(folder: Path, render: Render, first: list[Message], prompt: str, target: str) -> _Frame:
    messages = [*first, {"role": "user", "content": prompt}]
    start = render(messages, True)
    full = render([*messages, {"role": "assistant", "content": target}], False)
    if not full.startswith(start):
        rule = "must render the whole chat as the text that generation starts from and more"
        raise _error(folder, "chat template", rule, fix="Try data.system_prompt: null." if first else "")
    header, found_prompt, footer = start.rpartition(prompt)
    lead, found_target, tail = full[len(start) :].partition(target)
    if not found_prompt or not found_target:
        raise _error(folder, "chat template", "must keep the prompt and the target as they are")
    return _Frame(header, footer, lead, tail)


def _end_turn(
    folder: Path, tokenizer: Tokenizer, frame: _Frame, special: dict[str, Any]
) -> tuple[_Frame, int]:
    """The frame with its tail cut behind the token that ends the turn, and that token's id."""
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    found = [(frame.tail.index(text), -len(text), text) for text in added if text in frame.tail]
    if found:
        position, _, text = min(found)
        tail = frame.tail[:position] + text
    else:
        tail = text = special.get("eos_token") or ""
    end_id = tokenizer.token_to_id(text)
    if not text or end_id is None:
        raise _error(folder, "eos_token", "must be set, because the chat template ends no turn")
    return _Frame(frame.header, frame.footer, frame.lead, tail), end_id


def _error(folder: Path, where: str, rule: str, actual: object = None, fix: str = "") -> ConfigError:
    return ConfigError(str(folder), [Problem(where, rule, actual, fix)])
