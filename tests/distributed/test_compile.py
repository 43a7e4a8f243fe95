"""`training.compile`: routed layers stay out of the compiled blocks, and the numbers stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, write_zero_settings

STEPS = 3
SETTINGS = ["adapters.dropout=0", "adapters.balance_coefficient=0.5", "adapters.z_coefficient=0.1"]
LAYOUTS = {
    "replicated": Layout(zero=2, checkpointing="non_reentrant"),
    "tokens": Layout(zero=2, ep_size=2, exchange="tokens"),
    "weights": Layout(zero=3, ep_size=2, exchange="weights"),
}


def _train_compiled(run: str) -> dict[str, list[list[float]]]:
    """By layout: the numbers of each step, compiled."""
    import logging

    from support.training import start, step

    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    topology = start_distributed(load_config(run).parallel)
    seen = {}
    for name, layout in LAYOUTS.items():
        trainer = start(layout, run, topology, [*SETTINGS, "training.compile=true"])
        seen[name] = [list(step(trainer, number).values()) for number in range(STEPS)]
    plain = start(Layout(zero=2), run, topology, SETTINGS)
    seen["plain"] = [list(step(plain, number).values()) for number in range(STEPS)]
    stop_distributed()
    return seen


@pytest.mark.timeout(600)
def test_compiled_blocks_give_the_same_losses_and_norms(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path)
    write_zero_settings(tmp_path)
    seen = on_ranks(2, _train_compiled, tmp_path, str(run), timeout=580)[0]
    plain = seen.pop("plain")
    for name, numbers in seen.items():
        for got, expected in zip(numbers, plain, strict=True):
            assert got == pytest.approx(expected, rel=1e-5), name
