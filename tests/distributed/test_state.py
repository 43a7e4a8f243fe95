"""The trainable state leaves and enters every layout whole: a move between engines changes nothing.

Moves at 2 ranks share one process group; a state saved there is also taken by 1 and by 4 ranks, by hand and
as a real checkpoint of a run. A move to the same layout is bitwise, with dropout. Across layouts dropout is
the same as long as the same rank draws it for the same tokens: not between `tokens` and the others, nor
between worlds, where it is off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.launches import rows
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, start, step, write_zero_settings

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.distributed.state import TrainableState
    from moe_medical.training.trainer import Trainer

ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "balance_coefficient": 0.1}
LAYOUTS = {
    "zero0": Layout(zero=0),
    "zero1": Layout(zero=1),
    "zero2": Layout(zero=2),
    "zero2 offload": Layout(zero=2, offload=True),
    "zero3": Layout(zero=3),
    "zero0 weights": Layout(zero=0, ep_size=2, exchange="weights"),
    "zero2 weights": Layout(zero=2, ep_size=2, exchange="weights", offload=True),
    "zero3 weights": Layout(zero=3, ep_size=2, exchange="weights"),
    "zero2 tokens": Layout(zero=2, ep_size=2, exchange="tokens"),
    "zero3 tokens": Layout(zero=3, ep_size=2, exchange="tokens", offload=True),
}
ACROSS = [
    ("zero0", "zero2"),
    ("zero1", "zero3"),
    ("zero2", "zero0 weights"),
    ("zero0 weights", "zero1"),
    ("zero2 offload", "zero3 weights"),
    ("zero3 weights", "zero2 offload"),
    ("zero3", "zero2 weights"),
    ("zero2 weights", "zero0"),
    ("zero2 tokens", "zero3 tokens"),
    ("zero3 tokens", "zero2 tokens"),
]
HALF, FULL = 2, 4

OTHER_WORLDS = {
    1: {"zero1": Layout(zero=1), "zero3": Layout(zero=3)},
    4: {
        "zero2 tokens": Layout(zero=2, ep_size=4, exchange="tokens"),
        "zero3 weights": Layout(zero=3, ep_size=2, exchange="weights"),
        "zero0 weights": Layout(zero=0, ep_size=4, exchange="weights"),
    },
}
SAVED_BY = Layout(zero=3, ep_size=2, exchange="tokens")


# Between engines of 2 ranks


def _move_between_engines(run: str, saved: str) -> dict[str, dict[str, float]]:
    """By move: how far the receiving engine is from where it should be. One process group for all."""
    from moe_medical.distributed.state import gather_state
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(Layout().configured(run, 2).parallel)
    half, full, donors = {}, {}, {}
    for name, layout in LAYOUTS.items():
        straight, donors[name] = start(layout, run, topology), start(layout, run, topology)
        _train(straight, 0, FULL)
        full[name] = gather_state(straight.engine, FULL)
        _train(donors[name], 0, HALF)
        half[name] = gather_state(donors[name].engine, HALF)
    moves = [*zip(LAYOUTS, LAYOUTS, strict=True), *ACROSS]
    seen = {
        f"{a} -> {b}": _move(donors[a], start(LAYOUTS[b], run, topology), half[a], full[b]) for a, b in moves
    }
    for name, donor in donors.items():
        _train(donor, HALF, FULL)
        seen[f"{name} read"] = _distance(gather_state(donor.engine, FULL), full[name])
    _save_for_other_worlds(start(SAVED_BY, run, topology, ["adapters.dropout=0"]), Path(saved))
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


def _train(trainer: Trainer, first: int, last: int) -> list[float]:
    """All values of the steps."""
    steps = [step(trainer, number) for number in range(first, last)]
    return [value for of_step in steps for value in of_step.values()]


def _logits(trainer: Trainer) -> Tensor:
    """What the model itself says, without dropout: shows whether forward reads the loaded weights."""
    from moe_medical.adapters.routing import BatchInputs

    batch = trainer.batches.step(0)[0]
    trainer.engine.module.eval()
    with torch.no_grad(), trainer.context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS)):
        logits = trainer.engine.module(input_ids=batch.input_ids_BS, use_cache=False).logits
    trainer.engine.module.train()
    return logits[batch.token_mask_BS]


def _distance(a: TrainableState, b: TrainableState) -> dict[str, float]:
    """Largest difference of any parameter; and of any moment, relative to the largest of its tensor."""
    moments = [_apart(a.moments[key], b.moments[key], relative=True) for key in ("exp_avg", "exp_avg_sq")]
    return {"parameters": _apart(a.parameters, b.parameters, relative=False), "moments": max(moments)}


def _apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: bool) -> float:
    assert a.keys() == b.keys()
    assert all(t.any() for t in a.values())  # all of them have been trained
    return max(float((a[n] - b[n]).abs().max() / (b[n].abs().max() if relative else 1.0)) for n in a)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    training = {"steps": 6, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4}
    evaluation = {"loss_rows": 4, "score_rows": 2, "max_new_tokens": 2}
    adapters = ADAPTERS | {"dropout": 0.1}
    run = write_tiny_run(folder, adapters=adapters, training=training, evaluation=evaluation)
    write_zero_settings(folder)
    return run


@pytest.fixture(scope="module")
def moves(run_file: Path) -> dict[str, Any]:
    """Besides, the state for other worlds is saved."""
    folder = run_file.parent
    saved = str(folder / "saved.pt")
    first, second = on_ranks(2, _move_between_engines, folder, str(run_file), saved, timeout=280)
    assert first.keys() == second.keys()
    return {move: {k: max(v, second[move][k]) for k, v in seen.items()} for move, seen in first.items()}


def test_same_layout_goes_on_bitwise(moves: dict[str, dict[str, float]]) -> None:
    same = {f"{name} -> {name}": moves[f"{name} -> {name}"] for name in LAYOUTS}
    exact = {"loaded": 0.0, "forward": 0.0, "parameters": 0.0, "moments": 0.0}
    assert same == dict.fromkeys(same, exact)


def test_other_layout_goes_on_the_same(moves: dict[str, dict[str, float]]) -> None:
    across = {f"{a} -> {b}": moves[f"{a} -> {b}"] for a, b in ACROSS}
    assert {seen["loaded"] for seen in across.values()} == {0.0}
    assert max(seen["forward"] for seen in across.values()) < 1e-6
    assert max(seen["parameters"] for seen in across.values()) < 1e-6
    assert max(seen["moments"] for seen in across.values()) < 1e-5


def test_reading_the_state_disturbs_nothing(moves: dict[str, dict[str, float]]) -> None:
    read = [moves[f"{name} read"] for name in LAYOUTS]
    assert read == [{"parameters": 0.0, "moments": 0.0}] * len(LAYOUTS)


# To another world


def _save_for_other_worlds(trainer: Trainer, file: Path) -> None:
    """The state after half of the steps, the values of the other half and the state after them."""
    from moe_medical.distributed.state import gather_state

    _train(trainer, 0, HALF)
    half = gather_state(trainer.engine, HALF)
    values = _train(trainer, HALF, FULL)
    full = gather_state(trainer.engine, FULL)
    if trainer.topology.is_main:
        torch.save({"half": half, "values": values, "full": full}, file)


def _take(run: str, world: int, saved: str) -> dict[str, list[float]]:
    """By layout: how far values, parameters and moments are from those of the run that saved."""
    from moe_medical.distributed.state import gather_state, load_state
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    given = torch.load(saved, weights_only=False)
    topology = start_distributed(Layout().configured(run, world).parallel)
    seen = {}
    for name, layout in OTHER_WORLDS[world].items():
        trainer = start(layout, run, topology, ["adapters.dropout=0"])
        load_state(trainer.engine, given["half"])
        values = _train(trainer, HALF, FULL)
        apart = max(abs(a / b - 1) for a, b in zip(values, given["values"], strict=True))
        seen[name] = [apart, *_distance(gather_state(trainer.engine, FULL), given["full"]).values()]
    stop_distributed()
    return seen


@pytest.mark.parametrize("world", OTHER_WORLDS)
@pytest.mark.usefixtures("moves")
def test_another_world_goes_on_the_same(world: int, run_file: Path, tmp_path: Path) -> None:
    for of_rank in on_ranks(
        world, _take, tmp_path, str(run_file), world, str(run_file.with_name("saved.pt"))
    ):
        assert of_rank == {
            name: [pytest.approx(0.0, abs=limit) for limit in (1e-6, 1e-6, 1e-5)]
            for name in OTHER_WORLDS[world]
        }


# As a checkpoint


def _run(run: str, world: int, folder: str, layout: dict[str, Any]) -> None:
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    config = Layout(**layout).configured(run, world, ["adapters.dropout=0", f"run.dir={folder}"])
    Trainer(config, start_distributed(config.parallel)).run()
    stop_distributed()


def test_a_run_resumes_from_its_checkpoint_with_other_experts_per_rank(
    run_file: Path, tmp_path: Path
) -> None:
    """From 2 ranks, ZeRO-3 and ep_size 2 to 4 ranks, ZeRO-2 and ep_size 4: as if nothing had happened."""
    from safetensors.torch import load_file

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    saving = {"zero": 3, "ep_size": 2, "exchange": "tokens"}
    on_ranks(2, _run, tmp_path, str(run_file), 2, str(whole), saving)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(_checkpoint(resumed, 6))
    taking = {"zero": 2, "ep_size": 4, "exchange": "weights"}
    on_ranks(4, _run, tmp_path, str(run_file), 4, str(resumed), taking)

    layouts = [(4, 3, 2), (6, 2, 4)]
    for at, stage, ep_size in layouts:
        manifest = json.loads((_checkpoint(resumed, at) / "MANIFEST.json").read_text())
        assert (manifest["layout"]["zero_stage"], manifest["layout"]["ep_size"]) == (stage, ep_size)
    assert len(rows(resumed)) == len(rows(whole)) > 6
    for row, undisturbed in zip(rows(resumed), rows(whole), strict=True):
        assert row == pytest.approx(undisturbed, rel=1e-6)
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, resumed)]
    assert _apart(adapters[1], adapters[0], relative=False) < 1e-6


def _checkpoint(run: Path, at: int) -> Path:
    return run / "checkpoints" / f"step-{at:08d}"
