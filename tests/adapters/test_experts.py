"""Applied experts against plain autograd, into the base output or beside it; what is kept; by which path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.experts import (
    MEASURED,
    ExpertPath,
    ExpertShape,
    LoraFactors,
    apply_lora,
    apply_topk,
    choose_path,
)
from moe_medical.errors import ConfigError

D, F, E, RANK, T, K = 6, 10, 4, 3, 5, 2
SHAPES = {
    "plain": ((RANK, D), (F, RANK), False),
    "stacked": ((E, RANK, D), (E, F, RANK), False),
    "gated": ((E, RANK, D), (E, F, RANK), True),
    "shared_a": ((RANK, D), (E, F, RANK), True),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def of_kind(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    shape_A, shape_B, gated = SHAPES[kind]
    return draw(*shape_A), draw(*shape_B), draw(T, E) if gated else None


def by_expert(x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None) -> Tensor:
    """sum_i g_i B_i A_i x, expert by expert."""
    all_B = B if B.dim() == 3 else B[None]
    gate = torch.ones(len(x), len(all_B), dtype=x.dtype) if gate is None else gate
    all_A = A if A.dim() == 3 else A.expand(len(all_B), *A.shape)
    return sum(g[:, None] * (x @ a.t() @ b.t()) for g, a, b in zip(gate.t(), all_A, all_B, strict=True))


def routing() -> tuple[Tensor, Tensor]:
    ids_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(5)).topk(K).indices
    return ids_TK, draw(T, K)


def dense(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return torch.zeros(T, E, dtype=weights_TK.dtype).scatter(-1, ids_TK, weights_TK)


@pytest.mark.parametrize("kind", SHAPES)
def test_equals_a_loop_over_experts_and_its_gradient_is_right(kind: str):
    y, x, (A, B, gate) = draw(T, F), draw(T, D), of_kind(kind)
    torch.testing.assert_close(
        apply_lora(y, x, LoraFactors(A, B, 2.0), gate), y + 2 * by_expert(x, A, B, gate)
    )

    def of(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        y, x, A, B, *gate = inputs
        return apply_lora(y, x, LoraFactors(A, B, 2.0, 0.3), *gate)

    assert torch.autograd.gradcheck(of, tuple(t for t in (y, x, A, B, gate) if t is not None))


@pytest.mark.parametrize("kind", ["gated", "shared_a"])
def test_chosen_experts_equal_the_dense_gate(kind: str):
    y, x, (A, B, _), (ids, weights) = draw(T, F), draw(T, D), of_kind(kind), routing()
    expected = apply_lora(y, x, LoraFactors(A, B, 2.0), dense(ids, weights))
    assert torch.equal(apply_topk(y, x, LoraFactors(A, B, 2.0), ids, weights), expected)

    def of(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        y, x, A, B, weights = inputs
        return apply_topk(y, x, LoraFactors(A, B, 2.0, 0.3), ids, weights)

    assert torch.autograd.gradcheck(of, (y, x, A, B, weights))


class Alias(torch.autograd.Function):
    """What ZeRO-3's hooks return: another tensor over the same memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, view: bool) -> Tensor:
        return y.view_as(y) if view else y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_through_an_overwritten_base_output(dropout: float, alias: bool):
    x, weight, (A, B, gate) = draw(1, T, D), draw(F, D, seed=1), of_kind("gated")

    def of(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
        torch.manual_seed(1)
        y = Alias.apply(x @ weight.t(), False) if alias else x @ weight.t()
        memory = y.data_ptr()
        y = apply_lora(y, x, LoraFactors(A, B, 2.0, dropout), gate, overwrite=True)
        assert y.data_ptr() == memory
        return y * y

    assert torch.autograd.gradcheck(of, (x, weight, A, B, gate))


def outputs_that_must_stay() -> dict[str, Any]:
    linear, conv = nn.Linear(D, F).double().requires_grad_(False), Conv1D(F, D).double().requires_grad_(False)
    hooked = nn.Linear(D, F, bias=False).double()
    hooked.register_full_backward_hook(lambda *_: None)
    return {
        "leaf": lambda x: draw(1, T, F, seed=3),
        "view of a linear with bias": linear,
        "view of Conv1D": conv,
        "view from a function": lambda x: Alias.apply(linear(x), True),
        "backward hook": hooked,
        "expanded": lambda x: x.new_zeros(()).expand(1, T, F),
        "transposed": lambda x: draw(1, F, T, seed=3).transpose(1, 2) * 1,
        "parameter": lambda x: nn.Parameter(draw(1, T, F, seed=3).detach()),
    }


@pytest.mark.parametrize("case", outputs_that_must_stay())
def test_outputs_that_autograd_guards_stay_as_they_are(case: str):
    x, (A, B, gate), base = draw(1, T, D), of_kind("gated"), outputs_that_must_stay()[case]
    y = base(x)
    before = y.detach().clone()
    result = apply_lora(y, x, LoraFactors(A, B, 2.0), gate, overwrite=True)
    assert torch.equal(y, before)
    torch.testing.assert_close(result, (before + 2 * by_expert(x[0], A, B, gate)).view(1, T, F))
    ours = torch.autograd.grad(result.square().sum(), (x, A, B, gate), retain_graph=True)
    plain = base(x) + 2 * by_expert(x[0], A, B, gate)
    for got, expected in zip(ours, torch.autograd.grad(plain.square().sum(), (x, A, B, gate)), strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_is_overwritten_unasked_and_a_saved_output_is_noticed():
    x, (A, B, gate) = draw(T, D), of_kind("gated")
    y = x @ draw(D, F)
    before = y.detach().clone()
    apply_lora(y, x, LoraFactors(A, B, 2.0), gate)
    assert torch.equal(y, before)
    result = apply_lora(y.sigmoid(), x, LoraFactors(A, B, 2.0), gate, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_without_gradients_any_owned_output_is_overwritten():
    x, (A, B, gate), base = draw(1, T, D), of_kind("gated"), Conv1D(F, D).double()
    with torch.no_grad():
        y = base(x)
        expected = y + 2 * by_expert(x[0], A, B, gate)
        assert apply_lora(y, x, LoraFactors(A, B, 2.0), gate, overwrite=True) is y
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool):
    x, weight, (A, B, _), (ids, weights) = draw(1, T, D), draw(F, D, seed=1), of_kind("gated"), routing()

    def block(x: Tensor) -> Tensor:
        y = x @ weight.t()
        return apply_topk(y, x, LoraFactors(A, B, 2.0, 0.5), ids, weights, overwrite=True).tanh()

    def gradients(through: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        for leaf in (x, weight, A, B, weights):
            leaf.grad = None
        y = through(x)
        y.square().sum().backward()
        return (y.detach(), *(leaf.grad for leaf in (x, weight, A, B, weights)))

    plain = gradients(block)
    again = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiled_numbers_are_the_same_and_dropout_acts():
    y, x, (A, B, _) = draw(T, F), draw(T, D), of_kind("plain")

    def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float, overwrite: bool = False) -> Tensor:
        return apply_lora(y, x, LoraFactors(A, B, 2.0, dropout), overwrite=overwrite)

    compiled = torch.compile(add, backend="aot_eager", fullgraph=True)

    def gradients(through: Any, dropout: float) -> tuple[Tensor, ...]:
        result = through(y * 1, x, A, B, dropout, overwrite=True)
        return (result, *torch.autograd.grad(result.square().sum(), (y, x, A, B)))

    for got, expected in zip(gradients(compiled, 0.0), gradients(add, 0.0), strict=True):
        torch.testing.assert_close(got, expected)
    result, *_, grad_B = gradients(compiled, 0.5)
    assert not torch.allclose(result, apply_lora(y, x, LoraFactors(A, B, 2.0)))
    delta = (result - y).detach()  # the same mask in both passes: B's gradient fits the units that were used
    torch.testing.assert_close((2 * result.detach() * delta).sum(), (grad_B * B).sum().detach())


def test_autocast_computes_in_the_dtype_of_the_output():
    base, x = nn.Linear(D, F, bias=False), draw(1, T, D).detach().float().requires_grad_()
    A, B, gate = (t.detach().float().requires_grad_() for t in of_kind("gated"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = base(x)
        result = apply_lora(y, x, LoraFactors(A, B, 2.0), gate, overwrite=True)
    assert result is y
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, A, B, gate))
    torch.testing.assert_close(
        result.float(), base(x) + 2 * by_expert(x[0], A, B, gate), rtol=0.05, atol=0.3, check_dtype=False
    )


@pytest.mark.parametrize("kind", ["gated", "shared_a"])
def test_kept_for_backward_are_the_input_the_chosen_units_and_the_routing(kind: str):
    x, (A, B, _), (ids, weights) = draw(1, T, D), of_kind(kind), routing()
    y, kept = draw(1, T, F) * 1, {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = apply_topk(y, x, LoraFactors(A, B, 2.0, 0.3), ids, weights, overwrite=True)
    assert result.requires_grad
    shared = {t.data_ptr() for t in (x, A, B, ids, weights)}
    assert shared <= kept.keys()
    units = T * (RANK if kind == "shared_a" else K * RANK) * 8
    assert sum(size for pointer, size in kept.items() if pointer not in shared) == units


def test_frozen_experts_and_gates_get_no_gradient():
    y, x, (A, B, gate) = draw(T, F), draw(T, D), of_kind("gated")
    frozen = A, B, gate = tuple(t.detach() for t in (A, B, gate))
    apply_lora(y, x, LoraFactors(A, B, 2.0), gate).sum().backward()
    expected = torch.autograd.grad((2 * by_expert(x, A, B, gate)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert all(t.grad is None for t in frozen)


def test_experts_of_a_shard_need_an_exchange():
    y, x, (A, B, gate) = draw(T, F), draw(T, D), of_kind("gated")
    with pytest.raises(AssertionError, match="needs an exchange"):
        apply_lora(y, x, LoraFactors(A[:2], B[:2], 2.0), gate)


# Which path


def chosen(path: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: Any) -> str:
    of = {"num_experts": 8, "rank": 8, "top_k": 2, "in_features": 768, "out_features": 2048, **sizes}
    return choose_path(path, ExpertShape(**of), device, dtype)


def test_auto_takes_what_is_faster_and_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen() == "concat"
    assert chosen(num_experts=64, rank=16) == "grouped"
    assert chosen(num_experts=64, rank=16, dtype=torch.bfloat16) == "grouped"
    assert chosen(num_experts=64, rank=16, top_k=64) == "concat"  # every expert is used
    assert chosen(num_experts=64, rank=18) == "concat"  # strides are no multiples of 16 bytes
    assert chosen(num_experts=64, rank=4, dtype=torch.bfloat16, in_features=64, out_features=64) == "concat"
    assert chosen(num_experts=64, rank=16, shared_a=True) == "concat"


@pytest.mark.parametrize(
    ("path", "changes", "told"),
    [
        ("triton", {}, "must not be `triton` without a GPU"),
        ("triton", {"device": "cuda", "rank": 12}, "must not be `triton` without .* rank 2"),
        ("grouped", {"device": "cuda"}, "must not be `grouped` on a GPU below bfloat16"),
        ("grouped", {"rank": 6}, r"multiples of 4 in torch.float32, got \(6, 768, 2048\)"),
    ],
)
def test_a_path_that_does_not_fit_is_refused(
    path: str, changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=told):
        chosen(path, **changes)


def test_experts_that_share_a_go_the_concat_path_alone():
    with pytest.raises(ConfigError, match="must be `concat` or `auto` where experts share A"):
        chosen("grouped", in_features=64, out_features=64, shared_a=True)


def test_grouped_is_taken_nowhere_where_it_was_measured_to_be_slower():
    for in_features, out_features, tokens, top_k, times in MEASURED:
        for (num_experts, rank), faster in times.items():
            sizes = {"num_experts": num_experts, "rank": rank, "top_k": top_k}
            path = chosen(in_features=in_features, out_features=out_features, **sizes)
            assert path == "concat" or faster > 1, (in_features, out_features, tokens, top_k, sizes)
            assert path == "grouped" or faster < 1.5, (in_features, out_features, tokens, top_k, sizes)


def test_the_path_of_a_layer_is_chosen_once_for_a_device_and_a_dtype(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def choose(*args: Any) -> str:
        asked.append(args)
        return choose_path(*args)

    monkeypatch.setattr("moe_medical.adapters.experts.choose_path", choose)
    path = ExpertPath("auto", ExpertShape(8, 4, 2, 20, 20))
    wide = [path.on("cpu", torch.float32) for _ in range(3)]
    narrow = [path.on("cpu", torch.bfloat16) for _ in range(3)]  # 4 * 2 bytes are no multiple of 16
    assert (wide, narrow) == (["grouped"] * 3, ["concat"] * 3)
    assert len(asked) == 2
