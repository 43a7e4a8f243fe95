"""Low-rank experts on their own tokens only: tokens sorted by expert, one grouped GEMM for each weight.

The numbers are those of `experts.add_low_rank` with the gates of the same routing; `choose_path` says when
this way is the faster one. It spends K / E of the concat path's FLOPs and pays by moving tokens: their
N = T * K copies are gathered in both passes and summed again. Sorting, offsets and sums stay on the device;
nothing waits for the host. The copies of a token are summed by gathering them in a fixed order, so that the
result is the same in every run on every device.

Kept for backward are the layer's input (by reference), the (N, rank) hidden units, the order and the gates;
the sorted (N, D) inputs are gathered again, and the (N, F) outputs are not needed.

`add_routed` is what a layer calls: it takes the path that `choose_path` names for this device and dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, grouped_mm

from moe_medical.adapters import kernels
from moe_medical.adapters.exchange import WeightExchange
from moe_medical.adapters.experts import Dropout, add_chosen, masked, may_overwrite
from moe_medical.errors import ConfigError, Problem

_ALIGNMENT = 16  # bytes, of grouped_mm's strides


@cache
def choose_path(
    path: str,
    num_experts: int,
    rank: int,
    top_k: int,
    in_features: int,
    out_features: int,
    device_type: str,
    dtype: torch.dtype,
    shared_a: bool = False,
) -> str:
    """`concat`, `grouped` or `triton`: what was asked for, or the fastest that fits for `auto`.

    With rho = E * rank * (D + F) / (D * F), the concat path's FLOPs over the base layer's, `grouped` is taken
    from rho > K / 6 on, with K below E. Measured: the time of concat over that of grouped, forward and
    backward of the adapter alone, CPU, one thread, float32; bfloat16 breaks even at the same rho.

        D -> F         T    E8 r8   E8 r16  E16 r16  E64 r16   (K 2)
        768 -> 2048    512  0.5     0.8     1.3      4.4
        768 -> 2048   2048  0.4     0.6     1.3      6.0
        2048 -> 768    512  0.8     1.4     2.2      5.2
        2048 -> 768   2048  0.4     0.6     1.1      5.0
        576 -> 1536    512  0.8     1.4     2.4      6.1
        576 -> 1536   2048  0.5     0.8     1.4      7.9
        768 -> 2048    512  0.9     1.7     3.4      7.9       (K 1)
        768 -> 2048    512  0.3     0.8     1.4      3.6       (K 4)
        768 -> 2048    512  0.2     0.4     0.6      1.9       (K 6)

    On a GPU nothing was measured: there `auto` prefers the Triton kernels wherever they are available, and
    `grouped` is taken only in bfloat16, for which torch has a kernel that reads the offsets on the device.

    Args:
        path: Of the run file: `auto`, `concat`, `grouped` or `triton`.
        num_experts, rank, top_k, in_features, out_features: Of the layer.
        device_type: `cpu` or `cuda`.
        dtype: What the layer computes in: that of the base layer's output.
        shared_a: Whether all experts share A, which only `concat` knows.

    Raises:
        ConfigError: The path that was asked for does not fit.
    """
    sizes = (rank, in_features, out_features)
    aligned = all(size * dtype.itemsize % _ALIGNMENT == 0 for size in sizes)
    fits = {
        "concat": True,
        "grouped": aligned and not shared_a and (device_type == "cpu" or dtype == torch.bfloat16),
        "triton": not shared_a and kernels.available(device_type, rank),
    }
    if path == "auto":
        rho = num_experts * rank * (in_features + out_features) / (in_features * out_features)
        if device_type != "cpu" and fits["triton"]:
            return "triton"
        return "grouped" if fits["grouped"] and rho > top_k / 6 and top_k < num_experts else "concat"
    if not fits[path]:
        raise ConfigError("adapters", [_refusal(path, sizes, device_type, dtype, shared_a)])
    return path


def _refusal(
    path: str, sizes: tuple[int, int, int], device_type: str, dtype: torch.dtype, shared_a: bool
) -> Problem:
    fix = "Use `auto`, which takes what fits."
    if shared_a:
        return Problem("adapters.path", "must be `concat` or `auto` where experts share A", path, fix)
    if path == "triton":
        rule = f"must not be `triton` without a GPU, Triton and a rank 2^n of at most {kernels.MAX_RANK}"
        return Problem("adapters.path", rule, f"{device_type}, rank {sizes[0]}", fix)
    if device_type != "cpu" and dtype != torch.bfloat16:
        return Problem("adapters.path", "must not be `grouped` on a GPU below bfloat16", str(dtype), fix)
    step = _ALIGNMENT // dtype.itemsize
    rule = f"must not be `grouped` unless rank and the layer's sizes are multiples of {step} in {dtype}"
    return Problem("adapters.path", rule, sizes, fix)


def add_routed(
    path: str,
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
    """y + scaling * sum_k weight_k B_i A_i dropout(x), by the path of these tensors' device, dtype and sizes.

    Args:
        path: Of the run file, see `choose_path`; experts that are exchanged always go the concat path.
        y, x, lora_A, lora_B, scaling, dropout, expert_ids_TK, weights_TK, exchange, overwrite: See
            `experts.add_chosen`.
    """
    routed = (y, x, lora_A, lora_B, scaling, dropout, expert_ids_TK, weights_TK)
    if exchange is not None:
        return add_chosen(*routed, exchange, overwrite=overwrite)
    experts, features, rank = lora_B.shape
    sizes = (experts, rank, weights_TK.shape[1], x.shape[-1], features)
    chosen = choose_path(path, *sizes, y.device.type, y.dtype, lora_A.dim() == 2)
    add = {"concat": add_chosen, "grouped": add_grouped, "triton": kernels.add_fused}[chosen]
    result: Tensor = add(*routed, overwrite=overwrite)
    return result


def add_grouped(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    overwrite: bool = False,
) -> Tensor:
    """y + scaling * sum_k weight_k B_i A_i dropout(x) with i the k-th chosen expert, in the dtype of y.

    Args:
        y: Output of the base layer (..., F), of any leading shape that makes T tokens.
        x: Input of the layer (..., D); not changed.
        lora_A: (E, rank, D).
        lora_B: (E, F, rank).
        scaling: alpha / rank.
        dropout: As in `add_low_rank`, and the same mask from the same generator state.
        expert_ids_TK: int64, different ones in a row or not.
        weights_TK: Gate of each chosen expert.
        overwrite: Whether the delta may be added into y; see `add_low_rank`.

    Returns:
        Shape and dtype of y; the same memory where it was overwritten.
    """
    overwrite = overwrite and may_overwrite(y)
    inputs = (y, x, lora_A, lora_B, weights_TK, expert_ids_TK, scaling, dropout, overwrite)
    result: Tensor = _AddGrouped.apply(*inputs)
    return result


class _AddGrouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        scaling: float,
        dropout: float,
        overwrite: bool,
    ) -> Tensor:
        ctx.replay = Dropout(x.device, dropout) if dropout > 0 else None
        mask = ctx.replay.mask(x) if ctx.replay else None
        ctx.scale, ctx.dtype = scaling / (ctx.replay.keep if ctx.replay else 1), y.dtype
        order = _Order.of(expert_ids_TK, len(lora_A))
        with torch.autocast(y.device.type, enabled=False):
            x_ND = order.sorted(masked(x, mask, y.dtype))
            hidden_Nr = grouped_mm(x_ND, lora_A.to(y.dtype).transpose(-1, -2), offs=order.ends_E)
            gated_Nr = hidden_Nr * order.gates(weights_TK, ctx.scale, y.dtype)
            delta_NF = grouped_mm(gated_Nr, lora_B.to(y.dtype).transpose(-1, -2), offs=order.ends_E)
            delta = order.summed(delta_NF).view(y.shape)
        ctx.save_for_backward(x, lora_A, lora_B, weights_TK, hidden_Nr, *order)
        if not overwrite:
            return y + delta
        ctx.mark_dirty(y)
        return y.add_(delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, weights_TK, hidden_Nr, *kept = ctx.saved_tensors
        _, wants_x, wants_A, wants_B, wants_weights, *_ = ctx.needs_input_grad
        order, mask = _Order(*kept), ctx.replay.mask(x, again=True) if ctx.replay else None
        grad_x = grad_A = grad_B = grad_weights = None
        with torch.autocast(grad_y.device.type, enabled=False):
            gates_N1 = order.gates(weights_TK, ctx.scale, ctx.dtype)
            grad_NF = order.sorted(grad_y)
            grad_gated_Nr = grouped_mm(grad_NF, lora_B.to(ctx.dtype), offs=order.ends_E)
            grad_hidden_Nr = grad_gated_Nr * gates_N1
            if wants_A:
                x_ND = order.sorted(masked(x, mask, ctx.dtype))
                grad_A = order.gradient(grad_hidden_Nr, x_ND).to(lora_A.dtype)
            if wants_B:
                grad_B = order.gradient(hidden_Nr * gates_N1, grad_NF).transpose(-1, -2).to(lora_B.dtype)
            if wants_weights:
                grad_N = (grad_gated_Nr * hidden_Nr).sum(-1, dtype=weights_TK.dtype) * ctx.scale
                grad_weights = grad_N[order.place_TK]
            if wants_x:
                grad_ND = grouped_mm(grad_hidden_Nr, lora_A.to(ctx.dtype), offs=order.ends_E)
                grad_x = masked(order.summed(grad_ND).view(x.shape), mask, x.dtype)
        return grad_y, grad_x, grad_A, grad_B, grad_weights, None, None, None, None


class _Order(NamedTuple):
    """N = T * K copies of tokens, sorted by expert."""

    copy_N: Tensor
    """Which copy is at each place: token * K + k."""
    place_TK: Tensor
    """At which place a token's k-th copy is."""
    ends_E: Tensor
    """int32: where each expert's copies end."""

    @classmethod
    def of(cls, expert_ids_TK: Tensor, num_experts: int) -> _Order:
        """Stable, so that an expert sees its tokens in their order."""
        sorted_N, copy_N = expert_ids_TK.flatten().sort(stable=True)
        every_N = torch.arange(len(copy_N), device=copy_N.device)
        place_TK = torch.empty_like(copy_N).scatter_(0, copy_N, every_N).view(expert_ids_TK.shape)
        experts = torch.arange(num_experts, device=copy_N.device)
        return cls(copy_N, place_TK, torch.searchsorted(sorted_N, experts, right=True, out_int32=True))

    def sorted(self, x: Tensor) -> Tensor:
        """(..., D) -> (N, D): each place's token."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.copy_N // self.place_TK.shape[1])

    def summed(self, copies_ND: Tensor) -> Tensor:
        """(N, D) -> (T, D): the sum of each token's copies."""
        return embedding_bag(self.place_TK, copies_ND, mode="sum")

    def gates(self, weights_TK: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """(N, 1): each place's gate times the scale, rounded once."""
        return (weights_TK.flatten()[self.copy_N] * scale).to(dtype).unsqueeze(-1)

    def gradient(self, left_Nr: Tensor, right_ND: Tensor) -> Tensor:
        """(E, rank, D): each expert's left^T right; zero where it had no token."""
        product_ErD = grouped_mm(left_Nr.t(), right_ND, offs=self.ends_E)
        used_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) > 0
        return torch.where(used_E[:, None, None], product_ErD, 0)  # nothing is written for an empty group
