"""Defaults <- preset of the adapters <- run file <- command line: a RunConfig, or every mistake at once.

Each value is merged on its own, so one wrong key does not hide the next. Paths in a run file are
relative to that file and become absolute here, once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_medical.config.adapters import MoloraConfig, preset_for, run_file_keys
from moe_medical.config.rules import validate
from moe_medical.config.schema import RunConfig, TaskOverride
from moe_medical.errors import ConfigError, Problem
from moe_medical.files import write_file

_PATH_KEYS = (("data", "recipe"), ("parallel", "deepspeed"))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and `key=value` overrides into a validated config.

    Raises:
        ConfigError: with every problem found in the file, the overrides and their combination.
    """
    path = Path(path)
    problems: list[Problem] = []
    trees = [("", _read_yaml(path)), *(_parse_override(o, problems) for o in overrides)]
    leaves = [(key, value, origin) for origin, tree in trees for key, value in _leaves(tree)]
    preset = _preset_of(leaves)
    merged = OmegaConf.structured(RunConfig(adapters=preset))
    OmegaConf.set_readonly(merged.adapters, False)  # frozen once they are resolved, which happens here
    for key, value, origin in leaves:
        section, _, name = key.partition(".")
        if section == "adapters" and value is None:  # null takes the preset's value
            value = getattr(preset, name, None)
        problems += [p for p in _set(merged, key, value, origin) if p not in problems]
    problems += _reset_unresolvable(merged)
    config = typing.cast(RunConfig, OmegaConf.to_object(merged))
    _anchor_paths(config, path.parent)
    reported = {p.path for p in problems}
    problems += [p for p in validate(config) if p.path not in reported]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _preset_of(leaves: Sequence[tuple[str, Any, str]]) -> MoloraConfig:
    """The adapters' preset, into which the settings that are given go."""
    section = "adapters."
    given = {key.removeprefix(section): v for key, v, _ in leaves if key.startswith(section)}
    return preset_for({key: value for key, value in given.items() if value is not None})


def run_file_tree(config: RunConfig) -> dict[str, Any]:
    """The config as a run file has it: without what follows from the data."""
    tree = dataclasses.asdict(config)
    tree["adapters"] = {key: tree["adapters"][key] for key in run_file_keys()}
    return tree


def save_config(config: RunConfig, path: Path, mode: int | None = None) -> None:
    """Write the resolved config as YAML that `load_config` reads back; `mode` are the file's permissions."""
    write_file(path, OmegaConf.to_yaml(OmegaConf.create(run_file_tree(config))), mode)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(str(path), [Problem(str(path), "must be a readable file", e.strerror)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or "not text"
        raise ConfigError(str(path), [Problem(f"{path}{where}", "must be valid YAML", reason)]) from None
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [Problem(str(path), "must hold sections", type(tree).__name__)])
    return tree


def _parse_override(text: str, problems: list[Problem]) -> tuple[str, dict[str, Any]]:
    key, sign, value = text.partition("=")
    if not sign or not all(key.strip().split(".")):
        problems.append(Problem(text, "must have the form key=value", fix="Example: training.steps=100"))
        return text, {}
    try:
        tree: Any = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        tree = value
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return text, tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _set(config: DictConfig, key: str, value: Any, origin: str) -> list[Problem]:
    unknown = _unknown_key(key)
    if unknown:
        return [unknown]
    if value == {} or (value is None and dataclasses.is_dataclass(_type_at(key))):
        return []
    parts = key.split(".")
    if parts[:2] == ["data", "tasks"] and len(parts) > 2 and parts[2] not in config.data.tasks:
        config.data.tasks[parts[2]] = TaskOverride()
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as e:
        reason = str(e).splitlines()[0]
        return [Problem(key, f"has the wrong type ({reason})", value, f"From {origin!r}." if origin else "")]
    return []


def _type_at(key: str) -> Any:
    """Declared type of a dotted key, or None where there is no such key."""
    current: Any = RunConfig
    for part in key.split("."):
        if typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        elif dataclasses.is_dataclass(current):
            known = {field.name for field in _fields(current)}
            current = typing.get_type_hints(current).get(part) if part in known else None
        else:
            return None
    return current


def _unknown_key(key: str) -> Problem | None:
    parts = key.split(".")
    for depth in range(1, len(parts) + 1):
        if _type_at(".".join(parts[:depth])) is not None:
            continue
        known = [f.name for f in _fields(_type_at(".".join(parts[: depth - 1])) if depth > 1 else RunConfig)]
        close = difflib.get_close_matches(parts[depth - 1], known, n=1)
        where = ".".join(parts[: depth - 1]) or "the top level"
        fix = f"Did you mean {close[0]!r}?" if close else f"Known there: {', '.join(known) or 'nothing'}."
        return Problem(".".join(parts[:depth]), f"is not a key of {where}", fix=fix)
    return None


def _fields(kind: Any) -> Sequence[Any]:
    """Those that a run file may have."""
    every = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [field for field in every if "derived" not in field.metadata]


def _reset_unresolvable(config: DictConfig) -> list[Problem]:
    """Report what is missing or unresolvable, and put the default there so that the rest is checked too."""
    problems = []
    for key, value in list(_leaves(OmegaConf.to_container(config, resolve=False))):
        problem = _unresolvable(config, key, value)
        if problem:
            problems.append(problem)
            section, _, name = key.rpartition(".")
            holder = OmegaConf.select(config, section) if section else config
            default = getattr(
                OmegaConf.get_type(holder)(), name
            )  # of adapters ming_moe's: the run is refused
            holder[name] = "" if default == MISSING else default
    return problems


def _unresolvable(config: DictConfig, key: str, value: Any) -> Problem | None:
    if value == MISSING:
        return Problem(key, "must be given")
    try:
        found = OmegaConf.select(config, key)
        if OmegaConf.is_config(found):
            OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        return Problem(key, f"cannot be resolved ({str(e).splitlines()[0]})", value)
    return None


def _anchor_paths(config: RunConfig, base: Path) -> None:
    for section, key in _PATH_KEYS:
        holder = getattr(config, section)
        setattr(holder, key, str((base / getattr(holder, key)).resolve()))
    seesaw = config.tracking.seesaw
    if seesaw.reference:
        seesaw.reference = str((base / seesaw.reference).resolve())
    router = config.adapters.router_from
    config.adapters = dataclasses.replace(
        config.adapters,
        router_from=str((base / router).resolve()) if router else None,
        experts_from=tuple(str((base / folder).resolve()) for folder in config.adapters.experts_from),
    )
    local = base / config.model.name
    if config.model.name.startswith((".", "/")) or local.is_dir():
        config.model.name = str(local.resolve())
