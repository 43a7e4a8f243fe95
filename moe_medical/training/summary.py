"""The result of a run, task by task: printed, and written to results.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moe_medical.console import show, show_table
from moe_medical.files import write_json
from moe_medical.training.trainer import RunResult


@dataclass(frozen=True)
class TaskSummary:
    """One line of the table."""

    task: str
    rows: int
    weight: float
    """Share of the samples trained on."""
    repeats: float
    metric: str
    loss_before: float
    loss_after: float
    score_before: float | None
    score_after: float | None

    @property
    def improved(self) -> bool:
        return self.loss_after < self.loss_before


@dataclass(frozen=True)
class RunSummary:
    tasks: list[TaskSummary]
    macro_loss_before: float
    macro_loss_after: float
    macro_score_before: float | None
    macro_score_after: float | None
    tasks_improved: int
    accepted_data_changes: list[str]
    """What a resumed run found changed and was told to accept; else empty."""


def summarize(result: RunResult) -> RunSummary:
    """Evaluations before and after, joined with what each task got of the run."""
    total = result.samples_per_task.sum()
    tasks = []
    for task, samples in zip(result.tasks, result.samples_per_task.tolist(), strict=True):
        before = result.before.tasks[task.name]
        after = result.after.tasks[task.name]
        shares = (len(task.train), samples / total, samples / len(task.train), task.spec.metric)
        tasks.append(TaskSummary(task.name, *shares, before.loss, after.loss, before.score, after.score))
    return RunSummary(
        tasks=tasks,
        macro_loss_before=result.before.macro_loss,
        macro_loss_after=result.after.macro_loss,
        macro_score_before=result.before.macro_score,
        macro_score_after=result.after.macro_score,
        tasks_improved=sum(t.improved for t in tasks),
        accepted_data_changes=list(result.accepted_changes),
    )


def write_summary(summary: RunSummary, result: RunResult) -> None:
    write_json(result.folder.results, asdict(summary))


def show_summary(summary: RunSummary, result: RunResult) -> None:
    """Print the per-task table and where everything lies."""
    rows = [_row(t) for t in sorted(summary.tasks, key=lambda t: -t.rows)]
    losses = _change(summary.macro_loss_before, summary.macro_loss_after)
    scores = _change(summary.macro_score_before, summary.macro_score_after)
    footer = ("macro average", "", "", "", losses, scores)
    show_table(("task", "rows", "weight", "repeats", "loss", "score"), rows, footer)
    fall = 100 * (1 - summary.macro_loss_after / summary.macro_loss_before)
    improved = f"{summary.tasks_improved} of {len(summary.tasks)} tasks improved"
    show(f"macro-average evaluation loss fell by {fall:.1f} %; {improved}\n")
    for change in summary.accepted_data_changes:
        show(f"the data changed during this run: {change}\n")
    folder = result.folder
    for what, path in (
        ("adapter", folder.adapter),
        ("results", folder.results),
        ("metrics", folder.metrics),
        ("checkpoints", folder.checkpoints),
        ("W&B", folder.root / "wandb"),
    ):
        if path.exists():
            show(f"{what:<12} {path}")


def _row(task: TaskSummary) -> tuple[str, ...]:
    shares = (f"{task.rows:,}", f"{task.weight:.4f}", f"{task.repeats:.3f}")
    losses = _change(task.loss_before, task.loss_after)
    return (task.task, *shares, losses, _change(task.score_before, task.score_after))


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{before:.3f} → {after:.3f}"
