"""The low-rank update that an adapted linear comes to once its gates are fixed.

    delta W = scaling * (sum_i g_i B_i A_i + sum_s w_s B_s A_s) = scaling * B A

with A the experts' A on top of each other, (R, D), and B theirs side by side, (F, R), each column times its
gate: one LoRA of rank R = E * rank (MOELoRA, arXiv 2310.18339, sec. 3.5, kept as factors).

Decisions: pure functions of config and state, so that no model has to be built; all in float32, the gate
rounded once into B; experts with a gate of 0 are left out, a shared A is kept once. DoRA's magnitude goes
along as it is: it scales the rows of W0 + delta W, which are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_medical.adapters.placement import routing_scopes
from moe_medical.adapters.routers import TaskRouter, new_router
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, Problem

ROUTER = "router"
_LEAVES = ("lora_A", "lora_B", "magnitude", "shared_A", "shared_B", "shared_gate")


@dataclass(frozen=True)
class LowRank:
    """delta W = scaling * B A of one linear layer."""

    A: Tensor
    """(R, D) float32."""
    B: Tensor
    """(F, R) float32."""
    scaling: float
    magnitude: Tensor | None = None
    """(F,) with DoRA: the rows of W + delta W are scaled to these norms."""

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A)


def tensors_of_modules(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Adapted module -> its tensors by their role (`lora_A`, `router.weight`, ...), in the state's order."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, role = name.rpartition(".")
        parts = name.split(".")
        if role not in _LEAVES and ROUTER in parts:
            # The last one: what stands before it may be a module of the base that has this name too.
            place = len(parts) - 1 - parts[::-1].index(ROUTER)
            module = ".".join(parts[:place])
            role = ".".join(parts[place:])
        modules.setdefault(module, {})[role] = tensor
    return modules


def is_routed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module's tensors are those of routed experts, low-rank or full, rather than of one LoRA."""
    return any(role in tensors and tensors[role].dim() == 3 for role in ("lora_B", "weight"))


def router_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a module's own router, by their name there."""
    prefix = f"{ROUTER}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def router_owners(config: MoloraConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Routed linear -> the module whose tensors hold its router: that of its scope, or the only one."""
    owners = [name for name, tensors in modules.items() if router_tensors(tensors)]
    scopes = routing_scopes(modules, config.router_scope)
    of_scope = {scopes[owner]: owner for owner in owners}
    routed = [name for name, tensors in modules.items() if is_routed(tensors)]
    only = owners[0] if len(owners) == 1 else ""
    return {name: of_scope.get(scopes[name], only) for name in routed}


def gates_of_task(config: MoloraConfig, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Routed linear -> gate (E,) that the trained task router gives it for a task.

    Args:
        config: The adapter's, with `router: task`.
        state: Full parameter name -> tensor.
        number: Of the task.
    """
    modules = tensors_of_modules(state)
    owners = router_owners(config, modules)
    gates = {}
    for owner in dict.fromkeys(owners.values()):
        tensors = router_tensors(modules[owner])
        # The router is built anew rather than its equation written here a second time. Its E is that of its
        # own layer, and with it its top-k.
        experts = len(tensors["weight"])
        here = replace(config, num_experts=experts, experts_per_layer=(), top_k=config.active(experts))
        router = new_router(here, 1, torch.Generator())
        assert isinstance(router, TaskRouter), f"{owner} has a {config.router} router, which reads tokens"
        router.load_state_dict(tensors)
        gates[owner] = router.eval().gate_of(torch.tensor([number])).detach()
    return {name: gates[owner] for name, owner in owners.items()}


def effective_lora(
    config: MoloraConfig, state: Mapping[str, Tensor], gate_of_module: Mapping[str, Tensor]
) -> dict[str, LowRank]:
    """The low-rank update of each adapted linear.

    Args:
        config: The adapter's.
        state: Full parameter name -> tensor, of linear layers.
        gate_of_module: Routed module -> gate of each of its experts (E,).

    Raises:
        ConfigError: A routed module has no gate, or one of another number of experts.
    """
    loras: dict[str, LowRank] = {}
    problems = []
    for name, tensors in tensors_of_modules(state).items():
        if "lora_B" not in tensors:
            continue  # a router that stands by itself
        if not is_routed(tensors):
            A_RD = tensors["lora_A"].float()
            loras[name] = LowRank(A_RD, tensors["lora_B"].float(), config.scaling, tensors.get("magnitude"))
        elif name not in gate_of_module:
            problems.append(Problem(name, "must have a gate for its experts"))
        elif (given := len(gate_of_module[name])) != (experts := len(tensors["lora_B"])):
            problems.append(Problem(name, f"must have a gate of {experts} numbers, one per expert", given))
        else:
            loras[name] = _gated_lora(config, tensors, gate_of_module[name].detach().float().cpu())
    if problems:
        raise ConfigError("the gate", problems)
    return loras


def shared_lora(config: MoloraConfig, tensors: Mapping[str, Tensor]) -> LowRank:
    """The part of a routed module that every token uses: its shared experts with their weights."""
    A_SRD = tensors["shared_A"].float()
    B_SFR = tensors["shared_B"].float()
    weight_S = tensors.get("shared_gate", torch.full((len(A_SRD),), config.shared_weight))
    return LowRank(A_SRD.flatten(0, 1), _side_by_side(B_SFR, weight_S.float()), config.scaling)


def _gated_lora(config: MoloraConfig, tensors: Mapping[str, Tensor], gate_E: Tensor) -> LowRank:
    """Routed experts under one gate, and the shared experts beside them, as one LoRA."""
    A = tensors["lora_A"].float()
    B_EFR = tensors["lora_B"].float()
    if A.dim() == 2:
        # All experts read the same A x: sum_e g_e B_e (A x) = (sum_e g_e B_e) A x, which keeps the rank.
        lora = LowRank(A, torch.einsum("e,efr->fr", gate_E, B_EFR), config.scaling)
    else:
        # An expert without weight would only add columns of zeros.
        chosen = gate_E.nonzero().flatten()
        lora = LowRank(A[chosen].flatten(0, 1), _side_by_side(B_EFR[chosen], gate_E[chosen]), config.scaling)
    if "shared_A" not in tensors:
        return lora
    shared = shared_lora(config, tensors)
    return LowRank(torch.cat([lora.A, shared.A]), torch.cat([lora.B, shared.B], 1), config.scaling)


def _side_by_side(B_EFR: Tensor, gate_E: Tensor) -> Tensor:
    """(F, E * rank), each expert's columns times its gate: the gate is rounded into B once, never into A."""
    return (B_EFR * gate_E[:, None, None]).permute(1, 0, 2).flatten(1)
