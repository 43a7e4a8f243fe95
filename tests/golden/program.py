"""All that the golden runs know of the package: how one run is made, and what is read of it afterwards.

Whoever renames `Trainer`, `load_config` or the samples of a step changes `train` and nothing else here.
What is read comes from the run's folder, whose names and formats are frozen anyhow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.distributed.topology import Topology

TIMINGS = {"step_seconds", "tokens_per_second", "health/data_wait_seconds", "health/memory_gib"}
"""Series that no two runs have alike."""


def train(run_file: str, overrides: list[str], topology: Topology, first: int) -> list[str]:
    """Train to the end; the samples of each step from `first` on, as `task:row task:row ...`.

    Collective: every rank must call.
    """
    from moe_medical.config import load_config
    from moe_medical.training.trainer import Trainer

    trainer = Trainer(load_config(run_file, overrides), topology)
    trainer.run()
    steps = range(first, trainer.config.training.steps)
    return [" ".join(f"{s.task}:{s.row}" for s in trainer.batches.samples(step)) for step in steps]


def record(folder: Path, order: list[str]) -> dict[str, Any]:
    """What is to stay as it is of a finished run.

    Returns:
        `order`: samples of each step. `series`: name -> [step, value], `once_a_step`.
        `decisions`: of guard and mixture. `norms`: of each adapter tensor. `digests`: of each adapter tensor
        and, as `optimizer`, of the optimizer's state. `keys`: file or kind of file -> the keys in it.
    """
    from safetensors.torch import load_file

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    optimizer = load_file(max(folder.glob("checkpoints/step-*")) / "optimizer.safetensors")
    return {
        "order": order,
        "series": _series(folder / "metrics.jsonl"),
        "decisions": _lines(folder / "decisions.jsonl"),
        "norms": {name: float(adapter[name].double().norm()) for name in sorted(adapter)},
        "digests": {name: _digest({name: adapter[name]}) for name in sorted(adapter)}
        | {"optimizer": _digest(optimizer)},
        "keys": _keys_of_files(folder),
    }


def _series(path: Path) -> dict[str, list[list[Any]]]:
    series: dict[str, list[list[Any]]] = {}
    for row in _lines(path):
        for name in sorted(row.keys() - TIMINGS - {"step"}):
            series.setdefault(name, []).append([row["step"], row[name]])
    return once_a_step(series)


def once_a_step(series: dict[str, list[list[Any]]]) -> dict[str, list[list[Any]]]:
    """Series without what a step tells again: it may have one row in the log or several."""
    return {
        name: [entry for before, entry in zip([None, *entries], entries, strict=False) if entry != before]
        for name, entries in series.items()
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def _digest(tensors: dict[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The files of a run's folder


def _keys_of_files(folder: Path) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        kind = re.sub(r"step-\d{8}", "step-<step>", str(path.relative_to(folder)))
        found.setdefault(kind, set()).update(_keys(path))
    return {kind: sorted(keys) for kind, keys in found.items()}


def _keys(path: Path) -> Iterator[str]:
    """Dotted keys of a file; a value beside those that tell the format."""
    if path.name == "metrics.jsonl":
        return  # its names are frozen as series
    if path.suffix == ".safetensors":
        yield from _tensor_names(path)
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        documents = [json.loads(line) for line in text.splitlines()]
    else:
        documents = [json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)]
    for document in documents:
        yield from _dotted(document, "")


def _tensor_names(path: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield f"{re.sub(r'[.][0-9]+[.]', '.<n>.', name)} {file.get_slice(name).get_dtype()}"


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _dotted(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for inner in value:
            yield from _dotted(inner, f"{prefix}[]")
    else:
        yield f"{prefix} = {value}" if prefix in ("format", "format_version") else prefix
