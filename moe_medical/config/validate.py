"""Rules that types cannot say: ranges, and keys that must agree. Returns every problem, raises nothing."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from moe_medical.config.deepspeed_keys import RUN_FILE_OWNS, TOP_LEVEL_KEYS, ZERO_KEYS
from moe_medical.config.presets import PRESETS, resolve_adapters
from moe_medical.config.schema import RunConfig
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
    "checkpoint.every_steps",
)
_POSITIVE = ("training.learning_rate", "training.epsilon", "data.mix.temperature")


def validate(config: RunConfig) -> list[Problem]:
    """Every rule that the config breaks."""
    return [*_ranges(config), *_batches(config), *_tasks(config), *_files(config), *_adapters(config)]


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
    yield from _deepspeed(Path(config.parallel.deepspeed))


def _deepspeed(path: Path) -> Iterator[Problem]:
    try:
        settings = json.loads(path.read_text())
    except OSError as e:
        found = f"{path} ({e.strerror})"
        yield Problem("parallel.deepspeed", "must name a DeepSpeed JSON, relative to the run file", found)
        return
    except ValueError as e:
        yield Problem("parallel.deepspeed", f"must name valid JSON ({e})", str(path))
        return
    if not isinstance(settings, dict):
        yield Problem("parallel.deepspeed", "must name a JSON object", str(path))
        return
    for key, owner in RUN_FILE_OWNS.items():
        if key in settings:
            yield Problem(f"{path}: {key}", f"is owned by the run file's {owner}", fix="Remove it there.")
    rule = "is not a DeepSpeed key for use beside a run file"
    yield from _unknown(f"{path}: ", settings.keys() - RUN_FILE_OWNS.keys(), TOP_LEVEL_KEYS, rule)
    yield from _zero(f"{path}: zero_optimization", settings.get("zero_optimization", {}))


def _zero(where: str, zero: object) -> Iterator[Problem]:
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    yield from _require(f"{where}.stage", stage, lambda v: v in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
    if isinstance(zero, dict):
        yield from _unknown(f"{where}.", zero, ZERO_KEYS, "is not a key of zero_optimization")


def _unknown(prefix: str, keys: Iterable[str], known: Set[str], rule: str) -> Iterator[Problem]:
    for key in sorted(set(keys) - known):
        close = difflib.get_close_matches(key, sorted(known), n=1)
        yield Problem(f"{prefix}{key}", rule, fix=f"Did you mean {close[0]!r}?" if close else "")


def _adapters(config: RunConfig) -> Iterator[Problem]:
    if config.adapters.preset not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        yield Problem("adapters.preset", f"must be one of {known}", config.adapters.preset)
        return
    adapters = resolve_adapters(config.adapters)
    for key in ("num_experts", "top_k", "rank", "alpha"):
        yield from _require(f"adapters.{key}", getattr(adapters, key), lambda v: v > 0, "must be > 0")
    within = (lambda v: v <= adapters.num_experts, f"must be at most num_experts ({adapters.num_experts})")
    yield from _require("adapters.top_k", adapters.top_k, *within)
    yield from _require("adapters.dropout", adapters.dropout, lambda v: 0 <= v < 1, "must be in [0, 1)")
    for key in ("molora", "lora"):
        yield from _patterns(f"adapters.{key}", getattr(adapters, key))
    yield from _expert_parallel(config, adapters.num_experts)


def _patterns(key: str, patterns: tuple[str, ...]) -> Iterator[Problem]:
    for i, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except re.error as e:
            yield Problem(f"{key}[{i}]", f"must be a regular expression ({e})", pattern)


def _expert_parallel(config: RunConfig, num_experts: int) -> Iterator[Problem]:
    ep_size, ranks = config.parallel.ep_size, config.parallel.ranks
    if ep_size <= 1:
        return
    whole = True
    for what, number in (("adapters.num_experts", num_experts), ("parallel.ranks", ranks)):
        if number % ep_size:
            whole = False
            divisors = ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
            yield Problem("parallel.ep_size", f"must divide {what} ({number})", ep_size, f"Try {divisors}.")
    if whole:
        rule = "must be 1: this version replicates the experts on every rank"
        yield Problem("parallel.ep_size", rule, ep_size)


def _require(key: str, value, holds, rule: str) -> Iterator[Problem]:  # type: ignore[no-untyped-def]
    if not holds(value):
        yield Problem(key, rule, value)


def _get(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
