"""The trainable state leaves and enters every ZeRO stage whole: a move between engines changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
from support.ranks import on_ranks
from support.tiny import ROOT, write_tiny_run

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.distributed.state import TrainableState
    from moe_medical.training.trainer import Trainer

PRESETS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]
SAME = [(p, p) for p in PRESETS]
ACROSS = list(zip(PRESETS, PRESETS[2:] + PRESETS[:2], strict=True))
HALF, FULL = 2, 4


def _move_between_engines(run: str) -> dict[str, dict[str, float]]:
    """By move: how far the receiving engine is from where it should be. One process group for all."""
    from moe_medical.config import load_config
    from moe_medical.distributed.state import gather_state
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)

    def fresh(preset: str) -> Trainer:
        from moe_medical.training.trainer import Trainer

        return Trainer(
            load_config(run, [f"parallel.deepspeed={ROOT / 'ds_configs' / preset}.json"]), topology
        )

    half, full, donors = {}, {}, {}
    for preset in PRESETS:
        straight, donors[preset] = fresh(preset), fresh(preset)
        _train(straight, 0, FULL)
        full[preset] = gather_state(straight.engine, FULL)
        _train(donors[preset], 0, HALF)
        half[preset] = gather_state(donors[preset].engine, HALF)
    seen = {f"{a} -> {b}": _move(donors[a], fresh(b), half[a], full[b]) for a, b in SAME + ACROSS}
    for preset, donor in donors.items():
        _train(donor, HALF, FULL)
        seen[f"{preset} read"] = _distance(gather_state(donor.engine, FULL), full[preset])
    stop_distributed()
    return seen


def _move(donor: Trainer, taker: Trainer, half: TrainableState, full: TrainableState) -> dict[str, float]:
    from moe_medical.distributed.state import gather_state, load_state

    load_state(taker.engine, half)
    loaded = _distance(gather_state(taker.engine, HALF), half)
    forward = (_logits(taker) - _logits(donor)).abs().max()
    _train(taker, HALF, FULL)
    final = _distance(gather_state(taker.engine, FULL), full)
    return {"loaded": max(loaded.values()), "forward": float(forward), **final}


def _train(trainer: Trainer, first: int, last: int) -> None:
    from moe_medical.training.schedule import learning_rate
    from moe_medical.training.step import accumulate, count_step, seed_step

    for step in range(first, last):
        seed_step(trainer.config.run.seed, step, trainer.topology.rank)
        batches = trainer.batches.step(step)
        counts = count_step(trainer.engine, batches, len(trainer.tasks), stop=False)
        accumulate(trainer.engine, trainer.context, trainer.router_losses, batches, counts)
        trainer.engine.step(learning_rate(trainer.config.training, step))


def _logits(trainer: Trainer) -> Tensor:
    """What the model itself says, without dropout: shows whether forward reads the loaded weights."""
    import torch

    batch = trainer.batches.step(0)[0]
    trainer.engine.module.eval()
    with torch.no_grad(), trainer.context.bind(batch.token_mask_BS, batch.task_ids_BS):
        logits = trainer.engine.module(input_ids=batch.input_ids_BS, use_cache=False).logits
    trainer.engine.module.train()
    return logits


def _distance(a: TrainableState, b: TrainableState) -> dict[str, float]:
    """Largest difference of any parameter; and of any moment, relative to the largest of its tensor."""
    moments = [_apart(a.moments[key], b.moments[key], relative=True) for key in ("exp_avg", "exp_avg_sq")]
    return {"parameters": _apart(a.parameters, b.parameters, relative=False), "moments": max(moments)}


def _apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: bool) -> float:
    assert a.keys() == b.keys()
    assert all(t.any() for t in a.values())  # all of them have been trained
    return max(float((a[n] - b[n]).abs().max() / (b[n].abs().max() if relative else 1.0)) for n in a)


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("state")
    adapters = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.1}
    run = write_tiny_run(folder, adapters=adapters)
    first, second = on_ranks(2, _move_between_engines, folder, str(run))
    assert first.keys() == second.keys()
    return {move: {k: max(v, second[move][k]) for k, v in seen.items()} for move, seen in first.items()}


def test_same_stage_goes_on_bitwise(moves: dict[str, dict[str, float]]) -> None:
    same = {f"{a} -> {b}": moves[f"{a} -> {b}"] for a, b in SAME}
    exact = {"loaded": 0.0, "forward": 0.0, "parameters": 0.0, "moments": 0.0}
    assert same == dict.fromkeys(same, exact)


def test_other_stage_goes_on_the_same(moves: dict[str, dict[str, float]]) -> None:
    across = {f"{a} -> {b}": moves[f"{a} -> {b}"] for a, b in ACROSS}
    assert {seen["loaded"] for seen in across.values()} == {0.0}
    assert max(seen["forward"] for seen in across.values()) < 1e-6
    assert max(seen["parameters"] for seen in across.values()) < 1e-6
    assert max(seen["moments"] for seen in across.values()) < 1e-5


def test_reading_the_state_disturbs_nothing(moves: dict[str, dict[str, float]]) -> None:
    read = [moves[f"{preset} read"] for preset in PRESETS]
    assert read == [{"parameters": 0.0, "moments": 0.0}] * len(PRESETS)
