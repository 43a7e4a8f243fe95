"""The router losses against plain formulas and autograd over all tokens at once, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.router_losses import largest, plain, total
from torch import Tensor, nn

from moe_medical.adapters.loss_weights import LossWeights, kinds_of_tasks
from moe_medical.adapters.losses import RoutingSums, router_gradients, router_loss_tap, routing_sums
from moe_medical.adapters.routing import BatchInputs, Routing, RoutingContext
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError

ALL = LossWeights(0.7, 0.3, 0.2, 0.5, 0.4, delta=0.3)
ALONE = [LossWeights(**{name: 0.6}, delta=0.25) for name in ("balance", "z", "entropy", "divergence")]
ALONE.append(LossWeights(localized=0.6, delta=0.25))


def route(logits_TE: Tensor, top_k: int) -> Routing:
    top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(top_TK.softmax(-1), ids_TK, logits_TE)


def real(num_tokens: int) -> Tensor:
    return torch.ones(num_tokens, dtype=torch.bool)


class _Setup:
    """Two micro-batches with padding through three routers of 3, 5 and 4 experts."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.routers = [nn.Linear(5, experts, dtype=torch.float64) for experts in (3, 5, 4)]
        self.x_MTD = torch.randn(2, 8, 5, dtype=torch.float64)
        self.mask_MT = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
        self.classes_MT = torch.randint(0, 2, (2, 8))

    def layers(self) -> list[Tensor]:
        """Logits of all real tokens."""
        return [router(self.x_MTD[self.mask_MT]) for router in self.routers]

    def gradients(self) -> list[Tensor]:
        found = [p.grad for router in self.routers for p in router.parameters()]
        for router in self.routers:
            router.zero_grad()
        return found

    def sums(self, weights: LossWeights, micro_batch: int) -> RoutingSums:
        routings = [route(router(self.x_MTD[micro_batch]), 2) for router in self.routers]
        classes = self.classes_MT[micro_batch] if weights.localized else None
        with torch.no_grad():
            return routing_sums(routings, self.mask_MT[micro_batch], classes, weights.classes)


@pytest.mark.parametrize("weights", [ALL, *ALONE], ids=lambda w: "+".join(w.active))
def test_values_and_gradients_are_those_of_the_plain_formulas(weights: LossWeights):
    """The gradient enters in the backward of each micro-batch alone, times what the engine divides by."""
    setup, scale = _Setup(), 4.0
    kinds = setup.classes_MT[setup.mask_MT].tolist()
    layers = setup.layers()
    expected = plain(layers, largest(layers, 2), kinds, weights)
    total(expected, weights).backward()
    wanted = setup.gradients()
    statistics = setup.sums(weights, 0) + setup.sums(weights, 1)
    for name, value in statistics.values(weights).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-12, atol=1e-12)
    context, each = RoutingContext(), scale / float(setup.mask_MT.sum())
    for x_TD, mask_T, classes_T in zip(setup.x_MTD, setup.mask_MT, setup.classes_MT, strict=True):
        with context.bind(BatchInputs(mask_T.unsqueeze(0))):
            taps = [router_loss_tap(context, name) for name in "abc"]
            logits = [tap(router(x_TD)) for tap, router in zip(taps, setup.routers, strict=True)]
            assert torch.equal(logits[0], setup.routers[0](x_TD))
            of_tokens = classes_T if weights.localized else None
            context.record.gradients = router_gradients(statistics, "abc", weights, each, of_tokens)
            sum(0 * part.sum() for part in logits).backward()
    for got, want in zip(setup.gradients(), wanted, strict=True):
        torch.testing.assert_close(got / scale, want, rtol=1e-10, atol=1e-12)
        assert want.any()


def value(sums: RoutingSums, name: str) -> float:
    return float(sums.values(LossWeights(**{name: 1.0}, delta=0.1))[name])


def test_sums_add_up_and_change_as_one_tensor():
    setup = _Setup()
    first, second = setup.sums(ALL, 0), setup.sums(ALL, 1)
    both = first + second
    assert both.num_experts == (3, 5, 4)
    assert (both.num_tokens, both.tokens_C.tolist()) == (
        11,
        [int((setup.classes_MT[setup.mask_MT] == c).sum()) for c in (0, 1)],
    )
    assert both.chosen_LE.sum(-1).tolist() == [22.0] * 3
    assert not both.chosen_LE[0, 3:].any()
    assert not both.probs_LCE[2, :, 4:].any()
    sizes = []
    doubled = first.through(lambda flat: sizes.append(flat.numel()) or 2 * flat)
    assert sizes == [ALL.num_statistics(layers=3, num_experts=5)]
    for mine, other in zip(doubled._tensors(), (first + first)._tensors(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_gives_k_and_the_largest_entropy(top_k: int):
    # Each token prefers other experts by a hair, in turn: the load is even, the probabilities uniform.
    logits = torch.stack([torch.eye(4).roll(shift, 1)[0] * 1e-6 for shift in range(4)])
    logits = logits + 1e-7 * torch.stack([torch.arange(4).roll(shift).float() for shift in range(4)])
    sums = routing_sums([route(logits, top_k)], real(4))
    assert value(sums, "balance") == pytest.approx(top_k, rel=1e-5)
    assert value(sums, "entropy") == pytest.approx(math.log(4), rel=1e-5)
    assert value(sums, "divergence") == pytest.approx(0, abs=1e-5)


def test_each_layers_balance_takes_its_own_number_of_experts():
    layers = [route(torch.zeros(3, experts), experts) for experts in (2, 6)]
    assert value(routing_sums(layers, real(3)), "balance") == pytest.approx((2 + 6) / 2)


def test_collapsed_routing_gives_num_experts_and_no_entropy():
    logits = torch.tensor([[500.0, 0.0, 0.0]] * 5)
    sums = routing_sums([route(logits, 1)], real(5))
    assert value(sums, "balance") == pytest.approx(3)
    assert (value(sums, "entropy"), value(sums, "divergence")) == (0, 0)


def test_decided_tokens_that_differ_have_the_largest_divergence():
    sums = routing_sums([route(500 * torch.eye(4), 1)], real(4))
    assert value(sums, "entropy") == 0
    assert value(sums, "divergence") == pytest.approx(math.log(4))


def test_a_gate_of_zero_is_not_chosen():
    logits = torch.zeros(2, 3)
    weights = torch.tensor([[0.0, 0.4, 0.6], [0.0, 1.0, 0.0]])
    routing = Routing(weights, torch.arange(3).expand(2, 3), logits)
    assert routing_sums([routing], real(2)).chosen_LE.tolist() == [[0, 2, 1]]


def test_balance_by_hand_averaged_over_layers():
    # Layer 1: probabilities (3/4, 1/4) twice, both tokens choose expert 0: 2 * (1 * 3/4) = 1.5.
    # Layer 2: (3/4, 1/4) and (1/4, 3/4), one token each: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    log3 = math.log(3)
    layers = [route(torch.tensor(x), 1) for x in ([[log3, 0.0]] * 2, [[log3, 0.0], [0.0, log3]])]
    sums = routing_sums(layers, real(2))
    assert value(sums, "balance") == pytest.approx(1.25)
    assert value(sums, "z") == pytest.approx(math.log(4) ** 2)


def test_localized_loss_by_hand():
    """Each kind's tokens prefer its own experts: what the weights reward, and I is even. Else it is not."""
    log3, kinds = math.log(3), torch.tensor([0, 0, 1, 1])
    own = torch.tensor([[log3, 0.0], [log3, 0.0], [0.0, log3], [0.0, log3]])
    even = routing_sums([route(own, 1)], real(4), kinds, 2)
    assert value(even, "localized") == pytest.approx(0)
    one_kind = routing_sums([route(own, 1)], real(4), torch.zeros(4, dtype=torch.long), 2)
    # I = 2 * (1.1, 0.9), for the probabilities even out: CV^2 = 0.1^2.
    assert value(one_kind, "localized") == pytest.approx(0.01)
    alone = routing_sums([route(own[:2], 1)], real(2), kinds[:2], 2)
    first, second = 2 * 0.75 * 1.1, 2 * 0.25 * 0.9
    mean = (first + second) / 2
    assert value(alone, "localized") == pytest.approx(((first - mean) / mean) ** 2)


def test_padding_counts_in_no_loss():
    torch.manual_seed(0)
    tokens, kinds = torch.randn(6, 4), torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0])
    padded = torch.cat([tokens, 100 * torch.randn(3, 4)])
    alone = routing_sums([route(tokens, 2)], real(6), kinds[:6], 2).values(ALL)
    padding = routing_sums([route(padded, 2)], torch.arange(9) < 6, kinds, 2).values(ALL)
    assert list(alone) == ["balance", "z", "entropy", "divergence", "localized"]
    for name, value in alone.items():
        torch.testing.assert_close(padding[name], value)


def test_no_tokens_give_finite_values_and_gradients():
    sums = routing_sums([route(torch.randn(3, 4), 2)], torch.zeros(3, dtype=torch.bool), torch.ones(3), 2)
    assert all(value == 0 for value in sums.values(ALL).values())
    assert sums.by_probability(ALL).isfinite().all()


@pytest.mark.parametrize("weights", ALONE, ids=lambda w: "+".join(w.active))
def test_the_gradient_lowers_the_loss(weights: LossWeights):
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    context, kinds = RoutingContext(), torch.arange(64) % 2 if weights.localized else None

    def sums() -> RoutingSums:
        return routing_sums([route(logits, 2)], real(64), kinds, weights.classes)

    def loss() -> float:
        return float(total(sums().values(weights), weights))

    before = loss()
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        with context.bind(BatchInputs(real(64).unsqueeze(0))):
            tapped = router_loss_tap(context, "a")(leaf)
            context.record.gradients = router_gradients(sums(), "a", weights, 1 / 64, kinds)
            (0 * tapped.sum()).backward()
        logits = logits - 10 * leaf.grad
    assert loss() < before - 0.02


def test_outside_a_bind_or_without_losses_gradients_pass_unchanged():
    context, x = RoutingContext(), torch.randn(3, 4, requires_grad=True)
    assert router_loss_tap(context, "layer") is None
    with context.bind(BatchInputs(real(3).unsqueeze(0))):
        tap = router_loss_tap(context, "layer")
        tap(x).square().sum().backward()
        assert torch.equal(x.grad, 2 * x)
        assert not tap(x.detach()).requires_grad  # a frozen router's logits


def test_kinds_of_tasks_are_checked():
    config = MoloraConfig(localized_tasks=("b", "c"))
    assert kinds_of_tasks(config, ["a", "b", "c", "d"]) == [1, 0, 0, 1]
    with pytest.raises(
        ConfigError, match=r"must name tasks of the run, got 'c'\. The run's tasks are: a, b\."
    ):
        kinds_of_tasks(config, ["a", "b"])
    with pytest.raises(ConfigError, match="leave others"):
        kinds_of_tasks(config, ["b", "c"])


def test_which_losses_need_statistics():
    assert not LossWeights(z=1, entropy=1).needs_statistics
    assert all(LossWeights(**{name: 1}).needs_statistics for name in ("balance", "divergence", "localized"))
    named = {f"{name}_coefficient": 0.1 * i for i, name in enumerate(("balance", "z", "entropy"))}
    assert LossWeights.of(MoloraConfig(**named)).active == ("z", "entropy")
