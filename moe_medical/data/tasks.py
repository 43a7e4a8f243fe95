"""The tasks of a run: recipe + files + token format, ready to be mixed. Torch-free, so a plan is quick."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_medical.config.schema import DataSection, TaskOverride, TokenCache
from moe_medical.console import progress_line
from moe_medical.data.chat import ChatFormat
from moe_medical.data.mixture import MixPlan
from moe_medical.data.recipe import Mixture, TaskSpec, load_mixture
from moe_medical.data.rows import BATCH_ROWS, RejectedRecord, Rows, TextRows
from moe_medical.data.sources import Split, load_split, splits_of
from moe_medical.data.static_mixing import TaskSize, weight_schedule
from moe_medical.data.store import Fingerprint, load_array, published
from moe_medical.data.tokens import FreshTokens, TokenMemo, TokenRows, fitting
from moe_medical.errors import ConfigError, DataError, Problem

_LOG = logging.getLogger(__name__)


TOO_LONG = "target longer than data.max_length allows"


@dataclass(frozen=True)
class TaskData:
    """One task with its rows, which stay on disk."""

    spec: TaskSpec
    train: TextRows
    evaluation: TextRows
    unusable: list[RejectedRecord]
    """Records that could not be read; `rejected` has those that do not fit as well."""
    too_long: tuple[TextRows, ...]
    """Rows whose target does not fit, by split."""
    fingerprints: dict[str, dict[str, Fingerprint]]
    """`train` and `evaluation` -> every file that was read, in order."""
    tokens: TokenRows
    """Of the training rows."""
    weight: float
    max_repeats: float | None

    @property
    def name(self) -> str:
        return self.spec.name

    def rejected(self) -> Iterator[RejectedRecord]:
        """Every record that is not trained on or evaluated, and why; never its text."""
        yield from self.unusable
        for rows in self.too_long:
            for first in range(0, len(rows), BATCH_ROWS):
                yield from rows.records(range(first, min(first + BATCH_ROWS, len(rows))), TOO_LONG)

    def rejected_counts(self) -> dict[str, int]:
        """Reason -> records."""
        counts = Counter(record.reason for record in self.unusable)
        counts[TOO_LONG] = sum(map(len, self.too_long))
        return {reason: count for reason, count in counts.items() if count}


def load_tasks(section: DataSection, evaluation_split: str, chat: ChatFormat) -> list[TaskData]:
    """The training rows and the evaluation rows of every task of the recipe, or of `data.only`, in its order.

    Raises:
        ConfigError: problems of the recipe or of the run's overrides.
        DataError: unreadable, empty or mostly unusable files.
        StorageError: the cache cannot be written, or is damaged.
    """
    mixture = load_mixture(Path(section.recipe))
    _check_overrides(section, mixture.tasks)
    _check_text_only(mixture.tasks, Path(section.recipe))
    # Hygiene compares the rows of all tasks, those that `data.only` leaves out as well, so all are loaded.
    splits = [
        {split: load_split(spec, split, section.max_bad_fraction) for split in ("train", evaluation_split)}
        for spec in mixture.tasks
    ]
    dropped = _dropped_rows(mixture, splits, section.max_bad_fraction)
    memo = TokenMemo()
    return [
        _task(spec, section, (loaded["train"], loaded[evaluation_split]), dropped[spec.name], chat, memo)
        for spec, loaded in zip(mixture.tasks, splits, strict=True)
        if not section.only or spec.name in section.only
    ]


def cache_tokens(
    tasks: Sequence[TaskData], samples_per_task: Sequence[int], policy: TokenCache, ranks: int
) -> list[TaskData]:
    """The tasks, those whose tokens are worth it with them on disk; shows the progress of making them.

    Args:
        tasks: Of the run.
        samples_per_task: That the run takes of each.
        policy: `auto` keeps a task's tokens where the run would make more of them as it goes.
        ranks: Of the run; each needs the lengths of the whole step, so makes the tokens of all its samples.

    Raises:
        StorageError: the cache cannot be written, or is damaged.
    """
    chosen = [
        policy == "always" or (policy == "auto" and samples * ranks >= len(task.train))
        for task, samples in zip(tasks, samples_per_task, strict=True)
    ]
    pairs = list(zip(tasks, chosen, strict=True))
    missing = sum(len(task.train) for task, cached in pairs if cached and not task.tokens.is_cached)
    # Lines of information are the main rank's, and so is the progress.
    visible = missing > 0 and _LOG.isEnabledFor(logging.INFO)
    with progress_line("tokenising", missing, visible) as progress:
        return [
            replace(task, tokens=task.tokens.cached(progress.advance)) if cached else task
            for task, cached in pairs
        ]


def build_plan(tasks: Sequence[TaskData], section: DataSection, seed: int, num_samples: int) -> MixPlan:
    """The run's order of samples: the mixing rule's shares, the users' weights, the repeat caps.

    A task that its cap would stop before the end gets a smaller share all along, so it is seen to the end.

    Raises:
        ConfigError: `data.mix` does not fit these tasks.
    """
    sizes = mix_sizes(tasks, section)
    (_, first), *later = weight_schedule(section.mix, sizes, num_samples)
    caps = [size.max_repeats for size in sizes]
    plan = MixPlan([size.rows for size in sizes], first, section.mix.block, seed, caps)
    for block, weights in later:
        plan.set_weights(weights, from_block=block)
    return plan


def mix_sizes(tasks: Sequence[TaskData], section: DataSection) -> list[TaskSize]:
    """What the mixing rules know of the tasks; lengths are measured only where shares count tokens."""
    by_tokens = section.mix.by == "tokens"
    return [
        TaskSize(t.name, len(t.train), t.tokens.mean_length if by_tokens else 1.0, t.weight, t.max_repeats)
        for t in tasks
    ]


def _check_overrides(section: DataSection, specs: Sequence[TaskSpec]) -> None:
    known = {s.name for s in specs}
    fix = f"Tasks there: {', '.join(sorted(known))}."
    problems = [
        Problem(f"data.{key}.{name}", f"is not a task of {section.recipe}", fix=fix)
        for key, names in (("tasks", section.tasks), ("only", section.only))
        for name in names
        if name not in known
    ]
    chosen = set(section.only) & known or known
    if all(name in section.tasks and section.tasks[name].weight == 0 for name in chosen):
        problems.append(Problem("data.tasks", "give every task weight 0", fix="Leave one above 0."))
    if problems:
        raise ConfigError("the run file", problems)


def _check_text_only(specs: Sequence[TaskSpec], recipe: Path) -> None:
    names = [spec.name for spec in specs if spec.image is not None]
    if names:
        rule = f"must hold tasks of text only, as no vision tower reads the images of {', '.join(names)}"
        fix = "Leave these tasks out; `moe-medical data check` reads them."
        raise ConfigError(str(recipe), [Problem(f"{recipe}: tasks", rule, fix=fix)])


def _dropped_rows(mixture: Mixture, splits: Sequence[Mapping[str, Split]], most: float) -> dict[str, Rows]:
    """Task -> training rows that the mixture's `hygiene` leaves out; cached."""
    from moe_medical.data.hygiene import hygiene_key, needs_comparison, rows_to_drop  # it takes a second

    specs = mixture.tasks
    settings = mixture.hygiene
    if not needs_comparison(settings):
        return {spec.name: np.zeros(0, dtype=np.int64) for spec in specs}
    rows = {}
    for spec, known in zip(specs, splits, strict=True):
        # A training row leaks into whichever split it is in, not only into the one that this run evaluates.
        names = splits_of(spec) if settings.overlap == "drop" else ["train"]
        rows[spec.name] = {n: (known.get(n) or load_split(spec, n, most)).examples for n in names}
    contents = {task: {split: of.key for split, of in parts.items()} for task, parts in rows.items()}

    def build(folder: Path) -> None:
        for task, found in rows_to_drop(rows, specs, settings).items():
            np.save(folder / f"{task}.npy", found)

    folder = published("hygiene", hygiene_key(contents, specs, settings), build)
    return {spec.name: load_array(folder, spec.name) for spec in specs}


def _task(
    spec: TaskSpec,
    section: DataSection,
    splits: tuple[Split, Split],
    dropped: Rows,
    chat: ChatFormat,
    memo: TokenMemo,
) -> TaskData:
    train, too_long = _select(splits[0].examples, chat, dropped)
    evaluation, too_long_evaluation = _select(splits[1].examples, chat)
    override = section.tasks.get(spec.name, TaskOverride())
    caps = (override.max_repeats, spec.max_repeats, section.mix.max_repeats)
    task = TaskData(
        spec=spec,
        train=train,
        evaluation=evaluation,
        unusable=[*splits[0].rejected, *splits[1].rejected],
        too_long=(too_long, too_long_evaluation),
        fingerprints={"train": splits[0].fingerprints, "evaluation": splits[1].fingerprints},
        tokens=FreshTokens(train, chat, memo, spec.name),
        weight=spec.weight * override.weight,
        max_repeats=next((cap for cap in caps if cap is not None), None),
    )
    _report_rejected(task, section.max_length)
    return task


def _select(rows: TextRows, chat: ChatFormat, dropped: Rows | None = None) -> tuple[TextRows, TextRows]:
    """The rows that are used, and those whose target does not fit."""
    fits = fitting(rows, chat)
    used = fits.copy()
    used[[] if dropped is None else dropped] = False
    too_long = rows.select(np.flatnonzero(~fits))
    return rows if used.all() else rows.select(np.flatnonzero(used)), too_long


def _report_rejected(task: TaskData, max_length: int) -> None:
    if counts := task.rejected_counts():
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
        _LOG.info("%s: %d records rejected: %s", task.name, sum(counts.values()), reasons)
    if not task.train or not task.evaluation:
        raise DataError(
            f"{task.spec.path}: no row is left whose target fits data.max_length ({max_length}) "
            "and that the mixture's hygiene keeps"
        )
