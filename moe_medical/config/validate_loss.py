"""Rules of `training.loss` and of several paths that types cannot say; layouts that can tell gradients apart.

Gradients of single tasks are found by several backward passes over one graph, as many as the micro-batch has
tasks. What is refused here was seen to fail with torch 2.13 and DeepSpeed 0.19.8; each rule says how.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_medical.config.deepspeed import read_deepspeed, zero_stage
from moe_medical.config.presets import PRESETS, MoloraConfig, resolve_adapters
from moe_medical.config.schema import RunConfig
from moe_medical.errors import Problem

_SOLVERS = {
    "upgrad": (("qpsolvers", "quadprog"), "quadprog_projector"),
    "cagrad": (("cvxpy", "clarabel"), "cagrad"),
    "nash_mtl": (("cvxpy", "ecos"), "nash_mtl"),
}
"""Rules of torchjd 0.18 that solve a program: packages that do it, and the extra of torchjd that has them."""


def loss_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of `training.loss`, and of the mixing rule that needs the tasks' gradients too."""
    loss = config.training.loss
    if not 0 < loss.temperature < math.inf:
        yield Problem("training.loss.temperature", "must be finite and > 0", loss.temperature)
    if not 0 < loss.rate <= 1:
        yield Problem("training.loss.rate", "must be in (0, 1]", loss.rate)
    if loss.window < 1:
        yield Problem("training.loss.window", "must be at least 1", loss.window)
    if loss.surgery != "none":
        yield from _surgery_problems(config)
    if config.data.mix.dynamic.rule == "doge":
        yield from task_gradient_problems(config, "data.mix.dynamic.rule", "doge")
    if config.adapters.preset in PRESETS:
        yield from _router_path_problems(config, resolve_adapters(config.adapters))


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
    if _zero_stage(config) == 3:
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


def _surgery_problems(config: RunConfig) -> Iterator[Problem]:
    key, loss = "training.loss.surgery", config.training.loss
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


def _router_path_problems(config: RunConfig, adapters: MoloraConfig) -> Iterator[Problem]:
    key, training = "training.router_paths", config.training
    if training.router_paths < 1:
        yield Problem(key, "must be at least 1", training.router_paths)
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


def _zero_stage(config: RunConfig) -> int:
    try:
        return zero_stage(read_deepspeed(config.parallel.deepspeed))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0  # what is wrong with the JSON is told elsewhere
