"""What a resumed run must share with the run that saved; else its steps would be another run's.

Everything that shapes a number is compared. Free to change: where the run is written, the layout (ranks,
DeepSpeed JSON, ep_size, micro-batch, activation checkpointing, compilation), how samples are laid out and
made ready, the number of steps, checkpoints, logging. Data is compared by content, so that files may move and
be renamed; their order counts, as it is the order of the rows. Changed data may be accepted, which marks the
run for good; changed settings may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_medical.base_model import BaseModel
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.data.mixture import MixPlan
from moe_medical.data.sources import row_settings
from moe_medical.data.store import CHUNK_BYTES, Fingerprint
from moe_medical.data.tasks import TaskData
from moe_medical.errors import DataError
from moe_medical.files import sha256_file

_FREE = {
    "training.steps",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.compile",
    "evaluation.batch_rows",
    "evaluation.resamples",
    "evaluation.every_steps",
    "data.recipe",
    "data.batching",
    "data.pack_length",
    "data.workers",
    "data.prefetch_steps",
    "data.cache",
}
_VERSION = 2
_REMEDY = "Restore it or use a new run.name."
_OTHER_MIXTURE = (
    "the mixture is not the checkpoint's: a weight, cap or hygiene key has changed, or training.steps, "
    "which moves shares under unimax and where a cap binds"
)
_ACCEPT = f"{_REMEDY} checkpoint.accept_data_change=true goes on with the data as it is and marks the run."


@dataclass(frozen=True)
class RunFingerprint:
    """Saved in each checkpoint, but for the paths; JSON values only."""

    settings: dict[str, Any]
    """Dotted key of the run file -> value."""
    tasks: dict[str, dict[str, Any]]
    """Task -> `recipe`: key of its YAML -> hash; `train`, `evaluation`: fingerprint of each file, in order,
    with the file's name."""
    mixture: dict[str, Any]
    """State of the mixture as the run starts: sizes, weights, caps, seed."""
    paths: dict[str, str]
    """`<task>` -> its YAML; `<task>/<split>/<number>` -> where the file is now."""
    accepted_changes: tuple[str, ...] = ()
    """Changes of the data since the run began that the user has accepted."""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "settings": self.settings,
            "tasks": self.tasks,
            "mixture": self.mixture,
            "accepted_changes": list(self.accepted_changes),
        }

    def check_resumes(self, saved: Mapping[str, Any], accept_data_change: bool = False) -> RunFingerprint:
        """Compare with a checkpoint's fingerprint.

        Returns:
            The fingerprint to go on with: this one with the changes that were accepted, now and before.

        Raises:
            DataError: naming all that differs.
        """
        if saved.get("version") != _VERSION:
            raise DataError("the checkpoint is of another version of moe_medical. Use a new run.name.")
        settings = list(_changed_settings(saved["settings"], self.settings))
        if list(saved["tasks"]) != list(self.tasks):
            before = ", ".join(saved["tasks"])
            now = ", ".join(self.tasks)
            settings.append(f"the tasks were {before} in the checkpoint, are {now}")
        data = [] if settings else list(self._changed_data(saved["tasks"]))
        if not settings and not data and saved["mixture"] != self.mixture:
            settings = [_OTHER_MIXTURE]
        if settings:
            raise DataError("\n".join(f"{difference}. {_REMEDY}" for difference in settings))
        if data and not accept_data_change:
            raise DataError("\n".join([*(f"{difference}." for difference in data), _ACCEPT]))
        return replace(self, accepted_changes=(*saved.get("accepted_changes", ()), *data))

    def _changed_data(self, saved: Mapping[str, Any]) -> Iterator[str]:
        for task, contents in self.tasks.items():
            for key, digest in contents["recipe"].items():
                if saved[task]["recipe"].get(key) != digest:
                    yield f"{self.paths[task]}: {key} has changed since the checkpoint"
            for split in ("train", "evaluation"):
                yield from self._changed_files(task, split, saved[task][split])

    def _changed_files(self, task: str, split: str, saved: Sequence[dict[str, Any]]) -> Iterator[str]:
        files = self.tasks[task][split]
        before, now = ([file["sha256"] for file in of] for of in (saved, files))
        if before == now:
            return
        if sorted(before) == sorted(now):
            number = next(i for i, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
            place = f"{self.paths[f'{task}/{split}/{number}']} is the first out of place"
            yield f"the {split} files of {task} are in another order than in the checkpoint: {place}"
            return
        old = [file for file in saved if file["sha256"] not in now]
        new = [i for i, file in enumerate(files) if file["sha256"] not in before]
        for i in new:
            path = self.paths[f"{task}/{split}/{i}"]
            # Of the same name, else the next that is not there any more.
            match = next((file for file in old if file["name"] == files[i]["name"]), old[0] if old else None)
            if match is None:
                yield f"{path} ({split} file of {task}) is not in the checkpoint"
            else:
                old.remove(match)
                yield f"{path} has changed since the checkpoint: {_difference(task, match, files[i])}"
        for file in old:
            yield f"{file['name']} ({split} file of {task}) is in the checkpoint but gone"
        if not old and not new:
            yield f"the {split} files of {task} are {len(now)}, were {len(before)} in the checkpoint"


def run_fingerprint(
    config: RunConfig, base: BaseModel, adapters: MoloraConfig, tasks: Sequence[TaskData], plan: MixPlan
) -> RunFingerprint:
    """The fingerprint of a run that is about to start."""
    settings = compared_settings(config) | {"model.name": base.name, "model.revision": base.revision}
    settings |= _flat({"adapters": adapters.saved()}) | _frozen_sources(adapters)
    paths = {task.name: str(task.spec.path) for task in tasks}
    for task in tasks:
        for split, files in task.fingerprints.items():
            paths |= {f"{task.name}/{split}/{i}": file for i, file in enumerate(files)}
    return RunFingerprint(settings, {task.name: _contents(task) for task in tasks}, plan.state(), paths)


def compared_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key of the run file -> value, for all but adapters and base model that a resume must keep."""
    sections = {name: asdict(getattr(config, name)) for name in ("data", "training", "evaluation")}
    model = {"model.dtype": config.model.dtype, "model.quantization": config.model.quantization}
    settings = {"run.seed": config.run.seed} | model | _flat(sections)
    if config.data.mix.dynamic.rule == "regret" or config.training.guard.action != "none":
        settings["tracking.seesaw.gate"] = config.tracking.seesaw.gate  # it decides what is done
    looks = {"evaluation.every_steps"} if config.training.guard.action != "none" else set()
    return {key: value for key, value in settings.items() if key not in _FREE - looks}


def _frozen_sources(adapters: MoloraConfig) -> dict[str, Any]:
    """Digests of the folders whose values stay as they are: checkpoints hold what is trained."""
    lasting = adapters.lasting()
    routers = [lasting.router_from] if lasting.router_from else []
    experts = list(lasting.experts_from)
    found = {"adapters.router_from": routers, "adapters.experts_from": experts}
    return {key: [_weights_digest(Path(f)) for f in folders] for key, folders in found.items() if folders}


def _weights_digest(folder: Path) -> str:
    return " ".join(sha256_file(file) for file in sorted(folder.glob("*.safetensors")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*now, *saved]):
        if key in now and key in saved and now[key] != saved[key]:
            yield f"{key} was {saved[key]!r} in the checkpoint, is {now[key]!r}"
        elif key not in saved:
            yield f"{key} was not set in the checkpoint, is {now[key]!r}"
        elif key not in now:
            yield f"{key} was {saved[key]!r} in the checkpoint, is not set"


def _contents(task: TaskData) -> dict[str, Any]:
    recipe = row_settings(task.spec) | {"kind": task.spec.kind, "metric": task.spec.metric}
    recipe.pop("images", None)  # a folder, which may move
    return {
        "recipe": {key: _hash(value) for key, value in recipe.items()},
        **{split: _files(files) for split, files in task.fingerprints.items()},
    }


def _files(fingerprints: Mapping[str, Fingerprint]) -> list[dict[str, Any]]:
    return [{"name": Path(file).name, **of.to_json()} for file, of in fingerprints.items()]


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _difference(task: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of a file's content differs, for people."""
    before, after = (
        Fingerprint.from_json({key: value for key, value in of.items() if key != "name"})
        for of in (saved, now)
    )
    number = before.first_difference(after)
    sizes = [
        f"{of.size:,} bytes" if of.lines is None else f"{of.lines:,} lines and {of.size:,} bytes"
        for of in (before, after)
    ]
    where = f"the first 1 MiB chunk that differs is number {number}, at byte {number * CHUNK_BYTES:,}"
    return f"task {task}, {sizes[0]} then, {sizes[1]} now, {where}"
