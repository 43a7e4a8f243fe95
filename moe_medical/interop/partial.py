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

from moe_medical.adapters.model import router_groups
from moe_medical.config.adapters import ATTENTION, FFN, MoloraConfig
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
    # A state has the order of its file; the model's own decides which module of a scope is the first.
    modules = tensors_of_modules(state)
    adapted = {name: modules[name] for name in linears if name in modules}
    kept = _with_role(_with_names(adapted, only), only)
    if "shared" in only:
        return _shared_only(config, kept)
    if "routed" in only and config.shared_experts:
        _refuse_to_cut_blocks(config, only)
        shared = ("shared_A", "shared_B", "shared_gate")
        kept = {n: {role: t for role, t in own.items() if role not in shared} for n, own in kept.items()}
        config = replace(config, shared_experts=0, learn_shared_weight=False)
    routed = [name for name, tensors in kept.items() if is_routed(tensors)]
    plain = [name for name in kept if name not in routed]
    if routed:
        kept = _with_routers(config, modules, kept, routed, only)
    part = {f"{name}.{role}": t for name, tensors in kept.items() for role, t in tensors.items()}
    return _placed(config, routed, plain), part


def _with_names(modules: _Modules, only: Sequence[str]) -> _Modules:
    """Modules that any of the names or patterns selects; all where only a role is given."""
    patterns = [part for part in only if part not in ROLES]
    if not patterns:
        return modules
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in modules if re.fullmatch(_PATTERNS.get(pattern, pattern), name)}
        except re.error as error:
            rule = f"must be {', '.join([*_PATTERNS, *ROLES])} or a pattern ({error})"
            raise _refused(only, rule) from None
        if not found:
            raise _refused([pattern], "must select a module of the adapter")
        chosen |= found
    return {name: tensors for name, tensors in modules.items() if name in chosen}


def _with_role(modules: _Modules, only: Sequence[str]) -> _Modules:
    """Modules that have the one role that is asked for; all where none is."""
    roles = [part for part in only if part in ROLES]
    if len(roles) > 1:
        raise _refused(roles, f"must hold at most one of {', '.join(ROLES)}")
    if not roles:
        return modules
    found = {}
    for name, tensors in modules.items():
        has_role = {
            "routed": is_routed(tensors),
            "plain": "lora_B" in tensors and not is_routed(tensors),
            "shared": "shared_B" in tensors,
        }
        if has_role[roles[0]]:
            found[name] = tensors
    if not found:
        raise _refused(roles, "must select a module of the adapter")
    return found


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
        alpha=config.scaling * rank,  # so that alpha / rank stays, whatever rule the whole one had
        rank_split=False,
        rs_lora=False,
        dora=False,
        shared_experts=0,
        learn_shared_weight=False,
    )
    state = {f"{name}.lora_A": lora.A for name, lora in loras.items()}
    state |= {f"{name}.lora_B": lora.B for name, lora in loras.items()}
    return _placed(plain, [], list(loras)), state


def _with_routers(
    config: MoloraConfig, modules: _Modules, kept: _Modules, routed: Sequence[str], only: Sequence[str]
) -> _Modules:
    """The kept modules, with what routes for them where the attached model looks for it.

    Args:
        config: Of the part.
        modules: Of the whole adapter.
        kept: Of the part, as they were.
        routed: Those of the part with routed experts.
        only: For errors.
    """
    if config.experts != "linear":  # the router is the block's
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in routed)
        if not blocks.keys() <= modules.keys():
            _refuse_to_cut_blocks(config, only)
        return kept | {block: modules[block] for block in blocks}
    if (
        config.router_kind.decides_per == "text"
    ):  # one classifier for the whole model, which is no adapted linear
        if {name for name, tensors in modules.items() if is_routed(tensors)} != set(routed):
            rule = "must keep all routed modules of X-LoRA, whose gates come from one classifier"
            raise _refused(only, rule)
        return kept | {name: tensors for name, tensors in modules.items() if "lora_B" not in tensors}
    return _with_routers_of_groups(config, modules, kept, routed, only)


def _with_routers_of_groups(
    config: MoloraConfig, modules: _Modules, kept: _Modules, routed: Sequence[str], only: Sequence[str]
) -> _Modules:
    """Each group's router where attaching puts it: at the first of its linears that stay."""
    before = router_owners(config, modules)
    found = {}
    for name, tensors in kept.items():
        found[name] = {role: t for role, t in tensors.items() if role.partition(".")[0] != ROUTER}
    for owner in dict.fromkeys(group.owner for group in router_groups(routed, config.router_scope).values()):
        if before[owner] != owner and config.router_kind.decides_per != "task":
            # A task gate reads no layer's input and may stand anywhere; another would read another input.
            raise _refused(only, f"must keep {before[owner]}, whose input the router of others reads")
        own = router_tensors(modules[before[owner]])
        found[owner] |= {f"{ROUTER}.{name}": tensor for name, tensor in own.items()}
    return found


def _placed(config: MoloraConfig, routed: Sequence[str], plain: Sequence[str]) -> MoloraConfig:
    """The config with these very modules in place of the patterns, which would match others too."""
    return replace(config, molora=tuple(map(re.escape, routed)), lora=tuple(map(re.escape, plain)))


def _refuse_to_cut_blocks(config: MoloraConfig, only: Sequence[str]) -> None:
    if config.experts != "linear":
        raise _refused(only, "must not cut through blocks of experts, which are adapted whole")


def _refused(only: Sequence[str], rule: str) -> ConfigError:
    return ConfigError("--only", [Problem("only", rule, ", ".join(only))])
