"""What may look at a run, and act on it, without being part of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_medical.training.step import StepResult


class Callback:
    """Looks at a run. All ranks call the same ones in the same order: any method may be collective."""

    def before_step(self, step: int) -> None:
        """Before step `step`, counted from 0."""

    def after_forward(self) -> None:
        """Between forward and backward of each micro-batch of a step, while it is bound to the context."""

    def after_step(self, result: StepResult) -> None:
        """After the update of a step."""
