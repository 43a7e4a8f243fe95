"""Rules of the `training.loss` section that types cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from moe_medical.config.schema import RunConfig
from moe_medical.errors import Problem


def loss_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of `training.loss`."""
    yield from ()
