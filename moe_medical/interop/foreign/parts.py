"""What every reader is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_medical.config.presets import MoloraConfig
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.foreign.ledger import Ledger
from moe_medical.interop.foreign.scale import LowRank
from moe_medical.interop.foreign.settings import Settings
from moe_medical.interop.foreign.source import BaseLayers
from moe_medical.interop.foreign.tensors import read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """A foreign folder, and what the user said about it."""

    folder: Path
    layers: BaseLayers
    tasks: tuple[str, ...] = ()
    allow_pickle: bool = False

    def settings(self, name: str = CONFIG_FILE) -> Settings:
        """One of its JSON files."""
        return Settings.read(self.folder / name)

    def file(self, *names: str) -> Path | None:
        """The first of these that it has."""
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """Of the first of these weights files that it has.

        Raises:
            ConfigError: It has none of them.
        """
        path = self.file(*names)
        if path is None:
            problem = Problem(str(self.folder), f"must hold {' or '.join(names)}")
            raise ConfigError("import", [problem])
        return read_tensors(path, self.allow_pickle)

    def ledger(self, tensors: dict[str, Tensor]) -> Ledger:
        """That accounts for these tensors."""
        return Ledger(str(self.folder), tensors)


@dataclass(frozen=True)
class Imported:
    """An adapter in our form: settings, and what each module of the base gets."""

    config: MoloraConfig
    low_rank: Mapping[str, LowRank]
    """Base module -> its A and B, all in the config's scale; experts stacked."""
    routers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Base module or block -> parameters of its router; one entry, under any name, where all share one."""
    shared: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Base module -> A (S, rank, D) and B (S, F, rank) of its shared experts."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Base module -> (F,) of DoRA."""
    dropped: Sequence[str] = ()
    """Foreign tensors that nothing uses, there as here."""


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Experts' tensors as one."""
    return torch.stack(list(tensors))
