"""A YAML file -> a dataclass of keys, collecting problems instead of stopping at the first.

Decisions: each key is merged on its own, so one wrong key does not hide the next; the first problem of a key
is the only one told; a missing environment variable is told once, not once per key that uses it.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_medical.errors import ConfigError, Problem

Keys = TypeVar("Keys")


class Problems:
    """What is wrong so far in any number of files. `where` is `file: key`."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._missing_variables: dict[str, list[str]] = {}

    def add(self, where: str, rule: str, actual: object = None, fix: str = "") -> None:
        """Notes a problem, unless one is known for the same key."""
        if not any(where in places for places in self._missing_variables.values()):
            self._problems.setdefault(where, Problem(where, rule, actual, fix))

    def check(self, holds: bool, where: str, rule: str, actual: object = None, fix: str = "") -> None:
        """Notes a problem where the rule does not hold."""
        if not holds:
            self.add(where, rule, actual, fix)

    def check_known(self, value: str, known: Sequence[str], where: str) -> None:
        """Notes a problem where `value` is not one of `known`, with the nearest of them."""
        if not value:
            self.add(where, "must be given", fix=f"One of: {', '.join(known)}.")
        elif value not in known:
            self.add(where, "is not known", value, suggest(value, known))

    def missing_variable(self, variable: str, where: str) -> None:
        """Notes that a key needs an environment variable that is not set."""
        self._missing_variables.setdefault(variable, []).append(where)

    def raise_if_any(self, source: Path) -> None:
        """Raises ConfigError with every problem noted."""
        problems = list(self._problems.values())
        for variable, places in self._missing_variables.items():
            more = f" (as do {len(places) - 1} other keys)" if len(places) > 1 else ""
            rule = f"needs the environment variable {variable}{more}, which is not set"
            problems.append(Problem(places[0], rule, fix=f"Set it: export {variable}=/path/to/the/folder"))
        if problems:
            raise ConfigError(str(source), problems)


def suggest(word: str, known: Sequence[str]) -> str:
    """The fix for a word that is not one of `known`."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def read_keys(path: Path, schema: type[Keys], found: Problems) -> Keys | None:
    """The file's keys, interpolated and typed; None where the file as a whole cannot be used."""
    tree = _read_tree(path, found)
    if tree is None:
        return None
    raw = OmegaConf.create(tree)
    known = _known(schema)
    free = _free(schema)
    leaves = {}
    for key, value in _leaves(tree, free):
        where = f"{path}: {'.'.join(key)}"
        siblings = known.get(key[:-1], [])
        if key[-1] in siblings:
            leaves[key] = _resolve(raw, key, value, where, found)
        else:
            found.add(where, "is not a known key", fix=suggest(key[-1], siblings))
    return typing.cast(Keys, OmegaConf.to_object(_typed(OmegaConf.structured(schema), leaves, path, found)))


def _typed(config: Any, leaves: Mapping[tuple[str, ...], Any], path: Path, found: Problems) -> Any:
    """`config` with all leaves of the right type; the others are noted."""
    try:
        return OmegaConf.unsafe_merge(config.copy(), _tree(leaves))
    except OmegaConfBaseException:
        pass  # one by one, to name every wrong key
    for key, value in leaves.items():
        try:
            config = OmegaConf.merge(config, _tree({key: value}))
        except OmegaConfBaseException as e:
            reason = str(e).splitlines()[0]
            found.add(f"{path}: {'.'.join(key)}", f"has the wrong type ({reason})", value)
    return config


def _read_tree(path: Path, found: Problems) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        found.add(str(path), "must be a readable file", e.strerror)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        found.add(where, "must be valid YAML in UTF-8", getattr(e, "problem", None))
    else:
        if isinstance(tree, dict):
            return tree
        found.add(str(path), "must hold keys", type(tree).__name__)
    return None


def _leaves(
    tree: Mapping[Any, Any], free: Collection[tuple[str, ...]], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of keys, value). A mapping under an unknown key is walked; an empty or free one is a value."""
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, dict) and value and path not in free:
            yield from _leaves(value, free, path)
        else:
            yield path, value


def _known(schema: Any, parents: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """Path of a dataclass inside `schema` -> the keys it has."""
    known = {parents: [f.name for f in fields(schema)]}
    for name, hint in typing.get_type_hints(schema).items():
        for kind in (hint, *typing.get_args(hint)):
            if hasattr(kind, "__dataclass_fields__"):
                known |= _known(kind, (*parents, name))
    return known


def _free(schema: Any, parents: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Paths of the mappings whose keys are the user's own."""
    free: set[tuple[str, ...]] = set()
    for name, hint in typing.get_type_hints(schema).items():
        for kind in (hint, *typing.get_args(hint)):
            if typing.get_origin(kind) is dict:
                free.add((*parents, name))
            elif hasattr(kind, "__dataclass_fields__"):
                free |= _free(kind, (*parents, name))
    return free


def _tree(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), value in leaves.items():
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


def _resolve(raw: Any, key: tuple[str, ...], value: Any, where: str, found: Problems) -> Any:
    """The value with `${...}` filled in; None, and a note, where that fails."""
    if "${" not in str(value):
        return value
    try:
        resolved = raw
        for part in key:
            resolved = resolved[part]
        return OmegaConf.to_container(resolved, resolve=True) if OmegaConf.is_config(resolved) else resolved
    except OmegaConfBaseException as e:
        variable = re.search(r"Environment variable '([^']+)' not found", str(e))
        if variable:
            found.missing_variable(variable[1], where)
        else:
            found.add(where, "cannot be interpolated", value)
    return None
