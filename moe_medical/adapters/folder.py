"""The adapter folder: adapter_config.json + adapter_model.safetensors, all that is needed beside the base.

Decisions: the JSON says how to build the adapters (every `MoloraConfig` field) and what they were trained
for (base model, tasks, label sets); the folder's name says nothing. Nothing is ever unpickled. A folder
appears whole or not at all: it is written beside its place and renamed. Replacing an older adapter takes two
renames; a crash between them leaves the old one as `.NAME.old-*`, and no half-written one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_medical.config.adapter_rules import value_problems
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, DataError, Problem, SecurityRefusal
from moe_medical.files import new_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "moe_medical.adapter"
FORMAT_VERSION = 3
REQUIRED_META = ("base_model", "base_revision", "tasks", "label_sets")
_DEFAULTS = MoloraConfig()
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def save_adapter(
    folder: Path, state: Mapping[str, Tensor], config: MoloraConfig, meta: dict[str, Any]
) -> None:
    """Write an adapter folder, replacing an older adapter in its place.

    Args:
        folder: Where; its parents are made.
        state: Full parameter name -> tensor, the values of `adapter_parameters` or their full copies.
        config: How the adapters were attached.
        meta: JSON values; must hold `base_model`, `base_revision` (or None), `tasks` (list of names),
            `label_sets` (task name -> list of labels); may hold more.

    Raises:
        ConfigError: `folder` holds something else than an adapter, or `meta` lacks a key.
        StorageError: The disk refused.
    """
    folder = Path(folder)
    if problems := _meta_problems(meta):
        raise ConfigError(str(folder), problems)
    refuse_foreign(folder, (CONFIG_FILE, WEIGHTS_FILE), "save adapter", "an adapter's")
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.saved(), "meta": meta}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    with new_folder(folder, replace=True) as draft:
        (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(draft / CONFIG_FILE, draft / WEIGHTS_FILE)  # safetensors makes it private


def load_adapter(folder: Path) -> tuple[MoloraConfig, dict[str, Any], dict[str, Tensor]]:
    """Read an adapter folder; put the state into a model with `model.load_adapter_state`.

    Returns:
        The config to attach with, the meta, and full parameter name -> tensor on the CPU.

    Raises:
        ConfigError: A file is missing, or the JSON has an unknown version, key or type.
        DataError: A file is unreadable or corrupt.
        SecurityRefusal: The weights exist only as pickle.
    """
    folder = Path(folder)
    _refuse_missing(folder)
    config, meta = _parse(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    return config, meta, read_tensors(folder / WEIGHTS_FILE)


def refuse_foreign(folder: Path, files: Iterable[str], what: str, whose: str) -> None:
    """Only an empty folder, or one that holds these files and nothing else, may be replaced.

    Args:
        folder: That somebody wants to write.
        files: What it may hold.
        what: The attempt, for the error.
        whose: These files are, for the error.

    Raises:
        ConfigError: It is something else.
    """
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - set(files))
    else:
        foreign = [folder.name] if folder.exists() or folder.is_symlink() else []
    if foreign:
        rule = f"holds files that are not {whose}"
        raise ConfigError(what, [Problem(str(folder), rule, foreign[:4], "Choose another folder.")])


def read_json(path: Path) -> Any:
    """A JSON document.

    Raises:
        DataError: The file is unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not readable JSON ({error}).") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        DataError: The file is unreadable.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: is not a readable safetensors file ({error}).") from error


def _refuse_missing(folder: Path) -> None:
    """Name every file that is missing; refuse pickled weights instead of looking for a loader."""
    if not folder.is_dir():
        problem = Problem(str(folder), "is not a folder", fix="Name an adapter folder.")
        raise ConfigError("load adapter", [problem])
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    # Before the files that are missing are named: whoever has only a pickle should not go looking for more.
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if WEIGHTS_FILE in missing and pickles:
        why = f"weights exist only as pickle ({pickles[0]}), which can run code"
        raise SecurityRefusal(f"{folder}: {why}. Convert them to {WEIGHTS_FILE} on a machine you trust.")
    if missing:
        raise ConfigError(str(folder), [Problem(str(folder / name), "is missing") for name in missing])


def _parse(path: Path, document: Any) -> tuple[MoloraConfig, dict[str, Any]]:
    """Check the whole document; every mistake of a known version in one error."""
    header = _object(document)
    if header.get("format") != FORMAT:
        problem = Problem("format", f"must be {FORMAT!r}", header.get("format"), "Name a folder saved by us.")
        raise ConfigError(str(path), [problem])
    if header.get("format_version") not in range(1, FORMAT_VERSION + 1):  # older ones are read, see below
        found = header.get("format_version")
        problem = Problem(
            "format_version", f"must be {FORMAT_VERSION}", found, "Install a newer moe_medical."
        )
        raise ConfigError(str(path), [problem])
    config = _object(header.get("config"))
    meta = _object(header.get("meta"))
    if header["format_version"] < FORMAT_VERSION:  # what is not there did not exist: it has its default
        config = _DEFAULTS.saved() | config
    problems = _key_problems("", header, {"format", "format_version", "config", "meta"})
    problems += _config_problems(config) + _meta_problems(meta)
    if problems:
        raise ConfigError(str(path), problems)
    found = MoloraConfig(**{key: _as_typed(value, key) for key, value in config.items()})
    if problems := value_problems(found):
        raise ConfigError(str(path), problems)
    return found, meta


def _as_typed(value: Any, key: str) -> Any:
    """JSON has no tuples, and may write 32.0 as 32."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(getattr(_DEFAULTS, key), float) else value


def _config_problems(config: dict[str, Any]) -> list[Problem]:
    problems = _key_problems("config.", config, set(_DEFAULTS.saved()))
    for name, default in _DEFAULTS.saved().items():
        if name in config and not _same_type(config[name], default):
            problems.append(Problem(f"config.{name}", f"must be like {default!r}", config[name]))
    return problems


def _meta_problems(meta: Mapping[str, Any]) -> list[Problem]:
    return [Problem(f"meta.{key}", "is missing") for key in REQUIRED_META if key not in meta]


def _key_problems(prefix: str, given: dict[str, Any], known: set[str]) -> list[Problem]:
    """Both ways: keys that are missing and keys that nobody knows."""
    missing = [Problem(f"{prefix}{key}", "is missing") for key in sorted(known - given.keys())]
    unknown = [Problem(f"{prefix}{key}", "is not a known key") for key in sorted(given.keys() - known)]
    return missing + unknown


def _same_type(value: Any, default: Any) -> bool:
    """JSON has no tuples and may write 32.0 as 32; True is no number."""
    if isinstance(default, tuple):
        of_kind = (str, int) if not default else (type(default[0]),)
        return isinstance(value, list | tuple) and all(isinstance(item, of_kind) for item in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one, whose missing keys the caller reports."""
    return value if isinstance(value, dict) else {}
