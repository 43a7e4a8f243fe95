"""The loss of a step is that of plain PyTorch on its global batch, however it is laid out and normalised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from support.ranks import on_ranks
from support.reference import Row, Trained
from support.tiny import write_tiny_run
from support.training import Layout, apart, reference, start, worst, write_zero_settings

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.evaluation.loss import TokenWeights
    from moe_medical.training.step import StepCounts
    from moe_medical.training.trainer import Trainer

STEPS = 2
FACTORS = [0.4, 1.6]
"""Weights u_T of the two tasks."""
MODES = ["task_token_mean", "token_mean", "example_mean"]


class Case(NamedTuple):
    """A way of laying out the same samples."""

    batching: str
    world: int
    micro_batch: int
    zero: int


CASES = [
    Case("padded", 1, 12, 0),
    Case("grouped", 1, 3, 2),
    Case("packed", 1, 1, 2),
    Case("padded", 2, 2, 0),
    Case("packed", 2, 1, 2),
    Case("padded", 3, 2, 2),
    Case("packed", 3, 1, 1),
]


# The rules again, for plain PyTorch: weight of a target token of each row


def _token_mean(rows: Sequence[Row]) -> list[float]:
    return [1 / sum(row.num_targets for row in rows)] * len(rows)


def _example_mean(rows: Sequence[Row]) -> list[float]:
    return [1 / len(rows) / row.num_targets for row in rows]


def _task_token_mean(rows: Sequence[Row]) -> list[float]:
    samples = Counter(row.task for row in rows)
    tokens = {task: sum(row.num_targets for row in rows if row.task == task) for task in samples}
    return [samples[row.task] / len(rows) / tokens[row.task] for row in rows]


PLAIN: dict[str, Callable[[Sequence[Row]], list[float]]] = {
    "token_mean": _token_mean,
    "example_mean": _example_mean,
    "task_token_mean": _task_token_mean,
}


def _plain(run: str, mode: str) -> Trained:
    def weights(rows: Sequence[Row]) -> list[float]:
        return [FACTORS[row.task] * weight for row, weight in zip(rows, PLAIN[mode](rows), strict=True)]

    return reference(run, STEPS, token_weights=weights)


# The rules of the package, on ranks


def _train(run: str, expected: str, cases: list[list[Any]]) -> dict[str, Any]:
    """By case and mode: losses, norms, distance to the expected tensors, tasks of this rank in each step."""
    from safetensors.torch import load_file

    from moe_medical.distributed.state import gather_parameters
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    seen: dict[str, Any] = {}
    topology = None
    for case in (Case(*values) for values in cases):
        layout = Layout(zero=case.zero, accumulation=12 // case.world // case.micro_batch)
        topology = topology or start_distributed(layout.configured(run, case.world).parallel)
        for mode in MODES:
            settings = [f"data.batching={case.batching}", f"training.loss.normalise={mode}"]
            trainer = start(layout, run, topology, settings)
            steps = [_step(trainer, mode, number) for number in range(STEPS)]
            tensors = load_file(Path(expected) / f"{mode}.safetensors")
            off = worst(apart(gather_parameters(trainer.engine), tensors))[1]
            losses, norms, tasks = (list(column) for column in zip(*steps, strict=True))
            seen[f"{case} {mode}"] = {"loss": losses, "norm": norms, "apart": off, "tasks": tasks}
    stop_distributed()
    return seen


def _step(trainer: Trainer, mode: Any, number: int) -> tuple[float, float, list[int]]:
    """Loss over all ranks, gradient norm, tasks that this rank has."""
    from moe_medical.evaluation.loss import TokenWeights

    batches = trainer.batches.step(number)
    tasks = {task for batch in batches for task in batch.targets_per_task(2).nonzero()[:, 0].tolist()}
    trainer.factors.guard_T = np.array(FACTORS)
    own, of_step = [], trainer.factors.of_step

    def look(step: int, batches: Any, counts: StepCounts, plain: TokenWeights) -> np.ndarray:
        weights = TokenWeights.of(mode, counts.tokens_T, counts.rows_T, trainer.topology.device)
        own.append(_loss(trainer, batches, weights.times(np.array(FACTORS))))
        return of_step(step, batches, counts, plain)

    trainer.factors.of_step = look  # type: ignore[method-assign]
    norm = trainer.train_step(number, batches).grad_norm
    trainer.factors.of_step = of_step  # type: ignore[method-assign]
    return float(trainer.topology.sum(np.array(own))[0]), norm, sorted(tasks)


def _loss(trainer: Trainer, batches: Sequence[Any], weights: TokenWeights) -> float:
    """This rank's share of the loss."""
    import torch

    from moe_medical.evaluation.loss import token_losses

    def share(batch: Any) -> Tensor:
        tokens = token_losses(trainer.engine.module, batch)
        return (tokens.losses * weights(tokens)).sum()

    with torch.no_grad():
        return float(sum(share(batch) for batch in batches))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normalisation")
    adapters = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}
    write_zero_settings(folder)
    training = {"global_batch": 12, "epsilon": 1e-4, "learning_rate": 0.01, "steps": 6, "micro_batch": 2}
    data = {"tasks": {"even": {"weight": 0.25}}}  # rare: some ranks have none of it
    run = write_tiny_run(folder, adapters=adapters, training=training, data=data)
    _answer_at_length(folder / "tasks" / "last_word.train.jsonl")
    return run


def _answer_at_length(file: Path) -> None:
    """Targets of two to six words, where each had one."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"output": row["input"]}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def plain(run_file: Path) -> dict[str, Trained]:
    from safetensors.torch import save_file

    trained = {mode: _plain(str(run_file), mode) for mode in MODES}
    for mode, of_mode in trained.items():
        save_file(of_mode.tensors, run_file.parent / f"{mode}.safetensors")
    return trained


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_are_those_of_the_global_batch(
    world: int, run_file: Path, plain: dict[str, Trained], tmp_path: Path
) -> None:
    cases = [list(case) for case in CASES if case.world == world]
    by_rank = on_ranks(world, _train, tmp_path, str(run_file), str(run_file.parent), cases)
    for seen in by_rank:
        for name, values in seen.items():
            expected = plain[name.split()[-1]]
            assert values["loss"] == pytest.approx(expected.loss, rel=1e-5), name
            assert values["norm"] == pytest.approx(expected.norm, rel=1e-5), name
            assert values["apart"] < 1e-4, name
    some_rank_lacks_a_task = any(
        len(tasks) < 2 for seen in by_rank for v in seen.values() for tasks in v["tasks"]
    )
    assert some_rank_lacks_a_task == (world > 1)


def test_the_three_normalisations_differ(plain: dict[str, Trained]) -> None:
    norms = [trained.norm[0] for trained in plain.values()]
    assert min(abs(a / b - 1) for i, a in enumerate(norms) for b in norms[:i]) > 1e-2
