"""Adapter settings that contradict each other, or what they run on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import get_args

from moe_medical.config.adapters import (
    PRESETS,
    ComputePath,
    Experts,
    MoloraConfig,
    RouterScope,
    Selection,
)
from moe_medical.config.deepspeed import stage_of_file
from moe_medical.config.parallel_rules import expert_parallel_problems
from moe_medical.config.ranges import range_problems
from moe_medical.config.router_kinds import ROUTER_KINDS
from moe_medical.config.schema import RunConfig
from moe_medical.errors import ConfigError, Problem

_COEFFICIENTS = ("balance", "z", "entropy", "divergence", "localized")


def adapter_problems(config: RunConfig) -> Iterator[Problem]:
    """Rules between values that the adapters of a run break."""
    adapters = config.adapters
    if adapters.preset not in PRESETS:
        yield Problem("adapters.preset", f"must be one of {', '.join(sorted(PRESETS))}", adapters.preset)
        return
    if adapters.router not in ROUTER_KINDS:
        yield Problem("adapters.router", f"must be one of {', '.join(ROUTER_KINDS)}", adapters.router)
        return
    yield from _top_k(adapters)
    for key in ("molora", "lora"):
        yield from _patterns(f"adapters.{key}", getattr(adapters, key))
    # What follows divides by numbers that have to be in their range.
    if not any(range_problems(adapters)) and not any(_top_k(adapters)):
        yield from _routers(adapters)
        yield from _experts(adapters)
        yield from _sources(adapters)
        yield from _losses(adapters)
        yield from _engine(config, adapters)
    yield from expert_parallel_problems(config.parallel, adapters)


def value_problems(adapters: MoloraConfig) -> list[Problem]:
    """Values that no setting may have, alone and without a run."""
    return [*_names(adapters), *range_problems(adapters, "adapters."), *_top_k(adapters)]


def refuse_unknown_task(adapters: MoloraConfig, tasks: Sequence[str]) -> None:
    """Check `unknown_task` once the tasks are known.

    Raises:
        ConfigError: It is no rule and no task of the mixture.
    """
    if adapters.unknown_task not in ("mean", "refuse", *tasks):
        rule = "must be `mean`, `refuse` or a task of the mixture"
        fix = f"Tasks there: {', '.join(tasks)}."
        raise ConfigError("adapters", [Problem("adapters.unknown_task", rule, adapters.unknown_task, fix)])


def _names(a: MoloraConfig) -> Iterator[Problem]:
    known = {
        "experts": get_args(Experts),
        "router": tuple(ROUTER_KINDS),
        "router_scope": get_args(RouterScope),
        "selection": get_args(Selection),
        "path": get_args(ComputePath),
    }
    for key, names in known.items():
        value = getattr(a, key)
        if value not in names:
            yield Problem(f"adapters.{key}", f"must be one of {', '.join(names)}", value)


def _top_k(a: MoloraConfig) -> Iterator[Problem]:
    fewest = min(a.experts_per_layer, default=a.num_experts)
    if not 0 <= a.top_k <= fewest:
        rule = f"must be at most num_experts ({fewest}), or 0 for all"
        if a.experts_per_layer:
            rule = f"must be at most {fewest}"
        yield Problem("adapters.top_k", rule, a.top_k)


def _routers(a: MoloraConfig) -> Iterator[Problem]:
    kind = a.router_kind
    grouped = kind.has_groups
    if grouped and (a.groups < 2 or any(n % a.groups for n in a.experts_per_layer or (a.num_experts,))):
        rule = f"must be at least 2 and divide num_experts ({a.num_experts}) under a hierarchical router"
        yield Problem("adapters.groups", rule, a.groups)
    if not grouped and a.groups > 1:
        yield Problem("adapters.groups", f"must be 1 under a {a.router} router", a.groups)
    if a.experts_per_layer and (a.router_scope == "model" or kind.decides_per == "text"):
        rule = "must be left out where one router, or classifier, serves all layers"
        yield Problem("adapters.experts_per_layer", rule, list(a.experts_per_layer))
    if kind.decides_per == "text" and a.router_scope not in ("module", "model"):
        rule = "must be `module` or `model` under X-LoRA, whose classifier decides for all layers"
        yield Problem("adapters.router_scope", rule, a.router_scope)
    if a.jitter and not kind.has_input:
        rule = f"must be 0 under a {a.router} router, which has no input of its own"
        yield Problem("adapters.jitter", rule, a.jitter)
    if kind.chooses_number and a.active() != a.max_experts:
        rule = f"must be 0 under a {a.router} router, which sets their number"
        yield Problem("adapters.top_k", rule, a.top_k)
    if a.selection == "sample" and kind.decides_per == "task":
        yield Problem(
            "adapters.selection", "must be `top_k` under a task gate: a task decides once", "sample"
        )
    elif a.selection == "sample" and a.active() == a.max_experts:
        rule = "must be `top_k` where every expert is used: there is nothing to draw"
        yield Problem("adapters.selection", rule, a.selection)


def _experts(a: MoloraConfig) -> Iterator[Problem]:
    uneven = [n for n in a.experts_per_layer or (a.num_experts,) if a.rank % n]
    if a.rank_split and uneven:
        rule = f"must be a multiple of num_experts ({uneven[0]}), over which rank_split spreads it"
        near = max(uneven[0], round(a.rank / uneven[0]) * uneven[0])
        yield Problem("adapters.rank", rule, a.rank, f"Try {near}.")
    if a.shared_a and (a.rank_split or a.experts != "linear"):
        yield Problem(
            "adapters.shared_a", "must be false with rank_split, and with whole blocks as experts", True
        )
    if a.path in ("grouped", "triton") and a.shared_a:
        yield Problem("adapters.path", "must be `auto` or `concat` where experts share A", a.path)
    if a.experts == "block" and a.shared_experts:
        rule = "must be 0 with `experts: block`: a shared expert is for single linears or full copies"
        yield Problem("adapters.shared_experts", rule, a.shared_experts)
    if a.experts != "linear" and a.router_kind.decides_per == "text":
        yield Problem("adapters.experts", "must be `linear` under X-LoRA", a.experts)
    elif a.experts != "linear" and a.router_scope not in ("block", "model"):
        rule = f"must be `block` or `model` with `experts: {a.experts}`, which are whole blocks"
        yield Problem("adapters.router_scope", rule, a.router_scope)
    if a.experts == "ffn" and not a.lora and a.dropout:
        yield Problem("adapters.dropout", "must be 0 where full FFN copies are all there is", a.dropout)
    if a.learn_shared_weight and not a.shared_experts:
        rule = "must be false without shared_experts: there is no weight to learn"
        yield Problem("adapters.learn_shared_weight", rule, True)
    if a.dora and not a.lora:
        rule = (
            "must be false without plain LoRA layers (adapters.lora): a gate would change the norm by token"
        )
        yield Problem("adapters.dora", rule, True)


def _sources(a: MoloraConfig) -> Iterator[Problem]:
    """Where routers and experts start from."""
    if a.freeze_router and not a.router_from:
        rule = "must come with adapters.router_from: a router that nobody fitted would stay random"
        fix = "Fit one with `moe-medical router fit`, or set adapters.freeze_router to false."
        yield Problem("adapters.freeze_router", rule, True, fix)
    if a.router_from and not a.router_kind.can_be_fitted:
        rule = f"must be left out under a {a.router} router: what is fitted is a token or sequence router"
        yield Problem("adapters.router_from", rule, a.router_from)
    folders = a.experts_from
    if a.freeze_experts and not folders:
        rule = "must come with adapters.experts_from: experts that nobody trained would stay zero"
        fix = "Name one adapter folder for each expert."
        yield Problem("adapters.freeze_experts", rule, True, fix)
    if len(folders) not in (0, 1, a.num_experts) or (len(folders) == 1 and a.freeze_experts):
        rule = f"must name one adapter that all copy, or {a.num_experts}, one for each expert"
        yield Problem("adapters.experts_from", rule, len(folders))
    if a.start_noise is not None and (a.start_noise < 0 or len(folders) != 1):
        rule = "must not be negative, and is for the copies of one adapter in adapters.experts_from"
        yield Problem("adapters.start_noise", rule, a.start_noise)
    if folders and a.experts == "ffn":
        yield Problem("adapters.experts_from", "must be left out with `experts: ffn`", list(folders))
    if len(folders) > 1 and (a.shared_a or a.experts_per_layer):
        rule = (
            "must name one adapter with shared_a or experts_per_layer: no expert would be a LoRA of its own"
        )
        yield Problem("adapters.experts_from", rule, len(folders))


def _losses(a: MoloraConfig) -> Iterator[Problem]:
    active = [name for name in _COEFFICIENTS if getattr(a, f"{name}_coefficient")]
    if a.router_kind.decides_per == "text":
        for name in active:
            yield Problem(
                f"adapters.{name}_coefficient", "must be 0 under X-LoRA, which routes no token", name
            )
    if a.freeze_router:
        for name in active:
            yield Problem(f"adapters.{name}_coefficient", "must be 0 with a frozen router", None)
    if "localized" in active and not a.localized_tasks:
        rule = "must name the tasks of the first kind for the localized balance"
        yield Problem("adapters.localized_tasks", rule, [])
    if "localized" in active and any(n % 2 for n in a.experts_per_layer or (a.num_experts,)):
        yield Problem("adapters.num_experts", "must be even: each kind of task has half", a.num_experts)


def _engine(config: RunConfig, a: MoloraConfig) -> Iterator[Problem]:
    """What the engine cannot do with these adapters."""
    parallel = config.parallel
    lends = bool(a.molora) and (a.router_scope == "model" or a.router_kind.decides_per == "text")
    if lends and config.training.activation_checkpointing == "reentrant":
        rule = "must not be `reentrant` with a router for the whole model: its gradient would come in parts"
        yield Problem("training.activation_checkpointing", rule, "reentrant", "Use non_reentrant.")
    if stage_of_file(parallel.deepspeed) == 3:
        for what in a.not_under_zero3():
            yield Problem(
                "parallel.deepspeed", f"must be below ZeRO-3 with adapters.{what}", 3, "Use ZeRO-2."
            )
    if parallel.ep_size > 1:
        for what in a.not_spread():
            yield Problem("parallel.ep_size", f"must be 1 with adapters.{what}", parallel.ep_size)


def _patterns(key: str, patterns: tuple[str, ...]) -> Iterator[Problem]:
    for i, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except re.error as e:
            yield Problem(f"{key}[{i}]", f"must be a regular expression ({e})", pattern)
