"""Auxiliary losses of the routers, from the routings of one micro-batch.

    balance = E * sum_i f_i P_i        f_i = tokens that chose i / tokens, sums to K
                                       P_i = mean over tokens of the full softmax probability
    z       = mean over tokens of logsumexp(logits)^2

Both are averaged over layers, and padding counts in neither. Uniform routing gives balance = K, not 1,
because f sums to K (MING-MOE's definition; Switch Transformer's, arXiv 2101.03961, is the case K = 1).
f has no gradient: the balance loss trains the router through P. Everything derives from `RoutingSums`,
plain sums that may be added over micro-batches and ranks; the losses themselves do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_medical.adapters.routing import Routing
from moe_medical.errors import ConfigError, Problem


class RoutingSums(NamedTuple):
    """Sums over the real tokens of a batch for L layers with E experts; all float32, additive."""

    chosen_LE: Tensor
    """Tokens that chose each expert; no gradient."""
    probs_LE: Tensor
    """Summed softmax probability of each expert."""
    z_L: Tensor
    """Summed logsumexp(logits)^2."""
    num_tokens: Tensor
    """Real tokens, a scalar."""

    def balance(self) -> Tensor:
        """E * sum_i f_i P_i, averaged over layers; scalar."""
        tokens = self.num_tokens.clamp(min=1)
        per_layer_L = (self.chosen_LE / tokens * self.probs_LE / tokens).sum(-1)
        return self.chosen_LE.shape[-1] * per_layer_L.mean()

    def z(self) -> Tensor:
        """Mean of logsumexp(logits)^2 over tokens and layers; scalar."""
        return (self.z_L / self.num_tokens.clamp(min=1)).mean()


def routing_sums(routings: Iterable[Routing], token_mask_T: Tensor) -> RoutingSums:
    """Add up what the losses and the statistics need.

    Args:
        routings: One per layer, at least one; all with the same T and E.
        token_mask_T: True for real tokens; padding contributes nothing.
    """
    layers = list(routings)
    logits_LTE = torch.stack([routing.logits_TE for routing in layers])
    probs_LTE = torch.stack([routing.probs_TE for routing in layers])
    expert_ids_LTK = torch.stack([routing.expert_ids_TK for routing in layers])
    chosen_LTE = torch.zeros_like(probs_LTE).scatter_(-1, expert_ids_LTK, 1.0)
    # Multiplied, not indexed: an index by mask would wait for the device to count it.
    real_T1 = token_mask_T.to(probs_LTE.dtype).unsqueeze(-1)
    return RoutingSums(
        chosen_LE=(chosen_LTE * real_T1).sum(1),
        probs_LE=(probs_LTE * real_T1).sum(1),
        z_L=logits_LTE.logsumexp(-1).square() @ real_T1.squeeze(-1),
        num_tokens=real_T1.sum(),
    )


def balance_loss(routings: Iterable[Routing], token_mask_T: Tensor) -> Tensor:
    """E * sum_i f_i P_i averaged over layers; a differentiable scalar, 0 without routed layers.

    Raises:
        ConfigError: Gradients are on, but the routings carry none (reentrant activation checkpointing).
    """
    layers = _trainable(routings)
    return routing_sums(layers, token_mask_T).balance() if layers else _zero(token_mask_T)


def z_loss(routings: Iterable[Routing], token_mask_T: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers; a differentiable scalar, 0 without routed layers.

    Raises:
        ConfigError: As `balance_loss`.
    """
    layers = _trainable(routings)
    return routing_sums(layers, token_mask_T).z() if layers else _zero(token_mask_T)


def _zero(token_mask_T: Tensor) -> Tensor:
    return torch.zeros((), device=token_mask_T.device)


def _trainable(routings: Iterable[Routing]) -> list[Routing]:
    """The routings, refused when their loss would silently train nothing."""
    layers = list(routings)
    if torch.is_grad_enabled() and not all(routing.logits_TE.requires_grad for routing in layers):
        rule = "needs router gradients, which reentrant activation checkpointing drops"
        fix = "Use use_reentrant=False, or set balance_coefficient and z_coefficient to 0."
        raise ConfigError("router losses", [Problem("adapters.balance_coefficient", rule, None, fix)])
    return layers
