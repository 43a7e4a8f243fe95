"""How large a share of the run each task gets before anything dynamic: mixing rules, bounds, whole-run caps.

From the rule to the weights, in this order:
1. The rule gives shares of what `data.mix.by` counts: samples, or their tokens.
2. Each is multiplied by its task's own weight; a task of weight 0 takes no part.
3. Floor and ceiling hold exactly: what they give or take is spread over the others in proportion.
4. Token shares become sample shares: divided by the task's mean length.
5. Caps: no task gets more samples than `max_repeats` allows in the whole run, and its excess goes to the
   others in proportion. Caps win over floors and ceilings: a row is not repeated to fill a floor, and what
   capped tasks leave may lift another above its ceiling.
Shares are proportional to the returned weights; which samples follow from them is up to `mixture.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_medical.config.schema import MixSection, StaticRule
from moe_medical.errors import ConfigError, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST = 1e-12
"""Shares below this are as good as none; keeps ratios of shares finite."""


@dataclass(frozen=True)
class TaskSize:
    """What a mixing rule knows of a task."""

    name: str
    rows: int
    mean_tokens: float = 1.0
    """Tokens of a sample, on average; only `by: tokens` looks at it."""
    weight: float = 1.0
    """Multiplies the share after the rule; 0 leaves the task out."""
    max_repeats: float | None = None
    """Epochs at most; None is no cap."""


@dataclass(frozen=True)
class _Sizes:
    """The tasks that take part; sizes in units: samples or tokens."""

    names: list[str]
    units: Floats
    """Units of all rows of a task."""
    units_per_sample: Floats
    num_samples: int


def task_weights(mix: MixSection, tasks: Sequence[TaskSize], num_samples: int) -> Floats:
    """Sample weights of all tasks for a run of `num_samples`, shape (tasks,), summing to 1.

    Raises:
        ConfigError: `mix` does not fit these tasks: shares of others, or bounds that their number excludes.
    """
    problems = list(_problems(mix, tasks))
    if problems:
        raise ConfigError("the run file", problems)
    shares = unit_shares(mix, tasks, num_samples)
    # A token share of long samples is a smaller share of samples.
    samples = shares / units_per_sample(mix, tasks)
    limits = row_limits([t.rows for t in tasks], [t.max_repeats for t in tasks])
    return spread_caps(samples, limits, num_samples)


def weight_schedule(mix: MixSection, tasks: Sequence[TaskSize], num_samples: int) -> list[tuple[int, Floats]]:
    """(first block, weights) of every change of the static weights; one entry without a warm-up.

    The temperature goes from `temperature_from` in block 0 to `temperature` in block `temperature_blocks`, in
    equal steps of its inverse, the exponent of a size. Each entry spreads the caps over the whole run, so no
    task is faster than its cap allows it to be on average.
    """
    final = task_weights(mix, tasks, num_samples)
    if mix.temperature_from is None:
        return [(0, final)]
    # The inverse 1 / T is what acts, as n ** (1 / T): equal steps of T itself would do most at the end.
    exponents = np.linspace(1 / mix.temperature_from, 1 / mix.temperature, mix.temperature_blocks + 1)
    steps = [replace(mix, temperature=float(1 / e)) for e in exponents[:-1]]
    warm = [(block, task_weights(step, tasks, num_samples)) for block, step in enumerate(steps)]
    return [*warm, (mix.temperature_blocks, final)]


def unit_shares(mix: MixSection, tasks: Sequence[TaskSize], num_samples: int) -> Floats:
    """Shares of what `mix.by` counts, before caps: the rule, the tasks' weights, floor and ceiling."""
    taking = [_takes_part(mix, t) for t in tasks]
    part = [t for t, takes in zip(tasks, taking, strict=True) if takes]
    lengths = units_per_sample(mix, part)
    units = lengths * np.array([t.rows for t in part])
    ruled = MIX_RULES[mix.rule](mix, _Sizes([t.name for t in part], units, lengths, num_samples))
    weighed = ruled * np.array([t.weight for t in part])
    shares = np.zeros(len(tasks))
    floors = np.full(len(part), mix.floor)
    ceilings = np.full(len(part), mix.ceiling)
    shares[taking] = bounded_shares(weighed, floors, ceilings)
    return shares


def units_per_sample(mix: MixSection, tasks: Sequence[TaskSize]) -> Floats:
    """What one sample of each task counts: 1, or its mean tokens; shape (tasks,)."""
    return np.array([t.mean_tokens if mix.by == "tokens" else 1.0 for t in tasks])


def _takes_part(mix: MixSection, task: TaskSize) -> bool:
    return task.weight > 0 and (mix.rule != "explicit" or mix.shares[task.name] > 0)


def _problems(mix: MixSection, tasks: Sequence[TaskSize]) -> Iterator[Problem]:
    problems = list(_share_problems(mix.shares, tasks)) if mix.rule == "explicit" else []
    yield from problems
    if problems:  # who takes part is not known without the shares
        return
    count = sum(_takes_part(mix, t) for t in tasks)
    if not count:
        yield Problem("data.tasks", "must leave a task with a weight and a share above 0")
        return
    if mix.floor * count > 1 + _LEAST:
        rule = f"must be at most 1 / {count} tasks"
        yield Problem("data.mix.floor", rule, mix.floor, f"Try {0.5 / count:.4f}.")
    if mix.ceiling * count < 1 - _LEAST:
        rule = f"must be at least 1 / {count} tasks"
        yield Problem("data.mix.ceiling", rule, mix.ceiling, f"Try {min(1.0, 2 / count):.4f}.")


def _share_problems(shares: Mapping[str, float], tasks: Sequence[TaskSize]) -> Iterator[Problem]:
    names = [t.name for t in tasks]
    for name in shares:
        if name not in names:
            fix = f"Tasks there: {', '.join(sorted(names))}."
            yield Problem(f"data.mix.shares.{name}", "must be a task of the recipe", fix=fix)
    missing = [name for name in names if name not in shares]
    if missing:
        fix = f"Missing: {', '.join(missing)}."
        yield Problem("data.mix.shares", "must give a share to each task of the recipe", fix=fix)


# The rules: (mix, sizes) -> shares of units, any scale.


def _proportional(mix: MixSection, sizes: _Sizes) -> Floats:
    """Every row, or token, is as likely as every other."""
    return sizes.units


def _uniform(mix: MixSection, sizes: _Sizes) -> Floats:
    """Every task is as likely as every other."""
    return np.ones(len(sizes.units))


def _temperature(mix: MixSection, sizes: _Sizes) -> Floats:
    """n ** (1 / T) (Arivazhagan 2019): 1 is proportional, 2 the square root, large T nears uniform."""
    # Relative to the largest, so that no power of a count of tokens overflows.
    return (sizes.units / sizes.units.max()) ** (1 / mix.temperature)


def _cap(mix: MixSection, sizes: _Sizes) -> Floats:
    """min(n, K) ** (1 / T) (T5, Raffel 2020)."""
    return _temperature(mix, replace(sizes, units=np.minimum(sizes.units, mix.cap)))


def _effective_number(mix: MixSection, sizes: _Sizes) -> Floats:
    """Cui 2019 as sampling: each of n rows weighs (1 - beta) / (1 - beta ** n), the inverse of their number
    of distinct ones. beta has to suit the scale: near 0 it is proportional, near 1 uniform."""
    # 1 - beta ** n as -expm1(n log beta): for beta near 1 the plain difference has no digits left.
    return sizes.units * (1 - mix.beta) / -np.expm1(sizes.units * np.log(mix.beta))


def _unimax(mix: MixSection, sizes: _Sizes) -> Floats:
    """UniMax (Chung 2023, algorithm 1): as even as `epochs` epochs of the small tasks allow.

    Tokens: the budget is what `num_samples` samples of the resulting mix have, found by halving.
    """
    low, high = (sizes.num_samples * f(sizes.units_per_sample) for f in (np.min, np.max))
    for _ in range(64):  # a double has 53 digits to halve
        budget = (low + high) / 2
        samples = (_unimax_units(sizes.units, mix.epochs, budget) / sizes.units_per_sample).sum()
        low, high = (budget, high) if samples < sizes.num_samples else (low, budget)
    return _unimax_units(sizes.units, mix.epochs, high)


def _unimax_units(units: Floats, epochs: float, budget: float) -> Floats:
    """U_i = min(budget left / tasks left, epochs * n_i), smallest task first."""
    given = np.zeros(len(units))
    left = budget
    for rank, task in enumerate(np.argsort(units, kind="stable")):
        given[task] = min(left / (len(units) - rank), epochs * units[task])
        left -= given[task]
    return given


def _explicit(mix: MixSection, sizes: _Sizes) -> Floats:
    """The run file's own shares."""
    return np.array([mix.shares[name] for name in sizes.names], dtype=np.float64)


MIX_RULES: dict[StaticRule, Callable[[MixSection, _Sizes], Floats]] = {
    "temperature": _temperature,
    "proportional": _proportional,
    "uniform": _uniform,
    "cap": _cap,
    "effective_number": _effective_number,
    "unimax": _unimax,
    "explicit": _explicit,
}


# Bounds and caps.


def bounded_shares(weights: Floats, low: Floats, high: Floats) -> Floats:
    """Shares nearest in proportion to `weights` with low <= share <= high: clip(x * weights, low, high).

    The one x is found at which they sum to 1, so no later normalisation can break a bound.

    Args:
        weights: (tasks,) any scale, >= 0 and one > 0.
        low: (tasks,) least shares; together at most 1.
        high: (tasks,) largest shares; together at least 1.

    Returns:
        (tasks,) shares that sum to 1 up to rounding.
    """
    # x -> sum_i clip(x * r_i, low_i, high_i) rises and is linear between the x at which a share meets a
    # bound, so the x of sum 1 lies on the line between two of them.
    ratios = np.maximum(weights / np.sum(weights), _LEAST)
    turns = np.sort(np.concatenate([low / ratios, high / ratios]))
    sums = np.array([np.clip(x * ratios, low, high).sum() for x in turns])
    return np.clip(np.interp(1.0, sums, turns) * ratios, low, high)


def row_limits(sizes: Sequence[int] | Ints, max_repeats: Sequence[float | None]) -> Ints:
    """Samples that each task may give to the run at most; at least one, "no cap" is 2 ** 62."""
    unlimited = 2**62
    limits = [
        unlimited if cap is None else max(1, int(min(size * cap, unlimited)))
        for size, cap in zip(sizes, max_repeats, strict=True)
    ]
    return np.array(limits, dtype=np.int64)


def spread_caps(weights: Floats, limits: Ints, num_samples: int) -> Floats:
    """Weights under which no task passes its limit within `num_samples`.

    The repeat cap of OLMo-core and streaming (`max_repetition_factor`, `repeat`), as water-filling: clip a
    share and give the excess to the others in proportion, until stable. Without it a capped task runs at its
    full share and is gone early; with it the task is spread over the whole run. Where all limits together are
    too low for the run, the weights are the limits.

    Args:
        weights: (tasks,) shares asked for, any scale.
        limits: (tasks,) samples at most, of `row_limits`.
        num_samples: length of the run.

    Returns:
        (tasks,) shares that sum to 1.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    ceilings = np.where(shares > 0, limits / num_samples, 0.0)
    capped = np.zeros(len(shares), dtype=bool)
    # Water-filling: each turn caps the tasks that are over and spreads the room that is left over the others,
    # w_i = room * share_i / rest. A capped task stays capped, so there are at most as many turns as tasks.
    while True:
        room = 1.0 - ceilings[capped].sum()
        rest = shares[~capped].sum()
        if rest <= 0 or room <= 0:
            return ceilings / ceilings.sum()  # all are capped: the run is longer than the data allows
        filled = np.where(capped, ceilings, shares * (room / rest))
        over = ~capped & (filled > ceilings)
        if not over.any():
            return filled
        capped |= over
