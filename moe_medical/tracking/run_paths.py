"""Where a run keeps what it tells: written by `training/`, read by reports and dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """Paths below run.dir.

    `evaluations/`, `conflicts/` and `routing/` hold one JSON file per step at which there was one.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def decisions(self) -> Path:
        """One JSON object per line: `step`, `action`, `task` or null, `cause`, and the numbers behind it."""
        return self.root / "decisions.jsonl"

    def evaluation(self, step: int) -> Path:
        """Loss and scores of every task after `step` steps."""
        return _of_step(self.root / "evaluations", step)

    def conflict(self, step: int) -> Path:
        """Angles between the tasks' gradients after `step` steps."""
        return _of_step(self.root / "conflicts", step)

    def routing(self, step: int) -> Path:
        """Which task used which expert in the step that ended at `step`."""
        return _of_step(self.root / "routing", step)

    def of_each_step(self, first: Path) -> list[Path]:
        """The files beside `first`, such as `evaluation(0)`, by step."""
        return sorted(first.parent.glob("step-*.json"))


def _of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.json"
