"""How often ZeRO-3 gathers each parameter in a step: a replay of DeepSpeed's own rule. Torch-free.

`deepspeed.runtime.zero.partitioned_param_coordinator` of 0.19.8, once it has recorded a pass:

- A module's parameters are gathered when it starts, unless they are still there, and released when it ends,
  unless it runs again before `max_reuse_distance` parameters have gone by; looking ahead for what to prefetch
  keeps them too. `max_live_parameters` limits the prefetch and nothing else.
- What to release is decided once for each position in the recorded pass, and remembered for good. Where a
  pass without backward came first (an evaluation, a look-ahead), forward keeps nothing for backward.
- Frozen parameters of a block that is recomputed stay until the module ends whose backward asked for it: the
  block under reentrant checkpointing, its last layer under non-reentrant, so that the others gather again.
- Parameters of at most `param_persistence_threshold` elements are never released, and gathered anew after
  every step, frozen ones too.

The first two micro-batches of a run, and the first after an evaluation, gather more: they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_medical.base_model.known_shapes import block_of
from moe_medical.planning.adapted_model import FLOAT32, AdaptedModel, Workload
from moe_medical.planning.layouts import Layout


@dataclass(frozen=True)
class _Parameter:
    """A parameter that ZeRO-3 spreads over ranks."""

    owner: str
    """`base`, `shared` or `expert`."""
    numel: int
    """Before it is spread."""
    itemsize: int


@dataclass(frozen=True)
class _Module:
    """A module with parameters of its own."""

    name: str
    """Modules of the same name have the same parameters."""
    block: int
    parameters: tuple[_Parameter, ...]
    has_backward: bool = True
    held: bool = False
    """Whether its parameters stay in any case until they are taken along."""
    takes_along: frozenset[str] = frozenset()
    """Modules whose parameters are released when this one ends."""

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def frozen(self) -> bool:
        return all(p.owner == "base" for p in self.parameters)


def kept_whole(model: AdaptedModel, layout: Layout, workload: Workload) -> dict[str, float]:
    """Bytes by owner of the parameters that are too small to be spread: gathered after every step."""
    limit = layout.zero.persistence_threshold
    unique = {module.name: module for module in _forward(model, layout, workload)}
    return _bytes(p for m in unique.values() for p in m.parameters if p.numel <= limit)


def gathered(model: AdaptedModel, layout: Layout, workload: Workload) -> dict[str, float]:
    """Bytes by owner of the parameters that a step's passes gather, whole."""
    limit = layout.zero.persistence_threshold
    modules = _gathered(_forward(model, layout, workload), layout, workload)
    return _bytes(p for module in modules for p in module.parameters if p.numel > limit)


def _bytes(parameters: Iterable[_Parameter]) -> dict[str, float]:
    total = {"base": 0.0, "shared": 0.0, "expert": 0.0}
    for p in parameters:
        total[p.owner] += p.numel * p.itemsize
    return total


def _gathered(forward: Sequence[_Module], layout: Layout, workload: Workload) -> Iterator[_Module]:
    """Each module as often as its parameters are gathered in a step."""
    trace = [*forward, *_backward(forward, workload)]
    stays = _kept(trace, layout)
    if workload.forward_recorded:
        stays[: len(forward)] = _kept(forward, layout)
    look_ahead = [len(forward)] * (workload.accumulation if workload.looks_ahead else 0)
    present: set[str] = set()
    for length in [*look_ahead, *[len(trace)] * workload.accumulation]:
        for module, stay in zip(trace[:length], stays, strict=False):
            if module.name not in present:
                yield module
            (present.add if stay or module.held else present.discard)(module.name)
            present -= module.takes_along


def _kept(trace: Sequence[_Module], layout: Layout) -> list[bool]:
    """Whether each module's parameters outlast its run."""
    zero = layout.zero
    horizon = max(zero.max_reuse_distance, 2 * min(zero.prefetch_bucket, zero.max_live))
    stays = []
    gone_by = 0
    next_at: dict[str, int] = {}  # parameters from the start of the module's next run to the end of the trace
    for module in reversed(trace):
        passed = gone_by - next_at[module.name] if module.name in next_at else horizon
        stays.append(passed < horizon)
        gone_by += module.numel
        next_at[module.name] = gone_by
    return stays[::-1]


def _backward(forward: Sequence[_Module], workload: Workload) -> Iterator[_Module]:
    if workload.checkpointing == "none":
        yield from _reversed(forward)
        return
    last = max(i for i, module in enumerate(forward) if module.block >= 0)
    yield from _reversed(forward[last + 1 :])
    for block in range(forward[last].block, -1, -1):
        inside = [module for module in forward if module.block == block]
        yield from (replace(module, held=module.frozen) for module in inside)
        yield from _reversed(inside) if workload.checkpointing == "reentrant" else _after_recompute(inside)
    yield from _reversed(m for m in forward[:last] if m.block < 0)


def _after_recompute(block: Sequence[_Module]) -> Iterator[_Module]:
    """Backward of a recomputed block: its last layer takes the frozen parameters of all with it."""
    frozen = frozenset(module.name for module in block if module.frozen)
    for module in _reversed(block):
        last = module.name == block[-1].name.removesuffix(".router")
        yield replace(module, takes_along=frozen) if last else module


def _reversed(modules: Iterable[_Module]) -> Iterator[_Module]:
    return (m for m in reversed(list(modules)) if m.has_backward)


def _forward(model: AdaptedModel, layout: Layout, workload: Workload) -> list[_Module]:
    """Modules with parameters in the order in which they start."""
    base = model.base
    size = workload.itemsize
    table = _Parameter("base", base.vocabulary * base.hidden, size)
    norm = (_Parameter("base", base.hidden, size),)
    modules = [_Module("embedding", -1, (table,), workload.input_needs_grad)]
    for name in base.linears:
        if block_of(name) != modules[-1].block:
            number = block_of(name)
            reached = number > 0 or workload.input_needs_grad
            modules += [_Module(f"norms.{number}.{i}", number, norm, reached) for i in (0, 1)]
        modules += _linear(model, layout, workload, name)
    head = "embedding" if base.tied else "head"
    return [*modules, _Module("norm", -1, norm), _Module(head, -1, (table,))]


def _linear(model: AdaptedModel, layout: Layout, workload: Workload, name: str) -> Iterator[_Module]:
    """An adapter starts before the base layer and the router that it wraps."""
    block = block_of(name)
    shape = model.base.linears[name]
    kind = model.kinds.get(name)
    if kind == "lora":
        sizes = model.plain_sizes(name)
        yield _Module(name, block, tuple(_Parameter("shared", n, FLOAT32) for n in sizes))
    elif kind:
        sizes = model.expert_sizes(name)
        own = (_Parameter("expert", n // layout.ep_size, FLOAT32) for n in sizes)
        yield _Module(name, block, tuple(own))
    weight = _Parameter("base", shape.in_features * shape.out_features, workload.itemsize)
    yield _Module(f"{name}.base", block, (weight,), name not in model.front or workload.input_needs_grad)
    if kind == "molora" and (router := model.router_sizes(name)):
        yield _Module(f"{name}.router", block, tuple(_Parameter("shared", n, FLOAT32) for n in router))
