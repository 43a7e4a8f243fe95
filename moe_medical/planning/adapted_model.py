"""An adapted model and its work per step, as the cost model sees them: sizes only, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.adapters.placement import (
    AdapterKind,
    depth_of,
    match_modules,
    routing_scopes,
    shared_input_groups,
)
from moe_medical.base_model.known_shapes import BaseShape
from moe_medical.config.adapters import MoloraConfig
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
    """Samples of one forward pass, with all copies of each (`training.router_paths`)."""
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
        whole = training.balance_over == "global_batch" and LossWeights.of(adapters).needs_statistics
        rows = training.micro_batch * training.router_paths
        return cls(
            dtype=config.model.dtype,
            micro_batch=rows,
            tokens=rows * mean_tokens,
            positions=rows * (longest or config.data.max_length),
            accumulation=accumulation,
            checkpointing=training.activation_checkpointing,
            looks_ahead=whole and accumulation > 1 and bool(adapters.molora),
            head_positions=rows * targets,
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
        """Of all experts of all layers that are trained."""
        return sum(0 if self.adapters.freeze_experts else sum(self.expert_sizes(n)) for n in self.routed)

    @cached_property
    def shared_parameters(self) -> int:
        """Of routers, shared experts and plain LoRA, which every rank has."""
        plain = sum(sum(self.plain_sizes(name)) for name, kind in self.kinds.items() if kind == "lora")
        always = sum(self._always_used(name) for name in self.routed)
        return plain + always + self._classifier() + sum(sum(self.router_sizes(name)) for name in self.routed)

    @property
    def trainable(self) -> int:
        """Numbers that the optimizer gets."""
        return self.expert_parameters + self.shared_parameters

    def _classifier(self) -> int:
        """X-LoRA's, for all layers."""
        if self.adapters.router_kind.decides_per != "text" or not self.routed:
            return 0
        depth = 1 if self.adapters.router_scope == "model" else len(self.routed)
        return depth * self.adapters.num_experts * (self.base.hidden + 1)

    @property
    def spread_experts(self) -> int:
        """Experts of a layer that ranks may share; 0 where they may not."""
        return self.adapters.num_experts if self.routed and not self.adapters.not_spread() else 0

    def allows(self, stage: int) -> bool:
        """Whether the adapters can be trained at a ZeRO stage."""
        return stage < 3 or not self.adapters.not_under_zero3()

    def settings(self, name: str) -> MoloraConfig:
        """Of a layer: the number of experts may follow its depth."""
        return self.adapters.at_depth(depth_of(name), self.base.blocks)

    def expert_sizes(self, name: str) -> tuple[int, int]:
        """Numbers in A and in B of all routed experts of a layer; a full expert's weight counts as A."""
        shape = self.base.linears[name]
        at = self.settings(name)
        if at.experts == "ffn":
            return at.num_experts * shape.in_features * shape.out_features, 0
        rank = at.expert_rank()
        num_A = 1 if at.shared_a else at.num_experts
        return num_A * rank * shape.in_features, at.num_experts * rank * shape.out_features

    def plain_sizes(self, name: str) -> tuple[int, int]:
        """Numbers in A and in B of a plain LoRA, the magnitudes of DoRA with the latter."""
        shape = self.base.linears[name]
        rank = self.adapters.rank
        return rank * shape.in_features, (rank + self.adapters.dora) * shape.out_features

    def router_sizes(self, name: str) -> tuple[int, ...]:
        """Numbers in each parameter of a layer's router; none where another layer's is used."""
        if name not in self._router_owners or self.adapters.freeze_router:
            return ()
        settings = self.settings(name)
        return settings.router_kind.sizes(settings, self.base.linears[name].in_features)

    def layer_parameters(self, name: str) -> int:
        """Parameters of an adapted layer, all experts counted."""
        if self.kinds[name] == "lora":
            return sum(self.plain_sizes(name))
        return sum(self.expert_sizes(name)) + sum(self.router_sizes(name)) + self._always_used(name)

    @cached_property
    def deciding(self) -> frozenset[str]:
        """Routed layers that decide for their scope."""
        scope = self.adapters.router_scope if self.adapters.experts == "linear" else "block"
        scopes = routing_scopes(self.routed, scope)
        return frozenset({scope: name for name, scope in reversed(scopes.items())}.values())

    @cached_property
    def _router_owners(self) -> frozenset[str]:
        first = list(routing_scopes(self.routed, self.adapters.router_scope))[:1]
        return frozenset(first) if self.adapters.router_scope == "model" else self.deciding

    def _always_used(self, name: str) -> int:
        """Of shared experts, and of their gates where these are trained."""
        at = self.settings(name)
        shape = self.base.linears[name]
        gates = at.shared_experts * (
            at.learn_shared_weight and (at.experts == "linear" or name in self.deciding)
        )
        if at.experts == "ffn":
            return at.shared_experts * shape.in_features * shape.out_features + gates
        return at.shared_experts * at.expert_rank() * (shape.in_features + shape.out_features) + gates

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
