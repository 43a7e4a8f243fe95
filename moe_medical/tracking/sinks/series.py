"""Names of the series and what a summary of each keeps: one owner for every sink and dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Summary = Literal["min", "max", "last"]

NAMESPACES: Mapping[str, Summary] = {
    "train_loss": "last",
    "eval_loss": "min",
    "eval_score": "max",
    "eval": "last",
    "regret": "last",
    "mtl_gain": "last",
    "seesaw": "last",
    "conflict": "last",
    "router": "last",
    "router_loss": "last",
    "mix": "last",
    "mix_next": "last",
    "repeats": "last",
    "loss_weight": "last",
    "health": "last",
}
"""First part of a series' name -> what the summary keeps of it."""

EXACT: Mapping[str, Summary] = {"eval/macro_loss": "min", "eval/macro_score": "max"}
"""Series whose summary is another than their namespace's."""


def summary_of(name: str) -> Summary:
    """What the summary of the series `name` keeps."""
    return EXACT.get(name) or NAMESPACES.get(name.partition("/")[0], "last")
