"""The concat path: all experts of a layer as one LoRA, for all tokens at once.

The weighted sum of E experts is one LoRA of rank H = E * rank whose hidden units are multiplied by their
expert's gate, so two GEMMs serve any E; unchosen experts get gate 0. No loop over experts, no host
synchronisation, and every expert takes part in backward on every rank. It spends E / K times the FLOPs of the
chosen experts alone, which is small while H is small against D and F.

With an A that all experts share (HydraLoRA, arXiv 2404.19245) the `rank` hidden units are computed once, and
each expert's gated copy meets its own B. Plain LoRA is the case of one expert without a gate.

Shapes beside the package's: H = E * rank gated units; h = H hidden units, or rank where A is shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_medical.adapters.paths import GatedLora, spread_gate


def add(y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """See `Path`. Kept are the hidden units; with `ids_TK` only those of the chosen experts, and the ids."""
    units = _Units(lora, ids_TK)
    hidden_Th = x_TD @ units.flat_A.t()
    y_TF.addmm_(units.gated(hidden_Th), units.flat_B.t())
    if not keep:
        return ()
    if ids_TK is None:
        return (hidden_Th,)
    return units.chosen(hidden_Th), ids_TK


def gradients(grad_TF: Tensor, lora: GatedLora, kept: Sequence[Tensor]) -> _Gradients:
    """See `Path`."""
    hidden, *ids = kept
    return _Gradients(grad_TF, lora, hidden, *ids)


class _Gradients:
    """The chain rule through y += (hidden * gate) B^T, hidden = x A^T."""

    def __init__(self, grad_TF: Tensor, lora: GatedLora, hidden: Tensor, ids_TK: Tensor | None = None):
        self._units = _Units(lora, ids_TK)
        self._grad_TF = grad_TF
        self._hidden_Th = self._units.spread(hidden)
        self._grad_gated_TH = grad_TF @ self._units.flat_B
        self._grad_hidden_Th = self._units.ungated(self._grad_gated_TH)

    def of_A(self, x_TD: Tensor) -> Tensor:
        return (self._grad_hidden_Th.t() @ x_TD).view(self._units.shape_A)

    def of_B(self) -> Tensor:
        grad_HF = self._units.gated(self._hidden_Th).t() @ self._grad_TF
        *experts, features, rank = self._units.shape_B
        return grad_HF.view(*experts, rank, features).transpose(-1, -2)

    def of_gate(self) -> Tensor:
        return self._units.grad_gate(self._grad_gated_TH, self._hidden_Th)

    def of_x(self, shape: torch.Size) -> Tensor:
        # In the shape of x without a view: autograd adds gradients in place only to a sole owner.
        grad_hidden = self._grad_hidden_Th.view(*shape[:-1], self._grad_hidden_Th.shape[-1])
        return grad_hidden @ self._units.flat_A


class _Units:
    """All experts of a layer as one LoRA, with its hidden units' gates.

    Weights are in the compute dtype; a gate times the scale is rounded once.
    """

    def __init__(self, lora: GatedLora, ids_TK: Tensor | None):
        self.shape_A = lora.lora_A.shape
        self.shape_B = lora.lora_B.shape
        self._num_experts = lora.num_experts
        self._shared_A = lora.lora_A.dim() < lora.lora_B.dim()
        self._scale = lora.scale
        self._ids_TK = ids_TK
        self._weight_TE1: Tensor | None = None
        self._gate_dtype: torch.dtype | None = None
        assert lora.gate is not None or not self._shared_A, "experts that share A differ by their gates"
        if lora.gate is not None:
            gate_TE = lora.gate if ids_TK is None else spread_gate(lora.gate, ids_TK, self._num_experts)
            assert gate_TE.shape[1] == self._num_experts, "a shard of experts needs an exchange"
            self._weight_TE1 = (gate_TE * lora.scale).to(lora.dtype).unsqueeze(-1)
            self._gate_dtype = lora.gate.dtype
        # (E, rank, D) -> (h, D): experts lie one behind the other, so this is a view.
        self.flat_A = lora.lora_A.to(lora.dtype).reshape(-1, lora.lora_A.shape[-1])
        # (E, F, rank) -> (F, H): a copy, unless B is laid out for it (`model.lay_out_for_answers`).
        self.flat_B = lora.lora_B.to(lora.dtype).movedim(-2, 0).reshape(lora.lora_B.shape[-2], -1)

    def gated(self, hidden_Th: Tensor) -> Tensor:
        """(T, H): each expert's units times its gate and the scale."""
        if self._weight_TE1 is None:
            return hidden_Th * self._scale
        return (self._per_expert(hidden_Th) * self._weight_TE1).flatten(1)

    def ungated(self, grad_gated_TH: Tensor) -> Tensor:
        """(T, h): gradient of the units from that of their gated copies."""
        if self._weight_TE1 is None:
            return grad_gated_TH * self._scale
        grad_TEr = grad_gated_TH.unflatten(-1, (self._num_experts, -1)) * self._weight_TE1
        return grad_TEr.sum(1) if self._shared_A else grad_TEr.flatten(1)

    def grad_gate(self, grad_gated_TH: Tensor, hidden_Th: Tensor) -> Tensor:
        """(T, E) or (T, K) in the gate's dtype."""
        per_unit = grad_gated_TH.unflatten(-1, (self._num_experts, -1)) * self._per_expert(hidden_Th)
        grad_TE = per_unit.sum(-1, dtype=self._gate_dtype) * self._scale
        return grad_TE if self._ids_TK is None else grad_TE.gather(1, self._ids_TK)

    def chosen(self, hidden_Th: Tensor) -> Tensor:
        """(T, K, rank): the units of chosen experts; the others meet a gate of 0 and no gradient."""
        if self._ids_TK is None or self._shared_A:
            return hidden_Th
        units_TEr = self._per_expert(hidden_Th)
        return units_TEr.gather(1, self._ids_TK.unsqueeze(-1).expand(-1, -1, units_TEr.shape[-1]))

    def spread(self, hidden: Tensor) -> Tensor:
        """(T, h): undoes `chosen`, with 0 for the others."""
        if self._ids_TK is None or self._shared_A:
            return hidden
        rank = hidden.shape[-1]
        units_TEr = hidden.new_zeros(len(hidden), self._num_experts, rank)
        return units_TEr.scatter_(1, self._ids_TK.unsqueeze(-1).expand(-1, -1, rank), hidden).flatten(1)

    def _per_expert(self, hidden_Th: Tensor) -> Tensor:
        """(T, E, rank), or (T, 1, rank) where A is shared."""
        return hidden_Th.unsqueeze(1) if self._shared_A else hidden_Th.unflatten(-1, (self._num_experts, -1))
