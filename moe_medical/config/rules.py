"""Rules between several values of a run file, section by section; each problem is told, nothing is raised.

Ranges of single values stand beside the fields (`schema.py`); what adapters and parallelism have to keep to
has files of its own. Gradients of single tasks are found by several backward passes over one graph, as many
as the micro-batch has tasks: what is refused there was seen to fail with torch 2.13 and DeepSpeed 0.19.8, and
each rule says how.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_medical.config.adapter_rules import adapter_problems
from moe_medical.config.deepspeed import stage_of_file
from moe_medical.config.parallel_rules import deepspeed_problems
from moe_medical.config.ranges import range_problems
from moe_medical.config.schema import DataSection, MixSection, RunConfig
from moe_medical.errors import Problem

SINKS = ("tensorboard", "trackio")
"""Names in `tracking.sinks`, which are those of the packages too."""
_SOLVERS = {
    "upgrad": (("qpsolvers", "quadprog"), "quadprog_projector"),
    "cagrad": (("cvxpy", "clarabel"), "cagrad"),
    "nash_mtl": (("cvxpy", "ecos"), "nash_mtl"),
}
"""Rules of torchjd 0.18 that solve a program: packages that do it, and the extra of torchjd that has them."""


def validate(config: RunConfig) -> list[Problem]:
    """Every rule that the config breaks."""
    return [
        *range_problems(config),
        *_batches(config),
        *mix_problems(config.data),
        *_loss(config),
        *_router_paths(config),
        *_tracking(config),
        *_guard(config),
        *_files(config),
        *adapter_problems(config),
        *model_problems(config),
    ]


# Data


def _batches(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    training = config.training
    ranks = config.parallel.ranks
    unit = training.micro_batch * ranks
    if unit > 0 and training.global_batch % unit:
        rule = f"must be a multiple of micro_batch x ranks ({training.micro_batch} x {ranks})"
        near = max(unit, round(training.global_batch / unit) * unit)
        yield Problem("training.global_batch", rule, training.global_batch, f"Try {near}.")
    if data.pack_length is not None and data.pack_length < data.max_length:
        rule = f"must be at least max_length ({data.max_length}), or null"
        yield Problem("data.pack_length", rule, data.pack_length, f"Try {data.max_length}.")


def mix_problems(data: DataSection) -> Iterator[Problem]:
    """Problems of `data.mix`; what depends on the recipe's tasks is told by `rules.task_weights`."""
    mix = data.mix
    if not mix.floor < mix.ceiling <= 1:
        rule = f"must be > floor ({mix.floor:g}) and at most 1"
        yield Problem("data.mix.ceiling", rule, mix.ceiling)
    if mix.temperature_from is not None:
        yield from _warm_up(mix, mix.temperature_from)
    explicit = mix.rule == "explicit"
    if bool(mix.shares) != explicit:
        rule = "must be given under rule 'explicit' and under no other"
        fix = "" if explicit else "Set data.mix.rule=explicit."
        yield Problem("data.mix.shares", rule, mix.shares or None, fix)
    for name, share in mix.shares.items():
        if not 0 <= share < math.inf:
            yield Problem(f"data.mix.shares.{name}", "must be finite and not negative", share)
    if mix.shares and not any(mix.shares.values()):
        yield Problem("data.mix.shares", "must leave a task above 0", mix.shares)


def _warm_up(mix: MixSection, start: float) -> Iterator[Problem]:
    key = "data.mix.temperature_from"
    if mix.rule not in ("temperature", "cap"):
        yield Problem(key, f"must be null under rule {mix.rule!r}, which has no temperature", start)
    if mix.dynamic.rule != "none":
        yield Problem(key, "must be null under a dynamic rule, which sets the same shares", start)


# Training


def _loss(config: RunConfig) -> Iterator[Problem]:
    loss = config.training.loss
    if loss.surgery != "none":
        yield from _surgery(config)
    if config.data.mix.dynamic.rule == "doge":
        yield from task_gradient_problems(config, "data.mix.dynamic.rule", "doge")


class Obstacle(NamedTuple):
    """Why a layout cannot tell the gradients of single tasks."""

    reason: str
    """Continues `cannot with ...`."""
    fix: str


def task_gradient_obstacles(config: RunConfig) -> Iterator[Obstacle]:
    """All that keeps the gradients of single tasks from being told apart."""
    if config.parallel.ep_size > 1:
        yield Obstacle(
            "parallel.ep_size > 1: ranks with other tasks would wait for each other", "Use ep_size 1."
        )
    if stage_of_file(config.parallel.deepspeed) == 3:
        reason = "ZeRO-3: gradients of partitioned parameters come back empty"
        yield Obstacle(reason, "Use a DeepSpeed JSON of stage 0, 1 or 2.")
    if config.training.activation_checkpointing == "reentrant":
        reason = "reentrant activation checkpointing: it hides the adapters from autograd"
        yield Obstacle(reason, "Use training.activation_checkpointing=non_reentrant.")
    if config.training.compile:
        reason = "training.compile: compiled blocks have one backward pass only"
        yield Obstacle(reason, "Use compile=false.")


def task_gradient_problems(config: RunConfig, key: str, value: str) -> Iterator[Problem]:
    """The same where `key` asks for these gradients."""
    for obstacle in task_gradient_obstacles(config):
        yield Problem(key, f"must not be used with {obstacle.reason}", value, obstacle.fix)


def _surgery(config: RunConfig) -> Iterator[Problem]:
    key = "training.loss.surgery"
    loss = config.training.loss
    yield from task_gradient_problems(config, key, loss.surgery)
    if loss.task_weights != "none":
        rule = "must not be used with training.loss.task_weights: both scale the tasks' gradients"
        yield Problem(key, rule, loss.surgery, "Set one of the two to none.")
    solvers, extra = _SOLVERS.get(loss.surgery, ((), ""))
    missing = [name for name in ("torchjd", *solvers) if importlib.util.find_spec(name) is None]
    if missing:
        package = f"torchjd[{extra}]==0.18.0" if extra else "torchjd==0.18.0"
        rule = f"must find the packages that it needs; missing: {', '.join(missing)}"
        yield Problem(key, rule, loss.surgery, f'Run: pip install "{package}".')


def _router_paths(config: RunConfig) -> Iterator[Problem]:
    key = "training.router_paths"
    training = config.training
    adapters = config.adapters
    if training.router_paths <= 1:
        return
    if not (adapters.molora and (adapters.selection == "sample" or adapters.jitter)):
        rule = "must be 1 where each pass would choose the same experts"
        fix = "Set adapters.selection=sample, or adapters.jitter."
        yield Problem(key, rule, training.router_paths, fix)
    for other, one in (("surgery", training.loss.surgery), ("task_weights", training.loss.task_weights)):
        if one not in ("none", "dwa", "uncertainty"):
            rule = f"must be 1 with training.loss.{other}={one}, which looks at one pass only"
            yield Problem(key, rule, training.router_paths, f"Set training.loss.{other}=none.")


def _guard(config: RunConfig) -> Iterator[Problem]:
    guard = config.training.guard
    if guard.action == "none":
        return
    if config.evaluation.every_steps == 0:
        rule = "must be above 0 where training.guard is on: it looks at evaluations"
        yield Problem("evaluation.every_steps", rule, 0)
    if guard.action == "freeze" and config.data.mix.dynamic.rule != "none":
        rule = "must not be freeze beside data.mix.dynamic: both set shares"
        yield Problem("training.guard.action", rule, guard.action, "Use reweight, or dynamic.rule=none.")
    if guard.action == "freeze" and config.data.mix.temperature_from is not None:
        rule = "must not be freeze beside data.mix.temperature_from: shares are laid down until its end"
        yield Problem("training.guard.action", rule, guard.action, "Use reweight, or temperature_from=null.")


# Everything else


def _tracking(config: RunConfig) -> Iterator[Problem]:
    reference = config.tracking.seesaw.reference
    if reference and not Path(reference).is_file():
        rule = "must name a file, relative to the run file"
        yield Problem("tracking.seesaw.reference", rule, reference, "Make one with moe-medical baseline.")
    for i, name in enumerate(config.tracking.sinks):
        key = f"tracking.sinks[{i}]"
        if name not in SINKS:
            yield Problem(key, f"must be one of {', '.join(SINKS)}", name)
        elif importlib.util.find_spec(name) is None:
            yield Problem(key, "must be installed", name, f'Run: pip install "moe-medical[{name}]".')


def _files(config: RunConfig) -> Iterator[Problem]:
    if not Path(config.data.recipe).is_file():
        yield Problem("data.recipe", "must name a mixture YAML, relative to the run file", config.data.recipe)
    yield from deepspeed_problems(config.parallel)


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """Whether the adapters and the layout work on the base as it is quantised."""
    key = "model.quantization"
    kind = config.model.quantization
    if kind == "none":
        return
    if stage_of_file(config.parallel.deepspeed) == 3:
        rule = "must be none under ZeRO-3, which keeps the base in parts of plain numbers"
        yield Problem(key, rule, kind, "Use ZeRO-2: the quantised base is small.")
    if kind != "int8" and config.parallel.device == "cpu":
        yield Problem(key, "must be none or int8 with parallel.device cpu: bitsandbytes needs a GPU", kind)
    if config.adapters.experts == "ffn":
        yield Problem(key, "must be none with adapters.experts ffn, which copy the base and train", kind)
    if config.adapters.dora:
        yield Problem(key, "must be none with adapters.dora, which needs the norms of whole weights", kind)
