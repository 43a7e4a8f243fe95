"""The trainable state out of and into a DeepSpeed engine, whole whatever stage, world and ep_size.

Facts of DeepSpeed 0.19.8 that this relies on are kept as tests in tests/distributed/test_state.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_medical.distributed.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainableState:
    """fp32 CPU tensors by parameter name, whole whatever the sharding.

    Attributes:
        parameters: adapters and routers.
        moments: Adam's running averages, `{"exp_avg": {...}, "exp_avg_sq": {...}}`.
        step: optimizer steps done.
        applied: those that have updated something, which is what Adam corrects its averages by; None for all.
    """

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    step: int = 0
    applied: int | None = None


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Whole shape of every trainable tensor, which ZeRO-3 keeps beside its empty stand-in."""
    return {name: _whole_shape(engine, name) for name in engine.named}


def _whole_shape(engine: Engine, name: str) -> tuple[int, ...]:
    parameter = engine.named[name]
    first, *rest = getattr(parameter, "ds_shape", parameter.shape)
    peers = engine.group.size if engine.group and name in engine.experts else 1
    return first * peers, *rest


def gather_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole fp32 trainable tensors by name. Collective: every rank must call."""
    return {name: _whole(engine, name, _master(engine, p)) for name, p in engine.named.items()}


def gather_state(engine: Engine, step: int) -> TrainableState:
    """Parameters and moments after `step` optimizer steps. Collective: every rank must call."""
    _ensure_moments(engine)
    moments = {
        key: {n: _whole(engine, n, _moment(engine, p, key)) for n, p in engine.named.items()}
        for key in MOMENTS
    }
    return TrainableState(gather_parameters(engine), moments, step, engine.applied_steps)


@torch.no_grad()
def load_state(engine: Engine, state: TrainableState) -> None:
    """Put a whole state into the engine's own layout, as if it had made those steps itself."""
    _ensure_moments(engine)
    for name, parameter in engine.named.items():
        _set_master(engine, parameter, _own(engine, name, state.parameters[name]))
        for key in MOMENTS:
            _set_moment(engine, parameter, key, _own(engine, name, state.moments[key][name]))
    _refresh_forward_copies(engine)
    _set_step(engine, state.step, state.step if state.applied is None else state.applied)


def _whole(engine: Engine, name: str, own: torch.Tensor) -> torch.Tensor:
    """A tensor of this rank with the experts of its peers, on the CPU in float32."""
    if engine.group is not None and name in engine.experts:
        own = engine.group.whole(own)
    return own.detach().to("cpu", torch.float32, copy=True).contiguous()


def _own(engine: Engine, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Undo `_whole`."""
    sharded = engine.group is not None and name in engine.experts
    return engine.group.own(whole).contiguous() if engine.group and sharded else whole


def _master(engine: Engine, parameter: nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    # NOTE(deepspeed): ZeRO-0 in fp32 keeps no separate master copy.
    value: torch.Tensor = parameter if engine.stage == 0 else safe_get_full_fp32_param(parameter)
    return value.detach()


def _moment(engine: Engine, parameter: nn.Parameter, key: str) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.stage == 0:
        value: torch.Tensor = _torch_optimizer(engine).state[parameter][key]
    else:
        value = safe_get_full_optimizer_state(parameter, key)
    return value.detach()


def _set_master(engine: Engine, parameter: nn.Parameter, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.stage == 0:
        parameter.copy_(value)
    elif engine.stage == 3:
        _set_partition(engine, parameter, value)
    else:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _set_moment(engine: Engine, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    if engine.stage == 0:
        _torch_optimizer(engine).state[parameter][key].copy_(value)
    elif engine.stage == 3:
        _set_partition(engine, parameter, value, key)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _set_partition(
    engine: Engine, parameter: nn.Parameter, value: torch.Tensor, key: str | None = None
) -> None:
    """This rank's part of a master, or of the moment `key`."""
    # NOTE(deepspeed): its own setter fails on a last part that is padded.
    outer = engine.deepspeed.optimizer
    part, _ = outer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = part.numel() * outer._get_param_partition_rank(parameter)
    filled = value.flatten()[start : start + part.numel()]
    part[: filled.numel()].copy_(filled)


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    outer = engine.deepspeed.optimizer
    return outer if engine.stage == 0 else outer.optimizer


def _flat_masters(engine: Engine) -> Iterable[torch.Tensor]:
    """The tensors that the inner optimizer really steps."""
    outer = engine.deepspeed.optimizer
    if engine.stage == 0:
        return engine.named.values()
    if engine.stage == 3:
        return outer.fp32_partitioned_groups_flat
    return outer.single_partition_of_fp32_groups


def _ensure_moments(engine: Engine) -> None:
    """Give every master its Adam state, which torch makes at the first step only."""
    optimizer = _torch_optimizer(engine)
    fused = bool(optimizer.defaults.get("fused"))
    for master in _flat_masters(engine):
        if not optimizer.state.get(master):
            step = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            fresh = {key: torch.zeros_like(master.data) for key in MOMENTS}
            optimizer.state[master] = {"step": step, **fresh}
    outer = engine.deepspeed.optimizer
    if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
        # NOTE(deepspeed): 0.19.8 links parameters to their state once, possibly before it existed.
        outer._hp_optimizer_states_linked = False
        outer._lazy_init_hp_params_optimizer_state()


def _refresh_forward_copies(engine: Engine) -> None:
    """Masters -> the tensors that forward reads."""
    outer: Any = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        outer.update_lp_params()
    if engine.stage == 3:
        for i, master in enumerate(outer.fp32_partitioned_groups_flat):
            _refresh_partition(outer, i, master)
        if outer.persistent_parameters:
            outer.persistent_parameters[0].partition(outer.persistent_parameters)
            outer.persistent_parameters[0].all_gather(outer.persistent_parameters)


def _refresh_partition(outer: Any, group: int, master: torch.Tensor) -> None:
    if not master.numel():
        return
    flat = outer.fp16_partitioned_groups_flat[group]
    parts = outer.fp16_partitioned_groups[group]
    flat.data.copy_(master.data)
    for part, fresh in zip(parts, outer.unflatten(flat, parts), strict=True):
        part.data = fresh.data


def _set_step(engine: Engine, step: int, applied: int) -> None:
    for state in _torch_optimizer(engine).state.values():
        state["step"].fill_(float(applied))
    engine.applied_steps = applied
    engine.deepspeed.global_steps = step
    engine.deepspeed.global_samples = step * engine.deepspeed.train_batch_size()
    engine.deepspeed.micro_steps = step
