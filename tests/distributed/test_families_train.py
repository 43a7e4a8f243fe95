"""Every kind of router and expert trains alike on one rank and on two, sharded, packed and spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, start, step, worst, write_zero_settings

STEPS = 3
LOSSES = ("balance_coefficient=0.5", "z_coefficient=0.1")
ARMS: dict[str, tuple[str, ...]] = {
    "moelora": ("preset=moelora", "rank=8"),
    "med_moe": ("preset=med_moe", "freeze_router=false", "molora=['.*mlp.*_proj']"),
    "hydralora": ("preset=hydralora", *LOSSES),
    "mixlora": ("preset=mixlora", *LOSSES),
    "lora_moe": ("preset=lora_moe", "localized_coefficient=0.5", "localized_tasks=[even]"),
    "mola": ("preset=mola", "experts_per_layer=[2,4]", "divergence_coefficient=0.1", *LOSSES),
    "adamole": ("preset=adamole", *LOSSES),
    "joint": ("router=joint", "router_scope=layer", *LOSSES),
    "sequence": ("router=sequence", "router_scope=block", "entropy_coefficient=0.1"),
    "hierarchical": ("router=hierarchical", "groups=2", "renormalise=false", "temperature=2", *LOSSES),
    "shared": ("shared_experts=1", "learn_shared_weight=true", "path=grouped", *LOSSES),
}
WIDE = {"moelora", "med_moe"}
"""With a router for the whole model, or full experts: not under ZeRO-3."""
UNEVEN = {"med_moe", "hydralora", "mixlora", "mola"}
"""Not spread over ranks."""


def _layouts(arm: str, world: int) -> list[Layout]:
    if world == 1:
        return [Layout(zero=0), Layout(zero=1, checkpointing="non_reentrant", batching="packed")]
    more = [] if arm in WIDE else [Layout(zero=3, accumulation=2)]
    spread = [] if arm in UNEVEN else [Layout(zero=2, ep_size=2, exchange="tokens")]
    return [Layout(zero=2, batching="packed"), *more, *spread]


def _train(run: str, arms: Sequence[str]) -> dict[str, list[list[float]]]:
    from moe_medical.config import load_config
    from moe_medical.distributed.state import gather_parameters
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    losses: dict[str, list[list[float]]] = {}
    for arm in arms:
        for number, layout in enumerate(_layouts(arm, topology.world_size)):
            trainer = start(layout, run, topology, [f"adapters.{key}" for key in ARMS[arm]])
            rows = [step(trainer, done) for done in range(STEPS)]
            losses.setdefault(arm, []).append([value for row in rows for value in row.values()])
            trained = gather_parameters(trainer.engine)
            if topology.is_main:
                torch.save(trained, Path(run).with_name(f"{arm}-{topology.world_size}-{number}.pt"))
    stop_distributed()
    return losses


@pytest.mark.parametrize("arms", [list(ARMS)[::2], list(ARMS)[1::2]], ids=["even", "odd"])
@pytest.mark.timeout(600)
def test_every_layout_trains_the_same(arms: list[str], tmp_path: Path) -> None:
    adapters: dict[str, Any] = {"num_experts": 4, "top_k": None, "rank": 4, "alpha": 8, "dropout": 0.0}
    training = {"steps": STEPS, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4}
    run = write_tiny_run(tmp_path, adapters=adapters, training=training)
    write_zero_settings(tmp_path)
    seen = {world: on_ranks(world, _train, tmp_path, str(run), arms)[0] for world in (1, 2)}
    for arm in arms:
        first = torch.load(run.with_name(f"{arm}-1-0.pt"))
        for world in (1, 2):
            for number, layout in enumerate(_layouts(arm, world)):
                assert seen[world][arm][number] == pytest.approx(seen[1][arm][0], rel=1e-5), (arm, layout)
                off = apart(torch.load(run.with_name(f"{arm}-{world}-{number}.pt")), first)
                assert worst(off)[1] < 5e-5, (arm, layout, worst(off))
