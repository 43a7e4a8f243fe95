"""The grouped path: experts on their own tokens only, sorted by expert, one grouped GEMM for each weight.

The numbers are those of the concat path up to the order of sums. It spends K / E of that one's FLOPs and pays
by moving tokens: their N = T * K copies are gathered in both passes and summed again. Sorting, offsets and
sums stay on the device; nothing waits for the host. The copies of a token are summed by gathering them in a
fixed order, so that the result is the same in every run on every device.

Kept for backward are the (N, rank) hidden units and the order; the sorted (N, D) inputs are gathered again,
and the (N, F) outputs are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm

from moe_medical.adapters.paths import GatedLora, Gradients, Wanted

ALIGNMENT_BYTES = 16
"""Of grouped_mm's strides."""


def add(y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """See `Path`; an expert may be twice in a row of `ids_TK`."""
    assert ids_TK is not None, "only chosen experts have tokens of their own"
    order = _Order.of(ids_TK, lora.num_experts)
    # grouped_mm wants (E, D, rank) and (E, rank, F): views, as A and B are stored the other way round.
    A_EDr = lora.lora_A.to(lora.dtype).transpose(-1, -2)
    B_ErF = lora.lora_B.to(lora.dtype).transpose(-1, -2)
    hidden_Nr = grouped_mm(order.sorted(x_TD), A_EDr, offs=order.ends_E)
    delta_NF = grouped_mm(hidden_Nr * _gates(lora, order), B_ErF, offs=order.ends_E)
    y_TF.add_(order.summed(delta_NF))
    return (hidden_Nr, *order) if keep else ()


def gradients(
    grad_TF: Tensor, x_TD: Tensor | None, lora: GatedLora, kept: Sequence[Tensor], wanted: Wanted
) -> Gradients:
    """See `Path`: the chain rule through each copy of a token."""
    hidden_Nr, *rest = kept
    order = _Order(*rest)
    gates_N1 = _gates(lora, order)
    grad_NF = order.sorted(grad_TF)
    grad_gated_Nr = grouped_mm(grad_NF, lora.lora_B.to(lora.dtype), offs=order.ends_E)
    grad_hidden_Nr = grad_gated_Nr * gates_N1
    grad_A = grad_B = grad_gate = grad_x = None
    if x_TD is not None:
        grad_A = _per_expert(grad_hidden_Nr, order.sorted(x_TD), order)
        grad_B = _per_expert(hidden_Nr * gates_N1, grad_NF, order).transpose(-1, -2)
        del x_TD  # a copy of the layer's input, where there is dropout
    yield grad_A, grad_B
    if wanted.gate and lora.gate is not None:
        grad_N = (grad_gated_Nr * hidden_Nr).sum(-1, dtype=lora.gate.dtype) * lora.scale
        grad_gate = grad_N[order.place_TK]
    if wanted.x_shape is not None:
        grad_ND = grouped_mm(grad_hidden_Nr, lora.lora_A.to(lora.dtype), offs=order.ends_E)
        grad_x = order.summed(grad_ND).view(wanted.x_shape)
    yield grad_gate, grad_x


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
        experts_E = torch.arange(num_experts, device=copy_N.device)
        return cls(copy_N, place_TK, torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True))

    def sorted(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (N, D): each place's token."""
        return x_TD.index_select(0, self.copy_N // self.place_TK.shape[1])

    def summed(self, copies_ND: Tensor) -> Tensor:
        """(N, D) -> (T, D): the sum of each token's copies, gathered rather than added by index."""
        return embedding_bag(self.place_TK, copies_ND, mode="sum")


def _gates(lora: GatedLora, order: _Order) -> Tensor:
    """(N, 1): each place's gate times the scale, rounded once."""
    assert lora.gate is not None, "only chosen experts have tokens of their own"
    return (lora.gate.flatten()[order.copy_N] * lora.scale).to(lora.dtype).unsqueeze(-1)


def _per_expert(left_Nr: Tensor, right_ND: Tensor, order: _Order) -> Tensor:
    """(E, rank, D): left^T right over each expert's copies; zero where it has none."""
    product_ErD = grouped_mm(left_Nr.t(), right_ND, offs=order.ends_E)
    # grouped_mm writes nothing for an empty group: what is there is whatever the memory held.
    used_E = order.ends_E.diff(prepend=order.ends_E.new_zeros(1)) > 0
    return torch.where(used_E[:, None, None], product_ErD, 0)
