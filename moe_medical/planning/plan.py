"""What a run will do, told before it costs anything: shares, repeats, adapted layers, layouts.

Needs no torch: shapes come from the safetensors headers (or a config.json), tokens from a sample of each
task's rows, memory and traffic from the cost model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.known_shapes import known_shape, shape_of
from moe_medical.base_model.shapes import LinearShape
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.config.schema import MixSection
from moe_medical.console import show, show_table
from moe_medical.data.chat import ChatFormat
from moe_medical.data.dynamic_mixing import LEAD_STEPS
from moe_medical.data.tasks import TaskData, build_plan, load_tasks, mix_sizes
from moe_medical.planning.adapted_model import AdaptedModel
from moe_medical.planning.layout_plan import LayoutPlan, Machines, plan_layouts, show_layouts
from moe_medical.planning.mix_report import MixReport, compare_rules, show_comparison
from moe_medical.planning.preflight import check_context
from moe_medical.planning.sample_sizes import SampleSizes, mixture_sizes, task_sizes


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
    mix: MixSection
    rules: MixReport
    """All mixing rules for these tasks."""
    layers: list[LayerPlan]
    base_parameters: int
    layouts: LayoutPlan

    @property
    def trainable(self) -> int:
        return self.layouts.model.trainable


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
    if shape is None:
        check_context(config, base)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    adapters = config.adapters.for_tasks(len(tasks))
    model = AdaptedModel.of(known_shape(shape) if shape else shape_of(base), adapters)
    sizes = [task_sizes(task, chat) for task in tasks]
    planned = _plan_tasks(config, tasks, sizes)
    sample = mixture_sizes(sizes, [task.samples for task in planned])
    layouts = plan_layouts(config, model, sample, machines or Machines(1, config.parallel.ranks))
    samples = config.training.steps * config.training.global_batch
    mix = config.data.mix
    rules = compare_rules(mix, mix_sizes(tasks, config.data), samples, config.training.global_batch)
    return RunPlan(planned, mix, rules, _plan_layers(model), model.base.parameters, layouts)


def show_plan(plan: RunPlan, compare: bool = False) -> None:
    """Print a plan as tables; `compare` adds the other mixing rules."""
    _show_tasks(plan.tasks)
    _show_mixing(plan)
    if compare:
        show_comparison(plan.rules)
    _show_layers(plan.layers)
    share = 100 * plan.trainable / plan.base_parameters
    show(f"trainable {plan.trainable:,} parameters, {share:.2f} % of the base's {plan.base_parameters:,}\n")
    if idle := plan.layouts.model.adapters.idle_router():
        show(f"warning: {idle}\n")
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


def _show_mixing(plan: RunPlan) -> None:
    mix = plan.mix
    chosen = plan.rules.chosen
    caps = "no cap" if mix.max_repeats is None else f"at most {mix.max_repeats:g} epochs"
    warm_up = ""
    if mix.temperature_from is not None:
        warm_up = f", T={mix.temperature_from:g} at first, over {mix.temperature_blocks} blocks"
    effective = f"{chosen.effective_tasks:.1f} of {len(plan.tasks)} tasks in effect"
    moved = ""
    if mix.dynamic.rule != "none":
        moved = f"; {mix.dynamic.rule} moves these shares up to {_decisions(plan)} times"
    show(f"rule {chosen.title} by {mix.by}{warm_up}, {caps}; {effective}{moved}")
    for line in _warnings(plan):
        show(f"warning: {line}")
    show("")


def _warnings(plan: RunPlan) -> Iterator[str]:
    unseen = [t.name for t in plan.tasks if t.samples == 0]
    if unseen:
        yield f"no sample of {', '.join(unseen)} in this run; make it longer or weigh them up"
    report = plan.rules
    free = plan.rules.chosen.free_repeats
    capped = [
        f"{task.name} ({wanted:.1f} epochs)"
        for task, wanted in zip(report.tasks, free, strict=True)
        if task.max_repeats is not None and wanted > task.max_repeats
    ]
    if capped:
        yield f"capped, with the epochs that the rule alone would take: {', '.join(capped)}"


def _decisions(plan: RunPlan) -> int:
    """Decisions of the dynamic rule that take effect before the run ends."""
    mix = plan.mix
    report = plan.rules
    span = mix.dynamic.every_blocks * mix.block
    lead = LEAD_STEPS * report.global_batch
    return max(0, report.num_samples - 1 - lead) // span


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
