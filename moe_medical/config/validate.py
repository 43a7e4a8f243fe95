"""Rules that types cannot say: ranges, and keys that must agree. Returns every problem, raises nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from moe_medical.config.schema import RunConfig
from moe_medical.config.validate_adapters import adapter_problems
from moe_medical.config.validate_data import loader_problems, mix_problems
from moe_medical.config.validate_loss import loss_problems
from moe_medical.config.validate_model import model_problems
from moe_medical.config.validate_parallel import deepspeed_problems
from moe_medical.config.validate_tracking import tracking_problems
from moe_medical.errors import Problem

_AT_LEAST_ONE = (
    "training.steps",
    "training.global_batch",
    "training.micro_batch",
    "data.mix.block",
    "parallel.ranks",
    "parallel.ep_size",
    "parallel.timeout_seconds",
    "evaluation.loss_rows",
    "evaluation.batch_rows",
    "evaluation.max_new_tokens",
    "checkpoint.keep",
    "tracking.log_every_steps",
)
_NOT_NEGATIVE = (
    "training.weight_decay",
    "training.clip_norm",
    "evaluation.score_rows",
    "evaluation.every_steps",
    "evaluation.resamples",
    "checkpoint.every_steps",
)
_POSITIVE = ("training.learning_rate", "training.epsilon", "data.mix.temperature")


def validate(config: RunConfig) -> list[Problem]:
    """Every rule that the config breaks."""
    data = [*_tasks(config), *mix_problems(config.data), *loader_problems(config)]
    return [
        *_ranges(config),
        *_batches(config),
        *data,
        *loss_problems(config),
        *tracking_problems(config),
        *_files(config),
        *adapter_problems(config),
        *model_problems(config),
    ]


def _ranges(config: RunConfig) -> Iterator[Problem]:
    for key in _AT_LEAST_ONE:
        yield from _require(key, _get(config, key), lambda v: v >= 1, "must be at least 1")
    for key in _NOT_NEGATIVE:
        yield from _require(key, _get(config, key), lambda v: v >= 0, "must not be negative")
    for key in _POSITIVE:
        yield from _require(key, _get(config, key), lambda v: 0 < v < math.inf, "must be finite and > 0")
    share = (lambda v: 0 <= v < 1, "must be in [0, 1)")
    yield from _require("training.warmup_ratio", config.training.warmup_ratio, *share)
    yield from _require("data.max_bad_fraction", config.data.max_bad_fraction, *share)
    yield from _require("data.max_length", config.data.max_length, lambda v: v >= 32, "must be at least 32")
    betas = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)")
    yield from _require("training.betas", config.training.betas, *betas)


def _batches(config: RunConfig) -> Iterator[Problem]:
    ranks = config.parallel.ranks
    unit = config.training.micro_batch * ranks
    if unit > 0 and config.training.global_batch % unit:
        rule = f"must be a multiple of micro_batch x ranks ({config.training.micro_batch} x {ranks})"
        near = max(unit, round(config.training.global_batch / unit) * unit)
        yield Problem("training.global_batch", rule, config.training.global_batch, f"Try {near}.")


def _tasks(config: RunConfig) -> Iterator[Problem]:
    caps = {"data.mix.max_repeats": config.data.mix.max_repeats}
    for name, task in config.data.tasks.items():
        key = f"data.tasks.{name}"
        share = (lambda v: 0 <= v < math.inf, "must be finite and not negative")
        yield from _require(f"{key}.weight", task.weight, *share)
        caps[f"{key}.max_repeats"] = task.max_repeats
    for key, cap in caps.items():
        if cap is not None:
            yield from _require(key, cap, lambda v: v > 0, "must be > 0 or null")


def _files(config: RunConfig) -> Iterator[Problem]:
    if not Path(config.data.recipe).is_file():
        yield Problem("data.recipe", "must name a mixture YAML, relative to the run file", config.data.recipe)
    yield from deepspeed_problems(config.parallel)


def _require(key: str, value, holds, rule: str) -> Iterator[Problem]:  # type: ignore[no-untyped-def]
    if not holds(value):
        yield Problem(key, rule, value)


def _get(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
