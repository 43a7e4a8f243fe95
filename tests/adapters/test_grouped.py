"""The grouped path against the concat path, without waiting for the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_medical.adapters.experts import ExpertPath, ExpertShape, LoraFactors, apply_topk

WAITS = ("_local_scalar_dense", "nonzero", "item", "unique", "bincount", "is_nonzero", "equal.default")


class Case:
    """One layer's tensors; expert E - 1 is never chosen."""

    def __init__(self, T: int, D: int, F: int, E: int, rank: int, K: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(T + D + F + E)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.given = (
            draw(1, T, F, dtype=dtype),
            draw(1, T, D, dtype=dtype),
            draw(E, rank, D),
            draw(E, F, rank),
        )
        self.ids = torch.rand(T, E - 1, generator=generator).topk(K).indices
        self.weights = draw(T, K)

    def run(self, path: str, dropout: float = 0.0) -> tuple[Tensor, ...]:
        """Output, then the gradients of y, x, A, B and the weights."""
        torch.manual_seed(7)
        leaves = [t.clone().requires_grad_() for t in (*self.given, self.weights)]
        y, x, A, B, weights = leaves
        y = apply_topk(y, x, LoraFactors(A, B, 2.0, dropout), self.ids, weights, path=path)
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        return (y.detach(), *(leaf.grad for leaf in leaves))


@settings(max_examples=15)
@given(st.data())
def test_equals_the_concat_path(data: st.DataObject):
    experts = data.draw(st.integers(2, 9), label="E")
    sizes = [4 * data.draw(st.integers(1, 5), label=name) for name in ("D", "F", "rank")]
    top_k, tokens = (
        data.draw(st.integers(1, experts - 1), label="K"),
        data.draw(st.integers(1, 30), label="T"),
    )
    case = Case(tokens, sizes[0], sizes[1], experts, sizes[2], top_k)
    dropout = data.draw(st.sampled_from([0.0, 0.4]), label="dropout")
    for got, expected in zip(case.run("grouped", dropout), case.run("concat", dropout), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_base_with_float32_adapters():
    case = Case(40, 16, 24, 6, 8, 2, torch.bfloat16)
    for got, expected in zip(case.run("grouped"), case.run("concat"), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 0.01 * expected.abs().max()


def test_an_expert_without_tokens_gets_a_zero_gradient():
    *_, grad_A, grad_B, _ = Case(20, 8, 12, 5, 4, 2).run("grouped")
    for grad in (grad_A, grad_B):
        assert torch.equal(grad[-1], torch.zeros_like(grad[-1]))
        assert (grad[:-1] != 0).any(dim=(1, 2)).all()


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["grouped", "concat"])
def test_nothing_waits_for_the_host(path: str):
    case = Case(20, 8, 12, 5, 4, 2)
    with Operations() as seen:
        case.run(path, 0.2)
    assert any("_grouped_mm" in name for name in seen.names) == (path == "grouped")
    assert not [name for name in seen.names if any(wait in name for wait in WAITS)]


def test_the_host_would_be_seen_waiting():
    with Operations() as seen:
        torch.ones(3).sum().item()
    assert any(wait in name for name in seen.names for wait in WAITS)


def test_added_into_the_base_output_where_asked():
    case = Case(20, 8, 12, 5, 4, 2)
    y, x, A, B = (t.requires_grad_() for t in case.given)
    base = y * 1
    factors, chosen = LoraFactors(A, B, 2.0), (case.ids, case.weights)
    result = apply_topk(base, x, factors, *chosen, path="grouped", overwrite=True)
    assert result is base
    torch.testing.assert_close(result, apply_topk(y, x, factors, *chosen))
    result.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    kept = apply_topk(y, x, factors, *chosen, path="grouped", overwrite=True)  # a leaf
    assert kept is not y


def test_kept_for_backward_are_no_sorted_inputs_or_outputs():
    tokens, rank, top_k, experts = 50, 4, 2, 5
    case, kept = Case(tokens, 64, 96, experts, rank, top_k), {}
    y, x, A, B = (t.requires_grad_() for t in case.given)

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        factors = LoraFactors(A, B, 2.0, 0.1)
        result = apply_topk(y * 1, x, factors, case.ids, case.weights, path="grouped")
    assert result.requires_grad
    shared = {t.data_ptr() for t in (x, A, B, case.weights)}
    assert shared <= kept.keys()
    copies = tokens * top_k
    extra = sum(size for pointer, size in kept.items() if pointer not in shared)
    assert extra == copies * rank * 4 + 2 * copies * 8 + experts * 4


def of_layer(wanted: str, case: Case) -> str:
    experts, features, rank = case.given[3].shape
    shape = ExpertShape(experts, rank, case.ids.shape[1], case.given[1].shape[-1], features)
    return ExpertPath(wanted, shape).on("cpu", case.given[0].dtype)


@pytest.mark.parametrize("wanted", ["auto", "concat", "grouped"])
def test_a_layer_gets_the_same_numbers_by_any_path(wanted: str):
    case = Case(12, 16, 16, 6, 8, 2)
    for got, expected in zip(case.run(of_layer(wanted, case)), case.run("concat"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_paths_of_a_layer_follow_its_sizes():
    def operations(wanted: str, case: Case) -> set[str]:
        with Operations() as seen:
            case.run(of_layer(wanted, case))
        return {name for name in seen.names if "_grouped_mm" in name}

    assert operations("auto", Case(12, 16, 16, 6, 8, 2))
    assert not operations("concat", Case(12, 16, 16, 6, 8, 2))
    assert not operations("auto", Case(12, 15, 16, 6, 8, 2))
    assert not operations("auto", Case(12, 128, 128, 2, 4, 1))
