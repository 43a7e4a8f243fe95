"""Layouts that a run could have on given machines, what each costs a rank, and which to take. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.config.parallel_rules import nearest_ep_size
from moe_medical.config.schema import Batching, Exchange
from moe_medical.console import show, show_table
from moe_medical.errors import ConfigError, Problem
from moe_medical.planning.adapted_model import AdaptedModel, RoutedGroup, Workload
from moe_medical.planning.cost import Estimate, Recommendation, choose_exchange, estimate, recommend
from moe_medical.planning.layouts import Layout, is_possible, neighbours
from moe_medical.planning.sample_sizes import SampleSizes

_GIB = 2**30


class SizedLinear(Protocol):
    """What the choice of an exchange needs of a layer."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Machines:
    """Where a run would go."""

    nodes: int
    gpus: int
    """Ranks of each node."""
    gpu_memory: int = 80
    """GiB of each rank."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class LayoutPlan:
    """The run file's layout among others."""

    machines: Machines
    model: AdaptedModel
    workload: Workload
    global_batch: int
    """What the run file asks for."""
    chosen: Estimate
    others: list[Estimate]
    """Those that differ from the chosen one in a single setting."""
    recommended: Recommendation

    batching: Batching
    """As the run file has it."""

    @property
    def samples(self) -> int:
        """Samples of a step on these machines."""
        if self.batching == "packed":
            return _at_least_one_each(self.global_batch, self.machines.ranks)
        return self.workload.micro_batch * self.machines.ranks * self.workload.accumulation


def plan_layouts(
    config: RunConfig, model: AdaptedModel, sizes: SampleSizes, machines: Machines
) -> LayoutPlan:
    """Estimate the run's own layout, its neighbours and the best of all.

    Raises:
        ConfigError: the experts cannot be spread over these ranks as the run file asks.
    """
    layout = Layout.of(config, machines.ranks, machines.gpus)
    near_by = [n for n in neighbours(layout, model.spread_experts) if model.allows(n.zero.stage)]
    if not is_possible(layout, model.adapters.num_experts):
        rule = f"must divide --nodes x --gpus ({machines.ranks})"
        near = nearest_ep_size(layout.ep_size, model.adapters.num_experts, machines.ranks)
        problem = Problem("parallel.ep_size", rule, layout.ep_size, f"Try parallel.ep_size={near}.")
        raise ConfigError("the command line", [problem])
    workload = _workload(config, model.adapters, sizes, machines.ranks)
    return LayoutPlan(
        machines=machines,
        model=model,
        workload=workload,
        global_batch=config.training.global_batch,
        chosen=estimate(model, layout, workload),
        others=[estimate(model, other, workload) for other in near_by],
        recommended=recommend(model, layout, workload, machines.gpu_memory * _GIB),
        batching=config.data.batching,
    )


def exchange_chooser(
    config: RunConfig, adapters: MoloraConfig, sizes: SampleSizes, ranks: int
) -> Callable[[Mapping[str, SizedLinear]], Exchange]:
    """What `exchange: auto` means for layers that share an input; the plan decides alike.

    Args:
        config: The run.
        adapters: Its resolved adapter settings.
        sizes: Tokens of its samples.
        ranks: World size.
    """
    layout = Layout.of(config, ranks, ranks)
    workload = _workload(config, adapters, sizes, ranks)

    def choose(members: Mapping[str, SizedLinear]) -> Exchange:
        layers = list(members.values())
        group = RoutedGroup(layers[0].in_features, tuple(layer.out_features for layer in layers))
        return choose_exchange(group, adapters, layout, workload)

    return choose


def show_layouts(plan: LayoutPlan) -> None:
    """Print a line on the batch, the layouts side by side, and the chosen one's traffic by purpose."""
    show(_batch_line(plan))
    names = ("layout", "", "base", "adapters", "states", "activations", "buffers", "GPU", "host", "sent/step")
    columns = (*names, "to other nodes")
    show_table(columns, [_row(e, plan) for e in _listed(plan)])
    best = plan.recommended
    show(f"recommended for {plan.machines.gpu_memory} GiB: {best.estimate.layout}: {best.reason}\n")
    if plan.chosen.traffic:
        rows = [(t.purpose, t.kind, size(t.sent), size(t.across)) for t in plan.chosen.traffic]
        title = f"{plan.chosen.layout}, sent per rank and step"
        show_table((title, "collective", "bytes", "to other nodes"), rows)


def size(number: float) -> str:
    """Bytes for a person."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((p for p in range(len(units) - 1) if number < 1024 ** (p + 1)), len(units) - 1)
    value = number / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 100 or power == 0 else f"{value:.1f} {units[power]}"


def _workload(config: RunConfig, adapters: MoloraConfig, sizes: SampleSizes, ranks: int) -> Workload:
    rows = (
        _Rows.of_packed(config, sizes, ranks) if config.data.batching == "packed" else _Rows.of(config, sizes)
    )
    at_once = config.training.micro_batch * ranks
    accumulation = max(1, -(-rows.number // at_once))
    return Workload.of(
        config,
        adapters,
        accumulation=accumulation,
        mean_tokens=rows.tokens / (accumulation * at_once),
        longest=rows.longest,
        targets=rows.target_columns,
    )


class _Rows(NamedTuple):
    """The rows of a step over all ranks."""

    number: int
    tokens: float
    longest: int
    """Tokens of a row at most."""
    target_columns: int
    """Columns of a micro-batch that hold a target of some row."""

    @classmethod
    def of(cls, config: RunConfig, sizes: SampleSizes) -> _Rows:
        """One sample a row."""
        samples = config.training.global_batch
        return cls(samples, samples * sizes.mean, sizes.longest, sizes.longest_target)

    @classmethod
    def of_packed(cls, config: RunConfig, sizes: SampleSizes, ranks: int) -> _Rows:
        """As few as hold the samples, equally many on each rank; rows have their targets in other columns."""
        samples = _at_least_one_each(config.training.global_batch, ranks)
        length = config.data.pack_length or config.data.max_length
        tokens = samples * sizes.mean
        number = math.ceil(tokens / length / ranks) * ranks
        targets = samples * sizes.mean_target / number * config.training.micro_batch
        return cls(number, tokens, length, min(length, math.ceil(targets)))


def _at_least_one_each(samples: int, ranks: int) -> int:
    return -(-samples // ranks) * ranks


def _batch_line(plan: LayoutPlan) -> str:
    machines = plan.machines
    work = plan.workload
    where = f"{plan.model.base.name} on {machines.nodes} x {machines.gpus} ranks"
    rows = f"up to {work.micro_batch} packed rows" if plan.batching == "packed" else f"{work.micro_batch}"
    batch = f"micro-batch {rows} x {work.accumulation} accumulated = {plan.samples} samples a step"
    asked = "" if plan.samples == plan.global_batch else f" (the run file asks for {plan.global_batch})"
    return f"{where}; {batch}{asked}; {work.dtype}; activations and buffers are estimates\n"


def _listed(plan: LayoutPlan) -> Iterator[Estimate]:
    yield plan.chosen
    yield from plan.others
    if plan.recommended.estimate.layout not in [e.layout for e in (plan.chosen, *plan.others)]:
        yield plan.recommended.estimate


def _row(e: Estimate, plan: LayoutPlan) -> Sequence[str]:
    marks = []
    if e.layout == plan.chosen.layout:
        marks.append("run file")
    if e.layout == plan.recommended.estimate.layout:
        marks.append("recommended")
    m = e.memory
    used = " and ".join(f"{n} {name}" for name, n in e.exchanges.items())
    name = f"{e.layout} ({used})" if e.layout.exchange == "auto" and used else str(e.layout)
    held = (m.base, m.experts + m.shared, m.state, m.activations, m.buffers, m.device, m.host)
    return (name, ", ".join(marks), *(size(n) for n in (*held, e.sent, e.across)))
