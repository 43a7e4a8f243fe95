"""Per-task loss and score on a fixed probe set, shared over the ranks.

The probe set is the first rows of each task's evaluation split, in file order, so every evaluation of a
run (and of two runs on the same data) sees the same rows. Rows are dealt to ranks in batches of similar
length; every rank runs the same number of forward passes, which ZeRO-3 and expert parallelism need. Rows are
padded on the left and masked, so no row's numbers depend on its batch, and scores are taken in file order:
they are the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.adapters.xlora import needs_whole_text
from moe_medical.config.schema import EvaluationSection
from moe_medical.data.batches import collate
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.rows import Example
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.choices import answer_options, encode_options, likeliest
from moe_medical.evaluation.generate import generate_ids, pad_left
from moe_medical.evaluation.loss import row_sums, token_losses
from moe_medical.evaluation.metric import Answers
from moe_medical.evaluation.metrics import all_scores

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
    score_low: float | None = None
    """Of the score's 95 % interval; None where there is none."""
    score_high: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """By the task's metric and by each of its variants (`metrics.VARIANTS`)."""
    by_likelihood: bool = False
    """Whether the answers are the likeliest of listed options, not generated."""


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


class Answered(NamedTuple):
    """One scored row: text of a record, which only goes where the user allows it."""

    task: str
    row: int
    """Number in the task's probe set, from 0."""
    example: Example
    prediction: str


class _Row(NamedTuple):
    """One row of the probe set."""

    number: int
    """Among all of the probe set."""
    task: int
    example: Example
    options: tuple[str, ...] = ()
    """Of which one is to be chosen; empty where the answer is generated."""


class Evaluator:
    """Evaluates a model on the probe rows of every task. Collective: every rank must call.

    Args:
        tasks: What to evaluate on.
        chat: The model's format.
        section: How.
        topology: This process among all.
        needs_equal_forwards: Whether ranks must call the model equally often; see `Engine`.
        context: Of the model's adapters, which may route by task.
        numbers: The tasks' numbers in the model, where they are not those of `tasks`.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        chat: ChatFormat,
        section: EvaluationSection,
        topology: Topology,
        needs_equal_forwards: bool,
        context: RoutingContext | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._tasks = tasks
        self._chat = chat
        self._section = section
        self._topology = topology
        self._synced = needs_equal_forwards
        self._context = context or RoutingContext()
        self._numbers = list(range(len(tasks)) if numbers is None else numbers)

    @property
    def makes_scores(self) -> bool:
        """Whether any row is answered and scored."""
        return bool(self._score_rows)

    def num_batches(self, scores: bool = True) -> int:
        """Forward passes and generations of one evaluation on this rank, for a progress bar."""
        scored = (self._dealt(self._open), self._dealt(self._closed, self._questions))
        return len(self._dealt(self._loss_rows)) + scores * sum(map(len, scored))

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        step: int,
        advance: Callable[[], None] = lambda: None,
        scores: bool = True,
        tell: Callable[[Answered], None] = lambda _: None,
    ) -> Evaluation:
        """Loss and, unless they are not asked for, score of every task.

        Args:
            model: A causal LM.
            step: Optimizer steps that it has behind it.
            advance: Called after each batch.
            scores: Whether answers are made and scored.
            tell: Called with each answer, in the order of tasks and rows.
        """
        was_training = model.training
        model.eval()
        losses, tokens = self._losses(model, advance)
        texts = self._answers(model, advance) if scores else {}
        model.train(was_training)
        of_row = np.array([row.task for row in self._loss_rows])
        results = {}
        for i, task in enumerate(self._tasks):
            mine = losses[of_row == i]
            count = int(tokens[of_row == i].sum())
            result = TaskResult(
                loss=float(mine.sum() / count),
                tokens=count,
                rows=len(mine),
                metric=task.spec.metric,
                score=None,
                score_rows=0,
                row_losses=tuple(mine.tolist()),
            )
            results[task.name] = self._scored(result, i, texts, tell) if texts else result
        return Evaluation(step, results)

    # Losses

    def _losses(self, model: nn.Module, advance: Callable[[], None]) -> np.ndarray:
        """Summed loss and target tokens of each of the loss rows, shape (2, rows)."""
        sums = np.zeros((2, len(self._loss_rows)))
        for rows, counted in self._dealt(self._loss_rows):
            encoded = [self._chat.encode(r.example.prompt, r.example.target) for r in rows]
            found = self._row_sums(model, encoded, rows)
            if counted:
                sums[:, [r.number for r in rows]] = found
            advance()
        return self._topology.sum(sums)

    def _row_sums(self, model: nn.Module, encoded: Sequence[Encoded], rows: Sequence[_Row]) -> np.ndarray:
        """Summed loss and target tokens of samples, each of which is of one of the rows."""
        batch = collate(encoded, [row.task for row in rows], self._chat.pad_id).to(self._topology.device)
        with self._context.bind(BatchInputs.of_rows(self._task_ids(rows), batch.prompt_mask_BS)):
            tokens = token_losses(model, batch)
        return row_sums(tokens, len(encoded))

    # Scores

    def _answers(self, model: nn.Module, advance: Callable[[], None]) -> dict[int, str]:
        """Score row -> what the model answers."""
        return self._generated(model, advance) | self._chosen(model, advance)

    def _generated(self, model: nn.Module, advance: Callable[[], None]) -> dict[int, str]:
        ids: list[torch.Tensor] = []
        width = self._section.max_new_tokens
        for rows, _ in self._dealt(self._open):
            prompts = [self._chat.encode_prompt(r.example.prompt) for r in rows]
            where = (self._chat, width, self._topology.device)
            cached = not needs_whole_text(model)
            _, prompt_mask_BS = pad_left(prompts, self._chat.pad_id, self._topology.device)
            with self._context.bind(BatchInputs.of_rows(self._task_ids(rows), prompt_mask_BS)):
                made = generate_ids(model, prompts, *where, self._synced, cached)
            ids.append(nn.functional.pad(made, (0, 0, 0, self._section.batch_rows - len(made)), value=-1))
            advance()
        if not ids:
            return {}
        # Batches are full but for the last one and stand-ins, so rows and tokens line up from the start.
        lines = zip(_ordered(self._open), self._collect(ids).tolist(), strict=False)
        return {row.number: self._chat.decode([i for i in line if i >= 0]) for row, line in lines}

    def _collect(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Generated tokens of all rows in the order of `_ordered`: (all rows, width)."""
        mine = torch.stack(ids)  # (turns, batch_rows, width)
        everyone = self._topology.gather(mine.unsqueeze(0))  # (world, turns, batch_rows, width)
        return everyone.transpose(0, 1).reshape(-1, mine.shape[-1]).cpu()

    def _chosen(self, model: nn.Module, advance: Callable[[], None]) -> dict[int, str]:
        if not self._closed:
            return {}
        place = {row.number: i for i, row in enumerate(self._closed)}
        losses = np.zeros((len(place), max(len(row.options) for row in self._closed)))
        for rows, counted in self._dealt(self._closed, self._questions):
            fitting = [encode_options(self._chat, r.example.prompt, r.options) for r in rows]
            pairs = [(row, n, e) for row, of in zip(rows, fitting, strict=True) for n, e in of.items()]
            found = self._row_sums(model, [e for _, _, e in pairs], [row for row, _, _ in pairs])[0]
            if counted:
                losses[[place[row.number] for row in rows]] = np.inf  # where an option is too long
                losses[[place[row.number] for row, _, _ in pairs], [n for _, n, _ in pairs]] = found
            advance()
        total = self._topology.sum(losses)
        return {
            r.number: r.options[likeliest(total[place[r.number], : len(r.options)])] for r in self._closed
        }

    def _scored(
        self, result: TaskResult, task: int, texts: dict[int, str], tell: Callable[[Answered], None]
    ) -> TaskResult:
        """The result with the scores of the task's answers."""
        spec = self._tasks[task].spec
        rows = [row for row in self._score_rows if row.task == task]
        predictions = [texts[row.number] for row in rows]
        targets = [row.example.target for row in rows]
        for i, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
            tell(Answered(spec.name, i, row.example, prediction))
        answers = Answers(
            predictions, targets, spec.language.partition("-")[0], [r.example.choices for r in rows]
        )
        found = all_scores(spec.metric, answers, self._section.resamples)
        return replace(
            result,
            score=found.score,
            score_rows=len(rows),
            score_low=found.low,
            score_high=found.high,
            scores=found.all,
            by_likelihood=bool(rows[0].options),
        )

    # The probe set

    @cached_property
    def _loss_rows(self) -> list[_Row]:
        return self._first_rows(self._section.loss_rows)

    @cached_property
    def _score_rows(self) -> list[_Row]:
        rows = self._first_rows(self._section.score_rows)
        return rows if self._section.choices == "generated" else self._with_options(rows)

    def _with_options(self, rows: list[_Row]) -> list[_Row]:
        found = []
        for i, task in enumerate(self._tasks):
            mine = [row for row in rows if row.task == i]
            options = answer_options(task.spec.metric, [row.example for row in mine]) or [()] * len(mine)
            found += [row._replace(options=o) for row, o in zip(mine, options, strict=True)]
        return found

    @cached_property
    def _open(self) -> list[_Row]:
        """Score rows whose answer is generated."""
        return [row for row in self._score_rows if not row.options]

    @cached_property
    def _closed(self) -> list[_Row]:
        """Score rows whose answer is chosen."""
        return [row for row in self._score_rows if row.options]

    @property
    def _questions(self) -> int:
        """Closed rows of a forward pass, so that there is a place for each of their options."""
        return max(1, self._section.batch_rows // max((len(row.options) for row in self._closed), default=1))

    def _first_rows(self, count: int) -> list[_Row]:
        rows = ((i, e) for i, task in enumerate(self._tasks) for e in task.evaluation[:count])
        return [_Row(number, task, example) for number, (task, example) in enumerate(rows)]

    def _task_ids(self, rows: Sequence[_Row]) -> torch.Tensor:
        return torch.tensor([self._numbers[row.task] for row in rows], device=self._topology.device)

    def _dealt(self, rows: list[_Row], at_once: int | None = None) -> list[tuple[Sequence[_Row], bool]]:
        return list(deal(_ordered(rows), at_once or self._section.batch_rows, self._topology))


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
