from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_medical.adapters.losses import router_gradients, router_loss_tap, routing_sums
from moe_medical.adapters.routing import Routing, RoutingContext, TokenRouter


def route(logits_TE: Tensor, top_k: int) -> Routing:
    top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(top_TK.softmax(-1), ids_TK, logits_TE, logits_TE.softmax(-1))


def balance_loss(routings: list[Routing], mask_T: Tensor) -> Tensor:
    return routing_sums(routings, mask_T).balance()


def z_loss(routings: list[Routing], mask_T: Tensor) -> Tensor:
    return routing_sums(routings, mask_T).z()


def real(num_tokens: int) -> Tensor:
    return torch.ones(num_tokens, dtype=torch.bool)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_gives_k(top_k: int):
    # Each token prefers other experts by a hair, in turn: the load is even, the probabilities uniform.
    logits = torch.stack([torch.eye(4).roll(shift, 1)[0] * 1e-6 for shift in range(4)]).requires_grad_()
    logits = logits + 1e-7 * torch.stack([torch.arange(4).roll(shift).float() for shift in range(4)])
    assert balance_loss([route(logits, top_k)], real(4)).item() == pytest.approx(top_k, rel=1e-5)


def test_collapsed_routing_gives_num_experts():
    logits = torch.tensor([[50.0, 0.0, 0.0]] * 5, requires_grad=True)
    assert balance_loss([route(logits, 1)], real(5)).item() == pytest.approx(3)


def test_balance_by_hand_averaged_over_layers():
    # Layer 1: probabilities (3/4, 1/4) twice, both tokens choose expert 0: 2 * (1 * 3/4) = 1.5.
    # Layer 2: (3/4, 1/4) and (1/4, 3/4), one token each: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    log3 = torch.tensor(3.0).log()
    first = torch.tensor([[log3, 0.0], [log3, 0.0]], requires_grad=True)
    second = torch.tensor([[log3, 0.0], [0.0, log3]], requires_grad=True)
    layers = [route(first, 1), route(second, 1)]
    assert balance_loss(layers, real(2)).item() == pytest.approx(1.25)
    assert z_loss(layers, real(2)).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_padding_counts_in_neither_value_nor_gradient(loss):
    torch.manual_seed(0)
    tokens = torch.randn(6, 4, requires_grad=True)
    padded = torch.cat([tokens.detach(), 100 * torch.randn(3, 4)]).requires_grad_()
    mask = torch.tensor([True] * 6 + [False] * 3)
    alone, with_padding = loss([route(tokens, 2)], real(6)), loss([route(padded, 2)], mask)
    torch.testing.assert_close(with_padding, alone)
    alone.backward()
    with_padding.backward()
    torch.testing.assert_close(padded.grad[:6], tokens.grad)
    assert tokens.grad.any()
    assert not padded.grad[6:].any()


def test_gradient_of_the_balance_loss_evens_the_load():
    logits = (
        torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    ).requires_grad_()
    before = balance_loss([route(logits, 2)], real(64))
    for _ in range(50):
        (gradient,) = torch.autograd.grad(balance_loss([route(logits, 2)], real(64)), logits)
        logits = (logits - 20 * gradient).detach().requires_grad_()
    assert balance_loss([route(logits, 2)], real(64)) < before - 0.2


def test_sums_of_micro_batches_add_up_to_the_whole_batch():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) % 3 > 0
    whole = routing_sums([route(logits, 2)], mask)
    halves = [routing_sums([route(logits[part], 2)], mask[part]) for part in (slice(0, 4), slice(4, 10))]
    added = type(whole)(*(a + b for a, b in zip(*halves, strict=True)))
    for a, b in zip(added, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert whole.num_tokens == mask.sum()
    assert whole.chosen_LE.sum() == 2 * mask.sum()
    torch.testing.assert_close(added.balance(), whole.balance())


def test_no_tokens_give_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    assert balance_loss([route(logits, 2)], torch.zeros(3, dtype=torch.bool)) == 0


BALANCE, Z, SCALE = 0.7, 0.3, 4.0


def test_tap_enters_the_gradient_of_the_losses_of_the_whole_batch():
    """Two micro-batches with padding, each backward alone, against autograd over both at once."""
    torch.manual_seed(3)
    routers, x_T = [nn.Linear(5, 4), nn.Linear(5, 4)], torch.randn(2, 6, 5)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    whole = [route(router(x_T.flatten(0, 1)), 2) for router in routers]
    sums = routing_sums(whole, mask.flatten())
    (BALANCE * sums.balance() + Z * sums.z()).backward()
    wanted = [p.grad.clone() for router in routers for p in router.parameters()]
    for router in routers:
        router.zero_grad()
    tokens = float(mask.sum())
    fraction = sums.chosen_LE / tokens
    gradients = router_gradients(fraction, ["a", "b"], SCALE * BALANCE / tokens, SCALE * Z / tokens)
    context = RoutingContext()
    for x, real_T in zip(x_T, mask, strict=True):
        with context.bind(real_T.unsqueeze(0)):
            logits = [router_loss_tap(context, n)(r(x)) for n, r in zip("ab", routers, strict=True)]
            assert torch.equal(logits[0], routers[0](x))
            context.router_gradients = gradients
            sum(0 * part.sum() for part in logits).backward()
    got = [p.grad / SCALE for router in routers for p in router.parameters()]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_without_losses_or_outside_a_bind_gradients_pass_unchanged():
    context, router = RoutingContext(), TokenRouter(5, 4, 2)
    assert router_loss_tap(context, "layer") is None
    x = torch.randn(3, 5)
    with context.bind(torch.ones(1, 3, dtype=torch.bool)):
        router(x, router_loss_tap(context, "layer")).weights_TK[:, 0].sum().backward()
    tapped = router.weight.grad.clone()
    router.weight.grad = None
    router(x).weights_TK[:, 0].sum().backward()
    assert torch.equal(tapped, router.weight.grad)
