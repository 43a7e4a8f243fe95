"""Several passes of each sample: the smallest loss counts, and its gradient alone flows."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.one_process import counts_of, gradients, one_step, tiny_engine, tiny_samples
from support.router_losses import plain, total
from support.tiny import write_tiny_run
from torch import Tensor

from moe_medical.adapters.loss_weights import LossWeights
from moe_medical.config import RunConfig, load_config
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import TrainingSection
from moe_medical.data.batches import Batch, collate_packed
from moe_medical.errors import ConfigError
from moe_medical.evaluation.loss import TokenLosses, TokenWeights, forward_context, token_losses
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.router_paths import ONE_PATH, RouterPaths
from moe_medical.training.step import step_seed

WEIGHTS = LossWeights(balance=0.7, divergence=0.5)
CONFIG = MoloraConfig(
    num_experts=4,
    top_k=1,
    selection="sample",
    rank=3,
    dropout=0.0,
    balance_coefficient=WEIGHTS.balance,
    divergence_coefficient=WEIGHTS.divergence,
)


def packed() -> list[Batch]:
    """Two micro-batches: rows of two samples and of one, and a row of three."""
    samples = tiny_samples()
    return [collate_packed([samples[:2], samples[2:3]], 0), collate_packed([samples[3:]], 0)]


def test_one_path_changes_nothing():
    batch = packed()[0]
    tokens = TokenLosses(*(torch.zeros(3) for _ in range(4)))
    assert ONE_PATH.repeat(batch) is batch
    assert ONE_PATH.choose(tokens, batch) is tokens


def test_all_rows_are_repeated():
    batch = packed()[0]
    repeated = RouterPaths(3).repeat(batch)
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(repeated, field.name)
        if field.name.endswith("_BS"):
            assert torch.equal(after, torch.cat([before] * 3))
        else:
            assert after is before


@pytest.mark.parametrize("reduce", ["min", "mean"])
def test_each_sample_of_a_packed_row_takes_its_own_best_pass(reduce: str):
    batch = packed()[0]
    sizes = torch.tensor([last - first for first, last in borders(batch)])
    of_samples = torch.tensor([[3.0, 1.0, 2.0], [2.0, 5.0, 1.5]])  # (passes, samples)
    losses_PN = (
        of_samples.repeat_interleave(sizes, dim=1) + torch.arange(sizes.sum()) / 1e3
    ).requires_grad_()
    rest = [torch.arange(int(sizes.sum())).repeat(2) + i for i in range(3)]
    chosen = RouterPaths(2, reduce).choose(TokenLosses(losses_PN.flatten(), *rest), batch)
    best_N = torch.tensor([1, 0, 1]).repeat_interleave(sizes)
    share_PN = (best_N == torch.arange(2)[:, None]).float() if reduce == "min" else torch.full((2, 1), 0.5)
    assert torch.equal(chosen.losses, (losses_PN * share_PN).sum(0))
    assert [values.tolist() for values in chosen[1:]] == [values[: sizes.sum()].tolist() for values in rest]
    chosen.losses.sum().backward()
    assert torch.equal(losses_PN.grad, share_PN.expand_as(losses_PN))


def borders(batch: Batch) -> list[tuple[int, int]]:
    """First and past-the-last target token of each sample, in the order of the rows."""
    starts = (batch.token_mask_BS & (batch.position_ids_BS == 0)).nonzero().tolist()
    ends = [0]
    for row, column in starts:
        ends.append(ends[-1] + int(batch.sample_targets_BS[row, column]))
    return list(itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("reduce", "checkpointing"), [("min", "none"), ("min", "reentrant"), ("mean", "none")]
)
def test_gradients_are_those_of_the_chosen_passes_and_of_all_routings(reduce: str, checkpointing: str):
    """Two packed micro-batches, experts drawn; the router losses count the tokens of all passes."""
    engine, context = tiny_engine(CONFIG, checkpointing)
    batches, paths = packed(), RouterPaths(3, reduce)  # type: ignore[arg-type]
    losses, counts = RouterLosses(engine, context, CONFIG, "global_batch"), counts_of(batches)  # type: ignore
    config = RunConfig(training=TrainingSection(router_paths=3, router_paths_reduce=reduce))  # type: ignore
    sums = one_step(engine, context, losses, batches, config=config).task_sums
    of_tasks, values, wanted = by_autograd(batches, paths)
    assert sums[0].tolist() == pytest.approx(of_tasks)
    assert sums[1:].tolist() == [counts.tokens_T.tolist(), counts.rows_T.tolist()]
    assert losses.values() == pytest.approx(values, rel=1e-5)
    found = gradients(engine)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def by_autograd(
    batches: list[Batch], paths: RouterPaths
) -> tuple[list[float], dict[str, float], dict[str, Tensor]]:
    """Loss of each task, values of the router losses, and gradients: sample by sample, in one graph."""
    engine, context = tiny_engine(CONFIG)
    counts = counts_of(batches)
    weights = TokenWeights.of("task_token_mean", counts.tokens_T, counts.rows_T, torch.device("cpu"))
    torch.manual_seed(step_seed(RunConfig().run.seed, 0, 0))
    loss, of_tasks, logits, chosen = torch.zeros(()), [0.0, 0.0], [], []
    for batch in batches:
        rows = replace(
            batch,
            **{name: torch.cat([value] * 3) for name, value in vars(batch).items() if name.endswith("_BS")},
        )
        with forward_context(context, rows) as bound:
            tokens = token_losses(engine, rows)
            mask_T = bound.inputs.token_mask_T
            routings = bound.record.routings.values()
            logits.append([routing.logits_TE[mask_T] for routing in routings])
            chosen.append([routing.expert_ids_TK[mask_T] for routing in routings])
        each_PN, weight_PN = tokens.losses.view(3, -1), weights(tokens).view(3, -1)
        assert not torch.equal(each_PN[0], each_PN[1])
        for first, last in borders(batch):
            of_passes = each_PN[:, first:last].sum(1)
            best = min(of_passes) if paths.reduce == "min" else of_passes.mean()
            of_tasks[int(tokens.task_ids[first])] += float(best.detach())
            loss = loss + best * weight_PN[0, first]
    layers, ids = ([torch.cat(layer) for layer in zip(*parts, strict=True)] for parts in (logits, chosen))
    found = plain(layers, ids, [0] * len(ids[0]), WEIGHTS)
    (loss + total(found, WEIGHTS)).backward()
    return of_tasks, {name: float(value.detach()) for name, value in found.items()}, gradients(engine)


def test_rules_of_the_run_file(tmp_path: Path):
    run = str(write_tiny_run(tmp_path))
    assert load_config(run, ["training.router_paths=2", "adapters.selection=sample"])
    assert load_config(run, ["training.router_paths=2", "adapters.jitter=0.1"])
    for overrides, rule in (
        (["training.router_paths=0"], "must be at least 1"),
        (["training.router_paths=2"], "must be 1 where each pass would choose the same experts"),
        (["training.router_paths=2", "adapters.preset=lora"], "must be 1 where each pass"),
        (
            ["training.router_paths=2", "adapters.jitter=0.1", "training.loss.task_weights=famo"],
            "must be 1 with training.loss.task_weights=famo",
        ),
    ):
        with pytest.raises(ConfigError, match=rule):
            load_config(run, overrides)
