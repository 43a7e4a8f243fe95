"""Packed and padded rows train alike under every ZeRO stage and exchange: ten steps of plain PyTorch.

Packed steps differ in their number of micro-batches, which DeepSpeed is told at each of them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, reference, start, step, worst, write_zero_settings

TOLERANCE = 2e-6
TENSOR_TOLERANCE = 3e-5
"""Adam enlarges the last bits of small gradients: padded rows are as far off as packed ones."""
STEPS = 10
ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}
LOSSES = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
TRAINING = {"steps": STEPS, "global_batch": 16, "learning_rate": 0.01, "clip_norm": 0.85, "epsilon": 1e-4}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"zero": 0},
        {"zero": 1},
        {"zero": 2, "offload": True},
        {"zero": 2, "checkpointing": "non_reentrant"},
    ],
    2: [{"zero": 0}, {"zero": 2}, {"zero": 3}, {"zero": 2, "ep_size": 2, "exchange": "tokens"}],
    4: [{"zero": 1}, {"zero": 3, "ep_size": 2, "exchange": "weights"}, {"zero": 2, "batching": "padded"}],
}


def _train(run: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each layout is from the reference, and the micro-batches of its steps. One process group."""
    from moe_medical.config import load_config
    from moe_medical.distributed.state import gather_parameters
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    expected, seen = torch.load(Path(run).with_name("reference.pt")), []
    for given in layouts:
        layout = Layout(**{"batching": "packed", **given})
        trainer = start(layout, run, topology, ["training.micro_batch=1"])
        batches = [trainer.batches.step(number) for number in range(STEPS)]
        values = [step(trainer, number, batches[number]) for number in range(STEPS)]
        off = {
            key: max(abs(v[key] / r - 1) for v, r in zip(values, expected[key], strict=True))
            for key in ("loss", "balance", "z", "norm")
        }
        off["tensor"] = worst(apart(gather_parameters(trainer.engine), expected["tensors"]))[1]
        seen.append({"off": off, "counts": [len(b) for b in batches], "packed": batches[0][0].packed})
    stop_distributed()
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    data = {"batching": "packed", "pack_length": 96, "max_length": 96, "system_prompt": None}
    mix = {"block": 16, "max_repeats": None}
    run = write_tiny_run(folder, adapters=ADAPTERS | LOSSES, training=TRAINING, data=data | {"mix": mix})
    write_zero_settings(folder)
    torch.save(asdict(reference(str(run), STEPS)), run.with_name("reference.pt"))
    return run


@pytest.mark.parametrize("world", LAYOUTS)
def test_ten_packed_steps_equal_plain_pytorch(run: Path, world: int) -> None:
    by_rank = on_ranks(world, _train, run.parent, str(run), LAYOUTS[world])
    for layout, seen in zip(LAYOUTS[world], zip(*by_rank, strict=True), strict=True):
        assert len({tuple(rank["counts"]) for rank in seen}) == 1, "ranks need as many forward passes"
        for rank in seen:
            assert rank["packed"] == (layout.get("batching") != "padded")
            tensor = rank["off"].pop("tensor")
            assert rank["off"] == {key: pytest.approx(0.0, abs=TOLERANCE) for key in rank["off"]}, layout
            assert tensor < TENSOR_TOLERANCE, layout
    if world == 1:
        assert len(set(by_rank[0][0]["counts"])) > 1, "no step differs in its micro-batches"
