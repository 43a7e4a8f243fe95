"""The Triton kernels in Triton's interpreter, against the PyTorch path.

Whether Triton interprets is decided when it is imported, and other tests may have done that: the numbers come
from a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_medical.adapters import kernels
from moe_medical.adapters.experts import LoraFactors, apply_topk
from moe_medical.adapters.paths import spread_gate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {  # T, D, F, E, rank, K
    "aligned": (64, 32, 64, 8, 8, 2),
    "ragged": (70, 35, 67, 3, 2, 3),
    "one tile is not enough": (66, 40, 70, 20, 4, 2),
    "one expert a tile": (5, 70, 30, 2, 128, 1),
}
BFLOAT16 = ("ragged", "one tile is not enough")
PARTS = ("hidden", "delta", "grad_hidden", "grad_gate", "grad_A", "grad_B", "grad_x")
WHOLE = ("y", "y's gradient", "x", "A", "B", "weights")


class Case:
    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype):
        T, D, F, E, rank, K = sizes
        generator = torch.Generator().manual_seed(sum(sizes))

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.y, self.x = draw(T, F, dtype=dtype), draw(T, D, dtype=dtype)
        self.A, self.B, self.weights = draw(E, rank, D), draw(E, F, rank), draw(T, K)
        self.hidden, self.grad = draw(T, E * rank, dtype=dtype), draw(T, F, dtype=dtype)
        self.ids = torch.rand(T, E, generator=generator).topk(K).indices
        self.gate = spread_gate(self.weights, self.ids, E)

    def by_kernels(self) -> tuple[Tensor, ...]:
        """Every kernel on inputs of its own."""
        added = self.y.clone()
        kernels.add_delta(added, self.hidden, self.gate, self.B, 1.5)
        of_hidden = kernels.hidden_gradient(self.grad, self.hidden, self.gate, self.B, 1.5)
        return (
            kernels.hidden_units(self.x, self.A),
            added,
            *of_hidden,
            kernels.a_gradient(self.hidden, self.x, self.A),
            kernels.b_gradient(self.grad, self.hidden, self.gate, self.B, 1.5),
            kernels.input_gradient(self.hidden, self.A),
        )

    def by_equations(self) -> tuple[Tensor, ...]:
        """The same in float32, from weights in the compute dtype."""
        A, B = (t.to(self.x.dtype).float() for t in (self.A, self.B))
        x, hidden, grad = (t.float() for t in (self.x, self.hidden, self.grad))
        experts, rank = len(A), A.shape[1]
        gates, flat_A = self.gate.repeat_interleave(rank, dim=1), A.flatten(0, 1)
        flat_B = B.permute(1, 0, 2).flatten(1)
        gated, grad_gated = 1.5 * gates * hidden, 1.5 * grad @ flat_B
        return (
            x @ flat_A.t(),
            self.y.float() + gated @ flat_B.t(),
            gates * grad_gated,
            (grad_gated * hidden).unflatten(1, (experts, rank)).sum(-1),
            (hidden.t() @ x).view(A.shape),
            (grad.t() @ gated).unflatten(1, (experts, rank)).permute(1, 0, 2),
            hidden @ flat_A,
        )

    def run(self, path: str, dropout: float, laid_out: bool = False) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        leaves = [t.clone().requires_grad_() for t in (self.y, self.x, self.A, self.B, self.weights)]
        y, x, A, B, weights = leaves
        if laid_out:  # as `model.lay_out_for_answers` does
            B.data = B.data.transpose(1, 2).contiguous().transpose(1, 2)
        factors = LoraFactors(A, B, 1.5, dropout)
        result = apply_topk(y[None] * 1, x[None], factors, self.ids, weights, path=path, overwrite=True)
        (result[0] * self.grad).sum().backward()
        return (result[0].detach(), *(leaf.grad for leaf in leaves))


def apart(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def measure() -> dict[str, dict[str, float]]:
    """By dtype, sizes and dropout: how far each result is from the oracle's."""
    errors = {}
    for name, dtype in DTYPES.items():
        for sizes in SIZES if name == "float32" else BFLOAT16:
            case = Case(SIZES[sizes], dtype)
            parts = zip(PARTS, case.by_kernels(), case.by_equations(), strict=True)
            errors[f"{name}, {sizes}, kernels"] = {part: apart(*pair) for part, *pair in parts}
            for dropout in (0.0, 0.3) if sizes == "ragged" else (0.0,):
                pairs = zip(WHOLE, case.run("triton", dropout), case.run("concat", dropout), strict=True)
                errors[f"{name}, {sizes}, dropout {dropout}"] = {
                    whole: apart(*pair) for whole, *pair in pairs
                }
            pairs = zip(WHOLE, case.run("triton", 0.0, laid_out=True), case.run("concat", 0.0), strict=True)
            errors[f"{name}, {sizes}, laid out for answers"] = {whole: apart(*pair) for whole, *pair in pairs}
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    pytest.importorskip("triton")
    told = tmp_path_factory.mktemp("kernels") / "errors.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, str(told)], env=environment, check=True, timeout=300)
    return json.loads(told.read_text())


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_kernels_are_exact(errors: dict[str, dict[str, float]], sizes: str):
    of_sizes = {case: parts for case, parts in errors.items() if case.startswith(f"float32, {sizes},")}
    assert len(of_sizes) == (4 if sizes == "ragged" else 3)
    wrong = {(case, part): e for case, parts in of_sizes.items() for part, e in parts.items() if not e < 2e-6}
    assert wrong == {}


@pytest.mark.parametrize("sizes", BFLOAT16)
def test_bfloat16_kernels_are_right_to_its_rounding(errors: dict[str, dict[str, float]], sizes: str):
    """The interpreter cuts off where a device rounds: three roundings of 2^-8, twice as large."""
    of_sizes = {case: parts for case, parts in errors.items() if case.startswith(f"bfloat16, {sizes},")}
    assert len(of_sizes) == (4 if sizes == "ragged" else 3)
    wrong = {
        (case, part): e for case, parts in of_sizes.items() for part, e in parts.items() if not e < 0.025
    }
    assert wrong == {}


def test_available_only_where_kernels_can_run(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available("cpu", 8)
    assert [rank for rank in (1, 2, 6, 8, 12, 16, 128, 256) if kernels.available("cuda", rank)] == [
        1,
        2,
        8,
        16,
        128,
    ]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.available("cpu", 8)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure()))
