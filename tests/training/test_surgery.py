"""Gradient surgery: combinations by hand; steps on ranks against the plain step and a hand computation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, start, write_zero_settings

from moe_medical.training.surgery import combination

if TYPE_CHECKING:
    from moe_medical.data.batches import Batch
    from moe_medical.evaluation.loss import TokenWeights
    from moe_medical.training.step import StepCounts, StepResult
    from moe_medical.training.trainer import Trainer

Weigh = Callable[..., np.ndarray]
pytest.importorskip("torchjd")
SOLVERS = {"upgrad": "quadprog", "cagrad": "cvxpy", "nash_mtl": "ecos"}
RULES = [
    pytest.param(
        rule,
        marks=pytest.mark.skipif(
            rule in SOLVERS and importlib.util.find_spec(SOLVERS[rule]) is None, reason="solver not installed"
        ),
    )
    for rule in ("pcgrad", "upgrad", "imtl_g", "mgda", "aligned_mtl", "cagrad", "nash_mtl")
]
CONFLICT = np.array([[1.0, 0.0], [-1.0, 1.0]])
"""Gradients of two tasks, 135 degrees apart."""


def _gram(gradients: np.ndarray) -> np.ndarray:
    return np.asarray(gradients @ gradients.T)


# Combinations


def test_pcgrad_by_hand() -> None:
    """Each is freed of its part along the other: (1, 0) -> (0.5, 0.5), and (-1, 1) -> (0, 1)."""
    numbers = combination("pcgrad", _gram(CONFLICT), 0)
    assert numbers @ CONFLICT == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize(
    ("rule", "gradients", "wanted"),
    [
        # The shortest point between the two ends, (0.2, 0.4), times two tasks.
        ("mgda", CONFLICT, [0.4, 0.8]),
        # The same projection on both directions; weights sum to the number of tasks.
        ("imtl_g", np.diag([1.0, 2.0]), [4 / 3, 4 / 3]),
        # Principal components brought to the length of the smallest one.
        ("aligned_mtl", np.diag([1.0, 2.0]), [1.0, 1.0]),
    ],
)
def test_other_rules_by_hand(rule: str, gradients: np.ndarray, wanted: list[float]) -> None:
    assert combination(rule, _gram(gradients), 0) @ gradients == pytest.approx(wanted, rel=1e-3)


def _conflicting() -> np.ndarray:
    """Four gradients; along the second one their sum goes up."""
    gradients = np.random.default_rng(3).normal(size=(4, 50))
    gradients[1] = 0.2 * gradients[1] - 0.5 * gradients[0]
    assert (_gram(gradients).sum(1) < 0).tolist() == [False, True, False, False]
    return gradients


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.values[0] in ("upgrad", "mgda", "nash_mtl")])
def test_rules_that_promise_it_make_no_task_worse(rule: str) -> None:
    gram = _gram(_conflicting())
    assert (gram @ combination(rule, gram, 0) > -1e-2).all()


def test_imtl_g_projects_alike_on_all_directions() -> None:
    gradients = _conflicting()
    along = _gram(gradients) @ combination("imtl_g", _gram(gradients), 0) / np.linalg.norm(gradients, axis=1)
    assert along == pytest.approx(np.full(4, along[0]))


@pytest.mark.parametrize("rule", RULES)
def test_a_combination_does_not_depend_on_the_size_of_gradients(rule: str) -> None:
    large = combination(rule, _gram(CONFLICT), 0)
    assert combination(rule, _gram(1e-4 * CONFLICT), 0) == pytest.approx(large, rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_absent_tasks_are_left_out(rule: str) -> None:
    with_absent = combination(rule, _gram(np.insert(CONFLICT, 1, 0.0, axis=0)), 0)
    assert with_absent[[0, 2]] == pytest.approx(combination(rule, _gram(CONFLICT), 0))
    assert with_absent[1] == 1
    assert combination(rule, np.zeros((3, 3)), 0).tolist() == [1, 1, 1]
    assert combination(rule, np.diag([0.0, 2.0]), 0).tolist() == [1, 1]


@pytest.mark.parametrize("rule", ["pcgrad", "upgrad"])
def test_tasks_in_nobodys_way_make_the_plain_step(rule: str) -> None:
    if rule in SOLVERS and importlib.util.find_spec(SOLVERS[rule]) is None:
        pytest.skip("solver not installed")
    assert combination(rule, np.array([[2.0, 0.5], [0.5, 1.0]]), 0) == pytest.approx([1, 1], rel=1e-3)


def test_only_the_seed_decides_the_order_of_pcgrad() -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 6))
    orders = {combination("pcgrad", _gram(gradients), seed).tobytes() for seed in range(8)}
    assert len(orders) > 1
    assert combination("pcgrad", _gram(gradients), 3).tobytes() in orders


# Steps on ranks, with dropout and router losses


def _take(trainer: Trainer, weigh: Weigh | None = None) -> StepResult:
    """The first step of a run; `weigh` gives the factors of its tasks instead of the run's own."""
    if weigh is not None:
        trainer.factors.of_step = weigh  # type: ignore[assignment, method-assign]
    return trainer.train_step(0, trainer.batches.step(0))


def _gram_of(trainer: Trainer, batches: Sequence[Batch], plain: TokenWeights) -> np.ndarray:
    """Inner products of the tasks' gradients in the step that is being weighed."""
    from moe_medical.training.task_gradients import kept_generators, task_gram

    with kept_generators(trainer.topology.device):
        return task_gram(trainer.engine, trainer.context, batches, plain, 2)


FACTORS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]
LAYOUTS = [
    Layout(zero=0, accumulation=2),
    Layout(zero=1, accumulation=1, checkpointing="non_reentrant"),
    Layout(zero=2, accumulation=2, checkpointing="non_reentrant"),
    Layout(zero=2, accumulation=4, offload=True),
]


TURNED = np.array([1.0, -1.0])
"""The second task's gradient turned round is in the first one's way."""


def _norms(run: str) -> list[dict[str, Any]]:
    """By layout: gradient norms with each of FACTORS, and Gram matrices from the tasks' gradients."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology, seen = start_distributed(Layout().configured(run, 2).parallel), []
    for layout in LAYOUTS:
        norms, grams = [], []
        for factors in FACTORS:
            trainer = start(layout, run, topology, ["adapters.balance_coefficient=0"])
            trainer.factors.guard_T = np.array(factors)
            norms.append(_take(trainer).grad_norm)
        trainer = start(layout, run, topology, ["adapters.balance_coefficient=0"])

        def look(step: int, batches: Any, counts: StepCounts, plain: TokenWeights) -> np.ndarray:
            grams.append(_gram_of(trainer, batches, plain).tolist())  # noqa: B023
            return np.ones(2)

        _take(trainer, look)
        seen.append({"norms": norms, "gram": grams[0]})
    stop_distributed()
    return seen


def _surgery(run: str) -> list[dict[str, Any]]:
    """By layout: gradient norm and adapters after plain steps, and after steps with surgery."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology, seen, pcgrad = start_distributed(Layout().configured(run, 2).parallel), [], SURGERY
    for layout in LAYOUTS:
        same = [_after(start(layout, run, topology, settings)) for settings in ([], pcgrad)]
        plain, cut = start(layout, run, topology), start(layout, run, topology, pcgrad)
        hand = [_after(plain, _pcgrad_by_hand(plain)), _after(cut, _turned_pcgrad(cut))]
        seen.append({"same": same, "hand": hand})
    stop_distributed()
    return seen


SURGERY = ["training.loss.surgery=pcgrad"]


def _turned_pcgrad(trainer: Trainer) -> Weigh:
    """The run's own surgery of gradients of which the second is turned round."""
    own = trainer.factors.of_step

    def weigh(step: int, batches: Any, counts: StepCounts, plain: TokenWeights) -> np.ndarray:
        return np.asarray(TURNED * own(step, batches, counts, plain.times(TURNED)))

    return weigh


def _pcgrad_by_hand(trainer: Trainer) -> Weigh:
    """g_1 - <g_1, g_2> / <g_2, g_2> g_2, and the other way round."""

    def weigh(step: int, batches: Any, counts: StepCounts, plain: TokenWeights) -> np.ndarray:
        gram = _gram_of(trainer, batches, plain.times(TURNED))
        assert gram[0, 1] < 0
        return np.asarray(TURNED * (1 - gram[0, 1] / np.diag(gram)))

    return weigh


def _after(trainer: Trainer, weigh: Weigh | None = None) -> list[float]:
    """Gradient norm, then the mean size of each adapter tensor after the step."""
    from moe_medical.distributed.state import gather_parameters

    norm = _take(trainer, weigh).grad_norm
    return [norm, *(float(t.abs().mean()) for t in gather_parameters(trainer.engine).values())]


def _second_look(run: str) -> dict[str, list[float]]:
    """Losses of a step before it, and those that FAMO saw after it had changed nothing."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(Layout().configured(run, 2).parallel)
    trainer = start(LAYOUTS[2], run, topology, ["training.loss.task_weights=famo"])
    update = trainer.engine.step
    trainer.engine.step = lambda rate: update(0.0)  # type: ignore[method-assign]
    result = _take(trainer)
    before = topology.sum(result.task_sums[0]) / result.counts.tokens_T
    stop_distributed()
    return {"before": before.tolist(), "after": trainer.factors.state()["_losses"]}


def _probe(run: str) -> dict[str, Any]:
    """Gram matrices of probe rows, exact and from sketches; whether generators are left alone."""
    import torch

    from moe_medical.distributed.topology import launched_ranks, start_distributed, stop_distributed
    from moe_medical.training.task_gradients import Sketch, probe_gram

    topology = start_distributed(Layout().configured(run, launched_ranks()).parallel)
    trainer = start(Layout(zero=2), run, topology, ["adapters.dropout=0"])
    before = torch.get_rng_state()
    where = (trainer.engine, trainer.context, trainer.batches.step(0), 2)
    exact = probe_gram(*where, seed=1)
    sketched = probe_gram(*where, seed=1, sketch=Sketch(seed=5))
    undisturbed = torch.equal(before, torch.get_rng_state())
    stop_distributed()
    return {"exact": exact.tolist(), "sketched": sketched.tolist(), "undisturbed": undisturbed}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surgery")
    write_zero_settings(folder)
    adapters = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.1}
    return write_tiny_run(
        folder,
        adapters=adapters | {"balance_coefficient": 0.5},
        training={"epsilon": 1e-4, "learning_rate": 0.01, "steps": 6, "global_batch": 8, "micro_batch": 2},
    )


def test_gradients_of_tasks_are_those_that_steps_see(run_file: Path, tmp_path: Path) -> None:
    """The Gram matrix from the norms that DeepSpeed tells of steps on one task, both, their difference."""
    for seen in on_ranks(2, _norms, tmp_path, str(run_file)):
        for of_layout in seen:
            first, second, both, apart = (norm**2 for norm in of_layout["norms"])
            (a, b), (c, d) = of_layout["gram"]
            assert [a, d] == pytest.approx([first, second], rel=1e-5)
            assert b == c == pytest.approx((both - apart) / 4, abs=1e-5 * both)


def test_steps_with_surgery(run_file: Path, tmp_path: Path) -> None:
    """Without conflict the plain step, with conflict the one worked out by hand."""
    by_rank = on_ranks(2, _surgery, tmp_path, str(run_file))
    assert by_rank[0] == by_rank[1]
    for seen in by_rank[0]:
        assert seen["same"][1] == pytest.approx(seen["same"][0], rel=1e-6)
        assert seen["hand"][1] == pytest.approx(seen["hand"][0], rel=1e-6)
        assert seen["hand"][0] != pytest.approx(seen["same"][0], rel=1e-3)


def test_the_second_look_sees_the_batch_and_the_dropout_of_the_step(run_file: Path, tmp_path: Path) -> None:
    for seen in on_ranks(2, _second_look, tmp_path, str(run_file)):
        assert seen["after"] == pytest.approx(seen["before"], rel=1e-6)


def test_probes_do_not_depend_on_the_ranks(run_file: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, _probe, tmp_path, str(run_file))
    for seen in on_ranks(2, _probe, tmp_path, str(run_file)):
        assert seen["undisturbed"]
        exact, sizes = np.array(seen["exact"]), np.sqrt(np.diag(seen["exact"]))
        assert exact == pytest.approx(np.array(alone["exact"]), rel=1e-4)
        assert seen["sketched"] != seen["exact"]
        assert (np.abs(seen["sketched"] - exact) < 5 * np.sqrt(2 / 4096) * np.outer(sizes, sizes)).all()


# Sketches


def test_a_sketch_is_linear_and_as_exact_as_it_says() -> None:
    import torch

    from moe_medical.training.task_gradients import Sketch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30_000, generator=generator) for _ in range(2))
    b = b + 0.3 * a
    size, errors = 1024, []
    for seed in range(40):
        sketch = Sketch(size, seed)
        sa, sb = (sketch({"x": v[:9000].view(90, 100), "y": v[9000:]})["sketch"] for v in (a, b))
        both = sketch({"x": (a + 2 * b)[:9000].view(90, 100), "y": (a + 2 * b)[9000:]})["sketch"]
        torch.testing.assert_close(both, sa + 2 * sb, atol=1e-3, rtol=1e-4)
        errors.append(float((sa @ sb - a @ b) / (a.norm() * b.norm())))
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(40)
    assert 0.5 * np.sqrt(1 / size) < np.std(errors) < 1.5 * np.sqrt(2 / size)
    assert torch.equal(Sketch(size, 3)({"x": a})["sketch"], Sketch(size, 3)({"x": a})["sketch"])
