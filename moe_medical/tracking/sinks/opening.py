"""The sinks that a run's config asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from moe_medical.config import RunConfig
from moe_medical.config.load import run_file_tree
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.sinks.background import Background
from moe_medical.tracking.sinks.jsonl import JsonlSink
from moe_medical.tracking.sinks.sink import Sink, Sinks
from moe_medical.tracking.sinks.tensorboard_sink import TensorBoardSink
from moe_medical.tracking.sinks.trackio_sink import TrackioSink
from moe_medical.tracking.sinks.wandb_sink import WandbSink


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
    return Sinks([jsonl, *(Background(name, opener) for name, opener in _optional(config, root, last))])


def _optional(config: RunConfig, root: Path, last: int) -> Iterator[tuple[str, Callable[[], Sink]]]:
    if config.tracking.wandb.enabled:
        yield "W&B", lambda: _wandb(config, root)
    if "tensorboard" in config.tracking.sinks:
        yield "TensorBoard", lambda: TensorBoardSink(root / "tensorboard", last)
    if "trackio" in config.tracking.sinks:
        yield "trackio", lambda: TrackioSink(root / "trackio", config.run.name)


def _wandb(config: RunConfig, root: Path) -> WandbSink:
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
