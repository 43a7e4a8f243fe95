"""Auxiliary losses of the routers: their values from plain sums, their gradients entered in backward.

With p_t the softmax over the E experts of a layer for token t, P its mean over the tokens, H the entropy:

    balance    = E * sum_i f_i P_i           f_i = tokens that chose i / tokens; a gate of 0 is not chosen
    z          = mean_t logsumexp(logits_t)^2
    entropy    = mean_t H(p_t)
    divergence = H(P) - mean_t H(p_t)        generalised Jensen-Shannon (HMoRA); the loss is minus this
    localized  = var(I) / mean(I)^2          over experts; I_i = sum_t p_ti (1 + delta if token and expert are
                                             of one kind, else 1 - delta) (LoRAMoE, arXiv 2312.09979)

All are averaged over layers, and padding counts in none. Layers may have different numbers of experts.
Uniform routing gives balance = K, not 1, because f sums to K (MING-MOE's definition; Switch Transformer's,
arXiv 2101.03961, is the case K = 1). f has no gradient: the balance loss trains the router through P. Of the
localized loss, the first half of a layer's experts is of the first kind, as are the tasks that are named.

The statistics are the global batch's, which no layer knows in its forward pass. So the losses are not added
to the model's loss: `router_loss_tap` lets logits pass and adds, when backward comes by, the gradient. It is

    d/dp_tj = u[class of t, j] + h log p_tj       u from f, log P and dCV^2/dI of the whole batch

through the softmax's Jacobian, plus the z-loss's part. It holds under both kinds of activation checkpointing,
where a loss collected on the side would get no gradient (reentrant) or count tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.adapters.routing import RouterGradient, Routing, RoutingContext

_TINY = 1e-12
"""Least mean that is divided by: less than any sum of probabilities of a batch with tokens."""


@dataclass(frozen=True)
class RoutingSums:
    """Sums over the real tokens of a batch for L layers and C classes of tokens; float32, additive.

    E is the largest number of experts of any layer; others' rows end in zeros.
    """

    num_experts: tuple[int, ...]
    """Of each layer; the same in all that are added."""
    chosen_LE: Tensor
    """Tokens that chose each expert; no gradient."""
    probs_LCE: Tensor
    """Summed softmax probability of each expert."""
    z_L: Tensor
    """Summed logsumexp(logits)^2."""
    entropy_L: Tensor
    """Summed entropy of the softmax, nats."""
    tokens_C: Tensor
    """Real tokens of each class."""

    def __add__(self, other: RoutingSums) -> RoutingSums:
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return RoutingSums(self.num_experts, *(mine + others for mine, others in pairs))

    def through(self, change: Callable[[Tensor], Tensor]) -> RoutingSums:
        """With all numbers changed as one flat tensor, so that ranks add them up in one go."""
        tensors = self._tensors()
        flat = change(torch.cat([t.flatten() for t in tensors]))
        parts = flat.split([t.numel() for t in tensors])
        return RoutingSums(self.num_experts, *(p.view_as(t) for p, t in zip(parts, tensors, strict=True)))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.chosen_LE, self.probs_LCE, self.z_L, self.entropy_L, self.tokens_C

    @property
    def num_tokens(self) -> Tensor:
        """Real tokens, a scalar."""
        return self.tokens_C.sum()

    def values(self, weights: LossWeights) -> dict[str, Tensor]:
        """The active losses by name, scalars without coefficients; of the divergence itself, not minus it."""
        tokens = self.num_tokens.clamp(min=1)  # a batch of nothing but padding has values of 0
        fraction_LE = self.chosen_LE / tokens
        mean_probs_LE = self.probs_LCE.sum(1) / tokens
        entropy = (self.entropy_L / tokens).mean()
        found = {
            "balance": (self._experts_L * (fraction_LE * mean_probs_LE).sum(-1)).mean(),
            "z": (self.z_L / tokens).mean(),
            "entropy": entropy,
            "divergence": torch.special.entr(mean_probs_LE).sum(-1).mean() - entropy,
        }
        if weights.localized:
            squared_L, _ = self._variation(weights.delta)
            found["localized"] = squared_L.mean()
        return {name: found[name] for name in weights.active}

    def by_probability(self, weights: LossWeights) -> Tensor:
        """(L, C, E): tokens times the derivative by p of a token of each class, but for the part log p."""
        tokens = self.num_tokens.clamp(min=1)
        fraction_LE = self.chosen_LE / tokens
        log_mean_LE = (self.probs_LCE.sum(1) / tokens).clamp(min=_TINY).log()
        experts_L1 = self._experts_L.unsqueeze(-1)
        alike_LE = weights.balance * experts_L1 * fraction_LE + weights.divergence * log_mean_LE
        if not weights.localized:
            return alike_LE.unsqueeze(1)
        _, slope_LE = self._variation(weights.delta)
        slope_LE = weights.localized * self.num_tokens * slope_LE
        # dI/dp is the sign: what a class adds to an expert's I with each unit of probability.
        return alike_LE.unsqueeze(1) + slope_LE.unsqueeze(1) * self._signs_LCE(weights.delta)

    def _variation(self, delta: float) -> tuple[Tensor, Tensor]:
        """(L,) CV^2(I), and (L, E) its derivative by I."""
        experts_L1 = self._experts_L.unsqueeze(-1)
        weighted_LE = (self._signs_LCE(delta) * self.probs_LCE).sum(1)
        mean_L1 = weighted_LE.sum(-1, keepdim=True) / experts_L1
        relative_LE = weighted_LE / mean_L1.clamp(min=_TINY)
        # Of layers with fewer experts the row ends in zeros, which are no experts far from the mean.
        number_E = torch.arange(self.chosen_LE.shape[-1], device=self.chosen_LE.device)
        apart_LE = (relative_LE - (mean_L1 > 0).to(mean_L1.dtype)) * (number_E < experts_L1)
        squared_L1 = apart_LE.square().sum(-1, keepdim=True) / experts_L1
        slope_LE = 2 * (apart_LE - squared_L1) / (experts_L1 * mean_L1.clamp(min=_TINY))
        return squared_L1.squeeze(-1), slope_LE

    def _signs_LCE(self, delta: float) -> Tensor:
        """1 + delta where token and expert are of one kind, else 1 - delta."""
        number_E = torch.arange(self.chosen_LE.shape[-1], device=self.chosen_LE.device)
        second_LE = (number_E >= (self._experts_L // 2).unsqueeze(-1)).to(self.probs_LCE.dtype)
        second_L1E = second_LE.unsqueeze(1)
        return 1 + delta * torch.cat([1 - 2 * second_L1E, 2 * second_L1E - 1], dim=1)

    @property
    def _experts_L(self) -> Tensor:
        if len(set(self.num_experts)) == 1:  # filled on the device: a copy from the host would wait for it
            return self.probs_LCE.new_full((len(self.num_experts),), self.num_experts[0])
        return self.probs_LCE.new_tensor(self.num_experts)


def routing_sums(
    routings: Iterable[Routing], token_mask_T: Tensor, classes_T: Tensor | None = None, num_classes: int = 1
) -> RoutingSums:
    """Add up what the losses and the statistics need.

    Args:
        routings: One per layer, at least one; all with the same T.
        token_mask_T: True for real tokens; padding contributes nothing.
        classes_T: Class of each token, below `num_classes`; None puts all in the first.
        num_classes: C.
    """
    layers = list(routings)
    logits_LTE = _stacked([routing.logits_TE for routing in layers], float("-inf"))
    probs_LTE = _stacked([routing.probs_TE for routing in layers])
    # 1 where a token gave an expert any weight: a dense gate names all experts, and may leave some at 0.
    ids_LTK = _stacked([routing.expert_ids_TK for routing in layers])
    counted_LTK = _stacked([(routing.weights_TK > 0).to(probs_LTE.dtype) for routing in layers])
    chosen_LTE = torch.zeros_like(probs_LTE).scatter_add_(-1, ids_LTK, counted_LTK)
    # Multiplied, not indexed: an index by mask would wait for the device to count it.
    real_T = token_mask_T.to(probs_LTE.dtype)
    real_CT = real_T.unsqueeze(0)
    if classes_T is not None:
        numbers_C1 = torch.arange(num_classes, device=classes_T.device).unsqueeze(-1)
        real_CT = real_CT * (classes_T == numbers_C1)
    return RoutingSums(
        num_experts=tuple(routing.logits_TE.shape[-1] for routing in layers),
        chosen_LE=real_T @ chosen_LTE,
        probs_LCE=real_CT @ probs_LTE,
        z_L=logits_LTE.logsumexp(-1).square() @ real_T,
        entropy_L=torch.special.entr(probs_LTE).sum(-1) @ real_T,
        tokens_C=real_CT.sum(-1),
    )


def _stacked(tensors: list[Tensor], fill: float = 0) -> Tensor:
    """(L, T, E or K), filled up to the layer with most: layers may have their own numbers of experts."""
    width = max(tensor.shape[-1] for tensor in tensors)
    if all(tensor.shape[-1] == width for tensor in tensors):
        return torch.stack(tensors)
    return torch.stack([F.pad(tensor, (0, width - tensor.shape[-1]), value=fill) for tensor in tensors])


def router_gradients(
    statistics: RoutingSums,
    layer_names: Iterable[str],
    weights: LossWeights,
    each: float,
    classes_T: Tensor | None = None,
) -> dict[str, RouterGradient]:
    """What each layer's backward needs for the losses of the whole global batch.

    Args:
        statistics: Sums over the tokens whose statistics count.
        layer_names: L names, in the order of the rows of the sums.
        weights: Coefficients.
        each: Weight of a token: 1 / tokens of the global batch, times what the engine divides gradients by.
        classes_T: Class of each token of the bound micro-batch, where there are several.
    """
    each /= len(statistics.num_experts)  # the losses are means over layers
    of_probs_LCE = each * statistics.by_probability(weights)
    layers = zip(layer_names, statistics.num_experts, of_probs_LCE, strict=True)
    return {
        name: RouterGradient(
            of_probs_CE=of_probs_CE[:, :experts],
            classes_T=classes_T,
            # The divergence is minus a mean entropy too, and the loss is minus the divergence.
            entropy_weight=-each * (weights.entropy + weights.divergence),
            z_weight=each * weights.z,
        )
        for name, experts, of_probs_CE in layers
    }


def router_loss_tap(context: RoutingContext, layer_name: str) -> Callable[[Tensor], Tensor] | None:
    """Identity on the logits of a layer that adds the gradient of the router losses in backward.

    Returns:
        None where no batch is bound, so that there is nothing to add.
    """
    if context.inputs.token_mask_BS is None:
        return None
    mask_T = context.inputs.token_mask_T
    return lambda logits_TE: _Tap.apply(logits_TE, mask_T, context, layer_name)


class _Tap(torch.autograd.Function):
    """Identity that adds to the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, mask_T: Tensor, context: RoutingContext, layer_name: str
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, mask_T)
        # The context, not its record: that holds these logits, and the graph would keep itself alive.
        ctx.context = context
        ctx.layer_name = layer_name
        return logits_TE.view_as(logits_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        of_losses = ctx.context.record.gradients.get(ctx.layer_name)
        if of_losses is not None:
            logits_TE, mask_T = ctx.saved_tensors
            grad_TE = grad_TE + _loss_gradient(logits_TE, of_losses) * mask_T.unsqueeze(-1)
        return grad_TE, None, None, None


def _loss_gradient(logits_TE: Tensor, losses: RouterGradient) -> Tensor:
    """(T, E): derivative of the router losses by a layer's logits."""
    probs_TE = logits_TE.softmax(-1)
    slope_TE = losses.of_probs_CE if losses.classes_T is None else losses.of_probs_CE[losses.classes_T]
    weighted_TE = probs_TE * slope_TE
    if losses.entropy_weight:
        weighted_TE = weighted_TE + losses.entropy_weight * torch.special.xlogy(probs_TE, probs_TE)
    # Jacobian of the softmax: dL/dz_i = p_i dL/dp_i - p_i sum_j p_j dL/dp_j.
    mean_T1 = weighted_TE.sum(-1, keepdim=True)
    if losses.z_weight:  # d logsumexp(z)^2 / dz_i = 2 logsumexp(z) p_i
        mean_T1 = mean_T1 - 2 * losses.z_weight * logits_TE.logsumexp(-1, keepdim=True)
    return weighted_TE - probs_TE * mean_T1
