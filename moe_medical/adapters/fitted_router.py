"""A folder with a router that was fitted before training: router.json and router.safetensors.

Decisions: the labels are a list, and expert i is for label i, so that their order is part of the file
(Med-MoE's came from a set and could change with the process). Tensors are named as the adapted model names
them, `<first module of the scope>.router.weight`, so loading is by name. Nothing is ever unpickled. The
folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_medical.adapters.folder import read_json, read_tensors, refuse_foreign
from moe_medical.errors import ConfigError, Problem
from moe_medical.files import new_folder

ROUTER_FILE = "router.json"
TENSORS_FILE = "router.safetensors"
FORMAT = "moe_medical.router"
FORMAT_VERSION = 1
_LEVELS = ("token", "sequence")
_SCOPES = ("module", "block", "layer", "model")


@dataclass(frozen=True)
class FittedRouter:
    """A linear router, z = W x + b, for each scope, and what its experts stand for."""

    labels: tuple[str, ...]
    """Label of each expert, in their order."""
    tensors: dict[str, Tensor]
    """`<first module of the scope>.router.weight` (E, D) and `.bias` (E,), float32; no bias where the run's
    routers have none. One pair where the scope is the model."""
    level: str
    """`token`, or `sequence` for the mean over the prompt."""
    scope: str
    """`adapters.router_scope` that it was fitted for."""
    base_model: str
    base_revision: str | None
    label_of_task: dict[str, str]
    """The map that it was fitted on."""
    accuracy: dict[str, float]
    """`<first module of the scope>` -> share of held-out rows, or their tokens, that get their label."""
    label_accuracy: dict[str, dict[str, float]]
    """The same by label."""
    rows: dict[str, int]
    """Label -> training rows that were looked at, a fifth of them held out."""


def save_router(folder: Path, router: FittedRouter) -> None:
    """Write a router folder, replacing an older one in its place.

    Raises:
        ConfigError: `folder` holds something else.
        StorageError: the disk refused.
    """
    refuse_other_folder(folder)
    about = {key: value for key, value in asdict(router).items() if key != "tensors"}
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **about}
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in router.tensors.items()}
    with new_folder(folder, replace=True) as draft:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (draft / ROUTER_FILE).write_text(text, encoding="utf-8")
        save_file(tensors, draft / TENSORS_FILE)


def load_router(folder: Path | str) -> FittedRouter:
    """Read a router folder; strict: every key and tensor is there and of its type, and no other is.

    Raises:
        ConfigError: A file is missing, or says something else than it should.
        DataError: A file is unreadable.
    """
    folder = Path(folder)
    missing = [name for name in (ROUTER_FILE, TENSORS_FILE) if not (folder / name).is_file()]
    if missing:
        fix = "Make the folder with `moe-medical router fit`."
        raise ConfigError(
            "fitted router", [Problem(str(folder / name), "is missing", fix=fix) for name in missing]
        )
    about = read_json(folder / ROUTER_FILE)
    about = about if isinstance(about, dict) else {}
    problems = _header_problems(about) or _problems(about)
    if problems:
        raise ConfigError(str(folder / ROUTER_FILE), problems)
    tensors = read_tensors(folder / TENSORS_FILE)
    if problems := _tensor_problems(about, tensors):
        raise ConfigError(str(folder / TENSORS_FILE), problems)
    values = {field.name: about[field.name] for field in fields(FittedRouter) if field.name != "tensors"}
    return FittedRouter(**{**values, "labels": tuple(about["labels"])}, tensors=tensors)


def refuse_other_folder(folder: Path) -> None:
    """Only an empty folder, or one that holds a router and nothing else, may be replaced.

    Raises:
        ConfigError: it is something else.
    """
    refuse_foreign(folder, (ROUTER_FILE, TENSORS_FILE), "save router", "a fitted router's")


def _header_problems(about: Mapping[str, Any]) -> list[Problem]:
    for key, wanted in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if about.get(key) != wanted:
            return [Problem(key, f"must be {wanted!r}", about.get(key))]
    known = {field.name for field in fields(FittedRouter)} - {"tensors"}
    given = about.keys() - {"format", "format_version"}
    missing = [Problem(key, "is missing") for key in sorted(known - given)]
    return missing + [Problem(key, "is not a known key") for key in sorted(given - known)]


def _problems(about: Mapping[str, Any]) -> list[Problem]:
    labels = about["labels"]
    checks = {
        "labels": (_are_names(labels), "must be a list of two names at least, each once"),
        "level": (about["level"] in _LEVELS, f"must be one of {', '.join(_LEVELS)}"),
        "scope": (about["scope"] in _SCOPES, f"must be one of {', '.join(_SCOPES)}"),
        "base_model": (isinstance(about["base_model"], str), "must be a name"),
        "base_revision": (isinstance(about["base_revision"], str | None), "must be a name or null"),
    }
    for key in ("label_of_task", "accuracy", "label_accuracy", "rows"):
        checks[key] = (isinstance(about[key], dict), "must be an object")
    return [Problem(key, rule, about[key]) for key, (holds, rule) in checks.items() if not holds]


def _are_names(labels: object) -> bool:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return False
    return len(labels) >= 2 and len(set(labels)) == len(labels)


def _tensor_problems(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Each router that has an accuracy has a weight; nothing else is there."""
    wanted = {f"{name}.router.weight" for name in about["accuracy"]}
    allowed = wanted | {f"{name}.router.bias" for name in about["accuracy"]}
    problems = [Problem(name, "is missing") for name in sorted(wanted - tensors.keys())]
    problems += [
        Problem(name, "is not of a router of router.json") for name in sorted(tensors.keys() - allowed)
    ]
    for name in sorted(tensors.keys() & allowed):
        shape = tuple(tensors[name].shape)
        experts = len(about["labels"])
        if shape[:1] != (experts,) or len(shape) != (2 if name in wanted else 1):
            problems.append(Problem(name, f"must have a row for each of the {experts} labels", shape))
    return problems
