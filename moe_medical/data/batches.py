"""The samples of a step -> the micro-batches of one rank, as tensors.

    packed    rows of several samples, kept apart by positions that start again; padding is one of its own
    grouped   one sample a row, padded on the left to the longest of its micro-batch, of like lengths
    padded    the same, in the mixture's order

All three lay out the same samples. Which samples make a step depends on the plan alone, not on the ranks.

Decisions of `Loader`, which makes the steps ready ahead:
- Threads, not processes: tokenising leaves Python's lock, the rest of a step is a few milliseconds, nothing
  is pickled or forked beside a process group, and nothing is left behind by a kill.
- The caller's thread reads the plan and hands out samples; threads only lay them out. So the order cannot
  depend on the number of threads, and the plan needs no lock.
- What fails in a thread is raised where its step is taken.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import torch

from moe_medical.config.schema import Batching
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.mixture import MixPlan, SampleRef
from moe_medical.data.packing import Rows, deal, pack
from moe_medical.data.tasks import TaskData

IGNORE = -100
"""Label of positions that are not trained on."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass; int64 tensors of shape (B, S), the mask bool."""

    input_ids_BS: torch.Tensor
    token_mask_BS: torch.Tensor
    """True where there is a token, False on padding."""
    position_ids_BS: torch.Tensor
    """Of a token in its sample."""
    labels_BS: torch.Tensor
    """The token itself on target positions, IGNORE elsewhere."""
    task_ids_BS: torch.Tensor
    sample_targets_BS: torch.Tensor
    """Target tokens of the sample that a position belongs to."""
    target_columns_C: torch.Tensor
    """Columns in which some row has a target, ascending; shape (C,)."""
    num_truncated: int
    """Samples whose prompt was cut to fit."""
    packed: bool
    """Whether positions alone keep samples apart; else a row is one sample and the mask hides its padding."""

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)

    @property
    def prompt_mask_BS(self) -> torch.Tensor:
        """True on the tokens of prompts."""
        return self.token_mask_BS & (self.labels_BS == IGNORE)

    @property
    def num_tokens(self) -> int:
        return int(self.token_mask_BS.sum())

    def targets_per_task(self, num_tasks: int) -> torch.Tensor:
        """Supervised tokens of each task, shape (num_tasks,)."""
        return torch.bincount(self.task_ids_BS[self.labels_BS != IGNORE], minlength=num_tasks)

    def samples_per_task(self, num_tasks: int) -> torch.Tensor:
        """Samples of each task, shape (num_tasks,)."""
        starts = self.token_mask_BS & (self.position_ids_BS == 0)
        return torch.bincount(self.task_ids_BS[starts], minlength=num_tasks)


def collate(rows: Sequence[Encoded], task_ids: Sequence[int], pad_id: int) -> Batch:
    """One sample a row, padded on the left, so that all targets end at the last column."""
    length = max(len(r.input_ids) for r in rows)
    return _batch([[(row, task)] for row, task in zip(rows, task_ids, strict=True)], length, pad_id, False)


def collate_packed(rows: Sequence[Sequence[tuple[Encoded, int]]], pad_id: int) -> Batch:
    """Rows of (sample, task) one behind the other, padded on the right."""
    length = max(sum(len(sample.input_ids) for sample, _ in row) for row in rows)
    return _batch(rows, length, pad_id, True)


def _batch(rows: Sequence[Sequence[tuple[Encoded, int]]], length: int, pad_id: int, packed: bool) -> Batch:
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.bool)
    positions, tasks, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for b, row in enumerate(rows):
        sizes = [len(sample.input_ids) for sample, _ in row]
        end = 0 if packed else length - sum(sizes)
        tasks[b] = row[-1][1]  # padding too: a task id must be one
        for (sample, task), size in zip(row, sizes, strict=True):
            start = end
            end = end + size
            border = start + sample.num_prompt_tokens
            ids[b, start:end] = torch.as_tensor(sample.input_ids)
            labels[b, border:end] = ids[b, border:end]
            mask[b, start:end] = True
            positions[b, start:end] = torch.arange(size)
            tasks[b, start:end] = task
            targets[b, start:end] = end - border
        if packed:  # positions that start again make the padding a sample of its own
            positions[b, end:] = torch.arange(length - end)
    # The head is run on these columns alone: a prompt is long, and the vocabulary wide.
    columns = (labels != IGNORE).any(0).nonzero().squeeze(1)
    truncated = sum(sample.num_truncated > 0 for row in rows for sample, _ in row)
    return Batch(ids, mask, positions, labels, tasks, targets, columns, truncated, packed)


@dataclass(frozen=True)
class BatchShape:
    """How a step is cut up."""

    global_batch: int
    """Samples of a step over all ranks."""
    micro_batch: int
    """Rows of a forward pass at most."""
    rank: int
    world_size: int
    batching: Batching
    pack_length: int
    """Tokens of a packed row at most."""


class TrainingBatches:
    """The micro-batches of one rank, a pure function of the plan and the step.

    `samples` reads the plan and belongs to one thread; `lay_out` may run in any.
    """

    def __init__(self, plan: MixPlan, tasks: Sequence[TaskData], chat: ChatFormat, shape: BatchShape) -> None:
        self._plan = plan
        self._tasks = tasks
        self._chat = chat
        self._shape = shape

    def step(self, step: int) -> list[Batch]:
        """Micro-batches of this rank for step `step`, counted from 0; every rank has equally many."""
        return self.lay_out(self.samples(step))

    def samples(self, step: int) -> list[SampleRef]:
        """The samples of a step over all ranks."""
        first = step * self._shape.global_batch
        return [self._plan.at(g) for g in range(first, first + self._shape.global_batch)]

    def lay_out(self, samples: Sequence[SampleRef]) -> list[Batch]:
        """This rank's micro-batches of a step's samples."""
        shape = self._shape
        lengths = self._lengths(samples)
        rows: Rows = [[i] for i in range(len(samples))]
        if shape.batching == "packed":
            rows = pack(lengths, shape.pack_length, shape.world_size)
        dealt = deal(rows, lengths, shape.micro_batch, shape.world_size, shape.batching == "padded")
        mine = dealt[shape.rank :: shape.world_size]
        # Every rank needs all lengths to deal alike, but only the tokens of its own samples.
        encoded = self._encoded(samples, [i for batch in mine for row in batch for i in row])
        filled = [[[encoded[i] for i in row] for row in batch] for batch in mine]
        if shape.batching == "packed":
            return [collate_packed(rows, self._chat.pad_id) for rows in filled]
        return [
            collate([row[0][0] for row in rows], [row[0][1] for row in rows], self._chat.pad_id)
            for rows in filled
        ]

    def _lengths(self, samples: Sequence[SampleRef]) -> list[int]:
        if self._shape.batching == "padded":
            return [0] * len(samples)  # the order does not depend on them
        lengths = [0] * len(samples)
        for task, numbers in _by_task(samples, range(len(samples))).items():
            found = self._tasks[task].tokens.lengths([samples[i].row for i in numbers])
            for i, length in zip(numbers, found, strict=True):
                lengths[i] = length
        return lengths

    def _encoded(
        self, samples: Sequence[SampleRef], numbers: Sequence[int]
    ) -> dict[int, tuple[Encoded, int]]:
        """Sample number -> its tokens and its task."""
        encoded: dict[int, tuple[Encoded, int]] = {}
        for task, mine in _by_task(samples, numbers).items():
            rows = self._tasks[task].tokens.encoded([samples[i].row for i in mine])
            encoded |= {i: (row, task) for i, row in zip(mine, rows, strict=True)}
        return encoded


def _by_task(samples: Sequence[SampleRef], numbers: Iterable[int]) -> dict[int, list[int]]:
    tasks: dict[int, list[int]] = {}
    for i in numbers:
        tasks.setdefault(samples[i].task, []).append(i)
    return tasks


class Loader:
    """Micro-batches of consecutive steps, in order, made in background threads a bounded number ahead.

    Args:
        batches: What to make.
        workers: Threads; 0 makes a step when it is taken.
        ahead: Steps made before they are taken, at most.
        pin: Whether to put them into memory that a GPU copies from by itself.
    """

    def __init__(self, batches: TrainingBatches, workers: int, ahead: int, pin: bool = False) -> None:
        self._batches = batches
        self._pin = pin
        self._ahead = ahead if workers else 0
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._queue: deque[tuple[int, Future[list[Batch]]]] = deque()
        self._waited = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def take(self, step: int, end: int) -> list[Batch]:
        """The micro-batches of `step`; those of the steps behind it, before `end`, are begun.

        Steps are taken one after the other; another one than the next starts anew there.
        """
        began = time.perf_counter()
        try:
            if self._pool is None:
                return self._lay_out(self._batches.samples(step))
            if self._queue and self._queue[0][0] != step:
                self._queue.clear()  # a jump: what was begun is of other steps
            first = self._queue[-1][0] + 1 if self._queue else step
            for number in range(first, min(step + self._ahead + 1, end)):
                samples = self._batches.samples(number)
                self._queue.append((number, self._pool.submit(self._lay_out, samples)))
            return self._queue.popleft()[1].result()
        finally:
            self._waited += time.perf_counter() - began

    def waited(self) -> float:
        """Seconds that the caller has waited for steps since it last asked."""
        waited = self._waited
        self._waited = 0.0
        return waited

    def _lay_out(self, samples: list) -> list[Batch]:
        batches = self._batches.lay_out(samples)
        return [batch.pin_memory() for batch in batches] if self._pin else batches
