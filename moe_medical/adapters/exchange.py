"""What a routed layer needs when its experts are spread over ranks, without knowing how ranks talk.

Two strategies with the same numbers, both implemented in `distributed/exchange.py`:

    WeightExchange   experts to the tokens    forward   gather A, B -> all experts -> this rank's tokens
                                              backward  gather again, or keep; reduce gradients to the owners
    TokenExchange    tokens to the experts    forward   dispatch -> this rank's experts on all ranks' tokens
                                                        -> combine
                                              backward  the same way back, by autograd

Every call is collective: all ranks of the expert group make it, in the same order, also with no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ExpertShard:
    """Which of a layer's experts this rank holds: part `index` of `count` equal parts."""

    index: int = 0
    count: int = 1

    def slice(self, num_experts: int) -> slice:
        """This rank's range of E experts."""
        size = num_experts // self.count
        return slice(self.index * size, (self.index + 1) * size)


class PendingGradients(Protocol):
    """Summed gradients that are still on their way."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's experts, (e, rank, D) and (e, F, rank)."""


class WeightExchange(Protocol):
    """The experts of one layer from all ranks, and their gradients back. Collective in both passes."""

    keep: bool
    """Whether gathered weights are kept for backward rather than gathered again."""

    def gather(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's (e, rank, D) and (e, F, rank) -> all (E, rank, D) and (E, F, rank)."""

    def reduce(self, grad_A: Tensor, grad_B: Tensor) -> PendingGradients:
        """Start to sum float32 gradients of all E experts over the ranks."""


class Dispatched(Protocol):
    """Tokens of all ranks that chose experts of this one."""

    @property
    def x_RD(self) -> Tensor:
        """Inputs of the layer, R received tokens."""

    @property
    def gate_Re(self) -> Tensor:
        """Gates of this rank's experts, 0 where not chosen."""

    def combine(self, y_TF: Tensor, delta_RF: Tensor) -> Tensor:
        """Send each delta back to where its token came from and add it there. Collective."""


class TokenExchange(Protocol):
    """Sends the tokens of layers that share an input to their experts, once for all of these layers."""

    def dispatch(self, layer_name: str, x: Tensor) -> Dispatched:
        """Tokens for this rank's experts of the layer. Collective.

        Args:
            layer_name: One of the layers that share the input.
            x: Their input (..., D), the same memory for each of them.
        """
