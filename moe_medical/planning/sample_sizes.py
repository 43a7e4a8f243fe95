"""How many tokens the samples of a run have, from a sample of each task's rows. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData

_ROWS_MEASURED = 128


@dataclass(frozen=True)
class SampleSizes:
    """Tokens of samples."""

    mean: float
    longest: int
    longest_target: int
    mean_target: float


def task_sizes(task: TaskData, chat: ChatFormat) -> SampleSizes:
    """Of one task, measured on evenly spread rows."""
    picks = np.linspace(0, len(task.train) - 1, min(_ROWS_MEASURED, len(task.train))).astype(int)
    rows = chat.encode_many([(e.prompt, e.target) for e in task.train.take(picks.tolist())])
    lengths = [len(row.input_ids) for row in rows]
    targets = [len(row.input_ids) - row.num_prompt_tokens for row in rows]
    return SampleSizes(float(np.mean(lengths)), max(lengths), max(targets), float(np.mean(targets)))


def mixture_sizes(sizes: Sequence[SampleSizes], samples: Sequence[int]) -> SampleSizes:
    """Of a mixture of tasks.

    Args:
        sizes: Of each task.
        samples: That the run takes of each; at least one in all.
    """
    seen = [(size, n) for size, n in zip(sizes, samples, strict=True) if n]
    total = sum(n for _, n in seen)
    return SampleSizes(
        mean=sum(n * size.mean for size, n in seen) / total,
        longest=max(size.longest for size, _ in seen),
        longest_target=max(size.longest_target for size, _ in seen),
        mean_target=sum(n * size.mean_target for size, n in seen) / total,
    )
