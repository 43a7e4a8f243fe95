"""Where numbers go: `metrics.jsonl`, the record of truth, and conveniences that may fail at any time.

Decisions: a row of `metrics.jsonl` that could not be written whole leaves no trace and raises `StorageError`.
W&B, TensorBoard and trackio each stand behind a bounded queue and a thread (`Background`): they can neither
stop nor slow a run, and what they lose is counted. Only numbers, names of tasks and our own sentences are
passed on, never text of a record. Sinks live on the main rank.
This is the only package that imports wandb, tensorboard and trackio.
"""

from moe_medical.tracking.sinks.background import Background
from moe_medical.tracking.sinks.jsonl import JsonlSink, read_metrics
from moe_medical.tracking.sinks.opening import open_sinks
from moe_medical.tracking.sinks.series import NAMESPACES, summary_of
from moe_medical.tracking.sinks.sink import Cell, Sink, Sinks
from moe_medical.tracking.sinks.wandb_sink import (
    HEAT_MAP,
    HEAT_MAP_FIELDS,
    WandbSink,
    has_api_key,
    import_wandb,
)

__all__ = [
    "HEAT_MAP",
    "HEAT_MAP_FIELDS",
    "NAMESPACES",
    "Background",
    "Cell",
    "JsonlSink",
    "Sink",
    "Sinks",
    "WandbSink",
    "has_api_key",
    "import_wandb",
    "open_sinks",
    "read_metrics",
    "summary_of",
]
