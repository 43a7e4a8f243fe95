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

from moe_medical.adapters.paths import GatedLora

ALIGNMENT_BYTES = 16
"""Of grouped_mm's strides."""


def add(y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """See `Path`; experts may be twice in a row of `ids_TK`."""
    assert ids_TK is not None, "only chosen experts have tokens of their own"
    assert lora.gate is not None, "only chosen experts have tokens of their own"
    order = _Order.of(ids_TK, lora.num_experts)
    hidden_Nr = grouped_mm(order.sorted(x_TD), _transposed(lora.lora_A, lora.dtype), offs=order.ends_E)
    gated_Nr = hidden_Nr * order.gates(lora.gate, lora.scale, lora.dtype)
    delta_NF = grouped_mm(gated_Nr, _transposed(lora.lora_B, lora.dtype), offs=order.ends_E)
    y_TF.add_(order.summed(delta_NF))
    return (hidden_Nr, *order) if keep else ()


def gradients(grad_TF: Tensor, lora: GatedLora, kept: Sequence[Tensor]) -> _Gradients:
    """See `Path`."""
    hidden_Nr, *order = kept
    return _Gradients(grad_TF, lora, hidden_Nr, _Order(*order))


class _Gradients:
    """The chain rule through each copy of a token."""

    def __init__(self, grad_TF: Tensor, lora: GatedLora, hidden_Nr: Tensor, order: _Order):
        assert lora.gate is not None
        self._lora = lora
        self._order = order
        self._hidden_Nr = hidden_Nr
        self._gate_dtype = lora.gate.dtype
        self._gates_N1 = order.gates(lora.gate, lora.scale, lora.dtype)
        self._grad_NF = order.sorted(grad_TF)
        # B (E, F, rank) and A (E, rank, D) as they lie are the right factors here.
        self._grad_gated_Nr = grouped_mm(self._grad_NF, lora.lora_B.to(lora.dtype), offs=order.ends_E)
        self._grad_hidden_Nr = self._grad_gated_Nr * self._gates_N1

    def of_A(self, x_TD: Tensor) -> Tensor:
        return self._order.by_expert(self._grad_hidden_Nr, self._order.sorted(x_TD))

    def of_B(self) -> Tensor:
        return self._order.by_expert(self._hidden_Nr * self._gates_N1, self._grad_NF).transpose(-1, -2)

    def of_gate(self) -> Tensor:
        per_unit = self._grad_gated_Nr * self._hidden_Nr
        grad_N = per_unit.sum(-1, dtype=self._gate_dtype) * self._lora.scale
        return grad_N[self._order.place_TK]

    def of_x(self, shape: torch.Size) -> Tensor:
        weight_ErD = self._lora.lora_A.to(self._lora.dtype)
        grad_ND = grouped_mm(self._grad_hidden_Nr, weight_ErD, offs=self._order.ends_E)
        return self._order.summed(grad_ND).view(shape)


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
        """(N, D) -> (T, D): the sum of each token's copies."""
        return embedding_bag(self.place_TK, copies_ND, mode="sum")

    def gates(self, weights_TK: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """(N, 1): each place's gate times the scale, rounded once."""
        return (weights_TK.flatten()[self.copy_N] * scale).to(dtype).unsqueeze(-1)

    def by_expert(self, left_Nr: Tensor, right_ND: Tensor) -> Tensor:
        """(E, rank, D): left^T right over each expert's copies; zero where it has none."""
        product_ErD = grouped_mm(left_Nr.t(), right_ND, offs=self.ends_E)
        # grouped_mm writes nothing for an empty group: what is there is whatever the memory held.
        used_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) > 0
        return torch.where(used_E[:, None, None], product_ErD, 0)


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).transpose(-1, -2)
