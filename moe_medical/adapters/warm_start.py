"""Where routers and experts start from, other than from chance: a fitted router, trained LoRAs.

Decisions: experts start from plain LoRAs only. One LoRA that all experts copy gives its own function whatever
the gates, if they sum to 1 (MING-MOE's warm start); copies that are alike get like gradients up to their
gates and hardly ever part, so each gets noise of its own. One LoRA for each expert is X-LoRA's start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_medical.adapters.blocks import FfnLoraLinear
from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.fitted_router import load_router
from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.layer import LoraLinear, MoloraLinear, Routed, rows_of
from moe_medical.adapters.model import adapter_modules
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, Problem

_NOISE = 0.1
"""Deviation of the noise on copies, relative to that of the copied numbers, where the user says none."""


def labels_of(config: MoloraConfig) -> tuple[str, ...]:
    """What the experts of the fitted router stand for, if the settings name one."""
    return load_router(Path(config.router_from)).labels if config.router_from else ()


@torch.no_grad()
def start_from(model: nn.Module, config: MoloraConfig, seed: int, shard: ExpertShard | None) -> None:
    """Put the values of the folders that the settings name into a model whose adapters are new.

    Raises:
        ConfigError: A folder does not fit the model; names every tensor.
    """
    if config.router_from:
        _start_routers(model, config, Path(config.router_from))
    if config.experts_from:
        noise = _NOISE if config.start_noise is None else config.start_noise
        loras = [_TrainedLora.read(Path(folder)) for folder in config.experts_from]
        _start_experts(model, loras, noise, seed, shard or ExpertShard())


def _start_routers(model: nn.Module, config: MoloraConfig, folder: Path) -> None:
    """Copy a fitted router; strict both ways, as a router that keeps its chance values would go unnoticed."""
    fitted = load_router(folder)
    settings = {"router": (fitted.level, config.router), "router_scope": (fitted.scope, config.router_scope)}
    problems = [
        Problem(f"adapters.{key}", f"must be what the router was fitted for, `{wanted}`", given)
        for key, (wanted, given) in settings.items()
        if wanted != given
    ]
    routers = {
        f"{module.name}.{name}": parameter
        for module in adapter_modules(model)
        if isinstance(module, Routed)
        for name, parameter in module.router_parameters().items()
    }
    for name in sorted(routers.keys() - fitted.tensors.keys()):
        problems.append(Problem(name, "is missing in the fitted router"))
    for name in sorted(fitted.tensors.keys() - routers.keys()):
        problems.append(Problem(name, "is not in the model"))
    for name in sorted(routers.keys() & fitted.tensors.keys()):
        wanted_shape = tuple(routers[name].shape)
        given_shape = tuple(fitted.tensors[name].shape)
        if wanted_shape != given_shape:
            problems.append(Problem(name, f"must have shape {wanted_shape}", given_shape))
    if problems:
        raise ConfigError(str(folder), problems)
    for name, parameter in routers.items():
        parameter.copy_(fitted.tensors[name])


@dataclass(frozen=True)
class _TrainedLora:
    """A trained LoRA: layer -> (A, B), with the scaling that they were trained with."""

    folder: Path
    scaling: float
    state: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> _TrainedLora:
        config, _, state = load_adapter(folder)
        if config.molora or config.dora:
            rule = "must be an adapter of plain LoRA layers only: preset lora"
            raise ConfigError("adapters.experts_from", [Problem(str(folder), rule, config.preset)])
        return cls(folder, config.scaling, state)

    def why_not(self, name: str, rank: int) -> Problem | None:
        """What keeps it from starting the experts of a layer."""
        if f"{name}.lora_A" not in self.state:
            return Problem(f"{self.folder}: {name}", "is missing", fix="Train a LoRA on the same layers.")
        found = len(self.state[f"{name}.lora_A"])
        if found != rank:
            return Problem(f"{self.folder}: {name}", f"must have an expert's rank ({rank})", found)
        return None

    def factors(self, name: str, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B for a layer that scales its delta by `scaling`: B takes what the scalings differ by."""
        return self.state[f"{name}.lora_A"], self.state[f"{name}.lora_B"] * (self.scaling / scaling)


def _start_experts(
    model: nn.Module, loras: Sequence[_TrainedLora], noise: float, seed: int, shard: ExpertShard
) -> None:
    """Copy trained LoRAs; plain LoRA layers start too where there is one LoRA to start from."""
    modules = list(adapter_modules(model))
    routed = [m for m in modules if isinstance(m, MoloraLinear | FfnLoraLinear)]
    plain = [m for m in modules if isinstance(m, LoraLinear) and len(loras) == 1]
    found = [lora.why_not(m.name, m.lora_B.shape[-1]) for m in (*routed, *plain) for lora in loras]
    if problems := [problem for problem in found if problem is not None]:
        raise ConfigError("adapters.experts_from", problems)
    for lora_layer in plain:
        A, B = loras[0].factors(lora_layer.name, lora_layer.scaling)
        lora_layer.lora_A.copy_(A)
        lora_layer.lora_B.copy_(B)
        if lora_layer.magnitude is not None:  # so that the layer is the LoRA still, and no decomposed one
            whole_FD = rows_of(lora_layer.base) + lora_layer.scaling * lora_layer.lora_B @ lora_layer.lora_A
            lora_layer.magnitude.copy_(whole_FD.norm(dim=1))
    for layer in routed:
        _copy_experts(layer, loras, noise, seed, shard)


def _copy_experts(
    layer: MoloraLinear | FfnLoraLinear,
    loras: Sequence[_TrainedLora],
    noise: float,
    seed: int,
    shard: ExpertShard,
) -> None:
    """Experts of this rank from the LoRAs in turn; copies of a single one each get noise of their own."""
    all_A = []
    all_B = []
    shared_A = layer.lora_A.dim() == 2
    first = shard.index * len(layer.lora_B)
    for i in range(first, first + len(layer.lora_B)):
        A, B = loras[i % len(loras)].factors(layer.name, layer.scaling)
        key = f"{seed}:{layer.name}:{i}"  # by the expert's number among all: the same on whatever rank
        if len(loras) == 1 and shared_A:  # which cannot tell the experts apart, so B has to
            B = _with_noise(B, noise, key)
        elif len(loras) == 1:
            A = _with_noise(A, noise, key)
        all_A.append(A)
        all_B.append(B)
    layer.lora_A.copy_(all_A[0] if shared_A else torch.stack(all_A))
    layer.lora_B.copy_(torch.stack(all_B))


def _with_noise(values: Tensor, noise: float, key: str) -> Tensor:
    """Values plus normal noise whose deviation is that share of theirs."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    values = values.float()
    return values + noise * values.std() * torch.randn(values.shape, generator=generator)
