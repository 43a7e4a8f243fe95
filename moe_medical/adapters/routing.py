"""From a token, or its task, to experts and their weights; the object that carries a batch's side inputs.

Decisions: the router computes in float32 whatever the base model's dtype; top-k is taken on the logits and
the gate is a softmax over those k, which equals the softmax over all experts renormalised on the chosen
ones (MING-MOE, arXiv 2404.09027). Routing is data: it is returned and recorded, never kept in a module.
No noise, no capacity limit, no token is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_medical.config.presets import TASK_FEATURES, MoloraConfig


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    weights_TK: Tensor
    """Gate of each chosen expert, float32, rows sum to 1."""
    expert_ids_TK: Tensor
    """Chosen experts, int64, highest gate first."""
    logits_TE: Tensor
    """Router logits, float32; the z-loss needs them."""
    probs_TE: Tensor
    """Softmax of the logits over all experts; the balance loss needs it."""


class RouterGradient(NamedTuple):
    """What a layer's backward needs to know for the router losses of the whole global batch."""

    fraction_E: Tensor
    """Share of the global batch's tokens that chose each expert; sums to K."""
    balance_weight: float
    z_weight: float


class Router(nn.Module):
    """Anything that gives each token its experts."""

    def forward(
        self, x_TD: Tensor, task_ids_T: Tensor | None = None, tap: Callable[[Tensor], Tensor] | None = None
    ) -> Routing:
        """Route each token; all four tensors of the result are float32 or int64.

        Args:
            x_TD: Inputs, any float dtype.
            task_ids_T: Task of each token, where they are known.
            tap: Applied to the logits before the choice; the router losses enter backward through it.
        """
        raise NotImplementedError


def new_router(config: MoloraConfig, in_features: int, generator: torch.Generator) -> Router:
    """The router of one layer, its first values drawn from `generator`."""
    if config.router == "task":
        return TaskRouter(config.num_tasks, config.num_experts, config.top_k, generator)
    return TokenRouter(in_features, config.num_experts, config.top_k, generator)


class TokenRouter(Router):
    """Linear router: z = W x + b, S = top-k(z), g_i = exp(z_i) / sum_{j in S} exp(z_j).

    With `top_k` 1 the gate is always 1, so that only the balance loss trains the router.

    Args:
        in_features: D.
        num_experts: E.
        top_k: K, at most E.
        generator: Of the first values, torch's default for a linear layer.
    """

    def __init__(
        self, in_features: int, num_experts: int, top_k: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.top_k, bound = top_k, 1 / math.sqrt(in_features)
        self.weight = _uniform(bound, generator, num_experts, in_features)
        self.bias = _uniform(bound, generator, num_experts)

    def forward(
        self, x_TD: Tensor, task_ids_T: Tensor | None = None, tap: Callable[[Tensor], Tensor] | None = None
    ) -> Routing:
        """Route each token by itself."""
        logits_TE: Tensor = _Float32Linear.apply(x_TD, self.weight, self.bias)
        return _choose(logits_TE, self.top_k, tap)


class TaskRouter(Router):
    """Task gate of MOELoRA (arXiv 2310.18339), one for each layer: g = softmax(W e_j), e_j of task j.

    With `top_k` below E the gate is a softmax over the k largest. A token whose task is not known gets the
    mean of the tasks' logits.

    Args:
        num_tasks: J.
        num_experts: E.
        top_k: K, at most E; E is the paper's dense gate.
        generator: Of the first values: e ~ N(0, 1), W uniform.
    """

    def __init__(
        self, num_tasks: int, num_experts: int, top_k: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.top_k = top_k
        self.embedding = nn.Parameter(torch.randn(num_tasks, TASK_FEATURES, generator=generator))
        self.weight = _uniform(1 / math.sqrt(TASK_FEATURES), generator, num_experts, TASK_FEATURES)

    def forward(
        self, x_TD: Tensor, task_ids_T: Tensor | None = None, tap: Callable[[Tensor], Tensor] | None = None
    ) -> Routing:
        """Route each token by its task."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_JE = self.embedding.float() @ self.weight.float().t()
            if task_ids_T is None:
                logits_TE = logits_JE.mean(0, keepdim=True).expand(len(x_TD), -1)
            else:
                logits_TE = logits_JE[task_ids_T]
        return _choose(logits_TE, self.top_k, tap)


def _uniform(bound: float, generator: torch.Generator | None, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def _choose(logits_TE: Tensor, top_k: int, tap: Callable[[Tensor], Tensor] | None) -> Routing:
    logits_TE = logits_TE if tap is None else tap(logits_TE)
    top_logits_TK, expert_ids_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(top_logits_TK.softmax(-1), expert_ids_TK, logits_TE, logits_TE.softmax(-1))


class _Float32Linear(torch.autograd.Function):
    """`linear(x.float(), W, b)` that keeps x, not its float32 copy, for backward.

    Autograd's own version would hold 4 more bytes per input feature and token under a bfloat16 base.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.addmm(bias_E.float(), x_TD.float(), weight_ED.float().t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            grad_x = (grad_TE @ weight_ED.float()).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
            return grad_x, grad_weight, grad_TE.sum(0).to(weight_ED.dtype)


class RoutingContext:
    """Side inputs of one batch on the way in, the layers' routings on the way out; shared by all layers.

    A plain object rather than a context variable: autograd recomputes checkpointed layers in its own
    threads, which would not see one. Outside `bind` layers work and record nothing.
    """

    def __init__(self) -> None:
        self.token_mask_BS: Tensor | None = None
        self.task_ids_BS: Tensor | None = None
        self.routings: dict[str, Routing] = {}
        self.router_gradients: dict[str, RouterGradient] = {}
        self.pass_name = ""
        self.binding: object | None = None  # another one in each `bind`, whose mask may be an earlier one's

    @contextmanager
    def bind(
        self, token_mask_BS: Tensor, task_ids_BS: Tensor | None = None, pass_name: str = "train"
    ) -> Iterator[RoutingContext]:
        """Bind one micro-batch; must span forward **and** backward, which may run forward again.

        Args:
            token_mask_BS: True where the token is real, False where it is padding.
            task_ids_BS: Task of each token.
            pass_name: Passes of one name run the layers in one order, which the weight exchange learns.

        Raises:
            RuntimeError: A batch is bound already.
        """
        if self.token_mask_BS is not None:
            raise RuntimeError("a batch is bound already: one context serves one batch at a time")
        self.token_mask_BS, self.task_ids_BS = token_mask_BS, task_ids_BS
        self.pass_name, self.binding = pass_name, object()
        try:
            yield self
        finally:
            self.token_mask_BS = self.task_ids_BS = self.binding = None
            self.routings, self.router_gradients, self.pass_name = {}, {}, ""

    @contextmanager
    def bind_tasks(self, task_ids_B: Tensor) -> Iterator[RoutingContext]:
        """Bind the tasks of the rows alone, for any number of positions; nothing is recorded.

        For evaluation and generation, where a row is one sample and the cache leaves one position of it.
        """
        if self.token_mask_BS is not None:
            raise RuntimeError("a batch is bound already: one context serves one batch at a time")
        self.task_ids_BS = task_ids_B[:, None]
        try:
            yield self
        finally:
            self.task_ids_BS = None

    def task_ids_of(self, num_tokens: int) -> Tensor | None:
        """Task of each of a layer's tokens, None where no tasks are bound."""
        if self.task_ids_BS is None:
            return None
        positions = num_tokens // len(self.task_ids_BS)
        return self.task_ids_BS.expand(-1, positions).reshape(-1)

    @property
    def token_mask_T(self) -> Tensor:
        """Bound mask, flattened the way layers flatten their tokens."""
        if self.token_mask_BS is None:
            raise RuntimeError("no batch is bound: use `with context.bind(token_mask, task_ids):`")
        return self.token_mask_BS.reshape(-1)

    def record(self, layer_name: str, routing: Routing) -> None:
        """Keep the routing of a layer until `bind` ends. Assigns: a recomputed forward replaces, not adds."""
        if self.token_mask_BS is not None:
            self.routings[layer_name] = routing
