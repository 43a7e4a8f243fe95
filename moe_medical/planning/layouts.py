"""How a run's state may be spread over ranks, and which of these ways stand next to one another. Torch-free.

`ZeroSettings` are the keys of the DeepSpeed JSON that decide memory or traffic, with the defaults of
DeepSpeed 0.19.8 (`deepspeed.runtime.zero.config`). Not known are hpZ, `model_persistence_threshold` and
`use_all_reduce_for_fetch_params`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moe_medical.config.deepspeed import offloads, read_deepspeed, zero_stage
from moe_medical.config.schema import Exchange, RunConfig


@dataclass(frozen=True)
class ZeroSettings:
    """What the DeepSpeed JSON decides. Sizes are numbers of elements, as there."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_scatter: bool = True
    multi_rank_buckets: bool = True
    """`use_multi_rank_bucket_allreduce`: stages 1 and 2 all-reduce, although a rank keeps its part only."""
    contiguous_gradients: bool = True
    overlap: bool = False
    reduce_bucket: int = 500_000_000
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters of at most this size whole on every rank."""
    max_reuse_distance: int = 1_000_000_000
    max_live: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> ZeroSettings:
        """Read a DeepSpeed JSON that `validate` has accepted."""
        zero = settings.get("zero_optimization", {})
        stage = zero_stage(settings)
        given = {
            "offload_optimizer": offloads(settings, "offload_optimizer"),
            "offload_parameters": offloads(settings, "offload_param"),
            "reduce_scatter": zero.get("reduce_scatter"),
            "multi_rank_buckets": zero.get("use_multi_rank_bucket_allreduce"),
            "contiguous_gradients": zero.get("contiguous_gradients"),
            "overlap": zero.get("overlap_comm", stage == 3),
            "reduce_bucket": _number(zero, "reduce_bucket_size"),
            "persistence_threshold": _number(zero, "param_persistence_threshold"),
            "max_reuse_distance": _number(zero, "max_reuse_distance"),
            "max_live": _number(zero, "max_live_parameters"),
            "prefetch_bucket": _number(zero, "prefetch_bucket_size"),
        }
        return cls(stage, **{key: value for key, value in given.items() if value is not None})


def _number(zero: Mapping[str, Any], key: str) -> int | None:
    value = zero.get(key, zero.get(f"stage3_{key}"))
    return None if value is None else int(value)


@dataclass(frozen=True)
class RankGroups:
    """Process groups of one kind: how large, and how much of their traffic leaves the node."""

    size: int
    ring_across: float
    """Share of the steps of a ring through a group, ordered by rank, that cross nodes."""
    pairs_across: float
    """Share of a rank's peers that are on other nodes."""

    @classmethod
    def of(cls, groups: Iterable[range], ranks_per_node: int) -> RankGroups:
        """Groups of equal size, as ranges of ranks; nodes hold consecutive ranks."""
        members = [[rank // ranks_per_node for rank in group] for group in groups]
        size = len(members[0])
        if size == 1:
            return cls(1, 0.0, 0.0)
        steps = sum(node != after for g in members for node, after in zip(g, g[1:] + g[:1], strict=True))
        pairs = sum(n * (size - n) for g in members for n in Counter(g).values())
        return cls(size, steps / (len(members) * size), pairs / (len(members) * size * (size - 1)))


@dataclass(frozen=True)
class Layout:
    """One way of spreading a run over ranks."""

    ranks: int
    ranks_per_node: int
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    ep_size: int = 1
    exchange: Exchange = "auto"
    keep_gathered: bool = False

    @classmethod
    def of(cls, config: RunConfig, ranks: int, ranks_per_node: int) -> Layout:
        """What a run file asks for, on so many ranks."""
        parallel = config.parallel
        zero = ZeroSettings.from_json(read_deepspeed(parallel.deepspeed))
        layout = cls(ranks, ranks_per_node, zero, 1, parallel.exchange, parallel.keep_gathered)
        return _with_experts_over(layout, parallel.ep_size)

    @cached_property
    def everyone(self) -> RankGroups:
        """All ranks: gradients of what is replicated, ZeRO's partitions."""
        return RankGroups.of([range(self.ranks)], self.ranks_per_node)

    @cached_property
    def peers(self) -> RankGroups:
        """Ranks that together hold all experts of a layer: adjacent ones."""
        starts = range(0, self.ranks, self.ep_size)
        return RankGroups.of([range(s, s + self.ep_size) for s in starts], self.ranks_per_node)

    @cached_property
    def replicas(self) -> RankGroups:
        """Ranks that hold the same experts: equal position among their peers."""
        return RankGroups.of(
            [range(s, self.ranks, self.ep_size) for s in range(self.ep_size)], self.ranks_per_node
        )

    def __str__(self) -> str:
        parts = [f"ZeRO-{self.zero.stage}"]
        if self.ep_size > 1:
            kept = " (kept)" if self.keep_gathered and self.exchange != "tokens" else ""
            parts.append(f"ep {self.ep_size} {self.exchange}{kept}")
        if self.zero.offload_optimizer:
            parts.append("optimizer on host")
        if self.zero.offload_parameters:
            parts.append("parameters on host")
        return ", ".join(parts)


def neighbours(layout: Layout, num_experts: int) -> list[Layout]:
    """Working layouts that differ from this one in a single setting, itself not included.

    Args:
        layout: Where to start.
        num_experts: E; ep_size must divide it. 0 where no layer is routed.
    """
    zero = layout.zero
    exchanges: tuple[Exchange, ...] = ("tokens", "weights") if layout.ep_size > 1 else ()
    near = [_with_stage(layout, zero.stage + step) for step in (-1, 1) if 0 <= zero.stage + step <= 3]
    near += [_with_experts_over(layout, n) for n in (layout.ep_size // 2, layout.ep_size * 2) if n]
    near += [replace(layout, exchange=e) for e in exchanges if e != layout.exchange]
    if layout.ep_size > 1 and layout.exchange != "tokens":
        near.append(replace(layout, keep_gathered=not layout.keep_gathered))
    if zero.stage:
        near.append(_with_zero(layout, offload_optimizer=not zero.offload_optimizer))
    return [n for n in dict.fromkeys(near) if n != layout and is_possible(n, num_experts)]


def all_layouts(layout: Layout, num_experts: int) -> Iterator[Layout]:
    """Every working layout of the same ranks, `auto` exchange; other settings as in `layout`."""
    sizes = [n for n in range(1, layout.ranks + 1) if n == 1 or (num_experts and num_experts % n == 0)]
    for stage in range(4):
        for ep_size in sizes:
            for offload in (False, True) if stage else (False,):
                spread = _with_experts_over(replace(_with_stage(layout, stage), exchange="auto"), ep_size)
                candidate = _with_zero(spread, offload_optimizer=offload)
                if is_possible(candidate, num_experts):
                    yield candidate


def is_possible(layout: Layout, num_experts: int) -> bool:
    """Whether the experts can be spread so."""
    return layout.ranks % layout.ep_size == 0 and (layout.ep_size == 1 or num_experts % layout.ep_size == 0)


def _with_stage(layout: Layout, stage: int) -> Layout:
    """Another stage, with what it cannot have left out."""
    zero = layout.zero
    return _with_zero(
        layout,
        stage=stage,
        offload_optimizer=zero.offload_optimizer and stage > 0,
        offload_parameters=zero.offload_parameters and stage == 3,
    )


def _with_experts_over(layout: Layout, ep_size: int) -> Layout:
    """Another ep_size; without one, how to exchange is no setting."""
    if ep_size == 1:
        return replace(layout, ep_size=1, exchange="auto", keep_gathered=False)
    return replace(layout, ep_size=ep_size)


def _with_zero(layout: Layout, **changes: Any) -> Layout:
    return replace(layout, zero=replace(layout.zero, **changes))
