"""How large a share of the run each task gets before anything dynamic: mixing rules and whole-run caps.

Shares are proportional to the returned weights. Sizes count rows. `spread_caps` is the repeat cap of
OLMo-core and streaming (`max_repetition_factor`, `repeat`): clip a share where the run would repeat a task
too often and give the excess to the others in proportion, until stable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def proportional(sizes: Ints, temperature: float = 1.0) -> Floats:
    """Every row is as likely as every other; the temperature is not used."""
    return np.asarray(sizes, dtype=np.float64)


def uniform(sizes: Ints, temperature: float = 1.0) -> Floats:
    """Every task is as likely as every other; the temperature is not used."""
    return np.ones(len(sizes))


def temperature(sizes: Ints, temperature: float) -> Floats:
    """n ** (1 / T) (Arivazhagan 2019): 1 is proportional, 2 the square root, large T nears uniform."""
    return np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)


MIX_RULES: dict[str, Callable[[Ints, float], Floats]] = {
    "temperature": temperature,
    "proportional": proportional,
    "uniform": uniform,
}


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

    Without it a capped task runs at its full share and is gone early; with it the task is spread over the
    whole run. Where all limits together are too low for the run, the weights are the limits.

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
    while True:
        room, rest = 1.0 - ceilings[capped].sum(), shares[~capped].sum()
        if rest <= 0 or room <= 0:
            return ceilings / ceilings.sum()
        filled = np.where(capped, ceilings, shares * (room / rest))
        over = ~capped & (filled > ceilings)
        if not over.any():
            return filled
        capped |= over
