"""`generate`: prompts in, answers out.

Decision: prompts are answered in batches of like length, so that little is padding; each still gets the
answer that it would get alone, and answers are in the order of their prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from moe_medical.console import progress_line, show, show_part
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted
from moe_medical.serving.detokenizer import Detokenizer


@dataclass(frozen=True)
class Generation:
    """How prompts are answered."""

    max_new_tokens: int = 64
    batch_rows: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    """With a seed, prompt i (from 0) gets seed + i: its answer does not depend on its batch."""
    stream: bool = False
    """Show a single answer token by token, several as each is done."""


class _Prompt(NamedTuple):
    text: str
    task: str | None
    """Of the prompt itself."""

    @classmethod
    def of(cls, line: str) -> _Prompt:
        """From a JSON object with a `prompt`; any other line, one with a brace too, is the prompt itself."""
        if line.startswith("{"):
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value.get("prompt"), str):
                    task = value.get("task")
                    return cls(value["prompt"], task if task is None else str(task))
        return cls(line, None)

    def with_answer(self, answer: str) -> str:
        """One line of JSON."""
        task = {} if self.task is None else {"task": self.task}
        return json.dumps({"prompt": self.text, **task, "answer": answer}, ensure_ascii=False)


def answer_prompts(
    adapter: Path,
    prompts: Path | None,
    generation: Generation,
    task: str | None = None,
    base: str | None = None,
    quantization: str | None = None,
) -> None:
    """Answer each prompt of a file or of standard input; one JSON object per line on standard output.

    A prompt is a line, or the `prompt` of a line that is a JSON object: those may hold line breaks, and name
    a `task` of their own. A streamed answer to a single prompt is shown as plain text.

    Raises:
        ConfigError: settings out of range, a task that the adapter does not know, or none where it needs one.
        DataError: no readable prompts.
    """
    check_sampling(generation.sampling, "--temperature", "--top-p")
    lines = _read_prompts(prompts)
    adapted = load_adapted(adapter, base, quantization)
    tasks = []
    for number, line in enumerate(lines, start=1):  # a line's own task comes before the command line's
        setting = "--task" if line.task is None else f"task of prompt {number}"
        tasks.append(adapted.task_numbers(task if line.task is None else line.task, setting))
    if generation.stream and len(lines) == 1:
        answer_all(adapted, [lines[0].text], tasks, generation, emit=show_part)
        show("")
        return
    with progress_line("generating", len(lines), visible=True) as progress:

        def done(number: int, answer: str) -> None:
            progress.advance()
            if generation.stream:
                show(lines[number].with_answer(answer))

        answers = answer_all(adapted, [line.text for line in lines], tasks, generation, done)
        if not generation.stream:
            for line, answer in zip(lines, answers, strict=True):
                show(line.with_answer(answer))


def answer_all(
    adapted: Adapted,
    prompts: Sequence[str],
    tasks: Sequence[tuple[int, ...]],
    generation: Generation,
    done: Callable[[int, str], None] = lambda _, __: None,
    emit: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Answers to prompts, in their order.

    Args:
        adapted: Who answers.
        prompts: Each the user's text.
        tasks: Of each prompt, from `Adapted.task_numbers`.
        generation: How.
        done: Given the number and the answer of each prompt as soon as it is there.
        emit: Given the pieces of each answer.
    """
    encoded = [adapted.chat.encode_prompt(prompt) for prompt in prompts]
    detokenizers = [Detokenizer(adapted.chat, emit) for _ in prompts]

    def row(number: int) -> Row:
        # By the prompt's place in the file: neither batch size nor order of lengths changes what is drawn.
        sampling = generation.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + number)
        detokenizer = detokenizers[number]
        return Row(
            prompt_ids=encoded[number],
            max_new_tokens=generation.max_new_tokens,
            sampling=sampling,
            take=detokenizer.take,
            end=lambda _: done(number, detokenizer.finish()),
        )

    shortest_first = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    for start in range(0, len(prompts), generation.batch_rows):
        batch = shortest_first[start : start + generation.batch_rows]
        adapted.continue_rows([row(number) for number in batch], [tasks[number] for number in batch])
    return [detokenizer.text for detokenizer in detokenizers]


def check_sampling(sampling: Sampling, temperature: str, top_p: str) -> None:
    """Refuse what cannot be drawn from.

    Args:
        sampling: What is asked for.
        temperature: What the caller calls it.
        top_p: Likewise.

    Raises:
        ConfigError: One of them is out of range.
    """
    problems = []
    if not 0 <= sampling.temperature < float("inf"):
        problems.append(Problem(temperature, "must be finite and not negative", sampling.temperature))
    if not 0 < sampling.top_p <= 1:
        problems.append(Problem(top_p, "must be in (0, 1]", sampling.top_p))
    if problems:
        raise ConfigError("generate", problems)


def _read_prompts(path: Path | None) -> list[_Prompt]:
    try:
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"--prompts {path} cannot be read: {reason}") from None
    # Not `splitlines`, which would cut a prompt at any of Unicode's line ends.
    prompts = [_Prompt.of(line.strip()) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{path or 'standard input'} holds no prompt; one per line is expected")
    return prompts
