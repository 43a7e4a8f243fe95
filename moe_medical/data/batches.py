"""Encoded examples -> tensors, and the micro-batches of each step of each rank.

Rows are padded on the left, so that all targets end at the last column: the language-model head then
runs on the last few positions only. A rank reads a contiguous slice of each global batch and sorts it
by length into its micro-batches; which samples make a global batch depends on the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moe_medical.data.formats import ChatFormat, Encoded
from moe_medical.data.mixture import MixPlan
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
    labels_BS: torch.Tensor
    """The token itself on target positions, IGNORE elsewhere."""
    task_ids_BS: torch.Tensor
    num_target_columns: int
    """Columns at the right end that hold all targets."""
    num_truncated: int
    """Rows whose prompt was cut to fit."""

    def to(self, device: torch.device) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)

    @property
    def num_tokens(self) -> int:
        return int(self.token_mask_BS.sum())

    def targets_per_task(self, num_tasks: int) -> torch.Tensor:
        """Supervised tokens of each task, shape (num_tasks,)."""
        return torch.bincount(self.task_ids_BS[self.labels_BS != IGNORE], minlength=num_tasks)

    def rows_per_task(self, num_tasks: int) -> torch.Tensor:
        """Samples of each task, shape (num_tasks,)."""
        return torch.bincount(self.task_ids_BS[:, 0], minlength=num_tasks)


def collate(rows: Sequence[Encoded], task_ids: Sequence[int], pad_id: int) -> Batch:
    """Left-pad encoded rows into one batch."""
    length = max(len(r.input_ids) for r in rows)
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    labels = torch.full((len(rows), length), IGNORE)
    for i, row in enumerate(rows):
        start = length - len(row.input_ids)
        tokens = torch.tensor(row.input_ids)
        ids[i, start:], mask[i, start:] = tokens, True
        labels[i, start + row.num_prompt_tokens :] = tokens[row.num_prompt_tokens :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tasks = torch.tensor(task_ids).unsqueeze(1).expand(-1, length).contiguous()
    widest = max(len(r.input_ids) - r.num_prompt_tokens for r in rows)
    truncated = sum(r.num_truncated > 0 for r in rows)
    return Batch(ids, mask, positions, labels, tasks, widest, truncated)


class TrainingBatches:
    """The micro-batches of one rank, a pure function of the plan and the step."""

    def __init__(
        self,
        plan: MixPlan,
        tasks: Sequence[TaskData],
        chat: ChatFormat,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._plan, self._tasks, self._chat = plan, tasks, chat
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._share = global_batch // world_size
        self._offset = rank * self._share

    def step(self, step: int) -> list[Batch]:
        """Micro-batches of this rank for one optimizer step (counted from 0)."""
        first = step * self._global_batch + self._offset
        refs = [self._plan.at(g) for g in range(first, first + self._share)]
        rows = [(self._encode(ref.task, ref.row), ref.task) for ref in refs]
        rows.sort(key=lambda pair: len(pair[0].input_ids))
        cuts = range(0, len(rows), self._micro_batch)
        return [self._collate(rows[i : i + self._micro_batch]) for i in cuts]

    def _encode(self, task: int, row: int) -> Encoded:
        example = self._tasks[task].train[row]
        return self._chat.encode(example.prompt, example.target)

    def _collate(self, rows: Sequence[tuple[Encoded, int]]) -> Batch:
        return collate([r for r, _ in rows], [t for _, t in rows], self._chat.pad_id)
