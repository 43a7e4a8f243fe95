"""Portable checkpoints: safetensors + JSON, whole or not at all, readable at any layout.

    checkpoints/
      latest.json                 {"step": 2400}, replaced by rename
      step-00002400/
        adapters.safetensors      fp32 master of every trainable tensor, by parameter name
        optimizer.safetensors     exp_avg.<name>, exp_avg_sq.<name>, fp32
        state.json                step, applied_steps, samples, tokens, the run's fingerprint, task weights,
                                the state of each callback
        MANIFEST.json             written last: sha256 and bytes of each file, layout, versions

Nothing is ever unpickled. Random numbers need no file: the trainer seeds them from (seed, step, rank)
at every step. Format 1, which kept the parts of the state under keys of their own, is read too.
Not here: retries on a full disk, and reading with one damaged copy per node.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_medical.distributed.state import MOMENTS, TrainableState
from moe_medical.errors import DataError, StorageError
from moe_medical.files import new_folder, sha256_file, write_json

FORMAT_VERSION = 2
_MANIFEST = "MANIFEST.json"
_STATE = "state.json"
_LATEST = "latest.json"
_ADAPTERS = "adapters.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_FILES = {_ADAPTERS, _OPTIMIZER, _STATE}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on."""

    trainable: TrainableState
    state: dict[str, Any]
    """JSON values: samples, tokens, task weights, `fingerprint` of the run, `callbacks` by name."""


class CheckpointFolder:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def save(self, checkpoint: Checkpoint, layout: dict[str, Any]) -> Path:
        """Publish a checkpoint atomically, move the pointer, prune old ones. Never overwrites a step.

        Raises:
            StorageError: the disk refused; earlier checkpoints are untouched.
        """
        target = self.root / _name(checkpoint.trainable.step)
        if target.is_dir():
            return target
        try:
            with new_folder(target) as draft:
                _write_files(draft, checkpoint)
                write_json(draft / _MANIFEST, _manifest(draft, checkpoint.trainable.step, layout))
            write_json(self.root / _LATEST, {"step": checkpoint.trainable.step})
        except StorageError as e:
            raise StorageError(f"{e} Last good step: {self.newest_step()}.") from e
        self._prune()
        return target

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint that is what its manifest says; changes nothing."""
        return self._newest_whole()[0]

    def recover(self) -> int | None:
        """The same, after damaged newer ones were renamed, so that their steps can be saved again."""
        step, damaged = self._newest_whole()
        for folder, problem in damaged:
            aside = folder.with_name(f"{folder.name}.corrupt-{uuid.uuid4().hex[:4]}")
            folder.rename(aside)
            _LOG.warning("checkpoint %s is damaged (%s); set aside as %s", folder.name, problem, aside.name)
        return step

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint that `recover` has found whole."""
        folder = self.root / _name(step)
        optimizer = load_file(folder / _OPTIMIZER)
        moments: dict[str, dict[str, torch.Tensor]] = {key: {} for key in MOMENTS}
        for full_name, tensor in optimizer.items():
            key, _, name = full_name.partition(".")
            moments[key][name] = tensor
        state = _read_json(folder / _STATE)
        if _read_json(folder / _MANIFEST)["format_version"] == 1:
            state = _from_format_1(state)
        parameters = load_file(folder / _ADAPTERS)
        return Checkpoint(TrainableState(parameters, moments, step, state.pop("applied_steps", step)), state)

    def _newest_whole(self) -> tuple[int | None, list[tuple[Path, str]]]:
        """The newest whole one's step, and before it the damaged ones with what is wrong."""
        damaged: list[tuple[Path, str]] = []
        for folder in self._folders():
            problem = _damage(folder)
            if problem is None:
                return _step(folder), damaged
            damaged.append((folder, problem))
        return None, damaged

    def _folders(self) -> Iterator[Path]:
        """Published checkpoints, newest first. The pointer is for people; the folders are the truth."""
        names = sorted((p.name for p in self.root.glob("step-*") if p.name == _name(_step(p))), reverse=True)
        return (self.root / name for name in names)

    def _prune(self) -> None:
        for folder in list(self._folders())[self.keep :]:
            shutil.rmtree(folder, ignore_errors=True)
        for stale in self.root.glob("*.tmp-*"):  # what a kill in the middle of a save has left
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)


def check_same_tensors(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's trainable ones.

    Raises:
        DataError: naming the first missing, extra and differently shaped tensors.
    """
    saved = {name: tuple(tensor.shape) for name, tensor in checkpoint.trainable.parameters.items()}
    if saved == shapes:
        return
    missing = sorted(shapes.keys() - saved.keys())[:3]
    extra = sorted(saved.keys() - shapes.keys())[:3]
    other = sorted(name for name in saved.keys() & shapes.keys() if saved[name] != shapes[name])[:3]
    raise DataError(
        f"the checkpoint's tensors are not this model's: missing {missing}, extra {extra}, "
        f"other shape {other}. Were model or adapters changed in the run file? Use a new run.name."
    )


def _from_format_1(old: dict[str, Any]) -> dict[str, Any]:
    """The state of format 1 in the form of today: its sums of losses had an owner each."""
    mixture = dict(old["mixture"])
    guard = dict(old["guard"])
    loss, tokens, samples = zip(*old["meter"], strict=True)
    unused = [0.0] * len(samples)  # the other two readers never asked for numbers of samples
    callbacks = {
        "task_losses": {
            "log": [list(loss), list(tokens), list(samples)],
            "mixture": [*mixture.pop("sums"), unused],
            "guard": [*guard.pop("sums"), unused],
        },
        "step_log": {"truncated": old["truncated"], "speed": {}},
        "mixture": mixture,
    }
    if guard["guard"] is not None:
        callbacks["guard"] = guard | {"probed": guard.pop("looked")}
    kept = {key: old[key] for key in ("step", "samples", "tokens", "task_weights")}
    return kept | {"fingerprint": old["identity"], "callbacks": callbacks}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    trainable = checkpoint.trainable
    save_file(trainable.parameters, folder / _ADAPTERS)
    moments = {f"{key}.{name}": t for key, of in trainable.moments.items() for name, t in of.items()}
    save_file(moments, folder / _OPTIMIZER)
    applied = trainable.step if trainable.applied is None else trainable.applied
    write_json(folder / _STATE, {"step": trainable.step, "applied_steps": applied, **checkpoint.state})


def _manifest(folder: Path, step: int, layout: dict[str, Any]) -> dict[str, Any]:
    files = {name: _entry(folder / name) for name in sorted(_FILES)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "format": "moe_medical.checkpoint",
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": files,
        "layout": layout,
        "versions": versions | {"device": device},
    }


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _read_json(folder / _MANIFEST)
        _refuse_newer(folder, int(manifest["format_version"]))
        if manifest["step"] != _step(folder):
            return f"manifest of step {manifest['step']}"
        for name in sorted(_FILES):  # our names, not the manifest's: those could lead anywhere
            if _entry(folder / name) != manifest["files"][name]:
                return f"{name} differs from the manifest"
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__} while reading it"
    return None


def _refuse_newer(folder: Path, version: int) -> None:
    """A newer program's checkpoint is no damage: setting it aside would lose it to that program."""
    if version > FORMAT_VERSION:
        raise DataError(
            f"{folder} has format {version}; this version reads {FORMAT_VERSION}. Use a newer moe_medical."
        )


def _entry(path: Path) -> dict[str, object]:
    """What the manifest says of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
