"""Learning rate as a pure function of the step: nothing to checkpoint, the same after a resume."""

from __future__ import annotations

import math

from moe_medical.config.schema import TrainingSection


def learning_rate(section: TrainingSection, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to zero at the end."""
    warmup = math.ceil(section.warmup_ratio * section.steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(section.steps - warmup, 1)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return section.learning_rate * shape[section.schedule]
