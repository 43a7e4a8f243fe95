"""Part of an adapter: for ablations, and to merge or export what has no router.

    attention, ffn    modules whose full name matches the presets' ATTENTION, FFN pattern
    routed            modules with routed experts, without their shared experts
    plain             modules with one plain LoRA
    shared            the shared experts alone, which are then one plain LoRA: w_s goes into B
    anything else     a regular expression for full module names

Names select modules, roles select tensors; nothing is selected by a piece of a name. Several names are added
up; names and one role narrow each other (`routed` of `attention`). A part that matches nothing is an error.
Where modules share a router, a task router moves to the first that stays; another would then read the input
of another layer, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moe_medical.adapters.placement import routing_scopes
from moe_medical.config.presets import ATTENTION, FFN, MoloraConfig
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.effective import (
    ROUTER,
    is_routed,
    router_owners,
    router_tensors,
    shared_lora,
    tensors_of_modules,
)

ROLES = ("routed", "plain", "shared")
_PATTERNS = {"attention": ATTENTION, "ffn": FFN}
_Modules = dict[str, dict[str, Tensor]]


def restrict_adapter(
    config: MoloraConfig, state: Mapping[str, Tensor], only: Sequence[str], linears: Sequence[str]
) -> tuple[MoloraConfig, dict[str, Tensor]]:
    """Config and state of a part of an adapter; they attach and load as those of a whole one.

    Args:
        config: Of the whole.
        state: Full parameter name -> tensor.
        only: `attention`, `ffn`, `routed`, `plain`, `shared` or regular expressions.
        linears: The base's linear layers in the model's order, as `model.adaptable_modules` names them.

    Raises:
        ConfigError: One of them selects nothing, or cannot be cut out.
    """
    modules = tensors_of_modules(state)
    adapted = {name: modules[name] for name in linears if name in modules}
    kept = _by_role(_by_name(adapted, only), [part for part in only if part in ROLES])
    if "shared" in only:
        return _shared_only(config, kept)
    if "routed" in only and config.shared_experts:
        _refuse_blocks(config, only)
        kept = {name: _without_shared(tensors) for name, tensors in kept.items()}
        config = replace(config, shared_experts=0, learn_shared_weight=False)
    routed = [name for name, tensors in kept.items() if is_routed(tensors)]
    plain = [name for name in kept if name not in routed]
    if routed:
        kept = _with_routers(config, modules, kept, routed, only)
    return _named(config, routed, plain), _flat(kept)


def _by_name(modules: _Modules, only: Sequence[str]) -> _Modules:
    patterns = [part for part in only if part not in ROLES]
    if not patterns:
        return modules
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {n for n in modules if re.fullmatch(_PATTERNS.get(pattern, pattern), n)}
        except re.error as error:
            raise _refused(
                only, f"must be {', '.join([*_PATTERNS, *ROLES])} or a pattern ({error})"
            ) from None
        if not found:
            raise _refused([pattern], "must select a module of the adapter")
        chosen |= found
    return {name: tensors for name, tensors in modules.items() if name in chosen}


def _by_role(modules: _Modules, roles: Sequence[str]) -> _Modules:
    if len(roles) > 1:
        raise _refused(roles, f"must hold at most one of {', '.join(ROLES)}")
    for role in roles:
        wanted = {"routed": is_routed, "plain": _is_plain, "shared": _has_shared}[role]
        modules = {name: tensors for name, tensors in modules.items() if wanted(tensors)}
        if not modules:
            raise _refused(roles, "must select a module of the adapter")
    return modules


def _is_plain(tensors: Mapping[str, Tensor]) -> bool:
    return "lora_B" in tensors and not is_routed(tensors)


def _has_shared(tensors: Mapping[str, Tensor]) -> bool:
    return "shared_B" in tensors


def _without_shared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensor for role, tensor in tensors.items() if not role.startswith("shared_")}


def _shared_only(config: MoloraConfig, kept: _Modules) -> tuple[MoloraConfig, dict[str, Tensor]]:
    """One plain LoRA of rank S * rank for each module, with the scaling of the whole."""
    loras = {name: shared_lora(config, tensors) for name, tensors in kept.items()}
    ranks = {lora.rank for lora in loras.values()}
    if len(ranks) > 1:
        raise _refused(["shared"], f"must have one rank in all modules, has {sorted(ranks)}")
    rank = ranks.pop()
    plain = replace(
        config,
        experts="linear",
        router="token",
        num_tasks=0,
        rank=rank,
        alpha=config.scaling * rank,
        rank_split=False,
        rs_lora=False,
        dora=False,
        shared_experts=0,
        learn_shared_weight=False,
    )
    state = {f"{name}.lora_A": lora.A for name, lora in loras.items()}
    return _named(plain, [], list(loras)), state | {f"{n}.lora_B": lora.B for n, lora in loras.items()}


def _with_routers(
    config: MoloraConfig, modules: _Modules, kept: _Modules, routed: Sequence[str], only: Sequence[str]
) -> _Modules:
    """The kept modules, with what routes for them where the attached model looks for it."""
    if config.experts != "linear":
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in routed)
        if not blocks.keys() <= modules.keys():
            _refuse_blocks(config, only)
        return kept | {block: modules[block] for block in blocks}
    if config.router == "xlora":
        return _with_classifier(modules, kept, routed, only)
    owners, leaders = router_owners(config, modules), _new_owners(config, routed)
    moved = {leader: owners[leader] for leader in leaders if owners[leader] != leader}
    if moved and config.router != "task":
        lost = next(iter(moved.values()))
        raise _refused(only, f"must keep {lost}, whose input the router of others reads")
    without = {name: _without_router(tensors) for name, tensors in kept.items()}
    own = {leader: router_tensors(modules[owners[leader]]) for leader in leaders}
    return {
        name: t | {f"{ROUTER}.{n}": v for n, v in own.get(name, {}).items()} for name, t in without.items()
    }


def _new_owners(config: MoloraConfig, routed: Sequence[str]) -> list[str]:
    """The first module of each scope, of the whole model where all share one router."""
    if config.router_scope == "model":
        return [routed[0]]
    scopes = routing_scopes(routed, config.router_scope)
    return list({scope: name for name, scope in reversed(scopes.items())}.values())


def _with_classifier(
    modules: _Modules, kept: _Modules, routed: Sequence[str], only: Sequence[str]
) -> _Modules:
    every = {name for name, tensors in modules.items() if is_routed(tensors)}
    if every != set(routed):
        raise _refused(only, "must keep all routed modules of X-LoRA, whose gates come from one classifier")
    return kept | {name: tensors for name, tensors in modules.items() if "lora_B" not in tensors}


def _without_router(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensor for role, tensor in tensors.items() if role.split(".")[0] != ROUTER}


def _refuse_blocks(config: MoloraConfig, only: Sequence[str]) -> None:
    if config.experts != "linear":
        raise _refused(only, "must not cut through blocks of experts, which are adapted whole")


def _named(config: MoloraConfig, routed: Sequence[str], plain: Sequence[str]) -> MoloraConfig:
    exact = {"molora": tuple(map(re.escape, routed)), "lora": tuple(map(re.escape, plain))}
    return replace(config, **exact)  # type: ignore[arg-type]


def _flat(modules: _Modules) -> dict[str, Tensor]:
    return {f"{name}.{role}": t for name, tensors in modules.items() for role, t in tensors.items()}


def _refused(only: Sequence[str], rule: str) -> ConfigError:
    return ConfigError("--only", [Problem("only", rule, ", ".join(only))])
