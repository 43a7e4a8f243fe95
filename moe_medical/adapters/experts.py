"""Low-rank experts of one linear layer applied to all tokens at once (the concat path); plain LoRA is the
case without a gate.

Decisions: experts are stacked, lora_A (E, rank, D) and lora_B (E, F, rank), one PEFT LoRA per first index.
Their weighted sum is one LoRA of rank H = E * rank whose hidden units are multiplied by their expert's gate,
so two GEMMs serve any E; unchosen experts get gate 0. No loop over experts, no host synchronisation, and
every expert takes part in backward on every rank. It spends E / K times the FLOPs of the chosen experts
alone, which is small while H is small against D and F.

The gradient is written out because autograd would keep too much for backward: a float mask and the dropped
input of every adapter, and copies of A and B in the compute dtype. Kept here are only the layer's input
(which its neighbours and the router share), a byte mask, the T x H hidden units and the parameters.

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
    zeros_TE = torch.zeros_like(routing.logits_TE)
    return zeros_TE.scatter(-1, routing.expert_ids_TK, routing.weights_TK)


def add_low_rank(
    y_TF: Tensor,
    x_TD: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    gate_TE: Tensor | None = None,
    exchange: WeightExchange | None = None,
) -> Tensor:
    """y + scaling * sum_i gate_i B_i A_i dropout(x), computed in the dtype of y.

    Args:
        y_TF: Output of the base layer; not changed.
        x_TD: Input of the layer; not changed.
        lora_A: (E, rank, D), or (rank, D) for one adapter without a gate.
        lora_B: (E, F, rank), or (F, rank).
        scaling: alpha / rank.
        dropout: Probability that an input feature of a token is zeroed; the others grow by 1 / (1 - dropout).
        gate_TE: Weight of each expert, or None for a plain LoRA.
        exchange: Brings the experts of the other ranks; lora_A and lora_B are then (e, ...), this rank's.

    Returns:
        (T, F), in the dtype of y.
    """
    result: Tensor = _AddLowRank.apply(y_TF, x_TD, lora_A, lora_B, gate_TE, exchange, scaling, dropout)
    return result


class _AddLowRank(torch.autograd.Function):
    """The concat path with its gradient; H = E * rank, and `scale` holds 1 / (1 - dropout) too."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TF: Tensor,
        x_TD: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate_TE: Tensor | None,
        exchange: WeightExchange | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        keep_TD = torch.empty_like(x_TD, dtype=torch.uint8).bernoulli_(1 - dropout) if dropout > 0 else None
        ctx.scale, ctx.dtype, ctx.exchange = scaling / (1 - dropout), y_TF.dtype, exchange
        with torch.autocast(y_TF.device.type, enabled=False):
            all_A, all_B = exchange.gather(lora_A, lora_B) if exchange else (lora_A, lora_B)
            assert gate_TE is None or gate_TE.shape[1] == len(all_A), "a shard of experts needs an exchange"
            hidden_TH = _dropped(x_TD, keep_TD, y_TF.dtype) @ _flat_A(all_A, y_TF.dtype).t()
            kept = (all_A, all_B) if exchange and exchange.keep else ()
            ctx.save_for_backward(x_TD, lora_A, lora_B, gate_TE, keep_TD, hidden_TH, *kept)
            gated_TH = _gated(hidden_TH, gate_TE, ctx.scale)
            return y_TF.addmm(gated_TH, _flat_B(all_B, y_TF.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, lora_A, lora_B, gate_TE, keep_TD, hidden_TH, *kept = ctx.saved_tensors
        grad_x = grad_gate = None
        with torch.autocast(grad_TF.device.type, enabled=False):
            all_A, all_B = kept or (ctx.exchange.gather(lora_A, lora_B) if ctx.exchange else (lora_A, lora_B))
            grad_gated_TH = grad_TF @ _flat_B(all_B, ctx.dtype)
            grad_hidden_TH = _gated(grad_gated_TH, gate_TE, ctx.scale)
            grad_A = grad_hidden_TH.t() @ _dropped(x_TD, keep_TD, ctx.dtype)
            grad_B = _stacked_B(grad_TF.t() @ _gated(hidden_TH, gate_TE, ctx.scale), all_B)
            grad_A, grad_B = grad_A.view(all_A.shape).to(lora_A.dtype), grad_B.to(lora_B.dtype)
            summed = ctx.exchange.reduce(grad_A, grad_B) if ctx.exchange else None
            if gate_TE is not None:
                per_unit = (grad_gated_TH * hidden_TH).unflatten(-1, (gate_TE.shape[1], -1))
                grad_gate = per_unit.sum(-1, dtype=gate_TE.dtype) * ctx.scale
            if ctx.needs_input_grad[1]:
                grad_x = _dropped(grad_hidden_TH @ _flat_A(all_A, ctx.dtype), keep_TD, x_TD.dtype)
        grad_A, grad_B = summed.wait() if summed else (grad_A, grad_B)
        return grad_TF, grad_x, grad_A, grad_B, grad_gate, None, None, None


def _dropped(x_TD: Tensor, keep_TD: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x with dropped features zeroed; a uint8 mask multiplies 3-4 times faster on CPU than a bool one."""
    x_TD = x_TD.to(dtype)
    return x_TD if keep_TD is None else x_TD * keep_TD


def _gated(hidden_TH: Tensor, gate_TE: Tensor | None, scale: float) -> Tensor:
    """Each expert's units times its gate and the scale; scaled in float32, rounded once."""
    if gate_TE is None:
        return hidden_TH * scale
    weight_TE1 = (gate_TE * scale).to(hidden_TH.dtype).unsqueeze(-1)
    return (hidden_TH.unflatten(-1, (gate_TE.shape[1], -1)) * weight_TE1).view(hidden_TH.shape)


def _flat_A(lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, rank, D) or (rank, D) -> (H, D)."""
    return lora_A.to(dtype).reshape(-1, lora_A.shape[-1])


def _flat_B(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, F, rank) or (F, rank) -> (F, H), with A's order of hidden units."""
    return lora_B.to(dtype).movedim(-2, 0).reshape(lora_B.shape[-2], -1)


def _stacked_B(flat_B: Tensor, like: Tensor) -> Tensor:
    """Undo `_flat_B`."""
    return flat_B.view(like.shape[-2], *like.shape[:-2], like.shape[-1]).movedim(0, -2)
