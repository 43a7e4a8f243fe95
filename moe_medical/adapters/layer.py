"""A frozen linear layer plus its adapter: routed experts (`MoloraLinear`) or one plain LoRA (`LoraLinear`).

Decisions:
- Wraps the base layer as `.base`, so any linear works: `nn.Linear`, its subclasses, transformers' `Conv1D`.
- Sizes come from the base layer's attributes, never from its weight: ZeRO-3 leaves that empty.
- Adapters are stored in float32 and computed in the dtype of the base layer's output; routers in float32.
- B starts at zero, so step 0 equals the base model bit for bit; A and the router start from a generator
  seeded by (seed, module name), so every rank and every layout starts from the same numbers.
- Dropout hits the adapter's input in training; the router sees the input itself.
- Expert parallelism is a way to exchange tokens or weights, not another layer: the class holds its shard of
  the experts, and `distributed/` gives it an exchange. Without one it holds all experts.
- `forward` returns a tensor; routings leave through the `RoutingContext`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.exchange import ExpertShard, TokenExchange, WeightExchange
from moe_medical.adapters.experts import add_low_rank
from moe_medical.adapters.grouped import add_routed, choose_path
from moe_medical.adapters.losses import router_loss_tap
from moe_medical.adapters.routers import Router, new_router
from moe_medical.adapters.routing import Routing, RoutingContext
from moe_medical.config.presets import MoloraConfig


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in features, out features) of a layer that can be adapted, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def device_of(base: nn.Module) -> torch.device:
    """Where a base layer or block is; a quantised one may have buffers only."""
    return next(chain(base.parameters(), base.buffers())).device


class AdapterModule(nn.Module):
    """Anything that adapters add to a model: it knows its own parameters, and which of them are frozen.

    Args:
        name: Full module name in the model; with `seed` it decides the initial values.
        seed: The run's seed.
        context: Shared by all of a model.
    """

    def __init__(self, name: str, seed: int, context: RoutingContext | None = None):
        super().__init__()
        self.name, self.context = name, context or RoutingContext()
        self.frozen: frozenset[str] = frozenset()
        """Local names of the parameters that are not trained."""
        self._generator_seed = _seed_of(seed, name)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Local name -> parameter, in a fixed order; those of modules inside are their own."""
        raise NotImplementedError

    def new_generator(self) -> torch.Generator:
        """Of the first values."""
        return torch.Generator().manual_seed(self._generator_seed)


class AdaptedLinear(AdapterModule):
    """What all adapters of a linear layer share: the frozen base layer, its sizes, dropout and scaling.

    Args:
        base: Linear layer to wrap; it is frozen.
        config: Rank, alpha, dropout; for routed experts also their number and top-k, at the layer's depth.
        name, seed, context: See `AdapterModule`.

    Raises:
        TypeError: `base` is no linear layer.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext | None = None,
    ):
        super().__init__(name, seed, context)
        sizes = linear_sizes(base)
        if sizes is None:
            raise TypeError(f"{name}: an adapter needs nn.Linear or Conv1D, got {type(base).__name__}")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = sizes
        self.scaling, self.dropout, self._init_std = config.scaling, config.dropout, config.init_std
        self._device = device_of(base)

    def _add(self, y: Tensor, x: Tensor, gate_TE: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """y plus the low-rank delta of x, into y itself where it is the base layer's fresh output."""
        dropout = self.dropout if self.training else 0.0
        factors = (self.lora_A, self.lora_B, self.scaling, dropout)
        return add_low_rank(y, x, *factors, gate_TE, overwrite=overwrite)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self._device))

    def _first_A(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Kaiming-uniform (a = sqrt(5)), which is U(-1/sqrt(D), 1/sqrt(D)); or normal where that is asked."""
        values, bound = torch.empty(shape, dtype=torch.float32), 1 / math.sqrt(self.in_features)
        if self._init_std:
            return values.normal_(std=self._init_std, generator=generator).to(self._device)
        return values.uniform_(-bound, bound, generator=generator).to(self._device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling:g}"


class LoraLinear(AdaptedLinear):
    """y = base(x) + scaling * B A x (LoRA, arXiv 2106.09685); A (rank, D), B (F, rank).

    With `dora` the base's and the adapter's weights are decomposed (arXiv 2402.09353):
    y = m / |W + scaling * B A| * (W x + scaling * B A x) + b, norms over each output's row, without gradient.

    Args:
        base, config, name, seed, context: See `AdaptedLinear`.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext | None = None,
    ):
        super().__init__(base, config, name, seed, context)
        self.lora_A = nn.Parameter(self._first_A(self.new_generator(), config.rank, self.in_features))
        self.lora_B = self._zeros(self.out_features, config.rank)
        self.magnitude = nn.Parameter(rows_of(base).norm(dim=1)) if config.dora else None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        known = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude}
        return {name: parameter for name, parameter in known.items() if parameter is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        if self.context.adapters_off:
            return y
        return self._decomposed(self._add(y, x, overwrite=True))

    def _decomposed(self, y: Tensor) -> Tensor:
        if self.magnitude is None:
            return y
        with torch.no_grad():
            norm_F = (rows_of(self.base) + self.scaling * self.lora_B @ self.lora_A).norm(dim=1)
        factor_F = (self.magnitude / norm_F).to(y.dtype)
        bias = getattr(self.base, "bias", None)
        return y * factor_F if bias is None else (y - bias) * factor_F + bias


@dataclass(frozen=True)
class RouterSeat:
    """A layer's place among those that share one routing decision."""

    scope: str
    """What decides together; a layer by itself has its own name here."""
    followers: int = 0
    """Layers that use the decision of this one."""
    leads: bool = True
    """Whether this layer decides, with its router; else it takes what was decided."""
    lender: str = ""
    """Layer that owns the router, where it is not this one: all depths may share one."""


class MoloraLinear(AdaptedLinear):
    """y = base(x) + scaling * (sum_{i in S} g_i B_i A_i x + sum_s w_s B_s A_s x).

    A (e, rank, D), or (rank, D) where the experts share it; B (e, F, rank); s are the shared experts.

    Args:
        base, config, name, seed, context: See `AdaptedLinear`; the routing is recorded under `name`.
        shard: Which experts this rank holds. Unless it is all of them, one exchange must be set.
        seat: With whom the layer shares its routing; alone where not given.
        router: Of another layer, to use as well.
    """

    router: Router | None

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext | None = None,
        shard: ExpertShard | None = None,
        seat: RouterSeat | None = None,
        router: Router | None = None,
    ):
        super().__init__(base, config, name, seed, context)
        generator, self.num_experts = self.new_generator(), config.num_experts
        self.seat = seat or RouterSeat(name)
        self._new_experts(config, (shard or ExpertShard()).slice(config.num_experts), generator)
        self.router = router
        if self.seat.leads and router is None:
            self.router = new_router(config, self.in_features, generator).to(self._device)
        self._new_shared_experts(config, generator)
        self._path, self._active = config.path, config.active(config.num_experts)
        self.weight_exchange: WeightExchange | None = None
        self.token_exchange: TokenExchange | None = None

    def _new_experts(self, config: MoloraConfig, own: slice, generator: torch.Generator) -> None:
        rank = config.expert_rank(config.num_experts)
        if config.shared_a:
            self.lora_A = nn.Parameter(self._first_A(generator, rank, self.in_features))
        else:  # cut from the whole: the same on whatever rank
            all_A = self._first_A(generator, config.num_experts, rank, self.in_features)
            self.lora_A = nn.Parameter(all_A[own].clone())
        self.lora_B = self._zeros(own.stop - own.start, self.out_features, rank)

    def _new_shared_experts(self, config: MoloraConfig, generator: torch.Generator) -> None:
        self.shared_A = self.shared_B = self.shared_gate = None
        self._shared_weight = config.shared_weight
        if not config.shared_experts:
            return
        count, rank = config.shared_experts, config.expert_rank(config.num_experts)
        self.shared_A = nn.Parameter(self._first_A(generator, count, rank, self.in_features))
        self.shared_B = self._zeros(count, self.out_features, rank)
        if config.learn_shared_weight:
            gates = torch.full((count,), config.shared_weight, device=self._device)
            self.shared_gate = nn.Parameter(gates)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        known = {"shared_A": self.shared_A, "shared_B": self.shared_B, "shared_gate": self.shared_gate}
        shared = {name: parameter for name, parameter in known.items() if parameter is not None}
        owned = self.router if self.seat.leads and not self.seat.lender else None
        router = {} if owned is None else {f"router.{name}": p for name, p in owned.named_parameters()}
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, **shared, **router}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Those whose first dimension counts this rank's experts."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.compiler.disable  # routings leave and collectives run as side effects, which a trace would freeze
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        if self.context.adapters_off:
            return y
        y = self._add_shared(y, x)
        if self.token_exchange is None:
            return self._add_routed(y, x)
        received = self.token_exchange.dispatch(self.name, x)
        nothing_RF = y.new_zeros(()).expand(len(received.x_RD), self.out_features)
        delta_RF = self._add(nothing_RF, received.x_RD, received.gate_Re)
        return received.combine(y.reshape(-1, self.out_features), delta_RF).view(y.shape)

    def path_on(self, device_type: str, dtype: torch.dtype) -> str:
        """How the experts are computed there, `concat`, `grouped` or `triton`.

        Raises:
            ConfigError: `adapters.path` asks for one that does not fit.
        """
        experts, features, rank = self.lora_B.shape
        sizes = (experts, rank, self._active, self.in_features, features)
        return choose_path(self._path, *sizes, device_type, dtype, self.lora_A.dim() == 2)

    def route(self, x_TD: Tensor) -> Routing:
        """Choose each token's experts, and record it; or take what the scope's first layer has chosen."""
        context, scope = self.context, self.seat.scope
        if self.router is None:
            return context.shared(scope)
        tap = router_loss_tap(context, self.name)
        routing: Routing = self.router(
            x_TD, context.side_inputs(self.name, len(x_TD), tap, self.router.knows_tasks)
        )
        context.keep_prompt(self.name, routing.logits_TE)
        context.record(self.name, routing)
        context.share(scope, routing, self.seat.followers)
        return routing

    def _add_routed(self, y: Tensor, x: Tensor) -> Tensor:
        routing = self.route(x.reshape(-1, self.in_features))
        dropout = self.dropout if self.training else 0.0
        factors = (self.lora_A, self.lora_B, self.scaling, dropout)
        chosen = (routing.expert_ids_TK, routing.weights_TK)
        return add_routed(self._path, y, x, *factors, *chosen, self.weight_exchange, overwrite=True)

    def _add_shared(self, y: Tensor, x: Tensor) -> Tensor:
        if self.shared_A is None or self.shared_B is None:
            return y
        dropout = self.dropout if self.training else 0.0
        scaling, gate_TS = self.scaling * self._shared_weight, None
        if self.shared_gate is not None:
            scaling, gate_TS = self.scaling, self.shared_gate.expand(x.numel() // self.in_features, -1)
        factors = (self.shared_A, self.shared_B, scaling, dropout)
        return add_low_rank(y, x, *factors, gate_TS, overwrite=True)


def _alias(x: Tensor) -> Tensor:
    """Makes autograd sum the gradients of a layer's uses of x before those of its siblings.

    ZeRO-3's hooks do the same; in bfloat16 another order would round to other numbers at other stages.
    """
    return x.view_as(x)


def _seed_of(seed: int, name: str) -> int:
    """63 bits that depend on the run's seed and the module's name only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def rows_of(base: nn.Module) -> Tensor:
    """(F, D) float32: the base layer's weight, one row for each output."""
    weight = base.get_parameter("weight").detach().float()
    return weight.t() if isinstance(base, Conv1D) else weight
