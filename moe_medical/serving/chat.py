"""`chat`: a conversation with an adapter in a terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_medical.console import complain, show, show_part
from moe_medical.data.chat_template import Message
from moe_medical.errors import ConfigError, MoeMedicalError, Problem
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted
from moe_medical.serving.answers import check_sampling
from moe_medical.serving.detokenizer import Wording

_HELP = "/task NAME   /system TEXT   /reset   /quit"


def chat_in_terminal(
    adapter: Path,
    max_new_tokens: int,
    sampling: Sampling,
    task: str | None = None,
    base: str | None = None,
    quantization: str | None = None,
) -> None:
    """Answer line after line of standard input, with all that was said before, until its end or `/quit`.

    Raises:
        ConfigError: settings out of range, or a task that the adapter does not know.
    """
    check_sampling(sampling, "--temperature", "--top-p")
    adapted = load_adapted(adapter, base, quantization)
    conversation = Conversation(adapted, max_new_tokens, sampling, task)
    if sys.stdin.isatty():
        show(_HELP)
    for line in _lines():
        try:
            if not conversation.hear(line):
                return
        except MoeMedicalError as e:
            complain(str(e))


class Conversation:
    """What was said, and under which task and system prompt.

    Args:
        adapted: Who answers.
        max_new_tokens: Of an answer.
        sampling: How; with a seed, each answer gets the next.
        task: Of the gate, at first.

    Raises:
        ConfigError: an unknown task.
    """

    def __init__(
        self, adapted: Adapted, max_new_tokens: int, sampling: Sampling, task: str | None = None
    ) -> None:
        self._adapted, self._max_new_tokens, self._sampling = adapted, max_new_tokens, sampling
        self._task, self._system = task, adapted.system_prompt
        self._said: list[Message] = []
        if task is not None:
            adapted.task_numbers(task, "--task")

    def hear(self, line: str) -> bool:
        """A command or something to answer; False when it was `/quit`.

        Raises:
            ConfigError: an unknown command or task, or a chat that the model's template refuses.
        """
        command, _, rest = line.strip().partition(" ")
        if command.startswith("/"):
            return self._obey(command, rest.strip())
        if line.strip():
            self._answer(line.strip())
        return True

    def _obey(self, command: str, rest: str) -> bool:
        if command == "/task":
            self._adapted.task_numbers(rest, "/task")
            self._task = rest
        elif command == "/system":
            self._system, self._said = rest or None, []
        elif command == "/reset":
            self._said = []
        elif command != "/quit":
            complain(f"commands are {_HELP}")
        return command != "/quit"

    def _answer(self, text: str) -> None:
        numbers = self._adapted.task_numbers(self._task, "/task")
        said: list[Message] = [*self._said, {"role": "user", "content": text}]
        ids, said = self._fitting(said)
        wording = Wording(self._adapted.chat, show_part)
        row = Row(ids, self._max_new_tokens, self._sampling, wording.take)
        self._adapted.continue_rows([row], [numbers])
        answer = wording.finish()
        show("")
        self._said = [*said, {"role": "assistant", "content": answer}]
        if self._sampling.seed is not None:
            self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)

    def _fitting(self, said: list[Message]) -> tuple[list[int], list[Message]]:
        """Tokens of the chat without its oldest turns, as many as do not fit."""
        room = self._adapted.context_length - self._max_new_tokens
        while True:
            ids = self._adapted.chat.encode_chat([*self._first(), *said])
            if len(ids) <= room:
                return ids, said
            if len(said) == 1:
                rule = f"must be at most {room} tokens, to leave room for the answer"
                raise ConfigError("chat", [Problem("message", rule, len(ids))])
            said = said[2:]

    def _first(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            show_part("> ")
        if not (line := sys.stdin.readline()):
            return
        yield line
