"""What a path is: one way to compute the weighted sum of a layer's low-rank experts, and its gradient.

    y_t += scale * sum_i gate_ti B_i A_i x_t

`concat.py`, `grouped.py` and `kernels.py` are the paths. Each has the same two functions, `add` and
`gradients`, and nothing but algebra; `experts.py` chooses one and has all that they share: autograd, dropout,
autocast and the exchange of expert parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class GatedLora(NamedTuple):
    """What every path gets: low-rank experts, and how much of each a token takes.

    No dataclass: one is made in each forward, and a token's answer is short of microseconds.
    """

    lora_A: Tensor
    """(E, rank, D), or (rank, D): a plain LoRA, or one A that all experts share (HydraLoRA)."""
    lora_B: Tensor
    """(E, F, rank), or (F, rank): a plain LoRA."""
    gate: Tensor | None
    """(T, E); or (T, K) where the experts of each token are given; None for a plain LoRA."""
    scale: float
    """alpha / rank, divided by the share of features that dropout leaves."""
    dtype: torch.dtype
    """To compute in: that of the base layer's output."""

    @property
    def num_experts(self) -> int:
        """E; 1 for a plain LoRA."""
        return len(self.lora_B) if self.lora_B.dim() == 3 else 1

    @property
    def shares_A(self) -> bool:
        """Whether all experts have one A."""
        return self.lora_A.dim() < self.lora_B.dim()


class Wanted(NamedTuple):
    """Which gradients anybody asked for."""

    factors: bool
    """A's and B's."""
    gate: bool
    x_shape: torch.Size | None
    """Shape of the layer's input (..., D), None where its gradient is not wanted."""


Gradients = Iterator[tuple[Tensor | None, Tensor | None]]
"""First those of A and B in their shapes, then those of the gate, in its shape and dtype, and of x."""


class Path(Protocol):
    """One way to compute the experts; a module is a path."""

    def add(
        self, y_TF: Tensor, x_TD: Tensor, lora: GatedLora, ids_TK: Tensor | None, keep: bool
    ) -> tuple[Tensor, ...]:
        """Add the delta into y_TF.

        Args:
            y_TF: Contiguous; changed in place.
            x_TD: Of `lora.dtype`.
            lora: With gates of all experts, or of those that are given.
            ids_TK: Experts of each token, int64; None where the gate is that of all of them.
            keep: Whether backward will come.

        Returns:
            What `gradients` needs beside x and `lora`; nothing unless it is to `keep`.
        """

    def gradients(
        self, grad_TF: Tensor, x_TD: Tensor | None, lora: GatedLora, kept: Sequence[Tensor], wanted: Wanted
    ) -> Gradients:
        """Of one backward pass, in two steps: A's and B's can travel while the others are computed.

        Args:
            grad_TF: Of y, in its dtype.
            x_TD: As `add` got it; None where A's and B's gradients are not wanted.
            lora: The same.
            kept: What `add` returned.
            wanted: What is not wanted is None.
        """


def spread_gate(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E): each expert's gate, 0 where it was not chosen."""
    zeros_TE = weights_TK.new_zeros(len(weights_TK), num_experts)
    return zeros_TE.scatter(-1, ids_TK, weights_TK)
