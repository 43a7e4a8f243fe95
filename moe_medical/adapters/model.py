"""Adapters put into a model by module name, and their state taken out and put back by parameter name.

Decisions: no model's forward is copied or patched; linear layers are replaced in their parent. Trainable
parameters are found by module type, never by a substring of their name, so none can be forgotten when a
checkpoint is written. The output head and the embeddings are never adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.layer import AdaptedLinear, LoraLinear, MoloraLinear, linear_sizes
from moe_medical.adapters.placement import match_modules
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.presets import MoloraConfig
from moe_medical.errors import ConfigError, Problem


@dataclass(frozen=True)
class AdapterSummary:
    """What `attach_adapters` has put into a model."""

    num_molora: int
    num_lora: int
    num_parameters: int
    """Trainable numbers, those of the routers included."""
    num_router_parameters: int


def attach_adapters(
    model: nn.Module, config: MoloraConfig, seed: int, shard: ExpertShard | None = None
) -> RoutingContext:
    """Freeze the model and wrap the linear layers that the config's patterns name.

    With reentrant activation checkpointing also call `model.enable_input_require_grads()`: torch gives a
    checkpointed block no gradient when none of its inputs needs one, as is so behind frozen embeddings.

    Args:
        model: Base model.
        config: Adapter settings.
        seed: The run's seed.
        shard: Which experts of each routed layer this rank holds; None for all.

    Returns:
        The context shared by all routed layers.

    Raises:
        ConfigError: A pattern matches nothing, or the model has adapters already.
    """
    if any(_adapted(model)):
        problem = Problem("adapters", "are attached already", fix="Load the base model anew.")
        raise ConfigError("model", [problem])
    placement = match_modules(adaptable_modules(model), config)
    model.requires_grad_(False)
    context = RoutingContext()
    for name, kind in placement.items():
        base = model.get_submodule(name)
        if kind == "molora":
            adapted: AdaptedLinear = MoloraLinear(base, config, name, seed, context, shard)
        else:
            adapted = LoraLinear(base, config, name, seed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted.train(base.training))
    check_trainable(model)
    return context


def adaptable_modules(model: nn.Module) -> list[str]:
    """Full names of the linear layers, without the output head."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [n for n, m in model.named_modules() if linear_sizes(m) is not None and m is not head]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of every adapter and router, in the order of the model's modules."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in _adapted(model)
        for name, parameter in layer.adapter_parameters().items()
    }


def routed_layers(model: nn.Module) -> dict[str, MoloraLinear]:
    """Full name -> layer with routed experts, in the order of the model's modules."""
    return {name: layer for name, layer in _adapted(model) if isinstance(layer, MoloraLinear)}


def check_trainable(model: nn.Module) -> None:
    """Make sure that exactly the adapters, routers included, are trainable. Call before step 0.

    Raises:
        RuntimeError: Something froze an adapter or thawed the base; names the first few.
    """
    wanted = {id(parameter) for parameter in adapter_parameters(model).values()}
    wrong = [name for name, p in model.named_parameters() if p.requires_grad is not (id(p) in wanted)]
    if wrong:
        raise RuntimeError(f"requires_grad is wrong on {len(wrong)} parameters: {', '.join(wrong[:4])}")


def summarize_adapters(model: nn.Module) -> AdapterSummary:
    """Count the adapted layers and their parameters; not for ZeRO-3's partitioned parameters."""
    layers = [layer for _, layer in _adapted(model)]
    routers = [layer.router for layer in layers if isinstance(layer, MoloraLinear)]
    return AdapterSummary(
        num_molora=len(routers),
        num_lora=len(layers) - len(routers),
        num_parameters=sum(p.numel() for p in adapter_parameters(model).values()),
        num_router_parameters=sum(p.numel() for router in routers for p in router.parameters()),
    )


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "adapter state") -> None:
    """Copy a saved state into the adapters of a model; all or nothing.

    Args:
        model: With adapters attached, unsharded.
        state: Full parameter name -> tensor, as `adapter_parameters` names them.
        source: File or folder named in the error.

    Raises:
        ConfigError: Lists every missing, unexpected and wrongly shaped tensor.
    """
    parameters = adapter_parameters(model)
    problems = [Problem(name, "is missing in the state") for name in parameters.keys() - state.keys()]
    problems += [Problem(name, "is not in the model") for name in state.keys() - parameters.keys()]
    for name in parameters.keys() & state.keys():
        wanted, given = tuple(parameters[name].shape), tuple(state[name].shape)
        if wanted != given:
            problems.append(Problem(name, f"must have shape {wanted}", given))
    if problems:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.path))
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
