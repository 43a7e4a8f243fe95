"""The router losses as their equations say them, for autograd to differentiate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_medical.adapters.loss_weights import LossWeights


def plain(
    layers: Sequence[Tensor], chosen: Sequence[Tensor], kinds: Sequence[int], weights: LossWeights
) -> dict[str, Tensor]:
    """The active losses, layer by layer.

    Args:
        layers: Logits (T, E) of all real tokens.
        chosen: Experts (T, K) that they take.
        kinds: Of each token, 0 or 1.
        weights: Say which losses, and delta.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in weights.active}
    for logits, ids in zip(layers, chosen, strict=True):
        p, experts = logits.softmax(-1), logits.shape[-1]
        f = torch.zeros_like(p).scatter(-1, ids, 1.0).mean(0)
        entropy = -(p * p.log()).sum(-1).mean()
        of_expert = torch.tensor([int(n >= experts // 2) for n in range(experts)])
        alike = torch.tensor(kinds)[:, None] == of_expert
        importance = (p * (1 + weights.delta * (2 * alike.double() - 1))).sum(0)
        values = {
            "balance": experts * (f * p.mean(0)).sum(),
            "z": logits.logsumexp(-1).square().mean(),
            "entropy": entropy,
            "divergence": -(p.mean(0) * p.mean(0).log()).sum() - entropy,
            "localized": importance.var(correction=0) / importance.mean() ** 2,
        }
        for name, of_layers in found.items():
            of_layers.append(values[name])
    return {name: torch.stack(of_layers).mean() for name, of_layers in found.items()}


def largest(layers: Sequence[Tensor], top_k: int) -> list[Tensor]:
    """The experts with the largest logits, by layer."""
    return [logits.topk(top_k).indices for logits in layers]


def total(values: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """What is minimised: the weighted sum, minus the divergence."""
    signed = {**values, **({"divergence": -values["divergence"]} if "divergence" in values else {})}
    return torch.stack([getattr(weights, name) * value for name, value in signed.items()]).sum()
