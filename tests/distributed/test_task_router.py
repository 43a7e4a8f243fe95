"""A task gate trains alike under every ZeRO stage, exchange and world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, start, step, worst, write_zero_settings

STEPS = 4
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{"zero": 0}, {"zero": 2, "checkpointing": "reentrant", "batching": "packed"}],
    2: [
        {"zero": 2, "batching": "packed"},
        {"zero": 3},
        {"zero": 2, "ep_size": 2, "exchange": "tokens"},
        {"zero": 3, "ep_size": 2, "exchange": "weights"},
    ],
}


def _train(run: str, layouts: list[dict[str, Any]]) -> list[list[float]]:
    from moe_medical.config import load_config
    from moe_medical.distributed.state import gather_parameters
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    losses = []
    for number, given in enumerate(layouts):
        trainer = start(Layout(**given), run, topology)
        losses.append([step(trainer, done)["loss"] for done in range(STEPS)])
        trained = gather_parameters(trainer.engine)
        if topology.is_main:
            torch.save(trained, Path(run).with_name(f"{topology.world_size}-{number}.pt"))
    stop_distributed()
    return losses


@pytest.mark.parametrize("top_k", [4, 2])
def test_every_layout_trains_the_same(top_k: int, tmp_path: Path) -> None:
    adapters = {"router": "task", "num_experts": 4, "top_k": top_k, "rank": 4, "alpha": 8, "dropout": 0.0}
    losses = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
    training = {"steps": STEPS, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4}
    run = write_tiny_run(tmp_path, adapters=adapters | losses, training=training)
    write_zero_settings(tmp_path)
    seen = {world: on_ranks(world, _train, tmp_path, str(run), LAYOUTS[world]) for world in LAYOUTS}
    first = torch.load(run.with_name("1-0.pt"))
    assert any("router.embedding" in name for name in first)
    for world, layouts in LAYOUTS.items():
        for number, layout in enumerate(layouts):
            assert seen[world][0][number] == pytest.approx(seen[1][0][0], rel=2e-6), layout
            off = apart(torch.load(run.with_name(f"{world}-{number}.pt")), first)
            assert worst(off)[1] < 3e-5, (layout, worst(off))
