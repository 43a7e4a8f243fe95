"""The weighted sum of a layer's low-rank experts, added to the base layer's output.

    y + scaling * sum_i gate_i B_i A_i dropout(x)          experts are stacked, one PEFT LoRA per first index

`apply_lora` is for a plain LoRA and for gates of all experts, `apply_topk` for the chosen ones. Three paths
compute it (`PATHS`); here is what they share. `ExpertPath` is a layer's choice among them.

Decisions:
- The gradient is written out because autograd would keep too much for backward: a float mask and the dropped
  input of every adapter, and copies of A and B in the compute dtype. Kept here are only the layer's input (by
  reference; its neighbours and the router share it), hidden units, the gate and the parameters.
- The delta is added into the base layer's output where the caller allows it and autograd does too. For views
  (backward would copy the whole gradient), for leaves and under `torch.compile` the result is a new tensor.
- Under expert parallelism the parameters are this rank's experts only; a `WeightExchange` brings the others
  just before they are used, in forward and again in backward, so that no rank keeps all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_medical.adapters import concat, grouped, kernels
from moe_medical.adapters.dropout import draw_mask, masked
from moe_medical.adapters.exchange import WeightExchange
from moe_medical.adapters.paths import GatedLora, Path, Wanted, spread_gate
from moe_medical.adapters.routing import Routing
from moe_medical.errors import ConfigError, Problem


class LoraFactors(NamedTuple):
    """The low-rank experts of a layer, as it holds them."""

    lora_A: Tensor
    """(E, rank, D), or (rank, D) for one adapter without a gate or shared by all experts."""
    lora_B: Tensor
    """(E, F, rank), or (F, rank)."""
    scaling: float
    """alpha / rank."""
    dropout: float = 0.0
    """Probability that an input feature of a token is zeroed; the others grow so that their mean stays."""


def apply_lora(
    y: Tensor, x: Tensor, factors: LoraFactors, gate_TE: Tensor | None = None, *, overwrite: bool = False
) -> Tensor:
    """y plus the delta of x, computed in the dtype of y.

    Args:
        y: Output of the base layer (..., F), of any leading shape that makes T tokens.
        x: Input of the layer (..., D), of the same leading shape; not changed.
        factors: Of all experts.
        gate_TE: Weight of each expert, or None for a plain LoRA.
        overwrite: Whether y is the caller's own, so that the delta may be added into it. Whoever else kept a
            reference to it, a forward hook of the base layer for one, then sees the sum.

    Returns:
        Shape and dtype of y; the same memory where it was overwritten.
    """
    call = _Call("concat", factors.scaling, factors.dropout, overwrite and may_overwrite(y))
    return _apply(y, x, factors, gate_TE, None, call)


def apply_topk(
    y: Tensor,
    x: Tensor,
    factors: LoraFactors,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    path: str = "concat",
    exchange: WeightExchange | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`apply_lora` with the gates of chosen experts, of which alone the hidden units are kept.

    Args:
        y, x, overwrite: See `apply_lora`.
        factors: Of all experts, or of this rank's where there is an exchange.
        expert_ids_TK: int64, no expert twice in a row.
        weights_TK: Gate of each chosen expert.
        path: Of `PATHS`; `concat` where experts are exchanged.
        exchange: Brings the experts of the other ranks.
    """
    call = _Call(path, factors.scaling, factors.dropout, overwrite and may_overwrite(y), exchange)
    return _apply(y, x, factors, weights_TK, expert_ids_TK, call)


def dense_gate(routing: Routing) -> Tensor:
    """(T, E) float32: the gate of each expert, 0 where it was not chosen."""
    return spread_gate(routing.weights_TK, routing.expert_ids_TK, routing.logits_TE.shape[-1])


def may_overwrite(y: Tensor) -> bool:
    """Whether autograd lets a custom function add into y, and gains by it."""
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.is_contiguous():
        return False
    return not torch.is_grad_enabled() or not (y._is_view() or (y.is_leaf and y.requires_grad))


# Autograd


class _Call(NamedTuple):
    """How the experts are applied; what is not a tensor."""

    path: str
    scaling: float
    dropout: float
    overwrite: bool
    exchange: WeightExchange | None = None


def _apply(
    y: Tensor, x: Tensor, factors: LoraFactors, gate: Tensor | None, ids_TK: Tensor | None, call: _Call
) -> Tensor:
    if torch.is_grad_enabled() or call.dropout or call.exchange:
        result: Tensor = _ApplyExperts.apply(y, x, factors.lora_A, factors.lora_B, gate, ids_TK, call)
        return result
    # Answers: one token at a time, so that what autograd's machinery costs would count.
    y = y if call.overwrite else y.clone(memory_format=torch.contiguous_format)
    with torch.autocast(y.device.type, enabled=False):
        lora = GatedLora(factors.lora_A, factors.lora_B, gate, call.scaling, y.dtype)
        PATHS[call.path].path.add(_rows(y), _rows(x.to(y.dtype)), lora, ids_TK, False)
    return y


class _ApplyExperts(torch.autograd.Function):
    """Any path with its gradient.

    `gate` is (T, E); with `ids_TK` it is (T, K).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        ids_TK: Tensor | None,
        call: _Call,
    ) -> Tensor:
        mask, ctx.dropout, share = draw_mask(x, call.dropout)
        # No tensor is kept in ctx but by save_for_backward: else activation checkpointing could not free it.
        ctx.call = call
        ctx.scale = call.scaling / share
        ctx.dtype = y.dtype
        if call.overwrite:
            ctx.mark_dirty(y)  # so that autograd notices whoever has saved y for a backward of its own
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        # The paths compute in the dtype of y, which may not be the one that autocast would choose.
        with torch.autocast(y.device.type, enabled=False):
            all_A, all_B = call.exchange.gather(lora_A, lora_B) if call.exchange else (lora_A, lora_B)
            lora = GatedLora(all_A, all_B, gate, ctx.scale, y.dtype)
            kept = PATHS[call.path].path.add(_rows(y), _rows(masked(x, mask, y.dtype)), lora, ids_TK, True)
        gathered = (all_A, all_B) if call.exchange and call.exchange.keep else ()
        ctx.num_gathered = len(gathered)
        kept_mask = None if ctx.dropout else mask  # backward draws it again where it can
        ctx.save_for_backward(x, lora_A, lora_B, gate, kept_mask, *gathered, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, gate, mask, *saved = ctx.saved_tensors
        gathered = saved[: ctx.num_gathered]
        kept = saved[ctx.num_gathered :]
        _, wants_x, wants_A, wants_B, wants_gate, *_ = ctx.needs_input_grad
        exchange = ctx.call.exchange
        wanted = Wanted(bool(wants_A or wants_B or exchange), wants_gate, x.shape if wants_x else None)
        mask = ctx.dropout.mask(x, again=True) if ctx.dropout else mask
        travelling = None
        with torch.autocast(grad_y.device.type, enabled=False):
            all_A, all_B = gathered or (exchange.gather(lora_A, lora_B) if exchange else (lora_A, lora_B))
            gradients = PATHS[ctx.call.path].path.gradients(
                _rows(grad_y),
                _rows(masked(x, mask, ctx.dtype)) if wanted.factors else None,
                GatedLora(all_A, all_B, gate, ctx.scale, ctx.dtype),
                kept,
                wanted,
            )
            grad_A, grad_B = next(gradients)
            grad_A = None if grad_A is None else grad_A.to(lora_A.dtype)
            grad_B = None if grad_B is None else grad_B.to(lora_B.dtype)
            if exchange:  # on their way while the rest is computed
                travelling = exchange.reduce(grad_A, grad_B)
            grad_gate, grad_x = next(gradients)
            if grad_x is not None:
                grad_x = (grad_x if mask is None else grad_x.mul_(mask)).to(x.dtype)
        if travelling:
            grad_A, grad_B = travelling.wait()
        return grad_y, grad_x, grad_A, grad_B, grad_gate, None, None


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D)."""
    return x.reshape(-1, x.shape[-1])


# Which path


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of one layer's experts, as far as they decide about a path."""

    num_experts: int
    rank: int
    top_k: int
    """Gates of a token."""
    in_features: int
    out_features: int
    shared_a: bool = False
    """Whether all experts share A."""

    @property
    def flops_over_base(self) -> float:
        """FLOPs of the concat path over those of the base layer, E * rank * (D + F) / (D * F)."""
        hidden = self.num_experts * self.rank
        return hidden * (self.in_features + self.out_features) / (self.in_features * self.out_features)


MEASURED: tuple[tuple[int, int, int, int, dict[tuple[int, int], float]], ...] = (
    # D, F, T, K, then by (E, rank): time of concat over that of grouped
    (768, 2048, 512, 2, {(8, 8): 0.5, (8, 16): 0.8, (16, 16): 1.3, (64, 16): 4.4}),
    (768, 2048, 2048, 2, {(8, 8): 0.4, (8, 16): 0.6, (16, 16): 1.3, (64, 16): 6.0}),
    (2048, 768, 512, 2, {(8, 8): 0.8, (8, 16): 1.4, (16, 16): 2.2, (64, 16): 5.2}),
    (2048, 768, 2048, 2, {(8, 8): 0.4, (8, 16): 0.6, (16, 16): 1.1, (64, 16): 5.0}),
    (576, 1536, 512, 2, {(8, 8): 0.8, (8, 16): 1.4, (16, 16): 2.4, (64, 16): 6.1}),
    (576, 1536, 2048, 2, {(8, 8): 0.5, (8, 16): 0.8, (16, 16): 1.4, (64, 16): 7.9}),
    (768, 2048, 512, 1, {(8, 8): 0.9, (8, 16): 1.7, (16, 16): 3.4, (64, 16): 7.9}),
    (768, 2048, 512, 4, {(8, 8): 0.3, (8, 16): 0.8, (16, 16): 1.4, (64, 16): 3.6}),
    (768, 2048, 512, 6, {(8, 8): 0.2, (8, 16): 0.4, (16, 16): 0.6, (64, 16): 1.9}),
)
"""Forward and backward of the adapter alone, CPU, one thread, float32; bfloat16 breaks even at the same
FLOPs. On a GPU nothing was measured."""


def _triton_misfit(shape: ExpertShape, device_type: str, dtype: torch.dtype) -> Problem | None:
    if kernels.available(device_type, shape.rank):
        return None
    rule = f"must not be `triton` without a GPU, Triton and a rank 2^n of at most {kernels.MAX_RANK}"
    return Problem("adapters.path", rule, f"{device_type}, rank {shape.rank}", _TAKE_AUTO)


def _grouped_misfit(shape: ExpertShape, device_type: str, dtype: torch.dtype) -> Problem | None:
    # Of torch's grouped GEMMs on a GPU only that of bfloat16 reads the offsets on the device.
    if device_type != "cpu" and dtype != torch.bfloat16:
        rule = "must not be `grouped` on a GPU below bfloat16"
        return Problem("adapters.path", rule, str(dtype), _TAKE_AUTO)
    sizes = (shape.rank, shape.in_features, shape.out_features)
    step = grouped.ALIGNMENT_BYTES // dtype.itemsize
    if all(size % step == 0 for size in sizes):
        return None
    rule = f"must not be `grouped` unless rank and the layer's sizes are multiples of {step} in {dtype}"
    return Problem("adapters.path", rule, sizes, _TAKE_AUTO)


_TAKE_AUTO = "Use `auto`, which takes what fits."


class _PathRow(NamedTuple):
    """What is known of a path."""

    path: Path
    knows_shared_a: bool
    """Whether all experts may have one A."""
    misfit: Callable[[ExpertShape, str, torch.dtype], Problem | None]
    """What keeps it from a shape, a device type and a compute dtype."""
    faster: Callable[[ExpertShape, str], bool]
    """Whether it beats the rows below on a device type."""


PATHS = {
    "triton": _PathRow(kernels, False, _triton_misfit, lambda shape, device: device != "cpu"),
    # Where `MEASURED` has no time below 1, that is; with K = E every expert computes every token anyhow.
    "grouped": _PathRow(
        grouped,
        False,
        _grouped_misfit,
        lambda shape, device: shape.flops_over_base > shape.top_k / 6 and shape.top_k < shape.num_experts,
    ),
    "concat": _PathRow(concat, True, lambda shape, device, dtype: None, lambda shape, device: True),
}
"""`adapters.path` -> a path; `auto` takes the first that fits and is faster than those below."""


def choose_path(wanted: str, shape: ExpertShape, device_type: str, dtype: torch.dtype) -> str:
    """`concat`, `grouped` or `triton`: what was asked for, or the fastest that fits for `auto`.

    Args:
        wanted: `adapters.path` of the run file.
        shape: Of the layer.
        device_type: `cpu` or `cuda`.
        dtype: What the layer computes in: that of the base layer's output.

    Raises:
        ConfigError: The path that was asked for does not fit.
    """
    for name in PATHS if wanted == "auto" else (wanted,):
        row = PATHS[name]
        problem = row.misfit(shape, device_type, dtype)
        if shape.shared_a and not row.knows_shared_a:
            rule = "must be `concat` or `auto` where experts share A"
            problem = Problem("adapters.path", rule, name, _TAKE_AUTO)
        if wanted != "auto" and problem is not None:
            raise ConfigError("adapters", [problem])
        if wanted != "auto" or (problem is None and row.faster(shape, device_type)):
            return name
    raise AssertionError("concat fits everywhere")


class ExpertPath:
    """The path of one layer: chosen when it first computes on a device and in a dtype, and kept.

    Args:
        wanted: `adapters.path` of the run file.
        shape: Of the layer.
    """

    def __init__(self, wanted: str, shape: ExpertShape) -> None:
        self._wanted = wanted
        self._shape = shape
        self._chosen: dict[tuple[str, torch.dtype], str] = {}

    def on(self, device_type: str, dtype: torch.dtype) -> str:
        """`concat`, `grouped` or `triton`.

        Raises:
            ConfigError: The path that was asked for does not fit there.
        """
        place = (device_type, dtype)
        if place not in self._chosen:
            self._chosen[place] = choose_path(self._wanted, self._shape, *place)
        return self._chosen[place]
