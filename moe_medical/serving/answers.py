"""`generate`: prompts in, answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from moe_medical.console import ProgressLine, progress_line, show, show_part
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted
from moe_medical.serving.detokenizer import Wording


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
    tasks = _tasks_of(adapted, lines, task)
    if generation.stream and len(lines) == 1:
        answer_all(adapted, [lines[0].text], tasks, generation, tell=show_part)
        show("")
        return
    with progress_line("generating", len(lines), visible=True) as progress:
        _show_answers(adapted, lines, tasks, generation, progress)


def answer_all(
    adapted: Adapted,
    prompts: Sequence[str],
    tasks: Sequence[tuple[int, ...]],
    generation: Generation,
    done: Callable[[int, str], None] = lambda _, __: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Answers to prompts, in their order.

    Args:
        adapted: Who answers.
        prompts: Each the user's text.
        tasks: Of each prompt, from `Adapted.task_numbers`.
        generation: How.
        done: Given the number and the answer of each prompt as soon as it is there.
        tell: Given the pieces of each answer.
    """
    encoded = [adapted.chat.encode_prompt(p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    wordings = [Wording(adapted.chat, tell) for _ in prompts]
    rows = [
        _row(ids, generation, i, wording, done)
        for i, (ids, wording) in enumerate(zip(encoded, wordings, strict=True))
    ]
    for start in range(0, len(order), generation.batch_rows):
        chosen = order[start : start + generation.batch_rows]
        adapted.continue_rows([rows[i] for i in chosen], [tasks[i] for i in chosen])
    return [wording.text for wording in wordings]


def check_sampling(sampling: Sampling, temperature: str, top_p: str) -> None:
    """Refuse what cannot be drawn from.

    Raises:
        ConfigError: naming the settings as the caller does.
    """
    problems = []
    if not 0 <= sampling.temperature < float("inf"):
        problems.append(Problem(temperature, "must be finite and not negative", sampling.temperature))
    if not 0 < sampling.top_p <= 1:
        problems.append(Problem(top_p, "must be in (0, 1]", sampling.top_p))
    if problems:
        raise ConfigError("generate", problems)


def _row(
    ids: list[int], generation: Generation, number: int, wording: Wording, done: Callable[[int, str], None]
) -> Row:
    sampling = generation.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + number)
    return Row(
        ids, generation.max_new_tokens, sampling, wording.take, lambda _: done(number, wording.finish())
    )


def _show_answers(
    adapted: Adapted,
    lines: Sequence[_Prompt],
    tasks: Sequence[tuple[int, ...]],
    generation: Generation,
    progress: ProgressLine,
) -> None:
    def done(number: int, answer: str) -> None:
        progress.advance()
        if generation.stream:
            show(_line(lines[number], answer))

    answers = answer_all(adapted, [line.text for line in lines], tasks, generation, done)
    if not generation.stream:
        for line, answer in zip(lines, answers, strict=True):
            show(_line(line, answer))


def _line(prompt: _Prompt, answer: str) -> str:
    task = {} if prompt.task is None else {"task": prompt.task}
    return json.dumps({"prompt": prompt.text, **task, "answer": answer}, ensure_ascii=False)


def _tasks_of(adapted: Adapted, lines: Sequence[_Prompt], default: str | None) -> list[tuple[int, ...]]:
    """Of each prompt: its own, or the command line's."""
    found = []
    for number, line in enumerate(lines, start=1):
        where = "--task" if line.task is None else f"task of prompt {number}"
        found.append(adapted.task_numbers(default if line.task is None else line.task, where))
    return found


def _read_prompts(path: Path | None) -> list[_Prompt]:
    try:
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"--prompts {path} cannot be read: {getattr(e, 'strerror', None) or 'not UTF-8'}"
        ) from None
    prompts = [_prompt(line.strip()) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{path or 'standard input'} holds no prompt; one per line is expected")
    return prompts


def _prompt(line: str) -> _Prompt:
    if line.startswith("{"):
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value.get("prompt"), str):
                task = value.get("task")
                return _Prompt(value["prompt"], task if task is None else str(task))
    return _Prompt(line, None)
