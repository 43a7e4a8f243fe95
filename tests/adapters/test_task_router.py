"""The task gate against its equation, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_medical.adapters.layer import MoloraLinear, Target
from moe_medical.adapters.routers import new_router
from moe_medical.adapters.routing import BatchInputs
from moe_medical.config import MoloraConfig
from moe_medical.config.router_kinds import TASK_FEATURES

D, F, EXPERTS, TASKS = 12, 20, 4, 3


def config(top_k: int) -> MoloraConfig:
    return MoloraConfig(
        router="task", num_tasks=TASKS, num_experts=EXPERTS, top_k=top_k, rank=3, alpha=6.0, dropout=0.0
    )


def layer(top_k: int = EXPERTS) -> MoloraLinear:
    made = MoloraLinear(Target(nn.Linear(D, F), config(top_k), "mlp", seed=1))
    made.lora_B.data.copy_(torch.randn(made.lora_B.shape, generator=torch.Generator().manual_seed(2)))
    return made


def expected(made: MoloraLinear, x: torch.Tensor, task: int) -> torch.Tensor:
    """h = W0 x + alpha / rank sum_i w_ji B_i A_i x, w_j = softmax(W e_j) over the k largest."""
    logits = made.router.weight @ made.router.embedding[task]
    chosen = logits.argsort(descending=True)[: made.router.choice.top_k].tolist()
    weights = dict(zip(chosen, logits[chosen].softmax(0), strict=True))
    delta = sum(w * (made.lora_B[i] @ (made.lora_A[i] @ x)) for i, w in weights.items())
    return made.base(x) + 2.0 * delta


@pytest.mark.parametrize("top_k", [EXPERTS, 2])
def test_each_token_is_gated_by_its_own_task(top_k: int) -> None:
    made, x = layer(top_k), torch.randn(2, 4, D)
    tasks = torch.tensor([[0, 0, 2, 2], [1, 1, 1, 0]])  # packed rows hold several
    with made.context.bind(BatchInputs(torch.ones(2, 4, dtype=torch.bool), tasks)):
        y = made(x)
    for row in range(2):
        for place in range(4):
            want = expected(made, x[row, place], int(tasks[row, place]))
            torch.testing.assert_close(y[row, place], want, rtol=1e-5, atol=1e-6)


def test_a_row_keeps_its_task_for_any_number_of_positions() -> None:
    made, x = layer(), torch.randn(2, 5, D)
    with made.context.bind(BatchInputs.of_rows(torch.tensor([2, 1]))):
        whole, last = made(x), made(x[:, -1:])
    torch.testing.assert_close(last, whole[:, -1:])
    torch.testing.assert_close(whole[1, 3], expected(made, x[1, 3], 1), rtol=1e-5, atol=1e-6)
    assert made.context.inputs.task_ids_BS is None
    assert not made.context.record.routings


def test_unknown_tasks_get_the_mean_of_the_logits() -> None:
    made, x = layer(), torch.randn(3, D)
    weights = (made.router.embedding @ made.router.weight.t()).mean(0).softmax(0)
    parts = torch.einsum("efr,erd,td->tef", made.lora_B, made.lora_A, x)
    want = made.base(x) + 2.0 * torch.einsum("e,tef->tf", weights, parts)
    torch.testing.assert_close(made(x), want, rtol=1e-5, atol=1e-6)


def test_only_the_tasks_of_the_batch_get_a_gradient() -> None:
    made = layer()
    with made.context.bind(BatchInputs(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 2]]))):
        made(torch.randn(1, 2, D)).square().sum().backward()
    assert made.router.embedding.grad is not None
    assert made.router.embedding.grad.abs().sum(1).gt(0).tolist() == [True, False, True]
    assert made.router.weight.grad is not None
    assert made.router.weight.grad.abs().sum() > 0


def test_first_values_depend_on_seed_and_name_only() -> None:
    torch.manual_seed(5)
    first = layer().router.state_dict()
    torch.manual_seed(6)
    assert all(torch.equal(value, first[name]) for name, value in layer().router.state_dict().items())
    other = MoloraLinear(Target(nn.Linear(D, F), config(2), "other", seed=1)).router
    assert not torch.equal(other.weight, first["weight"])


def test_parameters_are_counted_and_the_preset_stays_a_token_router() -> None:
    adapters = MoloraConfig(router="task", num_experts=EXPERTS).for_tasks(TASKS)
    router = new_router(adapters, D, torch.Generator())
    assert adapters.router_kind.sizes(adapters, D) == tuple(p.numel() for p in router.parameters())
    assert sum(adapters.router_kind.sizes(adapters, D)) == TASK_FEATURES * (TASKS + EXPERTS)
    assert MoloraConfig().for_tasks(TASKS).num_tasks == 0
    assert MoloraConfig().router == "token"
