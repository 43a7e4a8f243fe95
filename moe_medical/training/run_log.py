"""What a run writes down while it trains: rows of numbers, alerts, and decisions with their cause."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_medical.tracking.sinks import Sinks
from moe_medical.training.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What was changed in a run, and why; a line of `decisions.jsonl`."""

    step: int
    action: str
    """`freeze`, `reweight`, `stop` or `mixture`."""
    task: str | None
    """None where it is about all tasks."""
    cause: str
    """One sentence with numbers, never the text of a record."""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """`step`, `action`, `task`, `cause` and the numbers, side by side."""
        head = {"step": self.step, "action": self.action, "task": self.task, "cause": self.cause}
        return {**head, **self.numbers}


class RunLog:
    """The log of a run. Of the main rank; that of another rank says nothing, so that all may call it.

    Args:
        folder: Of the run.
        is_main: Whether this is the main rank.

    Attributes:
        sinks: Where numbers go; empty until the main rank has opened them.
        tokens: That the run has trained on, prompts included; the second axis of every series.
    """

    def __init__(self, folder: RunFolder, is_main: bool) -> None:
        self.folder = folder
        self.is_main = is_main
        self.sinks = Sinks()
        self.tokens = 0

    def row(self, values: Mapping[str, float], step: int) -> None:
        """Log a row of numbers; nothing if there are none."""
        if values and self.is_main:
            self.sinks.log({**values, "tokens": self.tokens}, step)

    def alert(self, title: str, text: str) -> None:
        """Tell a person; `text` holds no text of a record."""
        if self.is_main:
            _LOG.warning("%s: %s", title, text)
            self.sinks.alert(title, text)

    def decide(self, decision: Decision) -> None:
        """Write down what was decided, and why, unless an earlier part of the run has."""
        if not self.is_main or not self.folder.add_decision(decision.to_json()):
            return
        about = f"{decision.action} {decision.task}" if decision.task else decision.action
        text = f"after {decision.step} steps: {about}: {decision.cause}"
        if decision.action == "mixture":  # there are many, and they are no alarm
            _LOG.info("%s", text)
            self.row(decision.numbers, decision.step)
        else:
            self.alert("decision", text)
