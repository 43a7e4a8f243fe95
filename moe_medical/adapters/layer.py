"""A frozen linear layer plus its adapter: routed experts (`MoloraLinear`) or one plain LoRA (`LoraLinear`).

Decisions:
- Wraps the base layer as `.base`, so any linear works: `nn.Linear`, its subclasses, transformers' `Conv1D`.
- Sizes come from the base layer's attributes, never from its weight: ZeRO-3 leaves that empty.
- Adapters are stored in float32 and computed in the dtype of the base layer's output; routers in float32.
- B starts at zero, so step 0 equals the base model bit for bit; A and the router start from a generator
  seeded by (seed, module name), so every rank and every layout starts from the same numbers.
- Dropout hits the adapter's input in training; the router sees the input itself.
- `forward` returns a tensor; routings leave through the `RoutingContext`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.experts import add_low_rank, dense_gate
from moe_medical.adapters.routing import RoutingContext, TokenRouter
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
        self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, gate_TE: Tensor | None = None
    ) -> Tensor:
        """The base layer's output y (..., F) plus the low-rank delta of x (..., D)."""
        y_TF, x_TD = y.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(y_TF, x_TD, lora_A, lora_B, self.scaling, dropout, gate_TE).view(y.shape)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self._device))

    def _initialise(self, *parameters: nn.Parameter) -> None:
        """U(-1/sqrt(D), 1/sqrt(D)): kaiming-uniform (a = sqrt(5)) of A, and torch's linear default."""
        generator = torch.Generator().manual_seed(self._generator_seed)
        bound = 1 / math.sqrt(self.in_features)
        for parameter in parameters:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.data.copy_(values.uniform_(-bound, bound, generator=generator))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling:g}"


class LoraLinear(AdaptedLinear):
    """y = base(x) + alpha / rank * B A x (LoRA, arXiv 2106.09685); A (rank, D), B (F, rank).

    Args:
        base, config, name, seed: See `AdaptedLinear`.
    """

    def __init__(self, base: nn.Module, config: MoloraConfig, name: str, seed: int):
        super().__init__(base, config, name, seed)
        self.lora_A = self._zeros(config.rank, self.in_features)
        self.lora_B = self._zeros(self.out_features, config.rank)
        self._initialise(self.lora_A)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        y: Tensor = self.base(x)
        return self._add(y, x, self.lora_A, self.lora_B)


class MoloraLinear(AdaptedLinear):
    """y = base(x) + alpha / rank * sum_{i in S} g_i B_i A_i x (MING-MOE); A (E, rank, D), B (E, F, rank).

    Args:
        base, config, name, seed: See `AdaptedLinear`.
        context: Shared by all layers of the model; the routing is recorded in it under `name`.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoloraConfig,
        name: str,
        seed: int,
        context: RoutingContext | None = None,
    ):
        super().__init__(base, config, name, seed)
        experts, rank = config.num_experts, config.rank
        self.lora_A = self._zeros(experts, rank, self.in_features)
        self.lora_B = self._zeros(experts, self.out_features, rank)
        self.router = TokenRouter(self.in_features, experts, config.top_k).to(self._device)
        self._initialise(self.lora_A, self.router.weight, self.router.bias)
        self.context = context or RoutingContext()
        self.gather: Callable[[Tensor], Tensor] | None = None
        """Under expert parallelism: this rank's (e, ...) experts -> all (E, ...), differentiable."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        router = {f"router.{name}": parameter for name, parameter in self.router.named_parameters()}
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, **router}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        y: Tensor = self.base(x)
        routing = self.router(x.reshape(-1, self.in_features))
        self.context.record(self.name, routing)
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if self.gather is not None:  # cast first: the exchange then moves the fewest bytes
            lora_A, lora_B = self.gather(lora_A.to(y.dtype)), self.gather(lora_B.to(y.dtype))
        return self._add(y, x, lora_A, lora_B, dense_gate(routing))


def _seed_of(seed: int, name: str) -> int:
    """63 bits that depend on the run's seed and the module's name only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
