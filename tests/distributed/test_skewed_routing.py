"""Unbalanced work under expert parallelism: nothing hangs, and the numbers are those of replicated experts.

Cases: all tokens choose one expert, or the two of one rank, so that the other ranks' experts get no token;
the batch of one rank, or of each rank but one, is padding but for one token, or altogether. Each case is
trained with each exchange under ZeRO-2 and ZeRO-3, and compared with ep_size 1 in the same world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, start, step, worst, write_zero_settings

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.data.batches import Batch
    from moe_medical.distributed.state import TrainableState
    from moe_medical.training.trainer import Trainer

EXPERTS, STEPS = 4, 2
ADAPTERS = {
    "num_experts": EXPERTS,
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "balance_coefficient": 0.5,
    "z_coefficient": 0.1,
}
TRAINING = {"steps": STEPS, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4}
SPREAD = [("tokens", 2), ("weights", 2), ("auto", 2), ("tokens", 3)]
"""Exchange and ZeRO stage."""


@dataclass(frozen=True)
class Case:
    """What is unbalanced."""

    top_k: int = 2
    chosen: tuple[int, ...] = ()
    """Experts that all tokens choose; none to leave it to the routers."""
    real_tokens: int = -1
    """Tokens in the batches of the ranks of `idle`; -1 for ordinary batches."""
    idle: str = "none"
    """`last`, or `all but last`."""

    def is_idle(self, rank: int, world: int) -> bool:
        return {"none": False, "last": rank == world - 1, "all but last": rank < world - 1}[self.idle]


CASES = {
    "one expert": Case(top_k=1, chosen=(3,)),
    "one rank's experts": Case(chosen=(0, 1)),
    "one token": Case(real_tokens=1, idle="last"),
    "one token each, for one rank": Case(chosen=(2, 3), real_tokens=1, idle="all but last"),
    "no token": Case(real_tokens=0, idle="last"),
}


def _train_cases(run: str, world: int) -> dict[str, Any]:
    """By case: the experts' shares of the tokens; by layout, how far it is from ep_size 1."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(Layout().configured(run, world).parallel)
    seen: dict[str, Any] = {}
    for name, case in CASES.items():
        settings = [f"adapters.top_k={case.top_k}"]
        replicated = start(Layout(), run, topology, settings)
        first = _first_state(replicated, case)
        expected = _train(replicated, first, case)
        seen[name] = {"shares": _shares(replicated, case)}
        for exchange, zero in SPREAD:
            layout = Layout(zero=zero, ep_size=world, exchange=exchange)
            values = _train(start(layout, run, topology, settings), first, case)
            seen[name][f"{exchange} zero{zero}"] = _distance(values, expected)
    stop_distributed()
    return seen


def _first_state(trainer: Trainer, case: Case) -> TrainableState:
    """The trainer's own state with experts that do something and routers that choose as told."""
    from moe_medical.distributed.state import gather_state

    state = gather_state(trainer.engine, 0)
    torch.manual_seed(5)
    for name, tensor in state.parameters.items():
        if name.endswith("lora_B"):
            tensor.normal_(std=0.2)
        if name.endswith("router.bias"):
            tensor[list(case.chosen)] += 100.0
    return state


def _train(trainer: Trainer, first: TrainableState, case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """All values of all steps, and the parameters after them."""
    from moe_medical.distributed.state import gather_parameters, load_state

    load_state(trainer.engine, first)
    values = [step(trainer, number, _batches(trainer, number, case)) for number in range(STEPS)]
    return [v for of_step in values for v in of_step.values()], gather_parameters(trainer.engine)


def _batches(trainer: Trainer, number: int, case: Case) -> Sequence[Batch]:
    batches = trainer.batches.step(number)
    if not case.is_idle(trainer.topology.rank, trainer.topology.world_size):
        return batches
    return [_padded(batch, case.real_tokens) for batch in batches]


def _padded(batch: Batch, real_tokens: int) -> Batch:
    """The last tokens of the last row, without a target; the rest is padding."""
    from moe_medical.data.batches import IGNORE

    mask = torch.zeros_like(batch.token_mask_BS)
    mask[-1, mask.shape[1] - real_tokens :] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = torch.full_like(batch.labels_BS, IGNORE)
    return replace(batch, token_mask_BS=mask, position_ids_BS=positions, labels_BS=labels)


@torch.no_grad()
def _shares(trainer: Trainer, case: Case) -> list[float]:
    """Share of all ranks' real tokens that choose each expert, over all layers."""
    from moe_medical.adapters.losses import routing_sums
    from moe_medical.adapters.routing import BatchInputs
    from moe_medical.evaluation.loss import run_model

    sums = torch.zeros(EXPERTS)
    for batch in _batches(trainer, 0, case):
        with trainer.context.bind(BatchInputs(batch.token_mask_BS)):
            run_model(trainer.engine.module, batch, logits_to_keep=1)
            layers = trainer.context.record.routings.values()
            sums += routing_sums(layers, batch.token_mask_BS.flatten()).chosen_LE.sum(0)
    sums = trainer.engine.sum(sums)
    return (sums * case.top_k / sums.sum()).tolist()


def _distance(seen: tuple[list[float], dict], expected: tuple[list[float], dict]) -> list[Any]:
    """The largest relative difference of a value; the name and that of the worst tensor."""
    values = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(seen[0], expected[0], strict=True))
    return [values, *worst(apart(seen[1], expected[1]))]


@pytest.fixture(scope="module", params=[2, 4])
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("skewed")
    run = write_tiny_run(folder, adapters=ADAPTERS, training=TRAINING)
    write_zero_settings(folder)
    return on_ranks(request.param, _train_cases, folder, str(run), request.param, timeout=280)


@pytest.mark.parametrize("name", CASES)
def test_the_case_is_as_unbalanced_as_it_says(name: str, by_rank: list[dict[str, Any]]) -> None:
    shares = by_rank[0][name]["shares"]
    chosen = CASES[name].chosen
    if chosen:
        assert shares == [float(i in chosen) for i in range(EXPERTS)]
    else:
        assert min(shares) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_replicated_experts(name: str, by_rank: list[dict[str, Any]]) -> None:
    for of_rank in by_rank:
        for layout in (f"{exchange} zero{zero}" for exchange, zero in SPREAD):
            values, tensor, of_tensor = of_rank[name][layout]
            assert (layout, values, tensor, of_tensor) == (
                layout,
                pytest.approx(0.0, abs=1e-5),
                tensor,
                pytest.approx(0.0, abs=1e-5),
            )
