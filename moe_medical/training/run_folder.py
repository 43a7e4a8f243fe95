"""Where a run writes what."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from moe_medical.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class RunFolder:
    """Paths below run.dir."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    def evaluation(self, step: int) -> Path:
        return self.root / "evaluations" / f"step-{step:08d}.json"

    def read_evaluation(self, step: int) -> Evaluation | None:
        path = self.evaluation(step)
        return Evaluation.from_json(json.loads(path.read_text())) if path.is_file() else None

    def forget_evaluations(self) -> None:
        """A fresh start must not find the evaluations of an earlier attempt."""
        shutil.rmtree(self.root / "evaluations", ignore_errors=True)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        write_json(self.evaluation(evaluation.step), evaluation.to_json())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)
