"""A whole FFN block as the expert: low-rank experts with activations of their own, or full copies.

    experts: block (MixLoRA, arXiv 2404.15159)
        y = sum_{i in S} g_i FFN_i(x), FFN_i = the frozen block whose linears each have their LoRA i
    experts: ffn (Med-MoE, Findings of EMNLP 2024)
        y = (sum_{i in S} g_i FFN_i(x) + sum_s w FFN_s(x)) / (sum g_i + sum w)

The published Med-MoE does not divide, so that its first step gives (1 + g) FFN(x) from copies of the FFN;
divided, step 0 is the dense model.

Decisions: the block's own forward runs unchanged, between a wrapper that routes once for the block and
linear layers that read the wrapper's dispatch metadata. With LoRA experts each linear that reads the tokens
themselves runs its base once and fans out into the K choices of each token; from there on there are K rows a
token. Of full copies the rows are sorted by expert first, and every linear is one grouped GEMM over stacked
weights. No loop over experts and no host synchronisation in either; every expert takes part in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_medical.adapters.experts import ExpertPath, ExpertShape, apply_topk
from moe_medical.adapters.layer import AdaptedLinear, Routed, Target, rows_of
from moe_medical.adapters.routers import Router, new_router
from moe_medical.adapters.routing import RouterGroup, Routing


class FfnDispatch:
    """Dispatch metadata that an FFN block's linears read while the block runs; all None in between.

    A side channel, as what runs between the wrapper and its linears is the base model's own code.
    """

    def __init__(self) -> None:
        self.choices_KT: Tensor | None = None
        """Which expert is the k-th choice of a token: for rows that fan out."""
        self.ends_E: Tensor | None = None
        """int32: where each expert's rows end: for rows that are sorted by expert."""

    @contextmanager
    def hold(self, choices_KT: Tensor | None = None, ends_E: Tensor | None = None) -> Iterator[None]:
        """Tell the linears, until the block has run."""
        self.choices_KT = choices_KT
        self.ends_E = ends_E
        try:
            yield
        finally:
            self.choices_KT = None
            self.ends_E = None


class RoutedFfn(Routed):
    """An FFN block whose linears are already adapted; routes, and joins what its experts made.

    Args:
        target: The block.
        dispatch: Shared with the block's linears.
        in_features: D of the block's input.
        owner: Block whose router this one uses; its own where not given.
        router: Of that block.
    """

    def __init__(
        self,
        target: Target,
        dispatch: FfnDispatch,
        in_features: int,
        owner: str | None = None,
        router: Router | None = None,
    ):
        super().__init__(target.name, target.seed, target.context)
        config = target.config
        self.base = target.base
        self.num_experts = config.num_experts
        self.group = RouterGroup(self.name, (self.name,), owner or self.name)
        self._dispatch = dispatch
        self._full_copies = config.experts == "ffn"
        if router is None:
            router = new_router(config, in_features, self.new_generator()).to(target.device)
        self.router = router
        self._num_shared = config.shared_experts
        self._shared_weight = config.shared_weight
        self.shared_gate: nn.Parameter | None = None
        if config.shared_experts and config.learn_shared_weight:
            gates = torch.full((config.shared_experts,), config.shared_weight, device=target.device)
            self.shared_gate = nn.Parameter(gates)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        shared = {} if self.shared_gate is None else {"shared_gate": self.shared_gate}
        return {**shared, **self.router_parameters()}

    @torch.compiler.disable  # as MoloraLinear
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.context.adapters_off:
            y: Tensor = self.base(x)
            return y
        routing = self.route(x.reshape(-1, x.shape[-1]))
        return self._run_sorted(x, routing) if self._full_copies else self._fan_out(x, routing)

    def _fan_out(self, x: Tensor, routing: Routing) -> Tensor:
        """LoRA experts: the block makes K rows of each token."""
        choices_KT = routing.expert_ids_TK.t()
        with self._dispatch.hold(choices_KT=choices_KT):
            y: Tensor = self.base(x)
        y = y.reshape(len(choices_KT), *x.shape)  # (K, ..., D)
        weights = routing.weights_TK.t().reshape(len(y), *x.shape[:-1], 1)
        return (y * weights.to(y.dtype)).sum(0)

    def _run_sorted(self, x: Tensor, routing: Routing) -> Tensor:
        """Full copies: N = T * X rows sorted by expert, X a token's chosen experts and the shared ones."""
        ids_TX, weights_TX = self._with_shared_experts(routing)
        x_TD = x.reshape(-1, x.shape[-1])
        tokens, each = ids_TX.shape
        # Stable, so that an expert sees its tokens in their order, in a recomputed forward too.
        order_N = ids_TX.flatten().argsort(stable=True)
        rows_E = torch.zeros(self.num_experts + self._num_shared, dtype=torch.int32, device=x.device)
        rows_E.scatter_add_(0, ids_TX.flatten(), torch.ones_like(order_N, dtype=torch.int32))
        with self._dispatch.hold(ends_E=rows_E.cumsum(0, dtype=torch.int32)):
            y_ND: Tensor = self.base(x_TD[order_N // each])
        # The inverse permutation: gathering sums a token's rows in a fixed order, which adding to them by
        # index would not on a GPU.
        back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x.device))
        y_TXD = y_ND[back_N].view(tokens, each, -1)
        return (y_TXD * weights_TX.unsqueeze(-1).to(y_TXD.dtype)).sum(1).view(x.shape)

    def _with_shared_experts(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """(T, K + S) experts and their shares, which sum to 1; the shared ones are numbered from E on."""
        ids_TX = routing.expert_ids_TK
        weights_TX = routing.weights_TK
        if count := self._num_shared:
            ids_S = torch.arange(count, device=ids_TX.device) + self.num_experts
            fixed_S = weights_TX.new_full((count,), self._shared_weight)
            weight_S = fixed_S if self.shared_gate is None else self.shared_gate
            ids_TX = torch.cat([ids_TX, ids_S.expand(len(ids_TX), -1)], dim=1)
            weights_TX = torch.cat([weights_TX, weight_S.expand(len(weights_TX), -1)], dim=1)
        return ids_TX, weights_TX / weights_TX.sum(-1, keepdim=True)


class FfnLoraLinear(AdaptedLinear):
    """A linear of an FFN block with LoRA experts: A (E, rank, D), B (E, F, rank).

    Args:
        target: See `AdaptedLinear`.
        dispatch: Of the block.
    """

    def __init__(self, target: Target, dispatch: FfnDispatch):
        super().__init__(target)
        experts = target.config.num_experts
        rank = target.config.expert_rank(experts)
        self.lora_A = nn.Parameter(self._new_A(self.new_generator(), experts, rank, self.in_features))
        shape_B = (experts, self.out_features, rank)
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=torch.float32, device=self._device))
        self._dispatch = dispatch
        shape = ExpertShape(experts, rank, 1, self.in_features, self.out_features)
        self.path = ExpertPath(target.config.path, shape)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    expert_parameters = adapter_parameters

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) of the tokens, or (K, ..., D) of rows that have fanned out -> (K, ..., F)."""
        y: Tensor = self.base(x)
        choices_KT = self._dispatch.choices_KT
        if choices_KT is None:
            return y
        if x.numel() // self.in_features == choices_KT.numel():
            return self._apply_expert(y, x, choices_KT.flatten(), overwrite=True)
        # The first linears of the block: what the base made of a token is the same for its K experts.
        return torch.stack([self._apply_expert(y, x, choice_T) for choice_T in choices_KT])

    def _apply_expert(self, y: Tensor, x: Tensor, choice_R: Tensor, overwrite: bool = False) -> Tensor:
        """One expert for each row, with a gate of 1: the block's wrapper applies the real one."""
        ones_R1 = torch.ones(len(choice_R), 1, device=x.device)
        path = self.path.on(y.device.type, y.dtype)
        return apply_topk(
            y, x, self.factors(), choice_R.unsqueeze(1), ones_R1, path=path, overwrite=overwrite
        )


class FfnCopyLinear(AdaptedLinear):
    """A linear of full FFN experts: W (E, F, D) and b (E, F), all copies of the dense layer's at the start.

    Args:
        target: See `AdaptedLinear`; E counts the shared experts too.
        dispatch: Of the block.
    """

    def __init__(self, target: Target, dispatch: FfnDispatch):
        super().__init__(target)
        copies = target.config.num_experts + target.config.shared_experts
        bias = getattr(target.base, "bias", None)
        self.weight = nn.Parameter(rows_of(target.base).repeat(copies, 1, 1))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().repeat(copies, 1))
        self._dispatch = dispatch

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    expert_parameters = adapter_parameters

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """(N, D), sorted by expert -> (N, F)."""
        ends_E = self._dispatch.ends_E
        if ends_E is None:
            dense: Tensor = self.base(x)
            return dense
        y = F.grouped_mm(x, self.weight.to(x.dtype).transpose(-1, -2), offs=ends_E)
        if self.bias is None:
            return y
        # The expert of row n is the first whose rows end after n.
        expert_N = torch.searchsorted(ends_E, torch.arange(len(x), device=x.device), right=True)
        return y + self.bias[expert_N].to(y.dtype)
