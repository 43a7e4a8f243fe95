"""Rules of the `data` section that types cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_medical.config.schema import (
    MAX_PREFETCH_STEPS,
    DataSection,
    DynamicMixSection,
    MixSection,
    RunConfig,
)
from moe_medical.errors import Problem


def mix_problems(data: DataSection) -> Iterator[Problem]:
    """Problems of `data.mix`; what depends on the recipe's tasks is told by `rules.task_weights`."""
    mix, whole = data.mix, "must be at least 1"
    yield from _must(mix.temperature_blocks >= 1, "temperature_blocks", whole, mix.temperature_blocks)
    yield from _must(mix.cap >= 1, "cap", whole, mix.cap)
    yield from _must(0 < mix.beta < 1, "beta", "must be between 0 and 1", mix.beta)
    yield from _must(0 < mix.epochs < math.inf, "epochs", "must be finite and > 0", mix.epochs)
    yield from _must(0 <= mix.floor < 1, "floor", "must be in [0, 1)", mix.floor)
    rule = f"must be > floor ({mix.floor:g}) and at most 1"
    yield from _must(mix.floor < mix.ceiling <= 1, "ceiling", rule, mix.ceiling)
    yield from _warm_up_problems(mix)
    yield from _explicit_problems(mix)
    yield from _dynamic_problems(mix.dynamic)


def _warm_up_problems(mix: MixSection) -> Iterator[Problem]:
    start = mix.temperature_from
    if start is None:
        return
    key = "temperature_from"
    yield from _must(0 < start < math.inf, key, "must be finite and > 0, or null", start)
    rule = f"must be null under rule {mix.rule!r}, which has no temperature"
    yield from _must(mix.rule in ("temperature", "cap"), key, rule, start)
    rule = "must be null under a dynamic rule, which sets the same shares"
    yield from _must(mix.dynamic.rule == "none", key, rule, start)


def _explicit_problems(mix: MixSection) -> Iterator[Problem]:
    explicit, shares = mix.rule == "explicit", mix.shares
    fix = "" if explicit else "Set data.mix.rule=explicit."
    rule = "must be given under rule 'explicit' and under no other"
    yield from _must(bool(shares) == explicit, "shares", rule, shares or None, fix)
    for name, share in shares.items():
        fits = 0 <= share < math.inf
        yield from _must(fits, f"shares.{name}", "must be finite and not negative", share)
    if shares and not any(shares.values()):
        yield Problem("data.mix.shares", "must leave a task above 0", shares)


def _dynamic_problems(section: DynamicMixSection) -> Iterator[Problem]:
    rate, smoothing, key = section.rate, section.smoothing, "dynamic"
    every = section.every_blocks
    yield from _must(every >= 1, f"{key}.every_blocks", "must be at least 1", every)
    yield from _must(0 < rate < math.inf, f"{key}.rate", "must be finite and > 0", rate)
    yield from _must(0 <= smoothing < 1, f"{key}.smoothing", "must be in [0, 1)", smoothing)
    yield from _must(0 < section.low <= 1, f"{key}.low", "must be > 0 and at most 1", section.low)
    yield from _must(
        1 <= section.high < math.inf, f"{key}.high", "must be finite and at least 1", section.high
    )


def _must(holds: bool, key: str, rule: str, actual: object, fix: str = "") -> Iterator[Problem]:
    if not holds:
        yield Problem(f"data.mix.{key}", rule, actual, fix)


def loader_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of batching, packing, workers and prefetching."""
    data, least = config.data, config.data.max_length
    fits = data.pack_length is None or data.pack_length >= least
    rule = f"must be at least max_length ({least}), or null"
    if not fits:
        yield Problem("data.pack_length", rule, data.pack_length, f"Try {least}.")
    if data.workers < 0:
        yield Problem("data.workers", "must not be negative", data.workers)
    if not 1 <= data.prefetch_steps <= MAX_PREFETCH_STEPS:
        rule = f"must be from 1 to {MAX_PREFETCH_STEPS}"
        yield Problem("data.prefetch_steps", rule, data.prefetch_steps)
