"""What a resumed run must share with the run that saved; else its steps would be another run's.

Everything that shapes a number is compared. Free to change: where the run is written, the layout (ranks,
DeepSpeed JSON, ep_size, micro-batch, activation checkpointing, compilation), the number of steps,
checkpoints, logging. Data is compared by content, so that files may move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_medical.base_model import BaseModel
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.data.mixture import MixPlan
from moe_medical.data.tasks import TaskData
from moe_medical.errors import DataError

_FREE = {
    "training.steps",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.compile",
    "evaluation.batch_rows",
    "evaluation.every_steps",
    "data.recipe",
}
_REMEDY = "Restore it or use a new run.name."


@dataclass(frozen=True)
class RunIdentity:
    """Saved in each checkpoint, but for the paths; JSON values only."""

    settings: dict[str, Any]
    """Dotted key of the run file -> value."""
    tasks: dict[str, dict[str, str]]
    """Task -> `<number>:<file name>` -> sha256, and the sha256 of its prompt and target templates."""
    mixture: dict[str, Any]
    """State of the mixture: sizes, weights, caps, seed."""
    paths: dict[str, str]
    """`<task>/<number>:<file name>` -> where the file is now."""

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "tasks": self.tasks, "mixture": self.mixture}

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Compare with a checkpoint's identity.

        Raises:
            DataError: naming what differs, changed data before settings.
        """
        differences = list(self._changed_data(saved["tasks"])) or [
            f"{key} was {saved['settings'].get(key)!r} in the checkpoint, is {value!r}"
            for key, value in self.settings.items()
            if saved["settings"].get(key) != value
        ]
        if not differences and saved["mixture"] != self.mixture:
            differences = [
                "the mixture is not the checkpoint's; training.steps changes shares where a cap binds"
            ]
        if differences:
            raise DataError("\n".join(f"{d}. {_REMEDY}" for d in differences))

    def _changed_data(self, saved: dict[str, dict[str, str]]) -> Iterator[str]:
        if list(saved) != list(self.tasks):
            yield f"the tasks were {', '.join(saved)} in the checkpoint, are {', '.join(self.tasks)}"
            return
        for task, contents in self.tasks.items():
            for name, digest in contents.items():
                if saved[task].get(name) != digest:
                    what = self.paths.get(f"{task}/{name}", f"prompt or target of {task}")
                    yield f"{what} has changed since the checkpoint"


def identify(
    config: RunConfig, base: BaseModel, adapters: MoloraConfig, tasks: Sequence[TaskData], plan: MixPlan
) -> RunIdentity:
    """The identity of a run that is about to start."""
    settings: dict[str, Any] = {"run.seed": config.run.seed, "model.dtype": config.model.dtype}
    settings |= {"model.name": base.name, "model.revision": base.revision}
    sections = {
        "data": asdict(config.data),
        "training": asdict(config.training),
        "evaluation": asdict(config.evaluation),
        "adapters": asdict(adapters),
    }
    for name, section in sections.items():
        for key, value in section.items():
            settings[f"{name}.{key}"] = list(value) if isinstance(value, tuple) else value
    kept = {key: value for key, value in settings.items() if key not in _FREE}
    paths = {
        f"{t.name}/{key}": file for t in tasks for key, file in zip(_keys(t), t.fingerprints, strict=True)
    }
    return RunIdentity(kept, {task.name: _contents(task) for task in tasks}, plan.state(), paths)


def _keys(task: TaskData) -> list[str]:
    return [f"{i}:{Path(file).name}" for i, file in enumerate(task.fingerprints)]


def _contents(task: TaskData) -> dict[str, str]:
    templates = f"{task.spec.prompt}\n{task.spec.target}"
    files = dict(zip(_keys(task), task.fingerprints.values(), strict=True))
    return files | {"templates": hashlib.sha256(templates.encode()).hexdigest()}
