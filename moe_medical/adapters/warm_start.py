"""Where routers and experts start from, other than from chance: a fitted router, trained LoRAs.

Decisions: experts start from plain LoRAs only. One LoRA that all experts copy gives its own function whatever
the gates, if they sum to 1 (MING-MOE's warm start); copies that are alike get like gradients up to their
gates and hardly ever part, so each gets noise of its own. One LoRA for each expert is X-LoRA's start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_medical.adapters.blocks import FfnLoraLinear
from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.fitted_router import load_router
from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.layer import LoraLinear, MoloraLinear, rows_of
from moe_medical.adapters.model import adapter_modules
from moe_medical.config.presets import MoloraConfig
from moe_medical.config.schema import AdaptersSection
from moe_medical.errors import ConfigError, Problem

_NOISE = 0.1
"""Deviation of the noise on copies, relative to that of the copied numbers, where the user says none."""


def with_labels(config: MoloraConfig, section: AdaptersSection) -> MoloraConfig:
    """The settings with the labels of the fitted router, if there is one."""
    if not section.router_from:
        return config
    return replace(config, labels=load_router(Path(section.router_from)).labels)


@torch.no_grad()
def start_from(
    model: nn.Module, config: MoloraConfig, section: AdaptersSection, seed: int, shard: ExpertShard | None
) -> None:
    """Put the values of the folders that a run names into a model whose adapters are new.

    Raises:
        ConfigError: A folder does not fit the model; names every tensor.
    """
    if section.router_from:
        _start_routers(model, config, Path(section.router_from))
    if section.experts_from:
        noise = _NOISE if section.start_noise is None else section.start_noise
        sources = [_Source.of(Path(folder)) for folder in section.experts_from]
        _start_experts(model, sources, noise, seed, shard or ExpertShard())


def _start_routers(model: nn.Module, config: MoloraConfig, folder: Path) -> None:
    fitted, routers = load_router(folder), _routers(model)
    problems = [
        Problem(f"adapters.{key}", f"must be what the router was fitted for, `{wanted}`", given)
        for key, wanted, given in (
            ("router", fitted.level, config.router),
            ("router_scope", fitted.scope, config.router_scope),
        )
        if wanted != given
    ]
    problems += _differences(routers, fitted.tensors)
    if problems:
        raise ConfigError(str(folder), problems)
    for name, parameter in routers.items():
        parameter.copy_(fitted.tensors[name])


def _routers(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{module.name}.{name}": parameter
        for module in adapter_modules(model)
        for name, parameter in module.adapter_parameters().items()
        if name.startswith("router.")
    }


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[Problem]:
    missing = [
        Problem(name, "is missing in the fitted router") for name in sorted(wanted.keys() - given.keys())
    ]
    extra = [Problem(name, "is not in the model") for name in sorted(given.keys() - wanted.keys())]
    uneven = [
        Problem(name, f"must have shape {tuple(wanted[name].shape)}", tuple(given[name].shape))
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name].shape != given[name].shape
    ]
    return missing + extra + uneven


@dataclass(frozen=True)
class _Source:
    """A trained LoRA: layer -> (A, B), with the scaling that they were trained with."""

    folder: Path
    scaling: float
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, folder: Path) -> _Source:
        config, _, state = load_adapter(folder)
        if config.molora or config.dora:
            rule = "must be an adapter of plain LoRA layers only: preset lora"
            raise ConfigError("adapters.experts_from", [Problem(str(folder), rule, config.preset)])
        return cls(folder, config.scaling, state)

    def problems(self, name: str, rank: int) -> Iterator[Problem]:
        """Why it cannot start a layer's experts."""
        if f"{name}.lora_A" not in self.state:
            yield Problem(f"{self.folder}: {name}", "is missing", fix="Train a LoRA on the same layers.")
        elif (found := len(self.state[f"{name}.lora_A"])) != rank:
            yield Problem(f"{self.folder}: {name}", f"must have an expert's rank ({rank})", found)

    def factors(self, name: str, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B for a layer that scales its delta like this."""
        return self.state[f"{name}.lora_A"], self.state[f"{name}.lora_B"] * (self.scaling / scaling)


def _start_experts(
    model: nn.Module, sources: Sequence[_Source], noise: float, seed: int, shard: ExpertShard
) -> None:
    layers = [m for m in adapter_modules(model) if isinstance(m, MoloraLinear | FfnLoraLinear | LoraLinear)]
    routed = [layer for layer in layers if not isinstance(layer, LoraLinear)]
    plain = [layer for layer in layers if isinstance(layer, LoraLinear)] if len(sources) == 1 else []
    problems = [
        p
        for layer in (*routed, *plain)
        for s in sources
        for p in s.problems(layer.name, layer.lora_B.shape[-1])
    ]
    if problems:
        raise ConfigError("adapters.experts_from", problems)
    for lora in plain:
        _copy(lora, *sources[0].factors(lora.name, lora.scaling))
    for layer in routed:
        _copy_experts(layer, sources, noise, seed, shard)


def _copy_experts(
    layer: MoloraLinear | FfnLoraLinear,
    sources: Sequence[_Source],
    noise: float,
    seed: int,
    shard: ExpertShard,
) -> None:
    own = range(shard.index * len(layer.lora_B), (shard.index + 1) * len(layer.lora_B))
    pairs = [sources[i % len(sources)].factors(layer.name, layer.scaling) for i in own]
    shared = layer.lora_A.dim() == 2
    if len(sources) == 1:
        which = 1 if shared else 0  # a shared A cannot tell the experts apart
        pairs = [
            _with_noise(pair, which, noise, f"{seed}:{layer.name}:{i}")
            for i, pair in zip(own, pairs, strict=True)
        ]
    A = pairs[0][0] if shared else torch.stack([A for A, _ in pairs])
    _copy(layer, A, torch.stack([B for _, B in pairs]))


def _with_noise(pair: tuple[Tensor, Tensor], which: int, noise: float, key: str) -> tuple[Tensor, Tensor]:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator, values = torch.Generator().manual_seed(number), pair[which].float()
    noisy = values + noise * values.std() * torch.randn(values.shape, generator=generator)
    return (noisy, pair[1]) if which == 0 else (pair[0], noisy)


def _copy(layer: MoloraLinear | FfnLoraLinear | LoraLinear, A: Tensor, B: Tensor) -> None:
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    if isinstance(layer, LoraLinear) and layer.magnitude is not None:
        layer.magnitude.copy_((rows_of(layer.base) + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1))
