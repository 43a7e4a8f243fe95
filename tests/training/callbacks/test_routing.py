"""Routing counts of real steps in every layout, against tokens that are routed one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, rows_of_steps, start, write_zero_settings

from moe_medical.training.callback import Callback
from moe_medical.training.callbacks.routing import RoutingCounts

ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.1, "balance_coefficient": 0.5}
PACKED = {"batching": "packed", "accumulation": 4}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"zero": 0},
        {"zero": 2, **PACKED},
        {"zero": 2, "batching": "padded", "accumulation": 4},
        {"zero": 2, "accumulation": 2, "checkpointing": "non_reentrant"},
        {"zero": 2, "accumulation": 2, "checkpointing": "reentrant"},
    ],
    2: [
        {"zero": 0, "accumulation": 2},
        {"zero": 3, "checkpointing": "reentrant"},
        {"zero": 2, "ep_size": 2, "exchange": "tokens", **PACKED},
        {"zero": 2, "ep_size": 2, "exchange": "weights", "accumulation": 2},
        {"zero": 3, "ep_size": 2, "exchange": "tokens", "checkpointing": "non_reentrant"},
        {"zero": 3, "ep_size": 2, "exchange": "weights", "checkpointing": "reentrant", "batching": "padded"},
    ],
}
"""With accumulation the balance loss runs a forward pass in advance."""


def _count_layouts(run: str, layouts: list[dict[str, Any]], settings: list[str]) -> list[dict[str, Any]]:
    """By layout: names of layers and counts of the first step, counted twice."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(load_config(run).parallel)
    seen = [_count(start(Layout(**layout), run, topology, settings)) for layout in layouts]
    stop_distributed()
    return seen


def _count(trainer: Any) -> dict[str, Any]:
    from moe_medical.training.step import TrainStep

    class Counting(Callback):
        def after_forward(self) -> None:
            counts.add()

    counts, batches = RoutingCounts(trainer.engine, trainer.context, 2), trainer.batches.step(0)
    trainer.engine.step = lambda rate: 0.0  # the second step shall see what the first one has seen
    where = (trainer.engine, trainer.context, trainer.factors, trainer.router_losses)
    train_step = TrainStep(trainer.config, *where, [Counting()])
    totals = []
    for _ in range(2):
        counts.begin()
        train_step(0, batches)
        totals.append(counts.total().tolist())
    return {"layers": counts.layers, "totals": totals, "gates": _gates(trainer)}


@torch.no_grad()
def _gates(trainer: Any) -> list[Any]:
    """Of dense task routers: softmax of each task's logits, by layer."""
    from moe_medical.adapters.model import routed_layers

    routers = [layer.router for layer in routed_layers(trainer.engine.module).values()]
    dense = [r for r in routers if hasattr(r, "embedding") and r.choice.top_k == r.weight.shape[0]]
    return [(r.embedding @ r.weight.t()).softmax(-1).tolist() for r in dense]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    write_zero_settings(folder)
    return write_tiny_run(folder, adapters=ADAPTERS, training={"steps": 2, "global_batch": 8})


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, np.ndarray]:
    """Layer -> (T, E): the gates of every token, sample by sample, in plain loops.

    Adapters add nothing at step 0, so that a layer's input is the base model's.
    """
    from moe_medical.adapters.model import attach_adapters, routed_layers
    from moe_medical.base_model import locate_base
    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config

    config = load_config(str(run))
    model = load_base(locate_base(config.model), "float32").eval()
    attach_adapters(model, config.adapters, config.run.seed)
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in routed_layers(model).items():
        layer.base.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0]}))
    counts = {name: np.zeros((2, 4)) for name in routed_layers(model)}
    for row in rows_of_steps(config, 1)[0]:
        with torch.no_grad():
            model(torch.tensor([row.tokens]))
        for name, layer in routed_layers(model).items():
            router = layer.router
            for logits in (inputs[name] @ router.weight.t() + router.bias).tolist():
                first, second = sorted(range(4), key=lambda e: -logits[e])[:2]
                gate = 1 / (1 + np.exp(logits[second] - logits[first]))
                counts[name][row.task, first] += gate
                counts[name][row.task, second] += 1 - gate
    return counts


@pytest.mark.parametrize("world", LAYOUTS)
def test_counts_are_those_of_single_samples(run: Path, expected: dict, world: int) -> None:
    wanted = np.stack(list(expected.values()))
    assert wanted.sum(axis=(1, 2)) == pytest.approx(np.full(len(wanted), wanted[0].sum()))
    for of_rank in on_ranks(world, _count_layouts, run.parent, str(run), LAYOUTS[world], []):
        for layout, seen in zip(LAYOUTS[world], of_rank, strict=True):
            assert seen["layers"] == list(expected)
            for total in seen["totals"]:
                assert np.array(total) == pytest.approx(wanted, abs=1e-3), layout


def test_one_expert_for_each_token_makes_whole_numbers(run: Path) -> None:
    (seen,) = on_ranks(1, _count_layouts, run.parent, str(run), [PACKED], ["adapters.top_k=1"])
    counts = np.array(seen[0]["totals"][0])
    assert (counts == counts.round()).all()
    assert len(set(counts.sum(axis=(1, 2)))) == 1
    assert counts.sum() > 0


def test_a_dense_gate_counts_what_it_gives(run: Path) -> None:
    settings = ["adapters.router=task", "adapters.top_k=4", "adapters.balance_coefficient=0"]
    (seen,) = on_ranks(1, _count_layouts, run.parent, str(run), [PACKED], settings)
    counts, gates = np.array(seen[0]["totals"][0]), np.array(seen[0]["gates"])
    assert gates.shape == counts.shape
    assert counts / counts.sum(-1, keepdims=True) == pytest.approx(gates, rel=1e-5)
    assert gates.max() - gates.min() > 0.01


def test_plain_adapters_have_nothing_to_count(run: Path) -> None:
    (seen,) = on_ranks(1, _count_layouts, run.parent, str(run), [{}], ["adapters.preset=lora"])
    assert (seen[0]["layers"], seen[0]["totals"]) == ([], [[], []])


def test_calls_out_of_turn_are_refused() -> None:
    from moe_medical.adapters.routing import RoutingContext

    class _Bare:
        module = torch.nn.Linear(1, 1)

    counts = RoutingCounts(_Bare(), RoutingContext(), 2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="between"):
        counts.add()
    with pytest.raises(RuntimeError, match="begin"):
        counts.total()
