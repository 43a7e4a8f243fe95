"""What a run will do, told before it costs anything: shares, repeats, adapted layers, memory per rank.

Needs no torch: shapes come from the safetensors headers, tokens from a sample of each task's rows.
Activations and buffers are not in the memory figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_medical.adapters.placement import match_modules
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.shapes import LinearShape, linear_shapes, num_parameters
from moe_medical.config import MoloraConfig, RunConfig, resolve_adapters
from moe_medical.config.deepspeed_keys import read_deepspeed, zero_stage
from moe_medical.console import show, show_table
from moe_medical.data.formats import ChatFormat
from moe_medical.data.tasks import TaskData, build_plan, load_tasks

_ROWS_MEASURED = 128
_BYTES = {"float32": 4, "bfloat16": 2}


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
class MemoryPlan:
    """Bytes per rank."""

    base: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.base + self.adapters + self.gradients + self.optimizer


@dataclass(frozen=True)
class RunPlan:
    tasks: list[TaskPlan]
    layers: list[LayerPlan]
    base_parameters: int
    memory: MemoryPlan

    @property
    def trainable(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def make_plan(config: RunConfig) -> RunPlan:
    """Work out the plan of a run from its files alone."""
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    layers = plan_layers(base, resolve_adapters(config.adapters))
    trainable = sum(layer.parameters for layer in layers)
    total = num_parameters(base)
    return RunPlan(_plan_tasks(config, tasks, chat), layers, total, plan_memory(config, total, trainable))


def show_plan(plan: RunPlan, config: RunConfig) -> None:
    """Print a plan as tables."""
    _show_tasks(plan.tasks)
    _show_layers(plan.layers)
    share = 100 * plan.trainable / plan.base_parameters
    show(f"trainable {plan.trainable:,} parameters, {share:.2f} % of the base's {plan.base_parameters:,}\n")
    memory = plan.memory
    stage = zero_stage(read_deepspeed(config.parallel.deepspeed))
    columns = ("memory per rank", "base", "adapters", "gradients", "optimizer", "total")
    sizes = (memory.base, memory.adapters, memory.gradients, memory.optimizer, memory.total)
    label = f"ZeRO-{stage}, {config.parallel.ranks} ranks, without activations"
    show_table(columns, [(label, *(f"{n / 2**20:,.0f} MiB" for n in sizes))])


def layer_parameters(shape: LinearShape, kind: str, adapters: MoloraConfig) -> int:
    """Trainable parameters of one adapted layer: A and B per expert, and the router with its bias."""
    low_rank = adapters.rank * (shape.in_features + shape.out_features)
    if kind == "lora":
        return low_rank
    router = shape.in_features + 1
    return adapters.num_experts * (low_rank + router)


def plan_layers(base: BaseModel, adapters: MoloraConfig) -> list[LayerPlan]:
    """The layers that the adapters' patterns name, in name order."""
    shapes = linear_shapes(base)
    return [
        LayerPlan(name, kind, shapes[name], layer_parameters(shapes[name], kind, adapters))
        for name, kind in match_modules(shapes, adapters).items()
    ]


def plan_memory(config: RunConfig, base_parameters: int, trainable: int) -> MemoryPlan:
    """Bytes per rank: fp32 adapters, gradients and AdamW states, spread as the ZeRO stage does."""
    stage, ranks = zero_stage(read_deepspeed(config.parallel.deepspeed)), config.parallel.ranks
    base = base_parameters * _BYTES[config.model.dtype]
    master = 0 if stage == 0 else 4
    return MemoryPlan(
        base=base // ranks if stage == 3 else base,
        adapters=4 * trainable // (ranks if stage == 3 else 1),
        gradients=4 * trainable // (ranks if stage >= 2 else 1),
        optimizer=(8 + master) * trainable // (ranks if stage >= 1 else 1),
    )


def _plan_tasks(config: RunConfig, tasks: Sequence[TaskData], chat: ChatFormat) -> list[TaskPlan]:
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
            tokens=round(share.samples * mean_tokens(task, chat)),
        )
        for task, share in zip(tasks, shares, strict=True)
    ]


def mean_tokens(task: TaskData, chat: ChatFormat) -> float:
    """Mean tokens of a sample, measured on evenly spread rows."""
    picks = np.linspace(0, len(task.train) - 1, min(_ROWS_MEASURED, len(task.train))).astype(int)
    rows = [task.train[i] for i in picks]
    return float(np.mean([len(chat.encode(r.prompt, r.target).input_ids) for r in rows]))


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
