"""What a foreign adapter folder holds: settings asked for by type, and tensors that must all be asked for.

Decisions:
- Mistakes are collected and refused together, for who converts a folder shall not meet them one by one. Until
  then a wrong value is replaced by a harmless one, so that the reading can go on.
- A tensor that nobody asks for is a mistake too, unless its own program never uses it, which is told.
- Adapters of several ranks and scalings are written in the one rank and alpha that our config has, exactly:

    s' B' A' = s B A    with A' = [A; 0], B' = [s / s' B, 0]

  The added rows and columns are zero, and so is their gradient: training on keeps the rank that was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.interop.foreign.base_layers import BaseLayers
from moe_medical.interop.foreign.tensors import read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
END_OF_NAME = r"(.*\.)?({})$"
"""How PEFT matches the keys of `rank_pattern` and `alpha_pattern`."""
MAX_COUNT = 65_536
"""Of anything; more is a mistake, or meant to fill the memory."""
MAX_EXPERTS = 1024
_MAX_NUMBER = 1e30
"""Python's JSON reads Infinity and NaN, which no comparison with this passes."""


@dataclass(frozen=True)
class Scale:
    """Rank and scaling of one adapter."""

    rank: int
    alpha: float
    rs_lora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / rank, or with rsLoRA alpha / sqrt(rank) (arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rs_lora else self.rank)


@dataclass(frozen=True)
class Factors:
    """A (..., rank, D) and B (..., F, rank) of a module: one adapter, or its experts stacked."""

    A: Tensor
    B: Tensor
    scale: Scale

    def rescaled(self, scale: Scale) -> Factors:
        """The same update written with another scaling and another rank, which must not be smaller."""
        if self.scale == scale:
            return self  # bit for bit, as most are
        added = scale.rank - self.scale.rank
        assert added >= 0, f"rank {self.scale.rank} cannot become {scale.rank}"
        # The factor goes into B alone: in both as a square root it would be rounded twice.
        factor = torch.tensor(self.scale.scaling / scale.scaling)
        return Factors(pad(self.A, (0, 0, 0, added)), pad(self.B * factor, (0, added)), scale)


def in_common_scale(modules: Mapping[str, Factors]) -> tuple[Scale, dict[str, Factors]]:
    """The scale of the first module of the greatest rank, and all modules in it."""
    # Zeros can be added to a rank, but nothing taken from it.
    scale = max((factors.scale for factors in modules.values()), key=lambda scale: scale.rank)
    return scale, {name: factors.rescaled(scale) for name, factors in modules.items()}


@dataclass
class Settings:
    """One JSON object, with the mistakes found in it."""

    path: Path
    values: Mapping[str, Any]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Settings:
        """From a file.

        Raises:
            DataError: Unreadable, or no JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not readable JSON ({error}).") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: must hold a JSON object.")
        return cls(path, values)

    def whole(self, key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """A whole number of at least 1."""
        rule = f"must be a whole number from 1 to {most}"
        value = self._value(key, lambda v: type(v) is int and 1 <= v <= most, rule, default)
        return 1 if value is None else int(value)

    def number(self, key: str, default: float | None = None, zero: bool = True) -> float:
        """A number that is not negative, nor 0 unless it may be."""
        rule = "must be a number, not below 0" if zero else "must be a number above 0"
        value = self._value(key, lambda v: _is_number(v) and (v > 0 or zero), rule, default)
        return 1.0 if value is None else float(value)

    def fraction(self, key: str) -> float:
        """A number from 0 to below 1; 0 where it is not given or null."""
        rule = "must be a number from 0 to below 1"
        return float(self._value(key, lambda v: _is_number(v) and v < 1, rule, 0.0) or 0.0)

    def flag(self, key: str) -> bool:
        """True or false; false where it is not given or null."""
        return bool(self._value(key, lambda v: isinstance(v, bool), "must be true or false", False))

    def text(self, key: str) -> str:
        """A text, which must be given."""
        return str(self._value(key, lambda v: isinstance(v, str), "must be a text", None) or "")

    def names(self, key: str) -> list[str]:
        """The names of a list, or those of an object of name -> whether that are chosen."""
        value = self.values.get(key)
        if isinstance(value, dict):
            return [name for name, chosen in value.items() if chosen]
        return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []

    def check_pattern(self, key: str) -> None:
        """Refuse what is neither a regular expression nor names: a list, or an object of name -> whether."""
        value = self.values.get(key)
        if isinstance(value, str):
            self._check_compiles(key, value, value)
            return
        names = isinstance(value, list | dict) and all(type(name) is str for name in value)
        if value is not None and not names:
            self.complain(key, "must be a pattern or names", value)

    def by_pattern(self, key: str) -> Settings:
        """An object whose keys are patterns of the ends of modules' names; its mistakes count as ours."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            self.complain(key, "must be an object", value)
            value = {}
        for pattern in value:
            self._check_compiles(key, pattern, END_OF_NAME.format(pattern))
        return Settings(self.path, value, self.problems)

    def must_be(self, key: str, *allowed: object, fix: str = "") -> None:
        """Refuse any other value; a key that is not given or null counts as the first of them."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            rule = f"must be {' or '.join(map(repr, allowed))}"
            self.complain(key, rule, value, fix)

    def must_be_unset(self, *keys: str) -> None:
        """Refuse whatever would change the numbers in a way that is not known here."""
        for key in keys:
            if self.values.get(key) not in (None, False, [], {}, ""):
                self.complain(key, "is not supported", self.values[key])

    def complain(self, key: str, rule: str, value: object = None, fix: str = "") -> None:
        """Add a mistake."""
        self.problems.append(Problem(f"{self.path.name}: {key}", rule, value, fix))

    def refuse(self) -> None:
        """Raise if anything was wrong.

        Raises:
            ConfigError: Every mistake.
        """
        if self.problems:
            raise ConfigError(str(self.path.parent), self.problems)

    def _check_compiles(self, key: str, shown: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error:
            self.complain(key, "must be a regular expression", shown)

    def _value(self, key: str, fits: Callable[[Any], bool], rule: str, default: Any) -> Any:
        """What is given, or the default where it is not given or null; None after a mistake."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if key not in self.values:
            self.complain(key, "is missing")
            return None
        if not fits(value):
            self.complain(key, rule, value)
            return None
        return value


@dataclass
class TensorReader:
    """Hands out the tensors of a folder, and accounts for every one of them.

    Args:
        source: The folder, for errors.
        tensors: By their foreign names.
    """

    source: str
    tensors: Mapping[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    """Names of tensors that the foreign program itself never uses."""
    _used: set[str] = field(default_factory=set)
    _problems: list[Problem] = field(default_factory=list)

    def modules(self, pattern: re.Pattern[str]) -> list[str]:
        """What the group `module` of a pattern of whole names is, each once, in the file's order."""
        matches = (pattern.fullmatch(name) for name in self.tensors)
        return list(dict.fromkeys(match["module"] for match in matches if match))

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32; zeros where it is missing or misshaped, and then `refuse` will say so."""
        self._used.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            self._problems.append(Problem(name, "is missing"))
        elif tuple(tensor.shape) != shape:
            self._problems.append(Problem(name, f"must have shape {shape}", tuple(tensor.shape)))
        elif not tensor.isfinite().all():
            self._problems.append(Problem(name, "must be finite"))
        else:
            return tensor.to(torch.float32)
        return torch.zeros(()).expand(shape)  # no memory, whatever a setting promised

    def take_stacked(self, names: Iterable[str], *shape: int) -> Tensor:
        """Tensors of one shape as one, (number of names, *shape)."""
        return torch.stack([self.take(name, *shape) for name in names])

    def take_copy(self, name: str, original: str) -> None:
        """Account for a second name of the same numbers, where the folder has one."""
        if name not in self.tensors:
            return
        self._used.add(name)
        first = self.tensors.get(original)
        if first is None or not torch.equal(first, self.tensors[name]):
            self._problems.append(Problem(name, f"must equal {original}"))

    def drop(self, names: Iterable[str]) -> None:
        """Account for tensors that their own program never uses."""
        self.dropped += names
        self._used.update(self.dropped)

    def complain(self, problem: Problem) -> None:
        """Add a mistake that `refuse` will tell of."""
        self._problems.append(problem)

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            ConfigError: All that is missing, misshaped and unexpected.
        """
        if not self._used:
            self.complain(Problem(self.source, "must hold an adapter's tensors"))
        left = [Problem(name, "is not expected") for name in self.tensors if name not in self._used]
        if problems := [*self._problems, *left]:
            raise ConfigError(self.source, sorted(problems, key=lambda problem: problem.path))


@dataclass(frozen=True)
class Source:
    """A foreign folder, the base that it is for, and what the user said about it."""

    folder: Path
    layers: BaseLayers
    tasks: tuple[str, ...] = ()
    """Names of a task gate's tasks, in the order of their ids."""
    allow_pickle: bool = False

    def settings(self, name: str = CONFIG_FILE) -> Settings:
        """One of its JSON files."""
        return Settings.read(self.folder / name)

    def file(self, *names: str) -> Path | None:
        """The first of these that it has."""
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def reader(self, *names: str, renamed: Callable[[str], str] = lambda name: name) -> TensorReader:
        """Of the first of these weights files that it has.

        Args:
            names: Of the files.
            renamed: From a name in the file to the one by which its tensor is asked for.

        Raises:
            ConfigError: It has none of them.
            DataError: The file is unreadable.
            SecurityRefusal: It is a pickle, without leave or of more than tensors.
        """
        path = self.file(*names)
        if path is None:
            raise ConfigError("import", [Problem(str(self.folder), f"must hold {' or '.join(names)}")])
        tensors: dict[str, Tensor] = {}
        reader = TensorReader(str(self.folder), tensors)
        for name, tensor in read_tensors(path, self.allow_pickle).items():
            # Which of two its own program would read cannot be known.
            if renamed(name) in tensors:
                reader.complain(Problem(name, f"must not be there beside {renamed(name)}"))
            tensors[renamed(name)] = tensor
        return reader


@dataclass(frozen=True)
class Imported:
    """An adapter in our form: settings, and what each module of the base gets."""

    config: MoloraConfig
    low_rank: Mapping[str, Factors]
    """Base module -> its A and B, all in the config's scale; experts stacked."""
    routers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Base module or block -> parameters of its router; one entry, under any name, where all share one."""
    shared: Mapping[str, Factors] = field(default_factory=dict)
    """Base module -> A (S, rank, D) and B (S, F, rank) of its shared experts, in the same scale."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Base module -> (F,) of DoRA."""
    dropped: Sequence[str] = ()
    """Foreign tensors that nothing uses, there as here."""


def _is_number(value: object) -> bool:
    """Not a bool, which is an int to Python."""
    return type(value) in (int, float) and 0 <= value < _MAX_NUMBER  # type: ignore[operator]
