"""Adapters put into a model by module name, and their state taken out and put back by parameter name.

Decisions: no model's forward is copied or patched; linear layers are replaced in their parent. Trainable
parameters are found by module type, never by a substring of their name, so none can be forgotten when a
checkpoint is written. The output head and the embeddings are never adapted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_medical.adapters.blocks import FfnCopyLinear, FfnDispatch, FfnLoraLinear, RoutedFfn
from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.layer import (
    AdapterModule,
    LoraLinear,
    MoloraLinear,
    Routed,
    Target,
    linear_sizes,
)
from moe_medical.adapters.placement import AdapterKind, depth_of, match_modules, routing_scopes
from moe_medical.adapters.routers import Router, TokenRouter
from moe_medical.adapters.routing import RouterGroup, RoutingContext
from moe_medical.adapters.xlora import attach_classifier
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, Problem


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
    if any(adapter_modules(model)):
        problem = Problem("adapters", "are attached already", fix="Load the base model anew.")
        raise ConfigError("model", [problem])
    linears = adaptable_modules(model)
    placement = match_modules(linears, config)
    model.requires_grad_(False)
    attaching = _Attaching(model, config, seed, shard, linears)
    attaching.attach(placement)
    _freeze(model, config)
    check_trainable(model)
    return attaching.context


class _Attaching:
    """One model getting its adapters."""

    def __init__(
        self,
        model: nn.Module,
        config: MoloraConfig,
        seed: int,
        shard: ExpertShard | None,
        linears: Sequence[str],
    ):
        self._model = model
        self._config = config
        self._seed = seed
        self._shard = shard
        self._all_linears = linears
        self.context = RoutingContext()
        self._num_layers = 1 + max(map(depth_of, linears))

    def attach(self, placement: Mapping[str, AdapterKind]) -> None:
        for name, kind in placement.items():
            if kind == "lora":
                self._replace(name, LoraLinear(self._target(name)))
        routed = [name for name, kind in placement.items() if kind == "molora"]
        if self._config.experts == "linear":
            self._attach_linears(routed)
        else:
            self._attach_ffn_blocks(routed)
        if routed and self._config.router_kind.decides_per == "text":
            attach_classifier(self._model, routed, self._config, self._seed, self.context)

    def _attach_linears(self, names: list[str]) -> None:
        """Routed experts in single linear layers, in the order in which these run."""
        routers: dict[str, Router | None] = {}
        for name, group in router_groups(names, self._config.router_scope).items():
            target = self._target(name)
            router = routers.get(group.owner) if group.decider == name else None
            _refuse_other_width(router, name, linear_sizes(target.base))
            layer = MoloraLinear(target, self._shard, group, router)
            routers[name] = layer.router
            self._replace(name, layer)

    def _attach_ffn_blocks(self, names: list[str]) -> None:
        """Experts that are whole FFN blocks: first the linears of a block, then the block around them."""
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
        _refuse_other_blocks(self._model, blocks)
        kind = FfnCopyLinear if self._config.experts == "ffn" else FfnLoraLinear
        owner: str | None = None
        router: Router | None = None
        for block, members in blocks.items():
            dispatch = FfnDispatch()
            in_features = self._input_size(block)
            for name in members:
                self._replace(name, kind(self._target(name), dispatch))
            wrapped = RoutedFfn(self._target(block), dispatch, in_features, owner, router)
            self._replace(block, wrapped)
            if self._config.router_scope == "model":  # the first block's router serves them all
                owner = wrapped.group.owner
                router = wrapped.router

    def _input_size(self, block: str) -> int:
        """D of the block: its first linear reads what the block reads, adapted or not."""
        first = next(name for name in self._all_linears if name.rpartition(".")[0] == block)
        sizes = linear_sizes(self._model.get_submodule(first))
        assert sizes is not None, "these are linear layers"
        return sizes[0]

    def _target(self, name: str) -> Target:
        config = self._config.at_depth(depth_of(name), self._num_layers)
        return Target(self._model.get_submodule(name), config, name, self._seed, self.context)

    def _replace(self, name: str, adapted: AdapterModule) -> None:
        parent, _, child = name.rpartition(".")
        before = self._model.get_submodule(name)
        # New modules are in training mode, the model may not be.
        setattr(self._model.get_submodule(parent), child, adapted.train(before.training))


def router_groups(names: Iterable[str], scope: str) -> dict[str, RouterGroup]:
    """Routed layer -> the layers that it shares its decision with, in the order in which they run.

    Args:
        names: Full names of the routed layers, in the order in which the model has registered them.
        scope: Of `adapters.router_scope`. With `model` each decoder layer decides anew, by the router of the
            first one.
    """
    group_of = routing_scopes(names, scope)
    members: dict[str, list[str]] = {}
    for name, group in group_of.items():
        members.setdefault(group, []).append(name)
    first = next(iter(group_of), "")
    groups = {
        group: RouterGroup(group, tuple(layers), first if scope == "model" else layers[0])
        for group, layers in members.items()
    }
    return {name: groups[group] for name, group in group_of.items()}


def _refuse_other_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Whole blocks are experts only where they map one tensor to one; attention, for one, does not."""
    for name in blocks:
        block = model.get_submodule(name)
        deeper = any("." in inner for inner, module in block.named_modules() if linear_sizes(module))
        if deeper or len(inspect.signature(block.forward).parameters) != 1:
            rule = "must name linears of plain FFN blocks where whole blocks are experts"
            raise ConfigError("adapter placement", [Problem("adapters.molora", rule, f"{name}, ...")])


def _refuse_other_width(router: Router | None, name: str, sizes: tuple[int, int] | None) -> None:
    """A router for the whole model reads inputs of one width."""
    if isinstance(router, TokenRouter) and sizes and router.weight.shape[1] != sizes[0]:
        rule = f"must be narrower than `model`: {name} reads {sizes[0]} features, the first layer"
        problem = Problem("adapters.router_scope", rule, router.weight.shape[1])
        raise ConfigError("adapter placement", [problem])


def _freeze(model: nn.Module, config: MoloraConfig) -> None:
    """What was trained before and is to stay: routers, experts or both."""
    for module in adapter_modules(model):
        frozen: dict[str, nn.Parameter] = {}
        if config.freeze_router and isinstance(module, Routed):
            frozen |= module.router_parameters()
        if config.freeze_experts:
            frozen |= module.expert_parameters()
        module.frozen = frozenset(frozen)
        for parameter in frozen.values():
            parameter.requires_grad_(False)


def adaptable_modules(model: nn.Module) -> list[str]:
    """Full names of the linear layers, without the output head."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [n for n, m in model.named_modules() if linear_sizes(m) is not None and m is not head]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of every adapter and router, frozen ones too, in the order of the modules.

    Names are those of the base model's own modules, whatever wraps them.
    """
    return {
        f"{module.name}.{name}": parameter
        for module in adapter_modules(model)
        for name, parameter in module.adapter_parameters().items()
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `adapter_parameters` that the settings do not freeze."""
    return {
        f"{module.name}.{name}": parameter
        for module in adapter_modules(model)
        for name, parameter in module.adapter_parameters().items()
        if name not in module.frozen
    }


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `adapter_parameters` that the settings freeze."""
    return {name: p for name, p in adapter_parameters(model).items() if not p.requires_grad}


def routed_layers(model: nn.Module) -> dict[str, MoloraLinear]:
    """Full name -> linear layer with routed experts, in the order of the model's modules."""
    return {m.name: m for m in adapter_modules(model) if isinstance(m, MoloraLinear)}


def deciding_layers(model: nn.Module) -> dict[str, Routed]:
    """Full name -> what decides for its router group: a linear layer, or an FFN block."""
    return {m.name: m for m in adapter_modules(model) if isinstance(m, Routed) and m.decides}


def check_trainable(model: nn.Module) -> None:
    """Make sure that exactly the adapters, routers included, are trainable as the settings say. Call it
    before step 0.

    Raises:
        RuntimeError: Something froze an adapter or thawed the base; names the first few.
    """
    wanted = {id(parameter) for parameter in trainable_parameters(model).values()}
    wrong = [name for name, p in model.named_parameters() if p.requires_grad is not (id(p) in wanted)]
    if wrong or not wanted:
        names = ", ".join(wrong[:4]) or "nothing is trainable"
        raise RuntimeError(f"requires_grad is wrong on {len(wrong)} parameters: {names}")


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
        wanted = tuple(parameters[name].shape)
        given = tuple(state[name].shape)
        if wanted != given:
            problems.append(Problem(name, f"must have shape {wanted}", given))
    if problems:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.path))
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


@torch.no_grad()
def lay_out_for_answers(model: nn.Module) -> None:
    """Put each stack of B's into memory as the concat path reads it; names, shapes and values stay.

    Without it every forward pass copies B, (E, F, rank) to (F, E * rank), which for a few tokens costs more
    than the product. Not for training, whose engine lays parameters out anew.
    """
    for module in adapter_modules(model):
        for name, parameter in module.adapter_parameters().items():
            if name in ("lora_B", "shared_B") and parameter.dim() == 3:
                # Shape (E, F, rank) in the memory of (E, rank, F): F's stride is 1, and E and rank can be
                # joined into one dimension without a copy.
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)


def adapter_modules(model: nn.Module) -> Iterator[AdapterModule]:
    """Everything that adapters have added to a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, AdapterModule))
