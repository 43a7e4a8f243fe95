"""One layer against independent references: PEFT, a loop over tokens, and plain arithmetic."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.exchange import ExpertShard
from moe_medical.adapters.layer import AdaptedLinear, LoraLinear, MoloraLinear, Target
from moe_medical.adapters.routing import BatchInputs
from moe_medical.config.adapters import MoloraConfig

D, F = 12, 20
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def config(**changes: object) -> MoloraConfig:
    return MoloraConfig(**{"num_experts": 4, "top_k": 2, "rank": 3, "alpha": 6.0, "dropout": 0.0, **changes})


def molora(
    settings: MoloraConfig,
    base: nn.Module | None = None,
    name: str = "mlp",
    shard: ExpertShard | None = None,
) -> MoloraLinear:
    torch.manual_seed(0)
    return randomise_B(MoloraLinear(Target(base or nn.Linear(D, F), settings, name, seed=1), shard))


def randomise_B(layer: AdaptedLinear) -> AdaptedLinear:
    generator = torch.Generator().manual_seed(2)
    layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return layer


def tokens(*shape: int, features: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, features, generator=torch.Generator().manual_seed(3))
    return x.to(dtype).requires_grad_()


def peft_lora(base: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> PeftLinear:
    rank = A.shape[0]
    lora_config = peft.LoraConfig(r=rank, lora_alpha=rank * scaling, lora_dropout=0.0)
    layer = PeftLinear(copy.deepcopy(base), "default", lora_config, r=rank, lora_alpha=rank * scaling)
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    return layer


def weighted_sum(y: Tensor) -> Tensor:
    """A loss whose gradient differs in every element."""
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()


def gradients(layer: nn.Module, x: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(weighted_sum(y), (x, *wanted)))


def same(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, **CLOSE)


def test_one_expert_is_peft_lora():
    layer, x = molora(config(num_experts=1, top_k=1)), tokens(2, 5)
    peft_layer = peft_lora(layer.base, layer.lora_A[0], layer.lora_B[0], layer.scaling)
    reference = gradients(
        peft_layer, x, peft_layer.lora_A["default"].weight, peft_layer.lora_B["default"].weight
    )
    same(gradients(layer, x, layer.lora_A, layer.lora_B), reference)
    plain = LoraLinear(Target(layer.base, config(), "mlp", seed=1))
    plain.lora_A.data.copy_(layer.lora_A[0])
    plain.lora_B.data.copy_(layer.lora_B[0])
    same(gradients(plain, x, plain.lora_A, plain.lora_B), reference)


def test_fixed_gate_is_peft_lora_of_rank_e_times_r_with_scaled_columns():
    layer, x = molora(config(num_experts=3, top_k=3)), tokens(2, 5)
    layer.router.weight.data.zero_()
    layer.router.bias.data.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    gate = torch.tensor([0.5, 0.3, 0.2])
    A = layer.lora_A.detach().reshape(9, D)
    B = torch.cat([g * layer.lora_B[i].detach() for i, g in enumerate(gate)], dim=1)
    peft_layer = peft_lora(layer.base, A, B, layer.scaling)
    lora_A, lora_B = peft_layer.lora_A["default"].weight, peft_layer.lora_B["default"].weight
    y, grad_x, grad_A, grad_B = gradients(peft_layer, x, lora_A, lora_B)
    grad_B = (grad_B.view(F, 3, 3) * gate.view(1, 3, 1)).movedim(1, 0)
    same(gradients(layer, x, layer.lora_A, layer.lora_B), (y, grad_x, grad_A.view(3, 3, D), grad_B))


def test_uniform_logits_over_all_experts_give_the_mean():
    layer, x = molora(config(top_k=4)), tokens(6)
    layer.router.weight.data.zero_()
    layer.router.bias.data.fill_(7.0)
    deltas = torch.stack([x @ A.t() @ B.t() for A, B in zip(layer.lora_A, layer.lora_B, strict=True)])
    torch.testing.assert_close(layer(x), layer.base(x) + layer.scaling * deltas.mean(0), **CLOSE)


def naive(layer: MoloraLinear, x: Tensor) -> Tensor:
    """MING-MOE's equation, token by token and expert by expert."""
    rows = []
    for token in x.reshape(-1, layer.in_features):
        z = layer.router.weight @ token + layer.router.bias
        chosen = z.detach().sort(descending=True).indices[: layer.router.choice.top_k]
        y = layer.base(token)
        for i in chosen:
            g = z[i].exp() / z[chosen].exp().sum()
            y = y + layer.scaling * g * (layer.lora_B[i] @ (layer.lora_A[i] @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], layer.out_features)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_concat_path_equals_a_loop_over_tokens(data: st.DataObject):
    experts = data.draw(st.integers(1, 6), label="E")
    top_k = data.draw(st.integers(1, experts), label="K")
    rank, rows = data.draw(st.integers(1, 4), label="rank"), data.draw(st.integers(1, 3), label="B")
    in_features, out_features = (
        data.draw(st.integers(1, 9), label="D"),
        data.draw(st.integers(1, 9), label="F"),
    )
    layer = molora(config(num_experts=experts, top_k=top_k, rank=rank), nn.Linear(in_features, out_features))
    x = tokens(rows, 3, features=in_features)
    wanted = (layer.lora_A, layer.lora_B, layer.router.weight, layer.router.bias)
    reference = naive(layer, x)
    expected = torch.autograd.grad(weighted_sum(reference), (x, *wanted))
    for ours, theirs in zip(gradients(layer, x, *wanted), (reference.detach(), *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_written_out_gradient():
    layer, x = molora(config()).double(), tokens(4).detach().double().requires_grad_()
    gate = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    from moe_medical.adapters.experts import LoraFactors, apply_lora

    def with_dropout(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        y, x, A, B, gate = inputs
        return apply_lora(y, x, LoraFactors(A, B, scaling=2.0, dropout=0.3), gate)

    y = layer.base(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(with_dropout, (y, x, layer.lora_A, layer.lora_B, gate))


def test_conv1d_base():
    base = Conv1D(F, D)
    layer, x = molora(config(), base), tokens(2, 5)
    assert (layer.in_features, layer.out_features) == (D, F)
    torch.testing.assert_close(layer(x), naive(layer, x), **CLOSE)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"wte: an adapter needs nn.Linear or Conv1D, got Embedding"):
        LoraLinear(Target(nn.Embedding(4, 4), config(), "wte", seed=0))


@pytest.mark.parametrize("kind", [LoraLinear, MoloraLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_bit_for_bit(kind: type[AdaptedLinear], dtype: torch.dtype):
    base, x = nn.Linear(D, F).to(dtype), tokens(3, 4, dtype=dtype)
    assert torch.equal(kind(Target(base, config(dropout=0.1), "mlp", seed=0))(x), base(x))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)])
def test_any_leading_shape_and_input_unchanged(shape: tuple[int, ...]):
    layer, x = molora(config(dropout=0.5)), tokens(*shape)
    before = x.detach().clone()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape, F)
    assert torch.equal(x, before)


def test_bf16_base_computes_in_bf16_and_keeps_float32_adapters():
    layer, x = molora(config(), nn.Linear(D, F).bfloat16()), tokens(5, dtype=torch.bfloat16)
    context = layer.context
    with context.bind(BatchInputs(torch.ones(1, 5, dtype=torch.bool))):
        y = layer(x)
        routing = context.record.routings["mlp"]
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.bfloat16
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == routing.probs_TE.dtype == torch.float32
    exact = x.float() @ layer.router.weight.t() + layer.router.bias
    torch.testing.assert_close(routing.logits_TE, exact, **CLOSE)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.adapter_parameters().values())
    wide = molora(config(), nn.Linear(D, F))
    wide.base.load_state_dict({k: v.float() for k, v in layer.base.state_dict().items()})
    torch.testing.assert_close(y.float(), wide(x.float()), rtol=0.03, atol=0.1)


def test_autocast_keeps_the_router_in_float32():
    layer, x = molora(config()), tokens(5)
    with (
        layer.context.bind(BatchInputs(torch.ones(1, 5, dtype=torch.bool))),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = layer(x)
        logits = layer.context.record.routings["mlp"].logits_TE
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(logits, x @ layer.router.weight.t() + layer.router.bias, **CLOSE)
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [LoraLinear, MoloraLinear])
def test_dropout_acts_in_training_only(kind: type[AdaptedLinear]):
    layer = randomise_B(kind(Target(nn.Linear(D, F), config(dropout=0.5), "mlp", seed=0)))
    x = tokens(64)
    evaluated = layer.eval()(x)
    assert torch.equal(evaluated, layer(x))
    layer.train()
    torch.manual_seed(0)
    trained = layer(x)
    assert not torch.allclose(trained, evaluated)
    # Unbiased: the mean over many masks is the evaluation output.
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    assert (mean - evaluated).abs().max() < 0.1 * (evaluated - layer.base(x)).abs().max()


def test_router_sees_the_input_without_dropout():
    layer, x = molora(config(dropout=0.9)).train(), tokens(8)
    with layer.context.bind(BatchInputs(torch.ones(1, 8, dtype=torch.bool))):
        layer(x)
        logits = layer.context.record.routings["mlp"].logits_TE
    torch.testing.assert_close(logits, x @ layer.router.weight.t() + layer.router.bias, **CLOSE)


def test_initial_values_depend_on_seed_and_name_only():
    def values(name: str, seed: int) -> list[Tensor]:
        torch.rand(seed + 1)  # the global generator must not matter
        layer = MoloraLinear(Target(nn.Linear(D, F), config(), name, seed))
        return [p.detach() for p in (layer.lora_A, layer.router.weight, layer.router.bias)]

    first = values("layers.0.mlp", 5)
    assert all(torch.equal(a, b) for a, b in zip(first, values("layers.0.mlp", 5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, values("layers.1.mlp", 5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, values("layers.0.mlp", 6), strict=True))
    assert first[0].abs().max() <= D**-0.5 < 1.1 * first[0].abs().max()


def test_only_a_byte_mask_and_the_hidden_units_are_kept_for_backward():
    """Beside the shared input: peers keep a float mask and the dropped input, a dozen times as much."""
    layer, x = molora(config(dropout=0.1), nn.Linear(64, 64)).train(), tokens(100, features=64)
    weights = {p.data_ptr() for p in (*layer.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    extra = sum(size for pointer, size in kept.items() if pointer not in weights)
    mask, hidden, router = 100 * 64, 100 * 12 * 4, 100 * (2 * 4 * 4 + 2 * 12)
    assert extra <= mask + hidden + router


class OnePeer:
    """A weight exchange whose other rank is played by the test; counts its calls."""

    def __init__(self, rest_A: Tensor, rest_B: Tensor, keep: bool):
        self.keep, self.gathers, self.rest = keep, 0, (rest_A, rest_B)

    def gather(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        self.gathers += 1
        return torch.cat([lora_A, self.rest[0]]), torch.cat([lora_B, self.rest[1]])

    def reduce(self, grad_A: Tensor, grad_B: Tensor) -> OnePeer:
        self.grads = grad_A[:2], grad_B[:2]
        return self

    def wait(self) -> tuple[Tensor, Tensor]:
        return self.grads


@pytest.mark.parametrize("keep", [False, True])
def test_exchanged_weights_give_the_output_and_gradients_of_the_whole_layer(keep: bool):
    whole, x = molora(config()), tokens(5)
    whole(x).square().sum().backward()
    part = molora(config())
    exchange = OnePeer(part.lora_A.detach()[2:], part.lora_B.detach()[2:], keep)
    part.lora_A, part.lora_B = (nn.Parameter(p.detach()[:2]) for p in (part.lora_A, part.lora_B))
    part.weight_exchange = exchange
    y = part(x)
    assert torch.equal(y, whole(x))
    y.square().sum().backward()
    assert exchange.gathers == (1 if keep else 2)
    for name, parameter in part.adapter_parameters().items():
        own = slice(0, 2) if name.startswith("lora") else slice(None)
        assert torch.equal(parameter.grad, whole.adapter_parameters()[name].grad[own])


def test_a_shard_starts_from_what_its_experts_are_in_the_whole_layer():
    whole = molora(config())
    halves = [molora(config(), shard=ExpertShard(i, 2)) for i in range(2)]
    assert torch.equal(torch.cat([half.lora_A for half in halves]), whole.lora_A)
    assert torch.equal(halves[1].router.weight, whole.router.weight)
    assert [len(half.lora_B) for half in halves] == [2, 2]


def test_nothing_is_recorded_outside_a_bind():
    layer = molora(config())
    layer(tokens(3))
    assert layer.context.record.routings == {}
