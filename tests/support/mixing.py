"""What tests ask of a plan that a run does not."""

from __future__ import annotations

from moe_medical.data.mixture import MixPlan
from moe_medical.data.static_mixing import Floats


def weights_at(plan: MixPlan, block: int) -> Floats:
    """The shares asked for in a block, shape (tasks,), summing to 1."""
    return [weights for first, weights in plan.history if first <= block][-1]
