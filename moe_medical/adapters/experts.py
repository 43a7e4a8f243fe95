"""Low-rank experts of one linear layer applied to all tokens at once (the concat path); plain LoRA is the
case without a gate.

Decisions: experts are stacked, lora_A (E, rank, D) and lora_B (E, F, rank), one PEFT LoRA per first index.
Their weighted sum is one LoRA of rank H = E * rank whose hidden units are multiplied by their expert's gate,
so two GEMMs serve any E; unchosen experts get gate 0. No loop over experts, no host synchronisation, and
every expert takes part in backward on every rank. It spends E / K times the FLOPs of the chosen experts
alone, which is small while H is small against D and F. With an A that all experts share (HydraLoRA, arXiv
2404.19245) the `rank` hidden units are computed once, and each expert's gated copy meets its own B.

The gradient is written out because autograd would keep too much for backward: a float mask and the dropped
input of every adapter, and copies of A and B in the compute dtype. Kept here are only the layer's input (by
reference; its neighbours and the router share it), the hidden units (with `add_chosen` only those of the
chosen experts: the others meet a gate of 0 and no gradient), the gate and the parameters. The mask
of dropout is drawn again in backward from the state that the generator had: that takes less time than one
Bernoulli draw of torch on CPU, and nothing is kept.

The delta is added into the base layer's output where the caller allows it and autograd does too. Under
`torch.compile`, for views (backward would copy the whole gradient) and for leaves the result is a new tensor.

Under expert parallelism the parameters are this rank's experts only; a `WeightExchange` brings the others
just before they are used, in forward and again in backward, so that no rank keeps all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_medical.adapters.exchange import WeightExchange
from moe_medical.adapters.routing import Routing


def dense_gate(routing: Routing) -> Tensor:
    """(T, E) float32: the gate of each expert, 0 where it was not chosen."""
    return spread_gate(routing.weights_TK, routing.expert_ids_TK, routing.logits_TE.shape[-1])


def add_low_rank(
    y_TF: Tensor,
    x_TD: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    gate_TE: Tensor | None = None,
    exchange: WeightExchange | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """y + scaling * sum_i gate_i B_i A_i dropout(x), computed in the dtype of y.

    Args:
        y_TF: Output of the base layer (..., F), of any leading shape that makes T tokens.
        x_TD: Input of the layer (..., D), of the same leading shape; not changed.
        lora_A: (E, rank, D), or (rank, D) for one adapter without a gate or shared by all experts.
        lora_B: (E, F, rank), or (F, rank).
        scaling: alpha / rank.
        dropout: Probability that an input feature of a token is zeroed, to 1 / 65536; the others grow so that
            their mean stays.
        gate_TE: Weight of each expert, or None for a plain LoRA.
        exchange: Brings the experts of the other ranks; lora_A and lora_B are then (e, ...), this rank's.
        overwrite: Whether y is the caller's own, so that the delta may be added into it. Whoever else kept a
            reference to it, a forward hook of the base layer for one, then sees the sum.

    Returns:
        Shape and dtype of y; the same memory where it was overwritten.
    """
    overwrite = overwrite and may_overwrite(y_TF)
    return _add(y_TF, x_TD, lora_A, lora_B, gate_TE, None, exchange, scaling, dropout, overwrite)


def add_chosen(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    exchange: WeightExchange | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """`add_low_rank` with the gate of a routing, of which only the chosen experts' hidden units are kept.

    Args:
        y, x, lora_A, lora_B, scaling, dropout, exchange, overwrite: See `add_low_rank`.
        expert_ids_TK: int64, no expert twice in a row.
        weights_TK: Gate of each chosen expert.
    """
    overwrite = overwrite and may_overwrite(y)
    return _add(y, x, lora_A, lora_B, weights_TK, expert_ids_TK, exchange, scaling, dropout, overwrite)


def may_overwrite(y: Tensor) -> bool:
    """Whether autograd lets a custom function add into y, and gains by it."""
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.is_contiguous():
        return False
    return not torch.is_grad_enabled() or not (y._is_view() or (y.is_leaf and y.requires_grad))


class Dropout:
    """Masks over a layer's input that can be drawn again, so that they need not be kept.

    Sixteen random bits decide about each feature, several times faster on CPU than `bernoulli_`. They come
    from the device's default generator, whose state activation checkpointing and a resumed run restore.

    Args:
        device: Of the input.
        probability: Of zeroing a feature.
    """

    def __init__(self, device: torch.device, probability: float):
        self._kept_of_65536 = min(max(round((1 - probability) * 65536), 1), 65535)
        self._default = _default_generator(device)
        self._before = self._default.clone_state()

    @property
    def keep(self) -> float:
        """The exact probability that a feature stays."""
        return self._kept_of_65536 / 65536

    def mask(self, x: Tensor, again: bool = False) -> Tensor:
        """uint8 in the shape of x, 1 where it stays; `again` gives what the first call gave."""
        generator = self._before.clone_state() if again else self._default
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
        return (bits < self._kept_of_65536 - 32768).view(torch.uint8).view(x.shape)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    generator: torch.Generator = torch.get_device_module(device).default_generators[device.index]
    return generator


def _add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    ids_TK: Tensor | None,
    exchange: WeightExchange | None,
    scaling: float,
    dropout: float,
    overwrite: bool,
) -> Tensor:
    if torch.is_grad_enabled() or dropout or exchange:
        inputs = (y, x, lora_A, lora_B, gate, ids_TK, exchange, scaling, dropout, overwrite)
        result: Tensor = _AddLowRank.apply(*inputs)
        return result
    with torch.autocast(y.device.type, enabled=False):
        units = _Units(lora_A, lora_B, gate, ids_TK, scaling, y.dtype)
        gated_TH = units.gated(_rows(x.to(y.dtype)) @ units.flat_A.t())
        if not overwrite:
            return _rows(y).addmm(gated_TH, units.flat_B.t()).view(y.shape)
        _rows(y).addmm_(gated_TH, units.flat_B.t())
        return y


class _AddLowRank(torch.autograd.Function):
    """The concat path with its gradient; `scale` holds the growth under dropout too.

    `gate` is (T, E); with `ids_TK` it is (T, K), and of the hidden units the chosen experts' are kept.
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
        exchange: WeightExchange | None,
        scaling: float,
        dropout: float,
        overwrite: bool,
    ) -> Tensor:
        ctx.replay, ctx.scale, mask, kept_mask = None, scaling, None, None
        if dropout > 0 and torch.compiler.is_compiling():  # a traced graph knows no generators
            mask = kept_mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - dropout)
            ctx.scale = scaling / (1 - dropout)
        elif dropout > 0:
            ctx.replay = Dropout(x.device, dropout)
            mask, ctx.scale = ctx.replay.mask(x), scaling / ctx.replay.keep
        ctx.dtype, ctx.exchange = y.dtype, exchange
        with torch.autocast(y.device.type, enabled=False):
            all_A, all_B = exchange.gather(lora_A, lora_B) if exchange else (lora_A, lora_B)
            units = _Units(all_A, all_B, gate, ids_TK, ctx.scale, y.dtype)
            hidden_Th = _rows(masked(x, mask, y.dtype)) @ units.flat_A.t()
            kept = (all_A, all_B) if exchange and exchange.keep else ()
            ctx.save_for_backward(x, lora_A, lora_B, gate, ids_TK, kept_mask, units.chosen(hidden_Th), *kept)
            gated_TH, B_HF = units.gated(hidden_Th), units.flat_B.t()
            if not overwrite:
                return _rows(y).addmm(gated_TH, B_HF).view(y.shape)
            ctx.mark_dirty(y)
            _rows(y).addmm_(gated_TH, B_HF)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, gate, ids_TK, mask, hidden, *kept = ctx.saved_tensors
        _, wants_x, wants_A, wants_B, wants_gate, *_ = ctx.needs_input_grad
        mask = ctx.replay.mask(x, again=True) if ctx.replay else mask
        grad_TF, exchange = _rows(grad_y), ctx.exchange
        grad_x = grad_A = grad_B = grad_gate = summed = None
        with torch.autocast(grad_y.device.type, enabled=False):
            all_A, all_B = kept or (exchange.gather(lora_A, lora_B) if exchange else (lora_A, lora_B))
            units = _Units(all_A, all_B, gate, ids_TK, ctx.scale, ctx.dtype)
            hidden_Th = units.spread(hidden)
            grad_gated_TH = grad_TF @ units.flat_B
            grad_hidden_Th = units.ungated(grad_gated_TH)
            if wants_A or exchange:
                flat_A = grad_hidden_Th.t() @ _rows(masked(x, mask, ctx.dtype))
                grad_A = flat_A.view(all_A.shape).to(lora_A.dtype)
            if wants_B or exchange:
                grad_B = units.stacked_B(units.gated(hidden_Th).t() @ grad_TF).to(lora_B.dtype)
            if exchange:
                summed = exchange.reduce(grad_A, grad_B)
            if wants_gate:
                grad_gate = units.grad_gate(grad_gated_TH, hidden_Th)
            if wants_x:
                # In the shape of x without a view: autograd adds gradients in place only to a sole owner.
                grad_hidden = grad_hidden_Th.view(*x.shape[:-1], grad_hidden_Th.shape[-1])
                grad_x = grad_hidden @ units.flat_A
                grad_x = (grad_x if mask is None else grad_x.mul_(mask)).to(x.dtype)
        grad_A, grad_B = summed.wait() if summed else (grad_A, grad_B)
        return grad_y, grad_x, grad_A, grad_B, grad_gate, None, None, None, None, None


class _Units:
    """All experts of a layer as one LoRA of H hidden units; h = H, or rank where A is shared.

    Weights are in the compute dtype; a gate times the scale is rounded once.
    """

    def __init__(
        self,
        all_A: Tensor,
        all_B: Tensor,
        gate: Tensor | None,
        ids_TK: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ):
        experts = len(all_B) if all_B.dim() == 3 else 1
        self._shared_A = all_A.dim() < all_B.dim()
        self._experts, self._scale, self._ids_TK, self._B_shape = experts, scale, ids_TK, all_B.shape
        assert gate is not None or not self._shared_A, "experts that share A differ by their gates"
        self._weight_TE1 = self._gate_dtype = None
        if gate is not None:
            gate_TE = gate if ids_TK is None else spread_gate(gate, ids_TK, experts)
            assert gate_TE.shape[1] == experts, "a shard of experts needs an exchange"
            self._weight_TE1, self._gate_dtype = (gate_TE * scale).to(dtype).unsqueeze(-1), gate.dtype
        self.flat_A = all_A.to(dtype).reshape(-1, all_A.shape[-1])
        """(h, D)"""
        self.flat_B = all_B.to(dtype).movedim(-2, 0).reshape(all_B.shape[-2], -1)
        """(F, H)"""

    def gated(self, hidden_Th: Tensor) -> Tensor:
        """(T, H): each expert's units times its gate and the scale."""
        if self._weight_TE1 is None:
            return hidden_Th * self._scale
        return (self._per_expert(hidden_Th) * self._weight_TE1).flatten(1)

    def ungated(self, grad_gated_TH: Tensor) -> Tensor:
        """(T, h): gradient of the units from that of their gated copies."""
        if self._weight_TE1 is None:
            return grad_gated_TH * self._scale
        grad_TEr = grad_gated_TH.unflatten(-1, (self._experts, -1)) * self._weight_TE1
        return grad_TEr.sum(1) if self._shared_A else grad_TEr.flatten(1)

    def grad_gate(self, grad_gated_TH: Tensor, hidden_Th: Tensor) -> Tensor:
        """(T, E) or (T, K) in the gate's dtype."""
        per_unit = grad_gated_TH.unflatten(-1, (self._experts, -1)) * self._per_expert(hidden_Th)
        grad_TE = per_unit.sum(-1, dtype=self._gate_dtype) * self._scale
        return grad_TE if self._ids_TK is None else grad_TE.gather(1, self._ids_TK)

    def chosen(self, hidden_Th: Tensor) -> Tensor:
        """What backward needs of the units: (T, K, rank), those of chosen experts."""
        if self._ids_TK is None or self._shared_A:
            return hidden_Th
        units_TEr = self._per_expert(hidden_Th)
        return units_TEr.gather(1, self._ids_TK.unsqueeze(-1).expand(-1, -1, units_TEr.shape[-1]))

    def spread(self, hidden: Tensor) -> Tensor:
        """Undo `chosen`, with 0 for the others: (T, h)."""
        if self._ids_TK is None or self._shared_A:
            return hidden
        rank = hidden.shape[-1]
        units_TEr = hidden.new_zeros(len(hidden), self._experts, rank)
        return units_TEr.scatter_(1, self._ids_TK.unsqueeze(-1).expand(-1, -1, rank), hidden).flatten(1)

    def stacked_B(self, grad_HF: Tensor) -> Tensor:
        """(H, F) -> the shape of B."""
        *experts, features, rank = self._B_shape
        return grad_HF.view(*experts, rank, features).transpose(-1, -2)

    def _per_expert(self, hidden_Th: Tensor) -> Tensor:
        return hidden_Th.unsqueeze(1) if self._shared_A else hidden_Th.unflatten(-1, (self._experts, -1))


def spread_gate(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E): 0 where an expert was not chosen."""
    zeros_TE = weights_TK.new_zeros(len(weights_TK), num_experts)
    return zeros_TE.scatter(-1, ids_TK, weights_TK)


def masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x with dropped features zeroed; a uint8 mask multiplies 3-4 times faster on CPU than a bool one."""
    x = x.to(dtype)
    return x if mask is None else x * mask


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D)."""
    return x.reshape(-1, x.shape[-1])
