"""From the rows that a terminology yields to three files per task: splits, balance, caps, order.

Decisions:
- The split is a property of a concept (a code, a term, a disease, a gene), by its sha256; a row whose
  concepts disagree is dropped. Nothing that a test row asks about is asked about in a train row.
- Wrong options are drawn from concepts of the row's own split: no answer of a test row is an option that
  training taught to reject, nor the one option that training never showed.
- The held-out ranges lie at the two ends of the hash, so a larger `holdout` only widens them: a concept held
  out at 0.1 is held out in every task of the terminology.
- The same input with two different outputs is ambiguous; all its rows are dropped.
- Everything random is a function of text, never of order, process or `hash()`.
Does not know any terminology.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

SPLITS = ("train", "validation", "test")
MAX_ROWS = {"train": 4000, "validation": 400, "test": 400}
MAX_INPUT_WORDS = 60
MAX_OUTPUT_WORDS = 24
LETTERS = "ABCD"

Source = TypeVar("Source")


@dataclass(frozen=True)
class Row:
    """One question and its answer; `concepts` are the ones that it asks about."""

    input: str
    output: str
    concepts: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question whose wrong options are still to be drawn."""

    question: str
    answer: str
    concepts: tuple[str, ...]
    others: Mapping[str, str]
    """Texts that are wrong answers -> the concept that each one names."""


@dataclass(frozen=True)
class TaskRecipe(Generic[Source]):
    """How one task is made from a parsed terminology."""

    instruction: str
    rows: Callable[[Source], Iterable[Row | Choice]]
    holdout: float = 0.1
    """Share of concepts for validation, and again for test."""
    balanced: bool = False
    """Trim every output of a split to as many rows as the rarest one has."""


def digest(text: str) -> str:
    """Hex sha256 of a text; the order and the splits of everything here come from it."""
    return hashlib.sha256(text.encode()).hexdigest()


def seeded(*parts: str) -> random.Random:
    """A random generator that is a function of the given texts only."""
    return random.Random(int(digest("\n".join(parts)), 16))


def split_of(concepts: Iterable[str], holdout: float) -> str | None:
    """The split that all the concepts share, or None where they differ."""
    splits = {_split(concept, holdout) for concept in concepts}
    return splits.pop() if len(splits) == 1 else None


def _split(concept: str, holdout: float) -> str:
    position = int(digest(f"split {concept}")[:12], 16) / 16**12
    if position < holdout:
        return "validation"
    return "test" if position >= 1 - holdout else "train"


def choose(question: str, answer: str, distractors: Sequence[str], concepts: tuple[str, ...]) -> Row:
    """A multiple-choice row: the options in a seeded order below the question, the letter as the output."""
    options = [answer, *distractors]
    seeded(question, *options).shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    text = "\n".join([question, *lines] if question else lines)
    return Row(text, LETTERS[options.index(answer)], concepts, tuple(LETTERS))


def draw(choice: Choice, holdout: float) -> Row | None:
    """The row with three wrong options of its own split, or None where there are fewer."""
    split = split_of(choice.concepts, holdout)
    pool = sorted(text for text, named in choice.others.items() if _split(named, holdout) == split)
    if split is None or len(pool) < len(LETTERS) - 1:
        return None
    wrong = seeded(choice.question, choice.answer).sample(pool, len(LETTERS) - 1)
    return choose(choice.question, choice.answer, wrong, choice.concepts)


def split_rows(recipe: TaskRecipe[Source], source: Source) -> dict[str, list[Row]]:
    """All rows of one task by split: usable, unambiguous, balanced if asked, capped, in a seeded order."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in _unambiguous(_short_rows(recipe, source)):
        if split := split_of(row.concepts, recipe.holdout):
            splits[split].append(row)
    return {split: _select(rows, MAX_ROWS[split], recipe.balanced) for split, rows in splits.items()}


def _short_rows(recipe: TaskRecipe[Source], source: Source) -> Iterator[Row]:
    for each in recipe.rows(source):
        row = draw(each, recipe.holdout) if isinstance(each, Choice) else each
        if (
            row
            and len(row.input.split()) <= MAX_INPUT_WORDS
            and 0 < len(row.output.split()) <= MAX_OUTPUT_WORDS
        ):
            yield row


def _unambiguous(rows: Iterable[Row]) -> Iterator[Row]:
    by_input: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_input[row.input.lower()].append(row)
    for same in by_input.values():
        if len({row.output.lower() for row in same}) == 1:
            yield same[0]


def _select(rows: list[Row], limit: int, balanced: bool) -> list[Row]:
    rows = sorted(rows, key=lambda row: digest(row.input))
    if not balanced:
        return rows[:limit]
    by_output: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_output[row.output].append(row)
    each = min(limit // len(by_output), *map(len, by_output.values())) if by_output else 0
    kept = [row for same in by_output.values() for row in same[:each]]
    return sorted(kept, key=lambda row: digest(row.input))


def write_task(task: str, recipe: TaskRecipe[Source], source: Source, folder: Path) -> dict[str, int]:
    """Writes `folder/<split>.jsonl` for each split and returns the number of rows in each."""
    folder.mkdir()
    splits = split_rows(recipe, source)
    for split, rows in splits.items():
        lines = [json.dumps(_record(task, recipe.instruction, row), ensure_ascii=False) for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {split: len(rows) for split, rows in splits.items()}


def _record(task: str, instruction: str, row: Row) -> dict[str, object]:
    record: dict[str, object] = {
        "id": f"{task}-{digest(row.input)[:12]}",
        "task": task,
        "instruction": instruction,
        "input": row.input,
        "output": row.output,
        "concepts": list(row.concepts),
    }
    if row.options:
        record["options"] = list(row.options)
    return record
