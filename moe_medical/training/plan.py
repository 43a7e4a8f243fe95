"""What a run will do, told before it costs anything: shares, repeats, adapted layers, layouts.

Needs no torch: shapes come from the safetensors headers (or a config.json), tokens from a sample of each
task's rows, memory and traffic from the cost model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.known_shapes import known_shape, shape_of
from moe_medical.base_model.shapes import LinearShape
from moe_medical.config import MoloraConfig, RunConfig, resolve_adapters
from moe_medical.console import show, show_table
from moe_medical.data.formats import ChatFormat
from moe_medical.data.tasks import TaskData, build_plan, load_tasks
from moe_medical.distributed.adapted_model import AdaptedModel
from moe_medical.training.layout_plan import LayoutPlan, Machines, plan_layouts, show_layouts
from moe_medical.training.sample_sizes import SampleSizes, mixture_sizes, task_sizes


@dataclass(frozen=True)
class TaskPlan:
    """One task's part of the run."""

    name: str
    kind: str
    rows: int
    weight: float
    """Share of the samples."""
    samples: int
    repeats: float
    tokens: int
    """Estimate: samples times the mean length of a sample of rows."""


@dataclass(frozen=True)
class LayerPlan:
    """One adapted linear layer."""

    name: str
    kind: str
    shape: LinearShape
    parameters: int


@dataclass(frozen=True)
class RunPlan:
    tasks: list[TaskPlan]
    layers: list[LayerPlan]
    base_parameters: int
    layouts: LayoutPlan

    @property
    def trainable(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def make_plan(config: RunConfig, machines: Machines | None = None, shape: str | None = None) -> RunPlan:
    """Work out the plan of a run from its files alone.

    Args:
        config: The run.
        machines: Where it would run; without them, the run file's ranks on one node.
        shape: Plan the layers and layouts for this model instead, a name or a config.json; its weights are
            not needed. Tokens are still those of the run's own tokenizer.

    Raises:
        MoeMedicalError: the run cannot be read, or cannot be spread so.
    """
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    model = AdaptedModel.of(
        known_shape(shape) if shape else shape_of(base), resolve_adapters(config.adapters)
    )
    sizes = [task_sizes(task, chat) for task in tasks]
    planned = _plan_tasks(config, tasks, sizes)
    sample = mixture_sizes(sizes, [task.samples for task in planned])
    layouts = plan_layouts(config, model, sample, machines or Machines(1, config.parallel.ranks))
    return RunPlan(planned, _plan_layers(model), model.base.parameters, layouts)


def show_plan(plan: RunPlan) -> None:
    """Print a plan as tables."""
    _show_tasks(plan.tasks)
    _show_layers(plan.layers)
    share = 100 * plan.trainable / plan.base_parameters
    show(f"trainable {plan.trainable:,} parameters, {share:.2f} % of the base's {plan.base_parameters:,}\n")
    show_layouts(plan.layouts)


def plan_layers(base: BaseModel, adapters: MoloraConfig) -> list[LayerPlan]:
    """The layers that the adapters' patterns name, in the order in which they run."""
    return _plan_layers(AdaptedModel.of(shape_of(base), adapters))


def _plan_layers(model: AdaptedModel) -> list[LayerPlan]:
    return [
        LayerPlan(name, kind, model.base.linears[name], model.layer_parameters(name))
        for name, kind in model.kinds.items()
    ]


def _plan_tasks(config: RunConfig, tasks: Sequence[TaskData], sizes: Sequence[SampleSizes]) -> list[TaskPlan]:
    samples = config.training.steps * config.training.global_batch
    shares = build_plan(tasks, config.data, config.run.seed, samples).report(samples)
    return [
        TaskPlan(
            name=task.name,
            kind=task.spec.kind,
            rows=len(task.train),
            weight=share.share,
            samples=share.samples,
            repeats=share.repeats,
            tokens=round(share.samples * size.mean),
        )
        for task, share, size in zip(tasks, shares, sizes, strict=True)
    ]


def _show_tasks(tasks: Sequence[TaskPlan]) -> None:
    rows = [
        (t.name, f"{t.rows:,}", f"{t.weight:.4f}", f"{t.samples:,}", f"{t.repeats:.3f}", f"{t.tokens:,}")
        for t in sorted(tasks, key=lambda t: -t.rows)
    ]
    totals = (sum(t.rows for t in tasks), sum(t.samples for t in tasks), sum(t.tokens for t in tasks))
    footer = (f"{len(tasks)} tasks", f"{totals[0]:,}", "", f"{totals[1]:,}", "", f"{totals[2]:,}")
    show_table(("task", "rows", "weight", "samples", "repeats", "tokens"), rows, footer)
    unseen = [t.name for t in tasks if t.samples == 0]
    if unseen:
        show(f"warning: no sample of {', '.join(unseen)} in this run; make it longer or weigh them up\n")


def _show_layers(layers: Sequence[LayerPlan]) -> None:
    groups: dict[tuple[str, str, LinearShape], list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault((layer.name.rsplit(".", 1)[-1], layer.kind, layer.shape), []).append(layer)
    rows = [
        (
            name,
            kind,
            f"{shape.in_features} -> {shape.out_features}",
            str(len(of)),
            f"{sum(x.parameters for x in of):,}",
        )
        for (name, kind, shape), of in groups.items()
    ]
    show_table(("adapted module", "adapter", "shape", "layers", "parameters"), rows)
