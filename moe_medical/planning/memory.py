"""What one rank holds, in bytes, at the peak of a step. Torch-free.

Parameters, gradients and optimizer states are counted as DeepSpeed 0.19.8 spreads them: tests/distributed
compares them with the tensors of real engines. Activations are an estimate: what autograd keeps of a
Llama-like block (tests compare it with torch's own account) plus the largest temporary buffers. Allocator
slack, kernels' workspaces and the CUDA context (1 to 2 GiB) are not in it.

Per token of a block, with b bytes a number, Q = heads * head size, F the inner width:

    2 RMSNorms             8 D + 8        float32 copies of the residual stream
    their outputs          2 b D          shared by q, k, v and by gate, up and the routers
    attention              4 b Q + b S    q, k, v (repeated per head) and the output; the mask, S positions
    SiLU and product       4 b F
    each adapter           b H + D        hidden units; the dropout mask, a byte each
    each router            12 E + 12 K    logits, probabilities, dense gate; gates and ids

With activation checkpointing a block keeps its input, b D, and its recorded routings, 8 E + 12 K each; one
block at a time is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_medical.config.layer_names import is_closing
from moe_medical.planning.adapted_model import FLOAT32, AdaptedModel, RoutedGroup, Workload, reach
from moe_medical.planning.layouts import Layout
from moe_medical.planning.zero3 import kept_whole

_MOMENTS = 2 * FLOAT32
"""Adam's two."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank; on the device unless the name says otherwise."""

    base: float
    experts: float
    shared: float
    """Routers and plain LoRA."""
    gradients: float
    optimizer: float
    """AdamW's moments and, under ZeRO, the master copy."""
    activations: float = 0.0
    buffers: float = 0.0
    """Buckets, gathered parameters and weights, the output head's logits."""
    host: float = 0.0
    """What offloading has moved off the device."""

    @property
    def device(self) -> float:
        """Peak on the device."""
        return self.base + self.experts + self.shared + self.state + self.activations + self.buffers

    @property
    def state(self) -> float:
        """Gradients and optimizer states on the device."""
        return self.gradients + self.optimizer


def memory_of(
    model: AdaptedModel,
    layout: Layout,
    workload: Workload,
    tokens_travel: Mapping[RoutedGroup, int] | None = None,
) -> Memory:
    """Add up what a rank holds.

    Args:
        model: The adapted model.
        layout: How it is spread.
        workload: One rank's work.
        tokens_travel: Routed groups whose exchange is `tokens`, and how many of each.
    """
    memory = _offloaded(_states(model, layout, workload), layout)
    return replace(
        memory,
        activations=_activations(model, layout, workload, tokens_travel or {}),
        buffers=_buffers(model, layout, workload),
    )


def _states(model: AdaptedModel, layout: Layout, workload: Workload) -> Memory:
    """Parameters, gradients and optimizer states, all on the device."""
    stage = layout.zero.stage
    base = model.base.parameters * workload.itemsize
    experts = model.expert_parameters / layout.ep_size
    shared = float(model.shared_parameters)
    # Of the experts there are only their replicas to hold partitions.
    own_experts = experts / layout.replicas.size
    own_shared = shared / layout.ranks
    own = own_experts + own_shared
    whole = experts + shared
    gradients = FLOAT32 * (own if stage >= 2 else whole)
    optimizer = (_MOMENTS + FLOAT32) * own if stage else _MOMENTS * whole
    if stage < 3:
        return Memory(base, FLOAT32 * experts, FLOAT32 * shared, gradients, optimizer)
    kept = kept_whole(model, layout, workload)
    return Memory(
        base=base / layout.ranks + kept["base"],
        experts=FLOAT32 * own_experts + kept["expert"],
        shared=FLOAT32 * own_shared + kept["shared"],
        gradients=gradients,
        optimizer=optimizer,
    )


def _offloaded(memory: Memory, layout: Layout) -> Memory:
    zero = layout.zero
    if zero.offload_optimizer:
        gradients = memory.gradients if zero.stage >= 2 else 0.0
        host = memory.optimizer + gradients
        memory = replace(memory, optimizer=0.0, gradients=memory.gradients - gradients, host=host)
    if zero.offload_parameters:
        host = memory.host + memory.base + memory.experts + memory.shared
        memory = replace(memory, base=0.0, experts=0.0, shared=0.0, host=host)
    return memory


def _activations(
    model: AdaptedModel, layout: Layout, workload: Workload, tokens_travel: Mapping[RoutedGroup, int]
) -> float:
    blocks = max(model.base.blocks, 1)
    size = workload.itemsize
    per_token = _of_base(model, workload) + _of_adapters(model, workload) + _of_routings(model)
    received = sum(n * _received(g, model, layout, workload) for g, n in tokens_travel.items())
    kept = size * model.expert_parameters if layout.keep_gathered and layout.ep_size > 1 else 0
    everything = per_token * workload.positions + received + kept
    if workload.checkpointing == "none":
        return everything
    inputs = size * model.base.hidden * blocks + _of_routings(model)
    return inputs * workload.positions + everything / blocks


def _of_base(model: AdaptedModel, workload: Workload) -> float:
    """Bytes per token that all blocks of the base keep."""
    base = model.base
    size = workload.itemsize
    wide = sum(s.in_features for name, s in base.linears.items() if is_closing(name))
    norms_and_mask = (8 + 2 * size) * base.hidden + 8 + size * workload.positions / workload.micro_batch
    return base.blocks * norms_and_mask + 4 * size * wide


def _of_adapters(model: AdaptedModel, workload: Workload) -> float:
    """Hidden units, of the chosen experts only; no mask of dropout, which is drawn again."""
    plain = model.adapters.rank * (len(model.kinds) - len(model.routed))
    layers = [model.settings(name) for name in model.routed]
    chosen = sum(at.active() * at.expert_rank() for at in layers)
    return float(workload.itemsize * (plain + chosen))


def _of_routings(model: AdaptedModel) -> float:
    """What is recorded for the router losses."""
    at = [model.settings(name) for name in model.deciding]
    return sum(4 * a.num_experts + 12 * a.active() for a in at)


def _received(group: RoutedGroup, model: AdaptedModel, layout: Layout, workload: Workload) -> float:
    """What dispatched rows keep for backward on the rank that computes them."""
    adapters = model.adapters
    members = len(group.out_features)
    size = workload.itemsize
    own = adapters.num_experts // layout.ep_size
    journey = reach(adapters.num_experts, adapters.active(), layout.ep_size, members)
    alone = reach(adapters.num_experts, adapters.active(), layout.ep_size)
    copied = size * group.in_features if members > 1 else 0
    per_member = copied + size * own * adapters.expert_rank()
    per_row = journey * (size * group.in_features + FLOAT32 * members * own) + alone * members * per_member
    return per_row * layout.ep_size * workload.tokens


def _buffers(model: AdaptedModel, layout: Layout, workload: Workload) -> float:
    head = workload.head_positions * model.base.vocabulary * (2 * workload.itemsize + 2 * FLOAT32)
    live = workload.itemsize * _live(model, layout, workload) if layout.zero.stage == 3 else 0
    return _buckets(model, layout) + live + head + _exchanged(model, layout, workload)


def _buckets(model: AdaptedModel, layout: Layout) -> float:
    """Where gradients are put together; DeepSpeed allocates a bucket whole, however little it holds."""
    zero = layout.zero
    if zero.stage and zero.contiguous_gradients:
        return FLOAT32 * zero.reduce_bucket * (2 if zero.overlap and zero.stage < 3 else 1)
    trained = model.expert_parameters / layout.ep_size + model.shared_parameters
    return FLOAT32 * min(zero.reduce_bucket, trained)


def _live(model: AdaptedModel, layout: Layout, workload: Workload) -> float:
    """Numbers of the base that ZeRO-3 has gathered at its peak."""
    base = model.base
    zero = layout.zero
    weights = [s.in_features * s.out_features for s in base.linears.values()]
    block = sum(weights) / max(base.blocks, 1) if workload.checkpointing != "none" else 0
    reused = 0 if workload.forward_recorded else zero.max_reuse_distance / 2
    largest = max([base.vocabulary * base.hidden, *weights])
    return min(base.parameters, max(reused, block) + min(zero.prefetch_bucket, zero.max_live) + largest)


def _exchanged(model: AdaptedModel, layout: Layout, workload: Workload) -> float:
    """The gathered weights of two layers, as they came and unpacked, and the gradients of one."""
    if layout.ep_size == 1 or not model.routed:
        return 0.0
    largest = max(sum(model.expert_sizes(name)) for name in model.routed)
    return largest * (4.0 * workload.itemsize + 2 * FLOAT32)
