"""Rules of the `data` section that types cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from moe_medical.config.schema import DataSection, RunConfig
from moe_medical.errors import Problem


def mix_problems(data: DataSection) -> Iterator[Problem]:
    """Problems of `data.mix`."""
    yield from ()


def loader_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of batching, packing, workers and prefetching."""
    yield from ()
