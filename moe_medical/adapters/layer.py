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

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.exchange import ExpertShard, TokenExchange, WeightExchange
from moe_medical.adapters.experts import add_low_rank, dense_gate
from moe_medical.adapters.losses import router_loss_tap
from moe_medical.adapters.routing import Routing, RoutingContext, new_router
from moe_medical.config.presets import MoloraConfig


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in features, out features) of a layer that can be adapted, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


class AdaptedLinear(nn.Module):
    """What both adapters share: the frozen base layer, its sizes, dropout, scaling and seeding.

    Args:
        base: Linear layer to wrap; it is frozen.
        config: Rank, alpha, dropout; for routed experts also their number and top-k.
        name: Full module name in the model; with `seed` it decides the initial values.
        seed: The run's seed.

    Raises:
        TypeError: `base` is no linear layer.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Module, config: MoloraConfig, name: str, seed: int):
        super().__init__()
        sizes = linear_sizes(base)
        if sizes is None:
            raise TypeError(f"{name}: an adapter needs nn.Linear or Conv1D, got {type(base).__name__}")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = sizes
        self.name, self.scaling, self.dropout = name, config.scaling, config.dropout
        self._generator_seed = _seed_of(seed, name)
        self._device = next(base.parameters()).device

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Local name -> trainable parameter, in a fixed order."""
        raise NotImplementedError

    def _add(
        self,
        y_TF: Tensor,
        x_TD: Tensor,
        gate_TE: Tensor | None = None,
        exchange: WeightExchange | None = None,
    ) -> Tensor:
        """The base layer's output y plus the low-rank delta of x."""
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(y_TF, x_TD, self.lora_A, self.lora_B, self.scaling, dropout, gate_TE, exchange)

    def _flat(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self._device))

    def _new_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._generator_seed)

    def _uniform(self, generator: torch.Generator, *shape: int) -> Tensor:
        """U(-1/sqrt(D), 1/sqrt(D)): kaiming-uniform (a = sqrt(5)) of A, and torch's linear default."""
        bound = 1 / math.sqrt(self.in_features)
        values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        return values.to(self._device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling:g}"


class LoraLinear(AdaptedLinear):
    """y = base(x) + alpha / rank * B A x (LoRA, arXiv 2106.09685); A (rank, D), B (F, rank).

    Args:
        base, config, name, seed: See `AdaptedLinear`.
    """

    def __init__(self, base: nn.Module, config: MoloraConfig, name: str, seed: int):
        super().__init__(base, config, name, seed)
        self.lora_A = nn.Parameter(self._uniform(self._new_generator(), config.rank, self.in_features))
        self.lora_B = self._zeros(self.out_features, config.rank)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        x_TD, y_TF = self._flat(x, y)
        return self._add(y_TF, x_TD).view(y.shape)


class MoloraLinear(AdaptedLinear):
    """y = base(x) + alpha / rank * sum_{i in S} g_i B_i A_i x (MING-MOE); A (e, rank, D), B (e, F, rank).

    Args:
        base, config, name, seed: See `AdaptedLinear`.
        context: Shared by all layers of the model; the routing is recorded in it under `name`.
        shard: Which experts this rank holds. Unless it is all of them, one exchange must be set.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext | None = None,
        shard: ExpertShard | None = None,
    ):
        super().__init__(base, config, name, seed)
        own, generator = (shard or ExpertShard()).slice(config.num_experts), self._new_generator()
        all_A = self._uniform(generator, config.num_experts, config.rank, self.in_features)
        self.lora_A = nn.Parameter(all_A[own].clone())  # cut from the whole: the same on whatever rank
        self.lora_B = self._zeros(own.stop - own.start, self.out_features, config.rank)
        self.router = new_router(config, self.in_features, generator).to(self._device)
        self.num_experts = config.num_experts
        self.context = context or RoutingContext()
        self.weight_exchange: WeightExchange | None = None
        self.token_exchange: TokenExchange | None = None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        router = {f"router.{name}": parameter for name, parameter in self.router.named_parameters()}
        return {**self.expert_parameters(), **router}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Those whose first dimension counts this rank's experts."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.compiler.disable  # routings leave and collectives run as side effects, which a trace would freeze
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        x = _alias(x)
        y: Tensor = self.base(x)
        x_TD, y_TF = self._flat(x, y)
        if self.token_exchange is None:
            gate_TE = dense_gate(self.route(x_TD))
            return self._add(y_TF, x_TD, gate_TE, self.weight_exchange).view(y.shape)
        received = self.token_exchange.dispatch(self.name, x)
        nothing_RF = y.new_zeros(()).expand(len(received.x_RD), self.out_features)
        delta_RF = self._add(nothing_RF, received.x_RD, received.gate_Re)
        return received.combine(y_TF, delta_RF).view(y.shape)

    def route(self, x_TD: Tensor) -> Routing:
        """Choose each token's experts, and record it."""
        tap = router_loss_tap(self.context, self.name)
        routing: Routing = self.router(x_TD, self.context.task_ids_of(len(x_TD)), tap)
        self.context.record(self.name, routing)
        return routing


def _alias(x: Tensor) -> Tensor:
    """Makes autograd sum the gradients of a layer's uses of x before those of its siblings.

    ZeRO-3's hooks do the same; in bfloat16 another order would round to other numbers at other stages.
    """
    return x.view_as(x)


def _seed_of(seed: int, name: str) -> int:
    """63 bits that depend on the run's seed and the module's name only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
