"""Auxiliary losses of the routers: their values from plain sums, their gradients entered in backward.

    balance = E * sum_i f_i P_i        f_i = tokens that chose i / tokens, sums to K
                                       P_i = mean over tokens of the full softmax probability
    z       = mean over tokens of logsumexp(logits)^2

Both are averaged over layers, and padding counts in neither. Uniform routing gives balance = K, not 1,
because f sums to K (MING-MOE's definition; Switch Transformer's, arXiv 2101.03961, is the case K = 1).
f has no gradient: the balance loss trains the router through P.

The statistics are the global batch's, which no layer knows in its forward pass. So the losses are not added
to the model's loss: `router_loss_tap` lets logits pass and adds, when backward comes by, the gradient

    d/dz_tj = balance_weight * p_tj (f_j - sum_i f_i p_ti) + z_weight * 2 logsumexp(z_t) p_tj

with the f that has been summed over ranks meanwhile. It holds under both kinds of activation checkpointing,
where a loss collected on the side would get no gradient (reentrant) or count tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_medical.adapters.routing import RouterGradient, Routing, RoutingContext


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


def router_gradients(
    fraction_LE: Tensor, layer_names: Iterable[str], balance_weight: float, z_weight: float
) -> dict[str, RouterGradient]:
    """What each layer's backward needs for the losses of the whole global batch.

    Args:
        fraction_LE: f, tokens of the global batch that chose each expert over its tokens.
        layer_names: L names, in the order of the rows of f.
        balance_weight: Coefficient / tokens of the global batch, times what the engine divides gradients by.
        z_weight: The same of the z-loss.
    """
    layers, experts = fraction_LE.shape
    weights = (balance_weight * experts / layers, z_weight / layers)
    return {n: RouterGradient(f_E, *weights) for n, f_E in zip(layer_names, fraction_LE, strict=True)}


def router_loss_tap(context: RoutingContext, layer_name: str) -> Callable[[Tensor], Tensor] | None:
    """Identity on the logits of a layer that adds the gradient of the router losses in backward.

    Returns:
        None where no batch is bound, so that there is nothing to add.
    """
    if context.token_mask_BS is None:
        return None
    mask_T = context.token_mask_T
    return lambda logits_TE: _Tap.apply(logits_TE, mask_T, context, layer_name)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, mask_T: Tensor, context: RoutingContext, layer_name: str
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, mask_T)
        ctx.context, ctx.layer_name = context, layer_name
        return logits_TE.view_as(logits_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        of_losses = ctx.context.router_gradients.get(ctx.layer_name)
        if of_losses is not None:
            logits_TE, mask_T = ctx.saved_tensors
            grad_TE = grad_TE + _loss_gradient(logits_TE, of_losses) * mask_T.unsqueeze(-1)
        return grad_TE, None, None, None


def _loss_gradient(logits_TE: Tensor, losses: RouterGradient) -> Tensor:
    probs_TE, f_E = logits_TE.softmax(-1), losses.fraction_E
    balance_TE = f_E - (probs_TE @ f_E).unsqueeze(-1)
    z_T1 = 2 * logits_TE.logsumexp(-1, keepdim=True)
    return probs_TE * (losses.balance_weight * balance_TE + losses.z_weight * z_T1)
