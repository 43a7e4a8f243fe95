"""The concat path: all experts of a layer as one LoRA, for all tokens at once.

The weighted sum of E experts is one LoRA of rank H = E * rank whose hidden units are multiplied by their
expert's gate, so two GEMMs serve any E; unchosen experts get gate 0. No loop over experts, no host
synchronisation, and every expert takes part in backward on every rank. It spends E / K times the FLOPs of the
chosen experts alone, which is small while H is small against D and F.

With an A that all experts share (HydraLoRA, arXiv 2404.19245) the `rank` hidden units are computed once, and
each expert's gated copy meets its own B. Plain LoRA is the case of one expert without a gate.

Shapes beside the package's: r = rank; H = E * r gated units; h = H hidden units, or r where A is shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_medical.adapters.paths import GatedLora, Gradients, Wanted, spread_gate


def add(y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """See `Path`. Kept are the hidden units; with `ids_TK` only those of the chosen experts, and the ids."""
    A_hD, B_FH = _as_one_lora(lora)
    hidden_Th = x_TD @ A_hD.t()
    hidden_TEr = hidden_Th.unsqueeze(1) if lora.shares_A else _per_expert(hidden_Th, lora)
    y_TF.addmm_((hidden_TEr * _weights(lora, ids_TK)).flatten(1), B_FH.t())
    if not keep:
        return ()
    if ids_TK is None:
        return (hidden_TEr,)
    if not lora.shares_A:  # the others meet a gate of 0 and no gradient
        hidden_TEr = hidden_TEr.gather(1, ids_TK.unsqueeze(-1).expand(-1, -1, hidden_TEr.shape[-1]))
    return hidden_TEr, ids_TK


def gradients(
    grad_TF: Tensor, x_TD: Tensor | None, lora: GatedLora, kept: Sequence[Tensor], wanted: Wanted
) -> Gradients:
    """See `Path`: the chain rule through y += (hidden * weight) B^T and hidden = x A^T."""
    hidden_TEr, ids_TK = (kept[0], None) if len(kept) == 1 else kept
    if ids_TK is not None and not lora.shares_A:  # back to all experts, with 0 for those not chosen
        chosen_TKr = hidden_TEr
        zeros_TEr = chosen_TKr.new_zeros(len(chosen_TKr), lora.num_experts, chosen_TKr.shape[-1])
        hidden_TEr = zeros_TEr.scatter_(1, ids_TK.unsqueeze(-1).expand_as(chosen_TKr), chosen_TKr)
    A_hD, B_FH = _as_one_lora(lora)
    weights = _weights(lora, ids_TK)
    grad_gated_TEr = _per_expert(grad_TF @ B_FH, lora)
    grad_hidden_TEr = grad_gated_TEr * weights
    # Units that all experts share sum what comes back from each.
    grad_hidden_Th = grad_hidden_TEr.sum(1) if lora.shares_A else grad_hidden_TEr.flatten(1)
    grad_A = grad_B = grad_gate = grad_x = None
    if x_TD is not None:
        grad_A = (grad_hidden_Th.t() @ x_TD).view(lora.lora_A.shape)
        grad_HF = (hidden_TEr * weights).flatten(1).t() @ grad_TF
        *experts, features, rank = lora.lora_B.shape
        grad_B = grad_HF.view(*experts, rank, features).transpose(-1, -2)
        del x_TD, grad_HF  # a copy of the layer's input, where there is dropout
    yield grad_A, grad_B
    if wanted.gate and lora.gate is not None:
        grad_TE = (grad_gated_TEr * hidden_TEr).sum(-1, dtype=lora.gate.dtype) * lora.scale
        grad_gate = grad_TE if ids_TK is None else grad_TE.gather(1, ids_TK)
    if wanted.x_shape is not None:
        # In the shape of x without a view: autograd adds gradients in place only to a sole owner.
        grad_x = grad_hidden_Th.view(*wanted.x_shape[:-1], grad_hidden_Th.shape[-1]) @ A_hD
    yield grad_gate, grad_x


def _as_one_lora(lora: GatedLora) -> tuple[Tensor, Tensor]:
    """A (h, D) and B (F, H) in the compute dtype."""
    # (E, r, D): experts lie one behind the other, so this is a view.
    A_hD = lora.lora_A.to(lora.dtype).reshape(-1, lora.lora_A.shape[-1])
    # (E, F, r) -> (F, E, r): this copies, unless B is laid out for it (`model.lay_out_for_answers`).
    B_FH = lora.lora_B.to(lora.dtype).movedim(-2, 0).reshape(lora.lora_B.shape[-2], -1)
    return A_hD, B_FH


def _per_expert(units_TH: Tensor, lora: GatedLora) -> Tensor:
    """(T, E, r); as they are where no gate tells the experts apart."""
    return units_TH if lora.gate is None else units_TH.unflatten(-1, (lora.num_experts, -1))


def _weights(lora: GatedLora, ids_TK: Tensor | None) -> Tensor | float:
    """(T, E, 1): each expert's gate times the scale, rounded once; the scale alone where there is no gate."""
    if lora.gate is None:
        assert not lora.shares_A, "experts that share A differ by their gates"
        return lora.scale
    gate_TE = lora.gate if ids_TK is None else spread_gate(lora.gate, ids_TK, lora.num_experts)
    assert gate_TE.shape[1] == lora.num_experts, "a shard of experts needs an exchange"
    return (gate_TE * lora.scale).to(lora.dtype).unsqueeze(-1)
