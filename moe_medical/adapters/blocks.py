"""A whole FFN block as the expert: low-rank experts with activations of their own, or full copies.

    block (MixLoRA, arXiv 2404.15159)  y = sum_{i in S} g_i FFN_i(x), FFN_i = the frozen block whose linears
                                       each have their adapter i
    ffn (Med-MoE, Findings of EMNLP 2024)
                                       y = (sum_{i in S} g_i FFN_i(x) + sum_s w FFN_s(x)) / (sum g_i + sum w)

The published Med-MoE does not divide, so that its first step gives (1 + g) FFN(x) from copies of the FFN;
divided, step 0 is the dense model.

Decisions: the block's own forward runs unchanged, between a wrapper that routes once for the block and
linear layers that know the wrapper's plan. In `block` each linear that reads the tokens themselves runs its
base once and fans out into the K choices of each token; from there on there are K rows a token. In `ffn` the
rows are sorted by expert first, and every linear is one grouped GEMM over stacked weights. No loop over
experts and no host synchronisation in either; every expert takes part in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_medical.adapters.grouped import add_routed
from moe_medical.adapters.layer import AdaptedLinear, AdapterModule, RouterSeat, device_of, rows_of
from moe_medical.adapters.losses import router_loss_tap
from moe_medical.adapters.routers import Router, new_router
from moe_medical.adapters.routing import Routing, RoutingContext
from moe_medical.config.presets import MoloraConfig


class BlockPlan:
    """What a block tells its linear layers while it runs; None in between."""

    def __init__(self) -> None:
        self.choices_KT: Tensor | None = None
        """Which expert is the k-th choice of a token."""
        self.ends_E: Tensor | None = None
        """int32: where each expert's rows end, once sorted."""

    @contextmanager
    def of(self, choices_KT: Tensor | None = None, ends_E: Tensor | None = None) -> Iterator[None]:
        """Hold a plan while the block runs."""
        self.choices_KT, self.ends_E = choices_KT, ends_E
        try:
            yield
        finally:
            self.choices_KT = self.ends_E = None


class RoutedBlock(AdapterModule):
    """An FFN block whose linears are already adapted; routes, and joins what its experts made.

    Args:
        base: The block.
        config: At the block's depth.
        name: Of the block.
        seed: The run's seed.
        context: Shared by all layers of the model.
        plan: Shared with the block's linears.
        in_features: D of the block's input.
        router: Of another block, to use as well.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext,
        plan: BlockPlan,
        in_features: int,
        router: Router | None = None,
    ):
        super().__init__(name, seed, context)
        self.base, self.plan = base, plan
        self.num_experts, self._config, self._owned = config.num_experts, config, router is None
        self.seat = RouterSeat(name)
        new = router is None
        device = device_of(base)
        self.router = new_router(config, in_features, self.new_generator()).to(device) if new else router
        self.shared_gate: nn.Parameter | None = None
        if config.shared_experts and config.learn_shared_weight:
            self.shared_gate = nn.Parameter(
                torch.full((config.shared_experts,), config.shared_weight, device=device)
            )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        shared = {} if self.shared_gate is None else {"shared_gate": self.shared_gate}
        router = dict(self.router.named_parameters()) if self._owned and self.router else {}
        return {**shared, **{f"router.{name}": parameter for name, parameter in router.items()}}

    @torch.compiler.disable  # as MoloraLinear
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.context.adapters_off:
            y: Tensor = self.base(x)
            return y
        routing = self.route(x.reshape(-1, x.shape[-1]))
        return self._fan_out(x, routing) if self._config.experts == "block" else self._dispatch(x, routing)

    def route(self, x_TD: Tensor) -> Routing:
        """Choose each token's experts for the whole block, and record it."""
        assert self.router is not None
        tap = router_loss_tap(self.context, self.name)
        side = self.context.side_inputs(self.name, len(x_TD), tap, self.router.knows_tasks)
        routing: Routing = self.router(x_TD, side)
        self.context.keep_prompt(self.name, routing.logits_TE)
        self.context.record(self.name, routing)
        return routing

    def _fan_out(self, x: Tensor, routing: Routing) -> Tensor:
        chosen_KT = routing.expert_ids_TK.t()
        with self.plan.of(choices_KT=chosen_KT):
            y: Tensor = self.base(x)
        y = y.reshape(len(chosen_KT), *x.shape)
        weights = routing.weights_TK.t().reshape(len(y), *x.shape[:-1], 1)
        return (y * weights.to(y.dtype)).sum(0)

    def _dispatch(self, x: Tensor, routing: Routing) -> Tensor:
        ids_TX, weights_TX = self._with_shared(routing)
        x_TD, (tokens, each) = x.reshape(-1, x.shape[-1]), ids_TX.shape
        order_N = ids_TX.flatten().argsort(stable=True)
        experts = self.num_experts + self._config.shared_experts
        ends_E = torch.zeros(experts, dtype=torch.int32, device=x.device).scatter_add_(
            0, ids_TX.flatten(), torch.ones_like(order_N, dtype=torch.int32)
        )
        with self.plan.of(ends_E=ends_E.cumsum(0, dtype=torch.int32)):
            y_ND: Tensor = self.base(x_TD[order_N // each])
        back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x.device))
        y_TXD = y_ND[back_N].view(tokens, each, -1)
        return (y_TXD * weights_TX.unsqueeze(-1).to(y_TXD.dtype)).sum(1).view(x.shape)

    def _with_shared(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """(T, K + S) experts and their shares, which sum to 1."""
        ids_TX, weights_TX = routing.expert_ids_TK, routing.weights_TK
        if count := self._config.shared_experts:
            ids_S = torch.arange(count, device=ids_TX.device) + self.num_experts
            weight_S = weights_TX.new_full((count,), self._config.shared_weight)
            weight_S = weight_S if self.shared_gate is None else self.shared_gate
            ids_TX = torch.cat([ids_TX, ids_S.expand(len(ids_TX), -1)], dim=1)
            weights_TX = torch.cat([weights_TX, weight_S.expand(len(weights_TX), -1)], dim=1)
        return ids_TX, weights_TX / weights_TX.sum(-1, keepdim=True)


class BlockLinear(AdaptedLinear):
    """A linear of a `block`: A (E, rank, D), B (E, F, rank). From T tokens, or K rows for each of them.

    Args:
        base, config, name, seed, context: See `AdaptedLinear`.
        plan: Of the block.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext,
        plan: BlockPlan,
    ):
        super().__init__(base, config, name, seed, context)
        experts, rank = config.num_experts, config.expert_rank(config.num_experts)
        self.lora_A = nn.Parameter(self._first_A(self.new_generator(), experts, rank, self.in_features))
        self.lora_B = self._zeros(experts, self.out_features, rank)
        self.plan, self._path = plan, config.path

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) or (K, ..., D) -> (K, ..., F)."""
        y: Tensor = self.base(x)
        choices_KT = self.plan.choices_KT
        if choices_KT is None:
            return y
        if x.numel() // self.in_features == choices_KT.numel():
            return self._add_expert(y, x, choices_KT.flatten(), overwrite=True)
        return torch.stack([self._add_expert(y, x, choice_T) for choice_T in choices_KT])

    def _add_expert(self, y: Tensor, x: Tensor, choice_R: Tensor, overwrite: bool = False) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        factors = (self.lora_A, self.lora_B, self.scaling, dropout)
        chosen = (choice_R.unsqueeze(1), torch.ones(len(choice_R), 1, device=x.device))
        return add_routed(self._path, y, x, *factors, *chosen, overwrite=overwrite)


class FfnLinear(AdaptedLinear):
    """A linear of full FFN experts: W (E, F, D) and b (E, F), all copies of the dense layer's at the start.

    Args:
        base, config, name, seed, context: See `AdaptedLinear`; E counts the shared experts too.
        plan: Of the block.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext,
        plan: BlockPlan,
    ):
        super().__init__(base, config, name, seed, context)
        count, bias = config.num_experts + config.shared_experts, getattr(base, "bias", None)
        self.weight = nn.Parameter(rows_of(base).repeat(count, 1, 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().repeat(count, 1))
        self.plan = plan

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(N, D), sorted by expert -> (N, F)."""
        ends_E = self.plan.ends_E
        if ends_E is None:
            dense: Tensor = self.base(x)
            return dense
        y = F.grouped_mm(x, self.weight.to(x.dtype).transpose(-1, -2), offs=ends_E)
        if self.bias is None:
            return y
        expert_N = torch.searchsorted(ends_E, torch.arange(len(x), device=x.device), right=True)
        return y + self.bias[expert_N].to(y.dtype)
