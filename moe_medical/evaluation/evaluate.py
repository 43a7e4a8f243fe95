"""Per-task loss and score on a fixed probe set, shared over the ranks.

The probe set is the first rows of each task's evaluation split, in file order, so every evaluation of a
run (and of two runs on the same data) sees the same rows. Rows are dealt to ranks in batches of similar
length; every rank runs the same number of forward passes, which ZeRO-3 and expert parallelism need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.schema import EvaluationSection
from moe_medical.data.batches import collate
from moe_medical.data.formats import ChatFormat
from moe_medical.data.rows import Example
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.generate import generate_ids
from moe_medical.evaluation.metrics import score
from moe_medical.evaluation.objective import row_sums, token_losses

T = TypeVar("T")


@dataclass(frozen=True)
class TaskResult:
    """One task at one evaluation."""

    loss: float
    """Mean over target tokens, nats."""
    tokens: int
    rows: int
    metric: str
    score: float | None
    """None where scores are turned off."""
    score_rows: int
    row_losses: tuple[float, ...] = ()
    """Summed over the target tokens of each row, in file order: what two evaluations are paired by."""


@dataclass(frozen=True)
class Evaluation:
    """Every task at one step."""

    step: int
    tasks: dict[str, TaskResult]

    @property
    def macro_loss(self) -> float:
        return float(np.mean([t.loss for t in self.tasks.values()]))

    @property
    def macro_score(self) -> float | None:
        scores = [t.score for t in self.tasks.values() if t.score is not None]
        return float(np.mean(scores)) if scores else None

    def values(self) -> dict[str, float]:
        """The series by name."""
        values = {"eval/macro_loss": self.macro_loss}
        if self.macro_score is not None:
            values["eval/macro_score"] = self.macro_score
        values |= {f"eval_loss/{name}": task.loss for name, task in self.tasks.items()}
        scores = {name: task.score for name, task in self.tasks.items()}
        return values | {f"eval_score/{name}": s for name, s in scores.items() if s is not None}

    def to_json(self) -> dict[str, object]:
        return {"step": self.step, "tasks": {k: asdict(v) for k, v in self.tasks.items()}}

    @classmethod
    def from_json(cls, data: dict) -> Evaluation:
        tasks = {
            k: TaskResult(**{**v, "row_losses": tuple(v.get("row_losses", ()))})
            for k, v in data["tasks"].items()
        }
        return cls(data["step"], tasks)


class _Row(NamedTuple):
    """One row of the probe set."""

    number: int
    """Among all of the probe set."""
    task: int
    example: Example


class Evaluator:
    """Evaluates a model on the probe rows of every task. Collective: every rank must call."""

    def __init__(
        self,
        tasks: Sequence[TaskData],
        chat: ChatFormat,
        section: EvaluationSection,
        topology: Topology,
        needs_equal_forwards: bool,
        context: RoutingContext | None = None,
    ) -> None:
        self._tasks, self._chat, self._section = tasks, chat, section
        self._topology, self._synced = topology, needs_equal_forwards
        self._context = context or RoutingContext()

    def num_batches(self, scores: bool = True) -> int:
        """Forward passes and generations of one evaluation on this rank, for a progress bar."""
        return len(self._dealt(self._loss_rows())) + scores * len(self._dealt(self._score_rows()))

    @torch.no_grad()
    def run(
        self, model: nn.Module, step: int, advance: Callable[[], None] = lambda: None, scores: bool = True
    ) -> Evaluation:
        """Loss and, unless they are not asked for, score of every task."""
        was_training = model.training
        model.eval()
        losses, tokens = self._losses(model, advance)
        scored = self._scores(model, advance) if scores else {}
        model.train(was_training)
        of_row = np.array([row.task for row in self._loss_rows()])
        results = {}
        for i, task in enumerate(self._tasks):
            mine, count = losses[of_row == i], int(tokens[of_row == i].sum())
            value, score_rows = scored.get(i, (None, 0))
            results[task.name] = TaskResult(
                loss=float(mine.sum() / count),
                tokens=count,
                rows=len(mine),
                metric=task.spec.metric,
                score=value,
                score_rows=score_rows,
                row_losses=tuple(mine.tolist()),
            )
        return Evaluation(step, results)

    def _losses(self, model: nn.Module, advance: Callable[[], None]) -> np.ndarray:
        """Summed loss and target tokens of each of the loss rows, shape (2, rows)."""
        rows = self._loss_rows()
        sums = np.zeros((2, len(rows)))
        for batch_rows, counted in self._dealt(rows):
            encoded = [self._chat.encode(r.example.prompt, r.example.target) for r in batch_rows]
            batch = collate(encoded, [r.task for r in batch_rows], self._chat.pad_id)
            with self._context.bind_tasks(self._task_ids(batch_rows)):
                tokens = token_losses(model, batch.to(self._topology.device))
            if counted:
                sums[:, [r.number for r in batch_rows]] = row_sums(tokens, len(batch_rows))
            advance()
        return self._topology.sum(sums)

    def _scores(self, model: nn.Module, advance: Callable[[], None]) -> dict[int, tuple[float, int]]:
        rows = self._score_rows()
        ids: list[torch.Tensor] = []
        width = self._section.max_new_tokens
        for batch_rows, _ in self._dealt(rows):
            prompts = [self._chat.encode_prompt(r.example.prompt) for r in batch_rows]
            with self._context.bind_tasks(self._task_ids(batch_rows)):
                made = generate_ids(model, prompts, self._chat, width, self._topology.device, self._synced)
            ids.append(nn.functional.pad(made, (0, 0, 0, self._section.batch_rows - len(made)), value=-1))
            advance()
        return self._score_texts(rows, self._collect(ids)) if rows else {}

    def _collect(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Generated tokens of all rows in the order of `_ordered`: (all rows, width)."""
        mine = torch.stack(ids)  # (turns, batch_rows, width)
        everyone = self._topology.gather(mine.unsqueeze(0))  # (world, turns, batch_rows, width)
        return everyone.transpose(0, 1).reshape(-1, mine.shape[-1]).cpu()

    def _score_texts(self, rows: list, ids: torch.Tensor) -> dict[int, tuple[float, int]]:
        # Batches are full but for the last one and stand-ins, so rows and tokens line up from the start.
        texts: dict[int, list[tuple[str, str]]] = {}
        for row, line in zip(_ordered(rows), ids, strict=False):
            text = self._chat.decode([i for i in line.tolist() if i >= 0])
            texts.setdefault(row.task, []).append((text, row.example.target))
        scores = {}
        for task, pairs in texts.items():
            spec = self._tasks[task].spec
            predictions, targets = [p for p, _ in pairs], [t for _, t in pairs]
            scores[task] = (score(spec.metric, predictions, targets, spec.language), len(pairs))
        return scores

    def _task_ids(self, rows: Sequence[_Row]) -> torch.Tensor:
        return torch.tensor([row.task for row in rows], device=self._topology.device)

    def _loss_rows(self) -> list[_Row]:
        return self._first_rows(self._section.loss_rows)

    def _score_rows(self) -> list[_Row]:
        return self._first_rows(self._section.score_rows)

    def _first_rows(self, count: int) -> list[_Row]:
        rows = ((i, e) for i, task in enumerate(self._tasks) for e in task.evaluation[:count])
        return [_Row(number, task, example) for number, (task, example) in enumerate(rows)]

    def _dealt(self, rows: list[_Row]) -> list[tuple[Sequence[_Row], bool]]:
        return list(deal(_ordered(rows), self._section.batch_rows, self._topology))


def _ordered(rows: list[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: len(row.example.prompt) + len(row.example.target), reverse=True)


def deal(rows: Sequence[T], batch_rows: int, topology: Topology) -> Iterator[tuple[Sequence[T], bool]]:
    """This rank's batches in turn order; batch b of turn t is the (t * world + rank)-th.

    A rank without a batch in the last turn repeats the last one, marked as not counted.
    """
    batches = [rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
    turns = -(-len(batches) // topology.world_size)
    for turn in range(turns):
        mine = turn * topology.world_size + topology.rank
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)
