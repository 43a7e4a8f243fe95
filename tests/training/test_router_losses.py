"""The router losses in real steps: values and gradients of the plain formulas over all tokens at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_process import OneProcess, counts_of, gradients, one_step, tiny_engine, tiny_samples
from support.ranks import on_ranks
from support.router_losses import largest, plain, total
from support.tiny import write_tiny_run
from support.training import Layout, start, step, write_zero_settings
from torch import Tensor

from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.adapters import MoloraConfig
from moe_medical.data.batches import Batch, collate, collate_packed
from moe_medical.evaluation.loss import TokenWeights, forward_context, token_losses
from moe_medical.training.callback import Callback
from moe_medical.training.router_losses import RouterLosses

WEIGHTS = LossWeights(0.7, 0.3, 0.2, 0.5, 0.4, delta=0.3)
CONFIG = MoloraConfig(
    experts_per_layer=(2, 4),
    top_k=1,
    rank=3,
    dropout=0.0,
    balance_coefficient=WEIGHTS.balance,
    z_coefficient=WEIGHTS.z,
    entropy_coefficient=WEIGHTS.entropy,
    divergence_coefficient=WEIGHTS.divergence,
    localized_coefficient=WEIGHTS.localized,
    localized_delta=WEIGHTS.delta,
    localized_tasks=("even",),
)
TASKS = ("odd", "even")  # the second is of the first kind


def micro_batches(batching: str) -> list[Batch]:
    """Three micro-batches of two samples, or one of them all; packed rows hold two."""
    samples = tiny_samples()
    if batching == "packed":
        return [collate_packed([samples[i : i + 2]], pad_id=0) for i in (0, 2, 4)]
    size = 6 if batching == "whole" else 2
    parts = [samples[i : i + size] for i in range(0, 6, size)]
    return [collate([s for s, _ in part], [t for _, t in part], pad_id=0) for part in parts]


def trained(
    batching: str, checkpointing: str, over: str = "global_batch", config: MoloraConfig = CONFIG
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Values and gradients of a step."""
    engine, context = tiny_engine(config, checkpointing)
    losses = RouterLosses(engine, context, config, over, TASKS)  # type: ignore[arg-type]
    batches = micro_batches(batching)
    one_step(engine, context, losses, batches)
    return losses.values(), gradients(engine)


def expected(grouped: bool = False) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The same by autograd, each sample alone; `grouped` takes the statistics over two samples at a time."""
    engine, context = tiny_engine(CONFIG)
    samples = tiny_samples()
    batches = [collate([sample], [task], pad_id=0) for sample, task in samples]
    counts, size = counts_of(batches), 2 if grouped else len(batches)
    weights = TokenWeights.of("task_token_mean", counts.tokens_T, counts.rows_T, torch.device("cpu"))
    loss, values = torch.zeros(()), dict.fromkeys(WEIGHTS.active, 0.0)
    for first in range(0, len(batches), size):
        part = batches[first : first + size]
        language, layers, kinds = forward(engine, context, part, weights)
        share = len(kinds) / counts.all_tokens
        found = plain(layers, largest(layers, 1), kinds, WEIGHTS)
        loss = loss + language + share * total(found, WEIGHTS)
        values = {name: value + share * float(found[name].detach()) for name, value in values.items()}
    loss.backward()
    return values, gradients(engine)


def forward(
    engine: OneProcess, context: RoutingContext, batches: list[Batch], weights: TokenWeights
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Language-model loss, logits of each layer, and the kind of each token."""
    language, rows, kinds = torch.zeros(()), [], []
    for batch in batches:
        with forward_context(context, batch):
            tokens = token_losses(engine, batch)
            language = language + (tokens.losses * weights(tokens)).sum()
            rows.append([routing.logits_TE for routing in context.record.routings.values()])
            kinds += (1 - batch.task_ids_BS.flatten()).tolist()
    return language, [torch.cat(layer) for layer in zip(*rows, strict=True)], kinds


def assert_same(seen: tuple[dict, dict[str, Tensor]], wanted: tuple[dict, dict[str, Tensor]]) -> None:
    assert seen[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-7)
    assert seen[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, float], dict[str, Tensor]]:
    return expected()


@pytest.mark.parametrize("batching", ["whole", "accumulated", "packed"])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
def test_every_layout_gives_the_plain_formulas_over_all_tokens(batching: str, checkpointing: str, whole: Any):
    assert_same(trained(batching, checkpointing), whole)
    assert list(whole[0]) == ["balance", "z", "entropy", "divergence", "localized"]


def test_losses_reach_the_total_loss(whole: Any):
    """Without them every router has another gradient."""
    none = {f"{name}_coefficient": 0.0 for name in WEIGHTS.active}
    values, without = trained("whole", "none", config=replace(CONFIG, **none))
    assert values == {}
    routers = [name for name in without if ".router." in name]
    assert len(routers) == 12
    assert all((without[name] - whole[1][name]).abs().max() > 1e-4 for name in routers)


def test_micro_batches_may_count_alone(whole: Any):
    seen = trained("accumulated", "none", over="micro_batch")
    assert_same(seen, expected(grouped=True))
    assert abs(seen[0]["localized"] - whole[0]["localized"]) > 1e-3


def test_losses_of_single_tokens_look_at_nothing_in_advance(whole: Any):
    passes: list[str] = []
    config = replace(CONFIG, balance_coefficient=0.0, divergence_coefficient=0.0, localized_coefficient=0.0)
    engine, context = tiny_engine(config)
    engine.module.register_forward_pre_hook(lambda *_: passes.append(context.current.name))
    losses, batches = RouterLosses(engine, context, config, "global_batch"), micro_batches("accumulated")
    one_step(engine, context, losses, batches)
    assert passes == ["train"] * 3
    assert losses.values() == pytest.approx({n: whole[0][n] for n in ("z", "entropy")}, rel=1e-5)


def test_what_is_drawn_is_drawn_alike_in_advance():
    """Dropout and sampled experts of the pass that counts are those of the passes that train."""
    config = replace(CONFIG, dropout=0.5, selection="sample", experts_per_layer=(), num_experts=4, top_k=2)
    engine, context = tiny_engine(config)
    losses, batches = RouterLosses(engine, context, config, "global_batch", TASKS), micro_batches("packed")
    chosen, probs, tokens = torch.zeros(6, 4), torch.zeros(6, 4), counts_of(batches).all_tokens

    class Look(Callback):
        def after_forward(self) -> None:
            for row, routing in enumerate(context.record.routings.values()):
                chosen[row] += torch.bincount(routing.expert_ids_TK.flatten(), minlength=4)
                probs[row] += routing.probs_TE.detach().sum(0)

    one_step(engine, context, losses, batches, Look())
    balance = 4 * (chosen / tokens * probs / tokens).sum(-1).mean()
    assert losses.values()["balance"] == pytest.approx(float(balance), rel=1e-6)


def test_frozen_routers_have_losses_and_no_gradient():
    engine, context = tiny_engine(CONFIG)
    for name, parameter in engine.module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".router." not in name)
    losses, batches = RouterLosses(engine, context, CONFIG, "global_batch", TASKS), micro_batches("packed")
    one_step(engine, context, losses, batches)
    assert not any(".router." in name for name in gradients(engine))
    assert losses.values()["balance"] > 0


# Two ranks

LAYOUTS: list[dict[str, Any]] = [
    {"zero": 0, "accumulation": 2, "checkpointing": "non_reentrant"},
    {"zero": 2, "checkpointing": "reentrant", "batching": "packed"},
]
PATHS: list[dict[str, Any]] = [
    {"zero": 0, "accumulation": 2},
    {"zero": 3, "accumulation": 2, "checkpointing": "reentrant"},
]
SEVERAL = [
    *("training.router_paths=2", "adapters.selection=sample", "adapters.experts_per_layer=null"),
    *("adapters.num_experts=4", "adapters.top_k=2"),
]


def _steps(run: str, jobs: list[list[Any]]) -> list[list[dict[str, float]]]:
    """Values and gradient norm of the first steps of each layout with its settings."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology, seen = start_distributed(load_config(run).parallel), []
    for layout, settings, steps in jobs:
        trainer = start(Layout(**layout), run, topology, settings)
        seen.append([step(trainer, number) for number in range(steps)])
    stop_distributed()
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    write_zero_settings(folder)
    adapters = {"rank": 4, "alpha": 8, "top_k": 1, "dropout": 0.0, "experts_per_layer": [2, 4]}
    losses = {f"{name}_coefficient": getattr(WEIGHTS, name) for name in WEIGHTS.active}
    named = {"localized_delta": WEIGHTS.delta, "localized_tasks": ["even"]}
    training = {"steps": 2, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4}
    return write_tiny_run(folder, adapters=adapters | losses | named, training=training)


@pytest.fixture(scope="module")
def of_ranks(run: Path) -> list[list[list[dict[str, float]]]]:
    jobs = [[layout, [], 1] for layout in LAYOUTS] + [[layout, SEVERAL, 2] for layout in PATHS]
    return on_ranks(2, _steps, run.parent, str(run), jobs)


def test_two_ranks_make_the_plain_formulas(run: Path, of_ranks: Any):
    values, norm = _by_autograd(str(run))
    for of_rank in of_ranks:
        for layout, (first,) in zip(LAYOUTS, of_rank, strict=False):
            assert {name: first[name] for name in values} == pytest.approx(values, rel=1e-5), layout
            assert first["norm"] == pytest.approx(norm, rel=1e-5), layout


def test_several_paths_train_alike_under_all_stages(of_ranks: Any):
    """The second step shows what was drawn in the first: B is zero before."""
    for *_, plain_layout, sharded in of_ranks:
        for seen, wanted in zip(sharded, plain_layout, strict=True):
            assert seen == pytest.approx(wanted, rel=2e-5)


def _by_autograd(run: str) -> tuple[dict[str, float], float]:
    """Values and gradient norm of the run's first step, each sample alone."""
    from support.training import rows_of_steps

    from moe_medical.adapters.model import adapter_parameters, attach_adapters
    from moe_medical.base_model import locate_base
    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config
    from moe_medical.data.chat import Encoded

    config = load_config(run)
    model = load_base(locate_base(config.model), "float32").train()
    context = attach_adapters(model, config.adapters, config.run.seed)
    rows = rows_of_steps(config, 1)[0]
    encoded = [(Encoded(row.tokens, row.num_prompt, 0), row.task) for row in rows]
    batches = [collate([sample], [task], pad_id=0) for sample, task in encoded]
    counts = counts_of(batches)
    weights = TokenWeights.of("task_token_mean", counts.tokens_T, counts.rows_T, torch.device("cpu"))
    language, layers, kinds = forward(OneProcess(model), context, batches, weights)
    found = plain(layers, largest(layers, 1), kinds, WEIGHTS)
    (language + total(found, WEIGHTS)).backward()
    grads = [p.grad for p in adapter_parameters(model).values() if p.grad is not None]
    return {n: float(v.detach()) for n, v in found.items()}, float(torch.nn.utils.get_total_norm(grads))
