"""`chat`: a conversation with an adapter in a terminal, or through a pipe."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from moe_medical.console import complain, show, show_part
from moe_medical.data.chat_template import Message
from moe_medical.errors import ConfigError, MoeMedicalError, Problem
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted
from moe_medical.serving.answers import check_sampling
from moe_medical.serving.detokenizer import Detokenizer

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
    interactive = sys.stdin.isatty()
    if interactive:
        show(_HELP)
    while True:
        if interactive:
            show_part("> ")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            if not conversation.take(line):
                return
        except MoeMedicalError as e:  # a mistake ends no conversation
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
        self._adapted = adapted
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._task = task
        self._system = adapted.system_prompt
        self._messages: list[Message] = []
        if task is not None:
            adapted.task_numbers(task, "--task")

    def take(self, line: str) -> bool:
        """A command or something to answer; False when it was `/quit`.

        Raises:
            ConfigError: an unknown task, or a chat that the model's template refuses.
        """
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if line.strip():
                self._answer(line.strip())
        elif command == "/task":
            self._adapted.task_numbers(rest.strip(), "/task")
            self._task = rest.strip()
        elif command == "/system":
            self._system = rest.strip() or None
            self._messages = []  # what was answered under another system prompt would contradict it
        elif command == "/reset":
            self._messages = []
        elif command != "/quit":
            complain(f"commands are {_HELP}")
        return command != "/quit"

    def _answer(self, text: str) -> None:
        numbers = self._adapted.task_numbers(self._task, "/task")
        ids, messages = self._fitting([*self._messages, {"role": "user", "content": text}])
        detokenizer = Detokenizer(self._adapted.chat, show_part)
        row = Row(ids, self._max_new_tokens, self._sampling, detokenizer.take)
        self._adapted.continue_rows([row], [numbers])
        answer = detokenizer.finish()
        show("")
        # Only now: a message that could not be answered is no part of the conversation.
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        if self._sampling.seed is not None:
            self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)

    def _fitting(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """Tokens of the chat without its oldest turns, as many as do not fit, and the messages that stay."""
        system: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        room = self._adapted.context_length - self._max_new_tokens
        while True:
            ids = self._adapted.chat.encode_chat([*system, *messages])
            if len(ids) <= room:
                return ids, messages
            if len(messages) == 1:
                rule = f"must be at most {room} tokens, to leave room for the answer"
                raise ConfigError("chat", [Problem("message", rule, len(ids))])
            messages = messages[2:]  # a turn of the user and its answer
