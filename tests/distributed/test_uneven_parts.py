"""ZeRO-3 with tensors that no number of ranks divides, and with the persistence threshold that is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.ranks import on_ranks
from support.tiny import ROOT, write_tiny_run
from support.training import Layout, write_zero_settings

ODD = ["adapters.num_experts=3", "adapters.rank=3", "adapters.dropout=0"]
SPREAD = ["adapters.dropout=0", f"parallel.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"]


def _move(run: str) -> dict[str, Any]:
    """By case: how far a fresh engine is from the state that it was given, and two steps later."""
    from support.training import start

    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    topology = start_distributed(load_config(run).parallel)

    def odd() -> Trainer:
        return start(Layout(zero=3), run, topology, ODD)

    def shipped() -> Trainer:
        return Trainer(load_config(run, [*SPREAD, "parallel.ep_size=2"]), topology)

    seen = {"odd": _distances(odd), "shipped threshold": _distances(shipped)}
    stop_distributed()
    return seen


def _distances(fresh: Any) -> list[float]:
    from support.training import apart, step

    from moe_medical.distributed.state import gather_state, load_state

    donor, taker = fresh(), fresh()
    for number in range(2):
        step(donor, number)
    state = gather_state(donor.engine, 2)
    load_state(taker.engine, state)
    found = gather_state(taker.engine, 2)
    loaded = [apart(found.parameters, state.parameters)]
    loaded += [apart(found.moments[key], state.moments[key]) for key in state.moments]
    for trainer in (donor, taker):
        for number in (2, 3):
            step(trainer, number)
    later = apart(gather_state(taker.engine, 4).parameters, gather_state(donor.engine, 4).parameters)
    return [max(of.values()) for of in (*loaded, later)]


def test_state_enters_parts_of_any_size(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path)
    write_zero_settings(tmp_path)
    for seen in on_ranks(2, _move, tmp_path, str(run)):
        assert seen == {case: [0.0] * 4 for case in ("odd", "shipped threshold")}
