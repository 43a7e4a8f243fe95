"""Adapters of several ranks and scalings -> the one rank and alpha that our config has, exactly.

    s' B' A' = s B A    with A' = [A; 0], B' = [s / s' B, 0]

The added rows and columns are zero, and so is their gradient: training on keeps the rank that was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Scale:
    """Rank and scaling of one adapter."""

    rank: int
    alpha: float
    rs_lora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (self.rank**0.5 if self.rs_lora else self.rank)


@dataclass(frozen=True)
class LowRank:
    """A (..., rank, D) and B (..., F, rank) of a module: one adapter, or its experts stacked."""

    A: Tensor
    B: Tensor
    scale: Scale


def common_scale(modules: Mapping[str, LowRank]) -> tuple[Scale, dict[str, LowRank]]:
    """The scale of the first module of the greatest rank, and all modules in it; some are so already."""
    scale = max((module.scale for module in modules.values()), key=lambda scale: scale.rank)
    return scale, {name: in_scale(module, scale) for name, module in modules.items()}


def in_scale(module: LowRank, scale: Scale) -> LowRank:
    """The same update written with another rank, which must not be smaller, and scaling."""
    if module.scale == scale:
        return module
    more, factor = scale.rank - module.scale.rank, module.scale.scaling / scale.scaling
    A = F.pad(module.A, (0, 0, 0, more))
    return LowRank(A, F.pad(module.B * torch.tensor(factor), (0, more)), scale)
