"""From a token, its task or its sequence to experts and their weights.

Decisions: a router only makes logits z (T, E); one function chooses from them, so that top-k, sampling,
temperature and renormalisation combine with every router. All of it is float32 whatever the base's dtype.

    gates of the chosen S = top-k(z)    exp(z_i) / sum_{j in S} exp(z_j)   renormalised (MING-MOE, MixLoRA)
                                        exp(z_i) / sum_j exp(z_j)          else (Med-MoE)

Top-k before or after the softmax is the same choice: the softmax keeps the order, and renormalised on S it is
the softmax over S. Samples are drawn without replacement by Gumbel noise on the logits (arXiv 1903.06059).
With top-k 1, renormalised, the gate is always 1, so that only the router losses train the router.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_medical.adapters.routing import Routing, SideInputs
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.router_kinds import TASK_FEATURES
from moe_medical.errors import ConfigError, Problem


@dataclass(frozen=True)
class Choice:
    """How experts follow from logits."""

    top_k: int
    renormalise: bool = True
    sampled: bool = False
    """Drawn in training rather than the largest."""
    temperature: float = 1.0
    jitter: float = 0.0

    @classmethod
    def of(cls, config: MoloraConfig) -> Choice:
        """The choice that a layer's settings ask for."""
        return cls(
            top_k=config.active(config.num_experts),
            renormalise=config.renormalise,
            sampled=config.selection == "sample",
            temperature=config.temperature,
            jitter=config.jitter,
        )

    def routing(self, logits_TE: Tensor, training: bool, start_T: Tensor | None = None) -> Routing:
        """Take the top-k, and weigh them; tokens of one `start_T` draw alike."""
        if self.top_k == logits_TE.shape[-1]:
            every_TE = torch.arange(self.top_k, device=logits_TE.device).expand(logits_TE.shape)
            return Routing(logits_TE.softmax(-1), every_TE, logits_TE)
        keys_TE = logits_TE
        if self.sampled and training:
            # Gumbel noise: the largest sum of it and a logit is drawn in proportion to the logit's
            # exponential, and the k largest are a draw without replacement.
            noise_TE = -torch.empty_like(logits_TE).exponential_().log()
            keys_TE = logits_TE + (noise_TE if start_T is None else noise_TE[start_T])
        ids_TK = keys_TE.topk(self.top_k, dim=-1).indices
        if self.renormalise:
            weights_TK = logits_TE.gather(-1, ids_TK).softmax(-1)
        else:
            weights_TK = logits_TE.softmax(-1).gather(-1, ids_TK)
        return Routing(weights_TK, ids_TK, logits_TE)


class InitialValues:
    """First values of parameters, from one generator in a fixed order."""

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def linear(self, in_features: int, *shape: int) -> nn.Parameter:
        """U(-1/sqrt(D), 1/sqrt(D)), torch's default for weight and bias of a linear layer."""
        bound = 1 / math.sqrt(in_features)
        return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=self._generator))

    def embedding(self, *shape: int) -> nn.Parameter:
        """N(0, 1), torch's default for an embedding."""
        return nn.Parameter(torch.randn(shape, generator=self._generator))


class Router(nn.Module):
    """Anything that gives each token its experts; a subclass makes the logits.

    Args:
        config: At the layer's depth: `num_experts` is its own.
        in_features: D of the layer that decides.
        init: First values; what a subclass draws is drawn in the order of its constructor.
    """

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__()
        self.choice = Choice.of(config)
        self.knows_tasks = config.router_kind.knows_tasks

    @classmethod
    def gates_per_token(cls, config: MoloraConfig) -> int:
        """K: experts that a token is given, of which some may have a gate of 0."""
        return config.active(config.num_experts)

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        """(T, E) float32."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, side: SideInputs | None = None) -> Routing:
        """Route each token; x_TD is of any float dtype, and stays as it is."""
        side = side or SideInputs()
        if self.training and self.choice.jitter:  # Switch Transformer's, arXiv 2101.03961, section 2.2
            x_TD = x_TD * (1 + self.choice.jitter * (2 * torch.rand_like(x_TD) - 1))
        logits_TE = self.logits(x_TD, side)
        if self.choice.temperature != 1:
            logits_TE = logits_TE / self.choice.temperature
        # Behind the temperature, so that the router losses see the softmax that the choice sees.
        return self._choose(logits_TE if side.tap is None else side.tap(logits_TE), x_TD, side)

    def _choose(self, logits_TE: Tensor, x_TD: Tensor, side: SideInputs) -> Routing:
        return self.choice.routing(logits_TE, self.training)


class TokenRouter(Router):
    """z = W x + b for each token by itself (MING-MOE, MixLoRA, MoLA and most others)."""

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.weight = init.linear(in_features, config.num_experts, in_features)
        self.bias = init.linear(in_features, config.num_experts) if config.router_bias else None

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        return linear_float32(x_TD, self.weight, self.bias)


class SequenceRouter(TokenRouter):
    """z = W x + b of the mean over the sequence's prompt, the same for all its tokens."""

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        if side.prompt_logits_TE is not None:
            # They were kept behind the temperature, which `forward` is about to apply once more.
            return side.prompt_logits_TE * self.choice.temperature
        if side.sequences is None:
            raise RuntimeError("a sequence router needs to know the prompts: bind them in the RoutingContext")
        return super().logits(side.sequences.mean(x_TD), side)

    def _choose(self, logits_TE: Tensor, x_TD: Tensor, side: SideInputs) -> Routing:
        start_T = None if side.sequences is None else side.sequences.start_T
        return self.choice.routing(logits_TE, self.training, start_T)


class TaskRouter(Router):
    """Task gate of MOELoRA (arXiv 2310.18339): z = W e_j, with e_j the embedding of task j.

    A token of several tasks gets the mean of their logits, as its embedding would be their mean; one whose
    task is not known the mean over all. The paper's gate is dense.
    """

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.embedding = init.embedding(config.num_tasks, TASK_FEATURES)
        self.weight = init.linear(TASK_FEATURES, config.num_experts, TASK_FEATURES)
        self._refuses_unknown = config.unknown_task == "refuse"

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        if side.task_ids_T is None and self._refuses_unknown:
            rule = "must be given: adapters.unknown_task is `refuse`"
            raise ConfigError("task gate", [Problem("task", rule, fix="Name the task of each sample.")])
        return _task_logits(self.embedding, self.weight, side.task_ids_T, len(x_TD))

    def gate_of(self, task_ids_M: Tensor) -> Tensor:
        """(E,) float32: the gates of a sample of these tasks, 0 where not chosen."""
        routing = self(self.weight.new_zeros(1, 1), SideInputs(task_ids_M[None]))
        return torch.zeros_like(routing.logits_TE).scatter(-1, routing.expert_ids_TK, routing.weights_TK)[0]


class JointRouter(TokenRouter):
    """Token and task together: z = W x + b + W_T e_j; without a task, the mean of their parts."""

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.embedding = init.embedding(config.num_tasks, TASK_FEATURES)
        self.task_weight = init.linear(TASK_FEATURES, config.num_experts, TASK_FEATURES)

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        of_tasks_TE = _task_logits(self.embedding, self.task_weight, side.task_ids_T, len(x_TD))
        return super().logits(x_TD, side) + of_tasks_TE


class ThresholdRouter(TokenRouter):
    """AdaMoLE (arXiv 2405.00361): experts above a threshold that the token sets itself.

    p = softmax(W x), tau = sigmoid(w x + b) / E, g_i = (p_i - tau)_+ / sum_j (p_j - tau)_+
    """

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.threshold_weight = init.linear(in_features, 1, in_features)
        self.threshold_bias = init.linear(in_features, 1)

    def _choose(self, logits_TE: Tensor, x_TD: Tensor, side: SideInputs) -> Routing:
        every = self.choice.routing(logits_TE, training=False)
        experts = logits_TE.shape[-1]
        tau_T1 = linear_float32(x_TD, self.threshold_weight, self.threshold_bias).sigmoid() / experts
        # The largest p is 1 / E at least and tau below that, so that one expert always stays.
        above_TE = (every.weights_TK - tau_T1).relu()
        total_T1 = above_TE.sum(-1, keepdim=True)
        return every._replace(weights_TK=above_TE / total_T1.clamp(min=torch.finfo(torch.float32).tiny))


class HierarchicalRouter(TokenRouter):
    """Expert of experts: z_i = log of a softmax over groups of experts + log of one within its group."""

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.group_weight = init.linear(in_features, config.groups, in_features)
        self.group_bias = init.linear(in_features, config.groups) if config.router_bias else None

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        group_TG = linear_float32(x_TD, self.group_weight, self.group_bias).log_softmax(-1)
        inner_TE = super().logits(x_TD, side)
        # (T, E) -> (T, G, M): the M experts of a group are neighbours.
        within_TGM = inner_TE.unflatten(-1, (len(self.group_weight), -1)).log_softmax(-1)
        return (group_TG.unsqueeze(-1) + within_TGM).flatten(1)


class GivenGates(Router):
    """No router of its own: the gates were decided before the layers ran (X-LoRA, arXiv 2402.07148)."""

    @classmethod
    def gates_per_token(cls, config: MoloraConfig) -> int:
        return config.num_experts

    def forward(self, x_TD: Tensor, side: SideInputs | None = None) -> Routing:
        if side is None or side.scalings_TE is None:
            raise RuntimeError("X-LoRA's scalings are made by the model's own forward: call the whole model")
        gates_TE = side.scalings_TE
        every_TE = torch.arange(gates_TE.shape[-1], device=gates_TE.device).expand(gates_TE.shape)
        # Logits whose softmax is the gates: for statistics, as no loss is allowed beside X-LoRA.
        logits_TE = gates_TE.clamp(min=torch.finfo(torch.float32).tiny).log()
        return Routing(gates_TE, every_TE, logits_TE)


ROUTERS: dict[str, type[Router]] = {
    "token": TokenRouter,
    "sequence": SequenceRouter,
    "task": TaskRouter,
    "joint": JointRouter,
    "threshold": ThresholdRouter,
    "hierarchical": HierarchicalRouter,
    "xlora": GivenGates,
}
"""`adapters.router` -> its class, of the kind that `config.router_kinds` describes."""


def new_router(config: MoloraConfig, in_features: int, generator: torch.Generator) -> Router:
    """The router of one group, its first values drawn from `generator`.

    Args:
        config: At the layer's depth: `num_experts` is its own.
        in_features: D of the group's first layer.
        generator: Weights are torch's default for a linear layer, task embeddings N(0, 1).
    """
    return ROUTERS[config.router](config, in_features, InitialValues(generator))


def _task_logits(embedding_JH: Tensor, weight_EH: Tensor, task_ids: Tensor | None, num_tokens: int) -> Tensor:
    """(T, E) logits of tasks (T,), of several for each token (T, M), or the mean over all."""
    with torch.autocast(weight_EH.device.type, enabled=False):
        logits_JE = embedding_JH.float() @ weight_EH.float().t()
    if task_ids is None:
        return logits_JE.mean(0, keepdim=True).expand(num_tokens, -1)
    if task_ids.dim() == 1:
        return logits_JE[task_ids]
    # Several tasks a token, filled up with -1: gathered as task 0, and left out of the mean.
    known_TM1 = (task_ids >= 0).unsqueeze(-1)
    each_TME = logits_JE[task_ids.clamp(min=0)] * known_TM1
    mean_TE = each_TME.sum(1) / known_TM1.sum(1).clamp(min=1)
    return torch.where(known_TM1.any(1), mean_TE, logits_JE.mean(0))


def linear_float32(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """W x + b in float32, for any float x."""
    result: Tensor = _Float32Linear.apply(x_TD, weight_ED, bias_E)
    return result


class _Float32Linear(torch.autograd.Function):
    """`linear(x.float(), W, b)` that keeps x, not its float32 copy, for backward.

    Autograd's own version would hold 4 more bytes per input feature and token under a bfloat16 base.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.biased = bias_E is not None
        with torch.autocast(x_TD.device.type, enabled=False):
            bias_E = None if bias_E is None else bias_E.float()
            return nn.functional.linear(x_TD.float(), weight_ED.float(), bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            grad_x = (grad_TE @ weight_ED.float()).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = None
            if ctx.needs_input_grad[1]:  # not so where the router is frozen
                grad_weight = (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
            grad_bias = grad_TE.sum(0).to(weight_ED.dtype) if ctx.biased else None
            return grad_x, grad_weight, grad_bias
