"""An adapted model and its work per step, as the cost model sees them: sizes only, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moe_medical.adapters.placement import AdapterKind, match_modules, shared_input_groups
from moe_medical.base_model.known_shapes import BaseShape
from moe_medical.config.presets import MoloraConfig
from moe_medical.config.schema import Checkpointing, Dtype, RunConfig

FLOAT32 = 4
"""Bytes of a number of an adapter, its gradient, a moment."""
BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RoutedGroup:
    """Routed layers that read the same input, so that tokens travel once for all of them."""

    in_features: int
    out_features: tuple[int, ...]
    """Of each member."""
    input_needs_grad: bool = True
    """False before the first trainable layer of a frozen base."""

    @property
    def width(self) -> int:
        """Sum of D + F over the members."""
        return sum(self.in_features + out for out in self.out_features)


@dataclass(frozen=True)
class Workload:
    """What one rank computes in one optimizer step."""

    dtype: Dtype
    """Of the base model; weights and tokens are exchanged in it."""
    micro_batch: int
    """Samples of one forward pass."""
    tokens: float
    """Real tokens of one forward pass, on average."""
    positions: int
    """Padded tokens of the largest forward pass: what memory must hold."""
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    looks_ahead: bool = False
    """Whether each micro-batch is run without graph first, to count routings over the global batch."""
    evaluated: bool = True
    """Whether the run has evaluated before it trains, which changes what ZeRO-3 keeps."""
    head_positions: int = 0
    """Positions that go through the output head."""
    num_tasks: int = 0

    @classmethod
    def of(
        cls,
        config: RunConfig,
        adapters: MoloraConfig,
        accumulation: int,
        mean_tokens: float,
        longest: int | None = None,
        targets: int = 0,
        num_tasks: int = 0,
    ) -> Workload:
        """What a run file asks of one rank.

        Args:
            config: The run.
            adapters: Its resolved adapter settings.
            accumulation: Micro-batches per step of one rank.
            mean_tokens: Tokens of a sample, on average.
            longest: Tokens of the longest sample; `data.max_length` where not known.
            targets: Columns of a micro-batch that hold targets.
            num_tasks: Tasks of the run.
        """
        training = config.training
        whole = training.balance_over == "global_batch" and bool(adapters.balance_coefficient)
        return cls(
            dtype=config.model.dtype,
            micro_batch=training.micro_batch,
            tokens=training.micro_batch * mean_tokens,
            positions=training.micro_batch * (longest or config.data.max_length),
            accumulation=accumulation,
            checkpointing=training.activation_checkpointing,
            looks_ahead=whole and accumulation > 1 and bool(adapters.molora),
            head_positions=training.micro_batch * targets,
            num_tasks=num_tasks,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the base model."""
        return BYTES[self.dtype]

    @property
    def input_needs_grad(self) -> bool:
        """Whether the embeddings' output needs a gradient: transformers asks for it under checkpointing."""
        return self.checkpointing != "none"

    @property
    def forward_recorded(self) -> bool:
        """Whether a pass without backward comes before the first with one."""
        return self.evaluated or self.looks_ahead

    @property
    def forwards(self) -> int:
        """Forward passes through each layer and micro-batch, recomputed ones included."""
        return 1 + (self.checkpointing != "none") + self.looks_ahead


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with the adapters that a run puts into it."""

    base: BaseShape
    kinds: Mapping[str, AdapterKind]
    """Adapter of each adapted layer, in the order in which they run."""
    adapters: MoloraConfig

    @classmethod
    def of(cls, base: BaseShape, adapters: MoloraConfig) -> AdaptedModel:
        """Place adapters by the patterns of the run file.

        Raises:
            ConfigError: a pattern matches no layer.
        """
        return cls(base, match_modules(base.linears, adapters), adapters)

    @property
    def routed(self) -> list[str]:
        """Names of the layers with routed experts."""
        return [name for name, kind in self.kinds.items() if kind == "molora"]

    @cached_property
    def expert_parameters(self) -> int:
        """Of all experts of all layers."""
        return self.adapters.num_experts * sum(self.low_rank(name) for name in self.routed)

    @cached_property
    def shared_parameters(self) -> int:
        """Of routers and plain LoRA, which every rank has."""
        plain = sum(self.low_rank(name) for name, kind in self.kinds.items() if kind == "lora")
        return plain + sum(self.router(name) for name in self.routed)

    def low_rank(self, name: str) -> int:
        """Parameters of A and B of one expert, or of a plain LoRA."""
        shape = self.base.linears[name]
        return self.adapters.rank * (shape.in_features + shape.out_features)

    def router(self, name: str) -> int:
        """Parameters of a layer's router."""
        return sum(self.adapters.router_sizes(self.base.linears[name].in_features))

    def layer_parameters(self, name: str) -> int:
        """Trainable parameters of an adapted layer, all experts counted."""
        if self.kinds[name] == "lora":
            return self.low_rank(name)
        return self.adapters.num_experts * self.low_rank(name) + self.router(name)

    @cached_property
    def front(self) -> frozenset[str]:
        """Linear layers whose input needs no gradient: all up to the first adapter, and its siblings."""
        names = list(self.base.linears)
        first = next((i for i, name in enumerate(names) if name in self.kinds), len(names))
        siblings = [g for g in shared_input_groups(names) if first < len(names) and names[first] in g]
        return frozenset(names[:first]).union(*siblings)

    def routed_groups(self, workload: Workload) -> Counter[RoutedGroup]:
        """The routed layers by shared input, and how often the model has each such group."""
        return Counter(self._group(names, workload) for names in shared_input_groups(self.routed))

    def _group(self, names: Iterable[str], workload: Workload) -> RoutedGroup:
        shapes = [self.base.linears[name] for name in names]
        needs_grad = workload.input_needs_grad or not any(name in self.front for name in names)
        return RoutedGroup(shapes[0].in_features, tuple(s.out_features for s in shapes), needs_grad)


def reach(num_experts: int, top_k: int, ep_size: int, members: int = 1) -> float:
    """Probability that a token chose an expert on a given rank, for any of the layers that share its input.

    Uniform, independent choices of K distinct experts of E, of which the rank holds E / ep_size:
    1 - (C(E - E/ep, K) / C(E, K)) ** members.
    """
    elsewhere = num_experts - num_experts // ep_size
    return 1 - (math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)) ** members
