"""One rank of a run, from joining the others to the printed table."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from moe_medical.config import RunConfig
from moe_medical.distributed.topology import naming_lost_peers, start_distributed, stop_distributed
from moe_medical.training.run_folder import RunFolder
from moe_medical.training.summary import show_summary, summarize, write_summary
from moe_medical.training.trainer import RunResult, Trainer


def train_and_report(config: RunConfig) -> RunResult:
    """Train; on the main rank write and show the result."""
    topology = start_distributed(config.parallel)
    folder = RunFolder(Path(config.run.dir))
    try:
        with naming_lost_peers(), folder.claimed() if topology.is_main else nullcontext():
            result = Trainer(config, topology).run()
            if topology.is_main:
                summary = summarize(result)
                write_summary(summary, result)
                show_summary(summary, result)
            return result
    finally:
        stop_distributed()
