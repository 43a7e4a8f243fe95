"""The sinks that a run's config asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe_medical.config import RunConfig
from moe_medical.config.load import run_file_tree
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.sinks.background import Background
from moe_medical.tracking.sinks.jsonl import JsonlSink
from moe_medical.tracking.sinks.sink import Sink, Sinks
from moe_medical.tracking.sinks.tensorboard_sink import TensorBoardSink
from moe_medical.tracking.sinks.trackio_sink import TrackioSink
from moe_medical.tracking.sinks.wandb_sink import WandbSink


class OptionalSink(NamedTuple):
    """A sink that a run may have beside `metrics.jsonl`."""

    label: str
    """For people."""
    open: Callable[[RunConfig, Path, int], Sink]
    """(config, the run's folder, last step to keep, -1 for none) -> the sink; called in its own thread."""


def _wandb(config: RunConfig, root: Path, last_step: int) -> WandbSink:
    wandb = config.tracking.wandb
    return WandbSink(
        root,
        run_file_tree(config),
        project=wandb.project,
        entity=wandb.entity,
        mode=wandb.mode,
        name=config.run.name,
        group=wandb.group or config.run.name,
        tags=wandb.tags,
        alerts=wandb.alerts,
    )


WANDB = OptionalSink("W&B", _wandb)
OPTIONAL = {
    "tensorboard": OptionalSink(
        "TensorBoard", lambda config, root, last_step: TensorBoardSink(root / "tensorboard", last_step)
    ),
    "trackio": OptionalSink(
        "trackio", lambda config, root, last_step: TrackioSink(root / "trackio", config.run.name)
    ),
}
"""`tracking.sinks` -> the sink; `config.rules.SINKS` has the names."""


def open_sinks(config: RunConfig, root: Path, first_step: int) -> Sinks:
    """`metrics.jsonl` without the rows after `first_step`, W&B, and what `tracking.sinks` names.

    Call it on the main rank only, and `close` what it returns.

    Args:
        config: The run's.
        root: The run's folder.
        first_step: Step of the checkpoint that the run goes on from; 0 is a fresh start and keeps nothing.

    Raises:
        StorageError: `metrics.jsonl` cannot be opened or cut.
    """
    last = first_step or -1
    jsonl = JsonlSink(RunPaths(root).metrics)
    jsonl.truncate_after(last)
    optional = [WANDB] if config.tracking.wandb.enabled else []
    optional += [OPTIONAL[name] for name in OPTIONAL if name in config.tracking.sinks]
    return Sinks([jsonl, *(Background(o.label, partial(o.open, config, root, last)) for o in optional)])
