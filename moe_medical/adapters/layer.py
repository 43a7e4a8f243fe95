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
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.exchange import ExpertShard, TokenExchange, WeightExchange
from moe_medical.adapters.experts import ExpertPath, ExpertShape, LoraFactors, apply_lora, apply_topk
from moe_medical.adapters.losses import router_loss_tap
from moe_medical.adapters.routers import ROUTERS, Router, new_router
from moe_medical.adapters.routing import RouterGroup, Routing, RoutingContext
from moe_medical.config.adapters import MoloraConfig


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in features, out features) of a layer that can be adapted, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def rows_of(base: nn.Module) -> Tensor:
    """(F, D) float32: the base layer's weight, one row for each output."""
    weight = base.get_parameter("weight").detach().float()
    return weight.t() if isinstance(base, Conv1D) else weight


@dataclass(frozen=True)
class Target:
    """A module of the base model that gets an adapter, and what the adapter is made from."""

    base: nn.Module
    """A linear layer, or an FFN block; it is frozen."""
    config: MoloraConfig
    """At the module's depth: `num_experts` and `top_k` are its own."""
    name: str
    """Full module name in the model; with `seed` it decides the initial values."""
    seed: int
    """The run's."""
    context: RoutingContext = field(default_factory=RoutingContext)
    """Shared by all adapters of a model; the routing is recorded there under `name`."""

    @property
    def device(self) -> torch.device:
        """Where the base is; a quantised layer may have buffers only."""
        return next(chain(self.base.parameters(), self.base.buffers())).device


class AdapterModule(nn.Module):
    """Anything that adapters add to a model: it knows its own parameters, and which of them are frozen.

    Args:
        name, seed, context: See `Target`.
    """

    def __init__(self, name: str, seed: int, context: RoutingContext):
        super().__init__()
        self.name = name
        self.context = context
        self.frozen: frozenset[str] = frozenset()
        """Local names of the parameters that are not trained."""
        # A hash: neighbouring seeds or names start from unrelated numbers. Of 63 bits, as seeds are signed.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._generator_seed = int.from_bytes(digest[:8], "big") >> 1

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Local name -> parameter, in a fixed order; those of modules inside are their own."""
        raise NotImplementedError

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Those of routed experts, whose first dimension counts this rank's; none in a plain adapter."""
        return {}

    def new_generator(self) -> torch.Generator:
        """Of the initial values."""
        return torch.Generator().manual_seed(self._generator_seed)


class Routed(AdapterModule):
    """A module that chooses its tokens' experts, or takes over what its router group has chosen."""

    router: Router | None
    """None where another member of the group decides."""
    group: RouterGroup
    num_experts: int

    @property
    def decides(self) -> bool:
        """Whether it calls the router for its group."""
        return self.group.decider == self.name

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the router, named as `router.NAME`; none where another module owns it."""
        if self.router is None or self.group.owner != self.name:
            return {}
        return {f"router.{name}": parameter for name, parameter in self.router.named_parameters()}

    def route(self, x_TD: Tensor) -> Routing:
        """Choose each token's experts, and record it; or take over what the group's first member has chosen.

        Raises:
            RuntimeError: That one has not run.
        """
        current = self.context.current
        if self.router is None:
            return current.decisions.take(self.group)
        tap = router_loss_tap(self.context, self.name)
        side = current.side_inputs(self.name, len(x_TD), tap, with_tasks=self.router.knows_tasks)
        routing: Routing = self.router(x_TD, side)
        current.keep(self.name, routing)
        current.decisions.share(self.group, routing)
        return routing


class AdaptedLinear(AdapterModule):
    """What all adapters of a linear layer share: the frozen base layer, its sizes, dropout and scaling.

    Args:
        target: A linear layer; of its config, rank, alpha and dropout.

    Raises:
        TypeError: The base is no linear layer.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, target: Target):
        super().__init__(target.name, target.seed, target.context)
        sizes = linear_sizes(target.base)
        if sizes is None:
            kind = type(target.base).__name__
            raise TypeError(f"{target.name}: an adapter needs nn.Linear or Conv1D, got {kind}")
        self.base = target.base.requires_grad_(False)
        self.in_features, self.out_features = sizes
        self.scaling = target.config.scaling
        self.dropout = target.config.dropout
        self._init_std = target.config.init_std
        self._device = target.device

    def factors(self) -> LoraFactors:
        """What is applied now: without dropout outside of training."""
        return LoraFactors(self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)

    def _new_A(self, generator: torch.Generator, *shape: int) -> Tensor:
        """PEFT's start, Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(D), 1/sqrt(D)); or N(0, std)."""
        # Drawn on the CPU wherever the layer is: a GPU's generator gives other numbers.
        values = torch.empty(shape, dtype=torch.float32)
        if self._init_std:
            return values.normal_(std=self._init_std, generator=generator).to(self._device)
        bound = 1 / math.sqrt(self.in_features)
        return values.uniform_(-bound, bound, generator=generator).to(self._device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling:g}"


class LoraLinear(AdaptedLinear):
    """y = base(x) + scaling * B A x (LoRA, arXiv 2106.09685); A (rank, D), B (F, rank).

    With `dora` the base's and the adapter's weights are decomposed (arXiv 2402.09353):
    y = m / |W + scaling * B A| * (W x + scaling * B A x) + b, norms over each output's row, without gradient.

    Args:
        target: See `AdaptedLinear`.
    """

    def __init__(self, target: Target):
        super().__init__(target)
        rank = target.config.rank
        self.lora_A = nn.Parameter(self._new_A(self.new_generator(), rank, self.in_features))
        self.lora_B = nn.Parameter(
            torch.zeros(self.out_features, rank, dtype=torch.float32, device=self._device)
        )
        self.magnitude: nn.Parameter | None = None
        if target.config.dora:  # from |W|, so that step 0 is the base
            self.magnitude = nn.Parameter(rows_of(self.base).norm(dim=1))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        known = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude}
        return {name: parameter for name, parameter in known.items() if parameter is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        if self.context.adapters_off:
            return y
        y = apply_lora(y, x, self.factors(), overwrite=True)
        if self.magnitude is None:
            return y
        with torch.no_grad():  # a constant to the gradient, as in section 4.3 of the paper
            norm_F = (rows_of(self.base) + self.scaling * self.lora_B @ self.lora_A).norm(dim=1)
        factor_F = (self.magnitude / norm_F).to(y.dtype)
        # Only the weight is decomposed, and y holds the bias already.
        bias = getattr(self.base, "bias", None)
        return y * factor_F if bias is None else (y - bias) * factor_F + bias


class MoloraLinear(Routed, AdaptedLinear):
    """y = base(x) + scaling * (sum_{i in S} g_i B_i A_i x + sum_s w_s B_s A_s x).

    A (e, rank, D), or (rank, D) where the experts share it; B (e, F, rank); s are the shared experts.

    Args:
        target: See `AdaptedLinear`.
        shard: Which experts this rank holds. Unless it is all of them, one exchange must be set.
        group: With whom the layer shares its routing; alone where not given.
        router: Of the group's owner, where that is another layer.
    """

    def __init__(
        self,
        target: Target,
        shard: ExpertShard | None = None,
        group: RouterGroup | None = None,
        router: Router | None = None,
    ):
        super().__init__(target)
        config = target.config
        self.num_experts = config.num_experts
        self.group = group or RouterGroup.alone(self.name)
        # One generator draws in this order: experts, router, shared experts. Another would start elsewhere.
        generator = self.new_generator()
        self._new_experts(config, (shard or ExpertShard()).slice(self.num_experts), generator)
        if self.decides and router is None:
            router = new_router(config, self.in_features, generator).to(self._device)
        self.router = router
        self._new_shared_experts(config, generator)
        self.path = self._new_path(config)
        self.weight_exchange: WeightExchange | None = None
        self.token_exchange: TokenExchange | None = None

    def _new_experts(self, config: MoloraConfig, own: slice, generator: torch.Generator) -> None:
        rank = config.expert_rank(config.num_experts)
        if config.shared_a:
            self.lora_A = nn.Parameter(self._new_A(generator, rank, self.in_features))
        else:  # all are drawn and the own ones cut out, so that an expert starts alike on whatever rank
            all_A = self._new_A(generator, config.num_experts, rank, self.in_features)
            self.lora_A = nn.Parameter(all_A[own].clone())
        shape_B = (own.stop - own.start, self.out_features, rank)
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=torch.float32, device=self._device))

    def _new_shared_experts(self, config: MoloraConfig, generator: torch.Generator) -> None:
        self.shared_A: nn.Parameter | None = None
        self.shared_B: nn.Parameter | None = None
        self.shared_gate: nn.Parameter | None = None
        self._shared_weight = config.shared_weight
        if not config.shared_experts:
            return
        count = config.shared_experts
        rank = config.expert_rank(config.num_experts)
        self.shared_A = nn.Parameter(self._new_A(generator, count, rank, self.in_features))
        shape_B = (count, self.out_features, rank)
        self.shared_B = nn.Parameter(torch.zeros(shape_B, dtype=torch.float32, device=self._device))
        if config.learn_shared_weight:
            gates = torch.full((count,), config.shared_weight, device=self._device)
            self.shared_gate = nn.Parameter(gates)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        known = {"shared_A": self.shared_A, "shared_B": self.shared_B, "shared_gate": self.shared_gate}
        shared = {name: parameter for name, parameter in known.items() if parameter is not None}
        return {**self.expert_parameters(), **shared, **self.router_parameters()}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.compiler.disable  # routings leave and collectives run as side effects, which a trace would freeze
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        if self.context.adapters_off:
            return y
        y = self._apply_shared_experts(y, x)
        if self.token_exchange is None:
            return self._apply_experts(y, x)
        received = self.token_exchange.dispatch(self.name, x)
        # The base ran on this rank's own tokens; of those received only the delta is wanted, so y is 0 here.
        zeros_RF = y.new_zeros(()).expand(len(received.x_RD), self.out_features)
        delta_RF = apply_lora(zeros_RF, received.x_RD, self.factors(), received.gate_Re)
        return received.combine(y.reshape(-1, self.out_features), delta_RF).view(y.shape)

    def _apply_experts(self, y: Tensor, x: Tensor) -> Tensor:
        routing = self.route(x.reshape(-1, self.in_features))
        exchange = self.weight_exchange
        return apply_topk(
            y,
            x,
            self.factors(),
            routing.expert_ids_TK,
            routing.weights_TK,
            # Experts that come from other ranks go the concat path, whose GEMMs take them as they come.
            path="concat" if exchange else self.path.on(y.device.type, y.dtype),
            exchange=exchange,
            overwrite=True,
        )

    def _apply_shared_experts(self, y: Tensor, x: Tensor) -> Tensor:
        """Every token takes all of them, with one weight or one for each that is learned."""
        if self.shared_A is None or self.shared_B is None:
            return y
        factors = self.factors()._replace(lora_A=self.shared_A, lora_B=self.shared_B)
        if self.shared_gate is None:
            factors = factors._replace(scaling=self.scaling * self._shared_weight)
            return apply_lora(y, x, factors, overwrite=True)
        gate_TS = self.shared_gate.expand(x.numel() // self.in_features, -1)
        return apply_lora(y, x, factors, gate_TS, overwrite=True)

    def _new_path(self, config: MoloraConfig) -> ExpertPath:
        experts, features, rank = self.lora_B.shape
        shape = ExpertShape(
            num_experts=experts,
            rank=rank,
            top_k=ROUTERS[config.router].gates_per_token(config),
            in_features=self.in_features,
            out_features=features,
            shared_a=config.shared_a,
        )
        return ExpertPath(config.path, shape)


def _alias(x: Tensor) -> Tensor:
    """Makes autograd sum the gradients of a layer's uses of x before those of its siblings.

    ZeRO-3's hooks do the same; in bfloat16 another order would round to other numbers at other stages.
    """
    return x.view_as(x)
