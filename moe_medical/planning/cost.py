"""What a layout costs one rank: bytes on the wire per step, and memory; known before a run. Torch-free.

Traffic is in the convention of `traffic.CollectiveBytes` (bytes sent under ring algorithms, averaged over
ranks), in the steady state, as DeepSpeed 0.19.8 was measured to do it:

- gradients: ZeRO-0 and 1 all-reduce once a step, ZeRO-2 all-reduces each *micro-batch* (a reduce-scatter only
  by name: `use_multi_rank_bucket_allreduce`), ZeRO-3 reduce-scatters each micro-batch;
- parameters: ZeRO-1 and 2 all-gather them after the step; ZeRO-3 gathers when needed (`zero3.py`);
- experts under expert parallelism do the same among their replicas only.

The exchanges, with e = E / ep experts a rank and W = ep ranks, per micro-batch:

    weights   (W-1)/W E rank sum(D + F) numbers to each forward, again to backward unless kept, and as many
              float32 gradients back
    tokens    T (W-1) reach rows to each forward (`adapted_model.reach`): D numbers and M e float32 gates out,
              F numbers of each member back; backward mirrors it

Every forward counts: recomputed ones under activation checkpointing, and those that look ahead. In bfloat16,
with e = 1 and no shared input, weights send 8 E rank and tokens 4 T K bytes for each of D + F: tokens win
below T K = 2 E rank, and a little longer where a token reaches several of its experts in one journey.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.config.adapters import MoloraConfig
from moe_medical.planning.adapted_model import FLOAT32, AdaptedModel, RoutedGroup, Workload, reach
from moe_medical.planning.layouts import Layout, RankGroups, all_layouts
from moe_medical.planning.memory import Memory, memory_of
from moe_medical.planning.zero3 import gathered, kept_whole

_NEAR = 1.05
"""Costs nearer than this are equal: the model is no more exact."""
_COUNT = 8
"""Bytes of an int64 row count and of a float64 sum."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends per step for one purpose."""

    purpose: str
    kind: str
    """Collective, as `CollectiveBytes` names it."""
    sent: float
    across: float
    """Of these bytes, those that go to another node."""


@dataclass(frozen=True)
class Estimate:
    """Cost of one layout."""

    layout: Layout
    memory: Memory
    traffic: tuple[Traffic, ...]
    exchanges: Counter[str]
    """Routed layers by exchange; empty without expert parallelism."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends per step."""
        return sum(t.sent for t in self.traffic)

    @property
    def across(self) -> float:
        """Of these, those that leave the node."""
        return sum(t.across for t in self.traffic)


def estimate(model: AdaptedModel, layout: Layout, workload: Workload) -> Estimate:
    """Memory and traffic of one rank under a layout."""
    groups = model.routed_groups(workload) if layout.ep_size > 1 else Counter[RoutedGroup]()
    choices = {g: choose_exchange(g, model.adapters, layout, workload) for g in groups}
    layers = Counter[str]()
    for group, times in groups.items():
        layers[choices[group]] += times * len(group.out_features)
    traffic = [
        *_exchanges(groups, choices, model.adapters, layout, workload),
        *_gradients(model, layout, workload),
        *_parameters(model, layout, workload),
        *_statistics(model, layout, workload),
    ]
    travel = Counter({group: times for group, times in groups.items() if choices[group] == "tokens"})
    memory = memory_of(model, layout, workload, travel)
    return Estimate(layout, memory, tuple(t for t in traffic if t.sent), layers)


def choose_exchange(
    group: RoutedGroup, adapters: MoloraConfig, layout: Layout, workload: Workload
) -> Literal["tokens", "weights"]:
    """The exchange of layers that share an input: what the layout says, or the one with fewer bytes."""
    if layout.exchange != "auto":
        return layout.exchange
    group = replace(group, input_needs_grad=True)  # a run decides before it knows which is the first layer
    sent = {
        name: sum(t.sent for t in exchange(group, adapters, layout, workload))
        for name, exchange in _EXCHANGES.items()
    }
    return "tokens" if sent["tokens"] < sent["weights"] else "weights"


# Recommending


@dataclass(frozen=True)
class Recommendation:
    """The layout to take, and why."""

    estimate: Estimate
    fits: bool
    reason: str


def recommend(
    model: AdaptedModel, layout: Layout, workload: Workload, device_memory: float
) -> Recommendation:
    """Of all layouts of these ranks: what fits the memory and sends least; of near equals, the simplest.

    Args:
        model: The adapted model.
        layout: Gives ranks and what the DeepSpeed JSON fixes.
        workload: One rank's work.
        device_memory: Bytes that a rank may use.
    """
    layouts = [other for other in all_layouts(layout, model.spread_experts) if model.allows(other.zero.stage)]
    estimates = [estimate(model, other, workload) for other in layouts]
    # Offloading sends nothing between ranks, but every state over the host's bus in every step.
    fitting = [e for e in estimates if e.memory.device <= device_memory]
    on_device = [e for e in fitting if not e.layout.zero.offload_optimizer] or fitting
    if not on_device:
        smallest = min(estimates, key=lambda e: e.memory.device)
        return Recommendation(smallest, False, _nothing_fits(smallest, workload))
    fewest = min(e.sent for e in on_device)
    best = min((e for e in on_device if e.sent <= fewest * _NEAR), key=_complexity)
    return Recommendation(best, True, _why(best, estimates))


def _complexity(e: Estimate) -> tuple[float, ...]:
    return e.layout.ep_size, e.layout.zero.stage, e.memory.device


def _nothing_fits(smallest: Estimate, workload: Workload) -> str:
    advice = "a smaller micro-batch or more GPUs"
    if workload.checkpointing == "none":
        advice = f"training.activation_checkpointing, {advice}"
    return f"nothing fits, and this comes nearest; try {advice}."


def _why(best: Estimate, estimates: Sequence[Estimate]) -> str:
    cheapest = min(estimates, key=lambda e: e.sent)
    if best.sent <= cheapest.sent * _NEAR:
        return "it fits, and no layout sends clearly fewer bytes."
    needs = f"{cheapest.memory.device / 2**30:.0f} GiB"
    return f"of what fits it sends the fewest bytes; {cheapest.layout} would send fewer, but needs {needs}."


# Traffic by purpose


def _ring(purpose: str, kind: str, group: RankGroups, numbers: float, size: int = 1) -> Traffic:
    """A collective whose whole result has `numbers` numbers of `size` bytes; an all-reduce goes twice."""
    sent = (group.size - 1) / group.size * numbers * size * (2 if kind == "all_reduce" else 1)
    return Traffic(purpose, kind, sent, sent * group.ring_across)


def _to_peers(purpose: str, group: RankGroups, sent: float) -> Traffic:
    return Traffic(purpose, "all_to_all", sent, sent * group.pairs_across)


def _exchanges(
    groups: Mapping[RoutedGroup, int],
    choices: Mapping[RoutedGroup, str],
    adapters: MoloraConfig,
    layout: Layout,
    workload: Workload,
) -> Iterator[Traffic]:
    """All layers' exchanges in a step, one entry for each purpose."""
    total: dict[tuple[str, str], tuple[float, float]] = {}
    for group, times in groups.items():
        for t in _EXCHANGES[choices[group]](group, adapters, layout, workload):
            sent, across = total.get((t.purpose, t.kind), (0.0, 0.0))
            often = times * workload.accumulation
            total[t.purpose, t.kind] = (sent + often * t.sent, across + often * t.across)
    yield from (Traffic(*key, *bytes_) for key, bytes_ in total.items())


def _weights(
    group: RoutedGroup, adapters: MoloraConfig, layout: Layout, workload: Workload
) -> Iterator[Traffic]:
    """One micro-batch of `exchange: weights`."""
    numbers = adapters.num_experts * adapters.expert_rank() * group.width
    times = workload.forwards + (not layout.keep_gathered)
    yield _ring("expert weights", "all_gather", layout.peers, numbers * times, workload.itemsize)
    yield _ring("expert gradients to their owner", "reduce_scatter", layout.peers, numbers, FLOAT32)


def _tokens(
    group: RoutedGroup, adapters: MoloraConfig, layout: Layout, workload: Workload
) -> Iterator[Traffic]:
    """One micro-batch of `exchange: tokens`, under uniform routing."""
    members = len(group.out_features)
    own = adapters.num_experts // layout.ep_size
    others = layout.ep_size - 1
    sizes = (adapters.num_experts, adapters.active(), layout.ep_size)
    journey = workload.tokens * others * reach(*sizes, members)
    alone = workload.tokens * others * reach(*sizes)
    forwards = workload.forwards
    size = workload.itemsize
    inputs = group.in_features * size * (forwards + group.input_needs_grad)
    gates = members * own * FLOAT32 * (forwards + 1)
    counts = others * (1 + members) * _COUNT * forwards
    deltas = alone * sum(group.out_features) * size * (forwards + 1)
    yield _to_peers("tokens to experts", layout.peers, journey * (inputs + gates) + counts)
    yield _to_peers("deltas to tokens", layout.peers, deltas)


_EXCHANGES: dict[str, Callable[[RoutedGroup, MoloraConfig, Layout, Workload], Iterator[Traffic]]] = {
    "tokens": _tokens,
    "weights": _weights,
}


def _gradients(model: AdaptedModel, layout: Layout, workload: Workload) -> Iterator[Traffic]:
    zero = layout.zero
    times = workload.accumulation if zero.stage >= 2 else 1
    kind = "all_reduce"
    if zero.stage == 3 and (zero.reduce_scatter or not zero.contiguous_gradients):
        kind = "reduce_scatter"
    elif zero.stage in (1, 2) and zero.reduce_scatter and zero.contiguous_gradients:
        kind = "all_reduce" if zero.multi_rank_buckets else "reduce"
    for purpose, group, numbers in _owners(model, layout):
        yield _ring(f"{purpose} gradients", kind, group, numbers * times, FLOAT32)


def _owners(model: AdaptedModel, layout: Layout) -> list[tuple[str, RankGroups, float]]:
    """Trainable parameters of a rank and the ranks that have the same ones."""
    own = model.expert_parameters / layout.ep_size
    return [("expert", layout.replicas, own), ("shared", layout.everyone, model.shared_parameters)]


def _parameters(model: AdaptedModel, layout: Layout, workload: Workload) -> Iterator[Traffic]:
    if layout.zero.stage in (1, 2):
        for purpose, group, numbers in _owners(model, layout):
            yield _ring(f"{purpose} parameters after the step", "all_gather", group, numbers, FLOAT32)
    if layout.zero.stage == 3:
        groups = {"base": layout.everyone, "expert": layout.replicas, "shared": layout.everyone}
        passes = ("in use", gathered(model, layout, workload))
        for when, moved in (passes, ("after the step", kept_whole(model, layout, workload))):
            for owner, group in groups.items():
                yield _ring(f"{owner} parameters {when}", "all_gather", group, moved[owner])


def _statistics(model: AdaptedModel, layout: Layout, workload: Workload) -> Iterator[Traffic]:
    """Counts of tokens for the objective, and routings for the router losses."""
    counts = 2 * workload.num_tasks + 3
    yield _ring("token counts", "all_reduce", layout.everyone, counts, _COUNT)
    losses = LossWeights.of(model.adapters)
    if model.routed and losses.active:
        numbers = losses.num_statistics(len(model.deciding), model.adapters.max_experts)
        # Without a loss that needs statistics they are summed for the log alone, once a step.
        once = workload.looks_ahead or not losses.needs_statistics
        times = 1 if once else workload.accumulation
        yield _ring("routing counts", "all_reduce", layout.everyone, numbers * times, FLOAT32)
