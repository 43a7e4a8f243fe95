"""Coefficients of the router losses, and what they ask of a step. Torch-free, for the cost model too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, Problem


@dataclass(frozen=True)
class LossWeights:
    """Coefficient of each router loss; 0 turns it off. `losses.py` has the equations."""

    balance: float = 0.0
    z: float = 0.0
    entropy: float = 0.0
    divergence: float = 0.0
    localized: float = 0.0
    delta: float = 0.1
    """Of the localized loss: a probability counts 1 + delta where token and expert are of one kind."""

    @classmethod
    def of(cls, adapters: MoloraConfig) -> LossWeights:
        """Those of a run."""
        return cls(
            adapters.balance_coefficient,
            adapters.z_coefficient,
            adapters.entropy_coefficient,
            adapters.divergence_coefficient,
            adapters.localized_coefficient,
            adapters.localized_delta,
        )

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the losses that count."""
        return tuple(name for name in NAMES if getattr(self, name))

    @property
    def needs_statistics(self) -> bool:
        """Whether a token's gradient depends on all other tokens, so that they must be seen before it."""
        return bool(self.balance or self.divergence or self.localized)

    @property
    def classes(self) -> int:
        """Kinds of tokens that are told apart."""
        return 2 if self.localized else 1

    def num_statistics(self, layers: int, num_experts: int) -> int:
        """Numbers that the ranks add up; see `losses.RoutingSums`."""
        return layers * (num_experts * (1 + self.classes) + 2) + self.classes


NAMES = ("balance", "z", "entropy", "divergence", "localized")
"""Of the losses, in the order in which they are told."""


def kinds_of_tasks(adapters: MoloraConfig, tasks: Sequence[str]) -> list[int]:
    """For the localized loss: 0 for tasks of the first kind, 1 for the others.

    Args:
        adapters: Name the first kind's.
        tasks: All of the run.

    Raises:
        ConfigError: A name is unknown, or one kind has no task.
    """
    first = adapters.localized_tasks
    key = "adapters.localized_tasks"
    fix = f"The run's tasks are: {', '.join(tasks)}."
    if unknown := [name for name in first if name not in tasks]:
        problem = Problem(key, "must name tasks of the run", ", ".join(unknown), fix)
        raise ConfigError("the run file", [problem])
    kinds = [int(name not in first) for name in tasks]
    if len(set(kinds)) < 2:
        rule = "must name some of the run's tasks and leave others, as localized_coefficient is not 0"
        raise ConfigError("the run file", [Problem(key, rule, ", ".join(first), fix)])
    return kinds
