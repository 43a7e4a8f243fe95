"""Looks at the tasks' gradients: as exact as sketches promise, the same on any ranks, disturbing nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, start, write_zero_settings

ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.1, "balance_coefficient": 0.5}
SIZE = 4096
SEEDS = 24
LOOKED_AT: list[dict[str, Any]] = [
    {"zero": 0, "accumulation": 2},
    {"zero": 1, "checkpointing": "non_reentrant"},
    {"zero": 2, "batching": "packed", "accumulation": 2},
    {"zero": 2, "offload": True},
]
REFUSED: dict[str, dict[str, Any]] = {
    "ZeRO-3": {"zero": 3},
    "parallel.ep_size": {"ep_size": 2},
    "reentrant": {"checkpointing": "reentrant"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    write_zero_settings(folder)
    training = {"steps": 6, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.02}
    return write_tiny_run(folder, adapters=ADAPTERS, training=training)


def _probe(trainer: Any) -> Any:
    from moe_medical.training.callbacks.conflict import ConflictProbe

    where = (trainer.data.chat, trainer.engine, trainer.context)
    return ConflictProbe(trainer.config, trainer.tasks, *where)


def _trained(trainer: Any) -> Any:
    """With adapters that do something."""
    torch.manual_seed(3)
    for name, parameter in trainer.engine.named.items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1)
    return trainer


# Sketches


def _sketches(run: str) -> dict[str, Any]:
    """The exact cosine of two tasks of the tiny model, and those from sketches with other seeds."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.tracking.conflict import Conflict
    from moe_medical.training.task_gradients import Sketch, probe_batches, probe_gram

    topology = start_distributed(load_config(run).parallel)
    trainer = _trained(start(Layout(), run, topology, ["adapters.dropout=0"]))
    batches = probe_batches(trainer.tasks, trainer.data.chat, topology, 0, 4, 2)
    where = (trainer.engine, trainer.context, batches, 2, 0)
    grams = [probe_gram(*where), *(probe_gram(*where, sketch=Sketch(SIZE, seed)) for seed in range(SEEDS))]
    found = [Conflict.of(gram, "ab", SIZE) for gram in grams]
    stop_distributed()
    return {"cosines": [f.cosine_TT[0, 1] for f in found], "norms": [f.norm_T.tolist() for f in found]}


def test_sketches_of_adapters_are_as_exact_as_they_promise(run: Path, tmp_path: Path) -> None:
    """An error of (1 - cos^2) / sqrt(size) on average, of 5 times that never."""
    (seen,) = on_ranks(1, _sketches, tmp_path, str(run))
    exact, *sketched = seen["cosines"]
    assert 0.05 < abs(exact) < 0.95
    errors, expected = np.array(sketched) - exact, (1 - exact**2) / np.sqrt(SIZE)
    assert 0.5 * expected < np.sqrt((errors**2).mean()) < 1.5 * expected
    assert np.abs(errors).max() < 5 * expected
    norms = np.array(seen["norms"][1:]) / seen["norms"][0]
    assert np.abs(norms - 1).max() < 5 / np.sqrt(2 * SIZE)


def test_cosines_of_unrelated_gradients_spread_as_the_noise_says() -> None:
    """24 random gradients: 276 errors."""
    from moe_medical.tracking.conflict import Conflict
    from moe_medical.training.task_gradients import Sketch

    generator, sketch = torch.Generator().manual_seed(0), Sketch(SIZE)
    gradients = torch.randn(24, 100_000, generator=generator)
    rows = torch.stack([sketch({"x": g[:70_000], "y": g[70_000:]})["sketch"] for g in gradients])
    names = [str(i) for i in range(24)]
    exact, seen = (Conflict.of((m @ m.T).double().numpy(), names, SIZE) for m in (gradients, rows))
    errors = (seen.cosine_TT - exact.cosine_TT)[np.triu_indices(24, 1)]
    assert errors.std() == pytest.approx(seen.noise / 2, rel=0.15)
    assert np.abs(errors).max() < 2.5 * seen.noise
    assert seen.strong == []


# Ranks and layouts


def _measure(run: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each layout sees; dropout is on in training."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import launched_ranks, start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    seen = []
    for layout in layouts:
        settings = ["training.global_batch=12", "tracking.conflict_rows=5"]
        given = Layout(**{**layout, "accumulation": 12 // launched_ranks() // 2})
        trainer = _trained(start(given, run, topology, settings))
        seen.append(_probe(trainer).measure(3).to_json(3))
    stop_distributed()
    return seen


def test_angles_do_not_depend_on_ranks_or_layout(run: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, _measure, tmp_path, str(run), LOOKED_AT[:1])
    cosine = alone[0]["cosine_TT"][0][1]
    assert 0.05 < abs(cosine) < 0.95
    assert alone[0]["noise"] == pytest.approx(2 / 64)
    for world in (2, 3):
        for of_rank in on_ranks(world, _measure, tmp_path, str(run), LOOKED_AT):
            for seen in of_rank:
                assert seen["tasks"] == ["last_word", "even"]
                assert seen["cosine_TT"][0][1] == pytest.approx(cosine, abs=2e-5)
                assert seen["norm_T"] == pytest.approx(alone[0]["norm_T"], rel=2e-5)


# Nothing is disturbed


def _disturb(run: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Values of steps and the adapters after them, without looks and with looks before and within steps."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    seen = []
    for layout in layouts:
        quiet = _steps(start(Layout(**layout), run, topology), looks=False)
        seen.append({"quiet": quiet, "looked": _steps(start(Layout(**layout), run, topology), looks=True)})
    stop_distributed()
    return seen


def _steps(trainer: Any, looks: bool) -> list[Any]:
    from moe_medical.distributed.state import gather_parameters

    told, probe, number = [], _probe(trainer), 0
    modes = [module.training for module in trainer.engine.module.modules()]
    update = trainer.engine.step

    def look_and_update(rate: float) -> float:
        probe.measure(number)  # with the gradients of the step in the making
        return update(rate)

    if looks:
        trainer.engine.step = look_and_update
    for number in range(3):
        if looks:
            probe.measure(number)
        result = trainer.train_step(number, trainer.batches.step(number))
        told += [result.task_sums.tolist(), result.grad_norm]
    assert [module.training for module in trainer.engine.module.modules()] == modes
    return [*told, *(float(t.double().abs().sum()) for t in gather_parameters(trainer.engine).values())]


def test_a_run_is_the_same_with_and_without_looks(run: Path, tmp_path: Path) -> None:
    for of_rank in on_ranks(2, _disturb, tmp_path, str(run), LOOKED_AT[:3]):
        for seen in of_rank:
            assert seen["looked"] == seen["quiet"]


# Rows


def test_rows_are_dealt_to_ranks_whole_and_once(run: Path) -> None:
    from moe_medical.base_model import locate_base
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import Topology
    from moe_medical.training.data_module import DataModule
    from moe_medical.training.task_gradients import probe_batches

    config = load_config(str(run))
    data = DataModule(config, locate_base(config.model))

    def rows(world: int, done: int, count: int, micro_batch: int) -> list[tuple[int, ...]]:
        found = []
        for rank in range(world):
            topology = Topology(rank, world, torch.device("cpu"), "test")
            for batch in probe_batches(data.tasks, data.chat, topology, done, count, micro_batch):
                assert len(batch.input_ids_BS) <= micro_batch
                assert len(set(batch.task_ids_BS.flatten().tolist())) == 1
                for ids, mask, task in zip(
                    batch.input_ids_BS, batch.token_mask_BS, batch.task_ids_BS, strict=True
                ):
                    found.append((int(task[0]), *ids[mask].tolist()))
        return sorted(found)

    alone = rows(1, 2, 5, 8)
    assert [row[0] for row in alone] == [0] * 5 + [1] * 5
    assert rows(2, 2, 5, 2) == rows(3, 2, 5, 4) == rows(16, 2, 5, 1) == alone
    assert rows(1, 3, 5, 8) != alone
    everything = rows(2, 7, 1000, 8)
    assert len(everything) == sum(len(task.train) for task in data.tasks), "no row twice"


# Where it cannot look


def test_what_cannot_be_looked_at_says_why(run: Path) -> None:
    from moe_medical.training.callbacks.conflict import ConflictProbe

    nothing: Any = None

    def reason(layout: dict[str, Any], *settings: str, tasks: int = 2) -> str | None:
        config = Layout(**layout).configured(str(run), 2, settings)
        return ConflictProbe(config, [nothing] * tasks, nothing, nothing, nothing).reason

    for word, layout in REFUSED.items():
        told = reason(layout)
        assert told is not None
        assert word in told
        assert not told.startswith("must")
    compiled = reason({}, "training.compile=true")
    assert compiled is not None
    assert "compile" in compiled
    assert reason({}, tasks=1) == "one task alone"
    assert [reason(layout) for layout in LOOKED_AT] == [None] * 4


def test_a_look_where_it_cannot_is_refused(run: Path) -> None:
    from moe_medical.training.callbacks.conflict import ConflictProbe

    nothing: Any = None
    config = Layout(zero=3).configured(str(run), 2)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        ConflictProbe(config, [nothing] * 2, nothing, nothing, nothing).measure(1)


class _Rows:
    """Stands in for a task: tells which rows are asked for."""

    def __init__(self, size: int) -> None:
        self.train, self.tokens, self.asked = range(size), self, list[int]()

    def encoded(self, rows: list[int]) -> list[Any]:
        from moe_medical.data.chat import Encoded

        self.asked += rows
        return [Encoded([1, 2], 1, 0)] * len(rows)


def test_looks_at_round_steps_see_other_rows_of_tasks_of_round_sizes() -> None:
    from types import SimpleNamespace

    from moe_medical.training.task_gradients import probe_batches

    task, alone = _Rows(500), SimpleNamespace(rank=0, world_size=1)
    for done in range(500, 6000, 500):
        probe_batches([task], SimpleNamespace(pad_id=0), alone, done, 4, 2)  # type: ignore[arg-type, list-item]
    assert len(task.asked) == 44
    assert len(set(task.asked)) > 35
