"""Adapters put into a model by module name, and their state taken out and put back by parameter name.

Decisions: no model's forward is copied or patched; linear layers are replaced in their parent. Trainable
parameters are found by module type, never by a substring of their name, so none can be forgotten when a
checkpoint is written. The output head and the embeddings are never adapted.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_medical.adapters.blocks import BlockLinear, BlockPlan, FfnLinear, RoutedBlock
from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.layer import (
    AdaptedLinear,
    AdapterModule,
    LoraLinear,
    MoloraLinear,
    RouterSeat,
    linear_sizes,
)
from moe_medical.adapters.placement import AdapterKind, depth_of, match_modules, routing_scopes
from moe_medical.adapters.routers import Router, TokenRouter
from moe_medical.adapters.routing import RoutingContext
from moe_medical.adapters.xlora import XLoraClassifier, attach_classifier
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
    if any(adapter_modules(model)):
        problem = Problem("adapters", "are attached already", fix="Load the base model anew.")
        raise ConfigError("model", [problem])
    linears = adaptable_modules(model)
    placement = match_modules(linears, config)
    model.requires_grad_(False)
    _Attaching(model, config, seed, shard, linears).attach(placement)
    _freeze(model, config)
    check_trainable(model)
    return next(iter(adapter_modules(model))).context


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
        self._model, self._config, self._seed, self._shard = model, config, seed, shard
        self._linears_of_model, self._context = linears, RoutingContext()
        self._num_layers = 1 + max(map(depth_of, linears))
        self._router: Router | None = None
        """Of the first scope, which lends it to all others where the whole model has one."""
        self._lender = ""

    def attach(self, placement: Mapping[str, AdapterKind]) -> None:
        for name, kind in placement.items():
            if kind == "lora":
                self._replace(name, LoraLinear(*self._parts(name), self._context))
        routed = [name for name, kind in placement.items() if kind == "molora"]
        self._blocks(routed) if self._config.experts != "linear" else self._linears(routed)
        if routed and self._config.router == "xlora":
            attach_classifier(self._model, routed, self._config, self._seed, self._context)

    def _linears(self, names: list[str]) -> None:
        scopes = routing_scopes(names, self._config.router_scope)
        leaders, sizes = {scope: name for name, scope in reversed(scopes.items())}, Counter(scopes.values())
        for name, scope in scopes.items():
            leads = leaders[scope] == name
            followers = sizes[scope] - 1 if leads else 0
            lent = self._router if leads else None
            _refuse_other_width(lent, name, linear_sizes(self._model.get_submodule(name)))
            seat = RouterSeat(scope, followers, leads, self._lender if leads else "")
            layer = MoloraLinear(*self._parts(name), self._context, self._shard, seat, lent)
            self._replace(name, layer)
            self._keep(name, layer.router)

    def _blocks(self, names: list[str]) -> None:
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
        _refuse_other_blocks(self._model, blocks)
        for block, members in blocks.items():
            plan, in_features = BlockPlan(), self._input_size(block)
            for name in members:
                parts = self._parts(name)
                if self._config.experts == "ffn":
                    self._replace(name, FfnLinear(*parts, self._context, plan))
                else:
                    self._replace(name, BlockLinear(*parts, self._context, plan))
            wrapped = RoutedBlock(*self._parts(block), self._context, plan, in_features, self._router)
            self._replace(block, wrapped)
            self._keep(block, wrapped.router)

    def _input_size(self, block: str) -> int:
        first = next(name for name in self._linears_of_model if name.rpartition(".")[0] == block)
        sizes = linear_sizes(self._model.get_submodule(first))
        assert sizes is not None, "these are linear layers"
        return sizes[0]

    def _parts(self, name: str) -> tuple[nn.Module, MoloraConfig, str, int]:
        config = self._config.at_depth(depth_of(name), self._num_layers)
        return self._model.get_submodule(name), config, name, self._seed

    def _replace(self, name: str, adapted: AdapterModule) -> None:
        parent, _, child = name.rpartition(".")
        before = self._model.get_submodule(name)
        setattr(self._model.get_submodule(parent), child, adapted.train(before.training))

    def _keep(self, name: str, router: Router | None) -> None:
        if self._config.router_scope == "model" and self._router is None:
            self._router, self._lender = router, name


def _refuse_other_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Whole blocks are experts only where they map one tensor to one; attention, for one, does not."""
    wrong = [b for b in blocks if not _is_plain_block(model.get_submodule(b))]
    if wrong:
        rule = "must name linears of plain FFN blocks where whole blocks are experts"
        raise ConfigError("adapter placement", [Problem("adapters.molora", rule, f"{wrong[0]}, ...")])


def _refuse_other_width(router: Router | None, name: str, sizes: tuple[int, int] | None) -> None:
    """A router for the whole model reads inputs of one width."""
    if isinstance(router, TokenRouter) and sizes and router.weight.shape[1] != sizes[0]:
        rule = f"must be narrower than `model`: {name} reads {sizes[0]} features, the first layer"
        problem = Problem("adapters.router_scope", rule, router.weight.shape[1])
        raise ConfigError("adapter placement", [problem])


def _is_plain_block(block: nn.Module) -> bool:
    """Whether it has one input, and its linears itself."""
    deeper = any("." in name for name, module in block.named_modules() if linear_sizes(module))
    return not deeper and len(inspect.signature(block.forward).parameters) == 1


def _freeze(model: nn.Module, config: MoloraConfig) -> None:
    for module in adapter_modules(model):
        parameters = module.adapter_parameters()
        module.frozen = frozenset(name for name in parameters if _is_frozen(name, module, config))
        for name in module.frozen:
            parameters[name].requires_grad_(False)


def _is_frozen(name: str, module: AdapterModule, config: MoloraConfig) -> bool:
    if isinstance(module, XLoraClassifier):
        return False
    if name.startswith("router."):
        return config.freeze_router
    routed = isinstance(module, MoloraLinear | BlockLinear | FfnLinear)
    return config.freeze_experts and routed and name in ("lora_A", "lora_B", "weight", "bias")


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


def deciding_layers(model: nn.Module) -> dict[str, MoloraLinear | RoutedBlock]:
    """Full name -> what decides for its scope: a layer that leads it, or a block."""
    found = (m for m in adapter_modules(model) if isinstance(m, MoloraLinear | RoutedBlock))
    return {m.name: m for m in found if m.seat.leads}


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


def summarize_adapters(model: nn.Module) -> AdapterSummary:
    """Count the adapted layers and their parameters; not for ZeRO-3's partitioned parameters."""
    modules = list(adapter_modules(model))
    linears = [module for module in modules if isinstance(module, AdaptedLinear)]
    num_lora = sum(isinstance(module, LoraLinear) for module in linears)
    parameters = adapter_parameters(model)
    return AdapterSummary(
        num_molora=len(linears) - num_lora,
        num_lora=num_lora,
        num_parameters=sum(p.numel() for p in parameters.values()),
        num_router_parameters=sum(
            parameters[f"{module.name}.{name}"].numel()
            for module in modules
            for name in module.adapter_parameters()
            if name.startswith("router.")
        ),
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


@torch.no_grad()
def lay_out_for_answers(model: nn.Module) -> None:
    """Put each stack of B's into memory as the concat path reads it; names, shapes and values stay.

    Without it every forward pass copies B, (E, F, rank) to (F, E * rank), which for a few tokens costs more
    than the product. Not for training, whose engine lays parameters out anew.
    """
    for module in adapter_modules(model):
        for name, parameter in module.adapter_parameters().items():
            if name in ("lora_B", "shared_B") and parameter.dim() == 3:
                parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)


def adapter_modules(model: nn.Module) -> Iterator[AdapterModule]:
    """Everything that adapters have added to a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, AdapterModule))
