"""The two exchanges of expert parallelism: weights to tokens, or tokens to experts. Same numbers.

`GatheredWeights`: one all-gather of A and B per layer just before they are used, again in backward (or kept),
and one reduce-scatter of their float32 gradients. `GatherAhead` learns the order in which the layers ask
during the first micro-batch, and from then on starts the next layer's gather while this one computes.

`SharedDispatch`: dropless all-to-all with uneven splits, no capacity and no (S, E, C) tensor. A token travels
once to each *rank* that holds an expert it chose, whatever the number of these experts, with its gates; the
layers that read the same input (gate and up, or q, k and v) share that journey. Padding does not travel.
Each layer sends its deltas back. Every collective runs in each forward on every rank, also with no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_medical.adapters.experts import dense_gate
from moe_medical.adapters.layer import MoloraLinear
from moe_medical.adapters.routing import RoutingContext
from moe_medical.distributed.expert_group import ExpertGroup

# Weights to tokens


@dataclass(frozen=True)
class _Gathering:
    """An all-gather on its way; `flat` is valid after `work.wait()`."""

    owner: GatheredWeights
    flat: Tensor
    work: dist.Work


class GatherAhead:
    """Starts gathers one layer early, in the order that an earlier pass of the same name has shown.

    All ranks run the same layers in the same order, so they guess alike; a wrong guess costs its bytes only.
    """

    def __init__(self, context: RoutingContext) -> None:
        self._context = context
        self._orders: dict[str, list[GatheredWeights]] = {}
        self._pass = 0
        """Number of the pass that is followed."""
        self._position = 0
        self._next: _Gathering | None = None

    def take(self, owner: GatheredWeights) -> _Gathering | None:
        """The gather that was started for this request, if there is one."""
        if self._context.current.number != self._pass:  # another micro-batch
            self._pass = self._context.current.number
            self._position = 0
            self._next = None
        ready = self._next
        self._next = None
        return ready if ready is not None and ready.owner is owner else None

    def go_on(self, owner: GatheredWeights) -> None:
        """Note what was asked for, and start what was asked for after it last time."""
        if not self._pass:  # nothing is bound
            return
        order = self._orders.setdefault(self._context.current.name, [])
        if self._position >= len(order) or order[self._position] is not owner:
            order[self._position :] = [owner]
        self._position += 1
        if self._position < len(order):
            self._next = order[self._position].start()


class GatheredWeights:
    """The `WeightExchange` of one layer.

    Args:
        layer: Its lora_A and lora_B hold this rank's experts.
        group: Ranks that hold the others.
        dtype: Type in which weights travel, that of the base model.
        keep: Keep gathered weights for backward.
        ahead: Shared by all layers; None turns overlap off.
    """

    def __init__(
        self,
        layer: MoloraLinear,
        group: ExpertGroup,
        dtype: torch.dtype,
        keep: bool,
        ahead: GatherAhead | None,
    ) -> None:
        self.keep = keep
        self._layer = layer
        self._group = group
        self._dtype = dtype
        self._ahead = ahead

    def gather(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightExchange`; in the given dtype."""
        ready = self._ahead.take(self) if self._ahead else None
        gathering = ready or self._start(lora_A, lora_B)
        gathering.work.wait()
        if self._ahead:
            self._ahead.go_on(self)
        return self._unpack(gathering.flat.view(self._group.size, -1), lora_A, lora_B)

    def start(self) -> _Gathering:
        """Begin to gather the layer's present weights."""
        return self._start(self._layer.lora_A, self._layer.lora_B)

    def reduce(self, grad_A: Tensor, grad_B: Tensor) -> _Reduction:
        """See `WeightExchange`."""
        parts = [g.reshape(self._group.size, -1) for g in (grad_A, grad_B)]
        flat = torch.cat(parts, dim=1)
        own = flat.new_empty(flat.shape[1])
        work = dist.reduce_scatter_single(own, flat.view(-1), group=self._group.peers, async_op=True)
        shapes = [(len(g) // self._group.size, *g.shape[1:]) for g in (grad_A, grad_B)]
        return _Reduction(own, flat, work, shapes)

    @torch.no_grad()
    def _start(self, lora_A: Tensor, lora_B: Tensor) -> _Gathering:
        mine = torch.cat([lora_A.reshape(-1).to(self._dtype), lora_B.reshape(-1).to(self._dtype)])
        flat = mine.new_empty(self._group.size * len(mine))
        work = dist.all_gather_single(flat, mine, group=self._group.peers, async_op=True)
        return _Gathering(self, flat, work)

    def _unpack(self, flat: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        all_A, all_B = flat.split([lora_A.numel(), lora_B.numel()], dim=1)
        return all_A.reshape(-1, *lora_A.shape[1:]), all_B.reshape(-1, *lora_B.shape[1:])


@dataclass(frozen=True)
class _Reduction:
    """A reduce-scatter on its way; keeps its input alive until it is done."""

    own: Tensor
    flat: Tensor
    work: dist.Work
    shapes: list[tuple[int, ...]]

    def wait(self) -> tuple[Tensor, Tensor]:
        self.work.wait()
        shape_A, shape_B = self.shapes
        grad_A, grad_B = self.own.split([torch.Size(shape_A).numel(), torch.Size(shape_B).numel()])
        return grad_A.view(shape_A), grad_B.view(shape_B)


# Tokens to experts


class SharedDispatch:
    """The `TokenExchange` of layers that read the same input.

    Args:
        layers: Name -> layer; their inputs are one tensor.
        group: Ranks that hold the experts.
        context: Its mask tells padding.
    """

    def __init__(
        self, layers: Mapping[str, MoloraLinear], group: ExpertGroup, context: RoutingContext
    ) -> None:
        self._layers = dict(layers)
        self._group = group
        self._context = context
        self._journey: _Journey | None = None

    def dispatch(self, layer_name: str, x: Tensor) -> Received:
        """See `TokenExchange`. The first layer to ask sends for all.

        Raises:
            RuntimeError: The layers do not share their input after all.
        """
        if self._journey is None or layer_name not in self._journey.waiting:
            self._journey = self._send(x)
        journey = self._journey
        if not _same(journey.x, x):  # routed twice, its router losses would silently count twice
            raise RuntimeError(f"{layer_name} reads another input than its siblings: use exchange=weights")
        journey.waiting.discard(layer_name)
        if not journey.waiting:
            self._journey = None
        return journey.received(list(self._layers).index(layer_name))

    def _send(self, x: Tensor) -> _Journey:
        x_TD = x.reshape(-1, x.shape[-1])
        gate_PTMe = self._gates(x_TD)
        wanted_PTM = (gate_PTMe != 0).any(-1)
        any_PT = wanted_PTM.any(-1)
        to, back = self._exchange_counts(torch.cat([any_PT.sum(1, keepdim=True), wanted_PTM.sum(1)], dim=1))
        row_N = _where(any_PT, sum(to[0]))  # by peer, then by token
        gate_NMe = gate_PTMe.flatten(0, 1).index_select(0, row_N)
        # By peer, so that no gradient is added twice at once: a GPU would do that in any order.
        tokens = (row_N % len(x_TD)).split(to[0])
        x_ND = torch.cat([x_TD.index_select(0, token_N) for token_N in tokens])
        x_RD = _AllToAll.apply(x_ND, to[0], back[0], self._group)
        gate_RMe = _AllToAll.apply(gate_NMe, to[0], back[0], self._group)
        returning = [_where(wanted_PTM[..., m], sum(rows)) % len(x_TD) for m, rows in enumerate(to[1:])]
        return _Journey(x, x_RD, gate_RMe, returning, to[1:], back[1:], self._group, set(self._layers))

    def _gates(self, x_TD: Tensor) -> Tensor:
        """(peers, T, members, e) float32: gates by the rank that holds the expert; padding has none."""
        gates = [dense_gate(layer.route(x_TD)) for layer in self._layers.values()]
        gate_TMPe = torch.stack(gates, dim=1).unflatten(-1, (self._group.size, -1))
        if self._context.inputs.token_mask_BS is not None:
            gate_TMPe = gate_TMPe * self._context.inputs.token_mask_T.view(-1, 1, 1, 1)
        return gate_TMPe.permute(2, 0, 1, 3)

    def _exchange_counts(self, sent_PC: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to and from each peer, one list for the journey and one for each member's way back."""
        back_PC = torch.empty_like(sent_PC)
        dist.all_to_all_single(back_PC, sent_PC.contiguous(), group=self._group.peers)
        both = torch.stack([sent_PC.t(), back_PC.t()]).tolist()
        return both[0], both[1]


def _where(mask: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` true values, without asking the device how many they are."""
    return torch.nonzero_static(mask.reshape(-1), size=count).squeeze(1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one; ZeRO-3 hands each module its own alias of a shared input."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


@dataclass
class _Journey:
    """One dispatch, until each member has taken what it received."""

    x: Tensor
    x_RD: Tensor
    gate_RMe: Tensor
    returning: Sequence[Tensor]
    """By member: which own tokens its returning rows belong to."""
    to: list[list[int]]
    back: list[list[int]]
    group: ExpertGroup
    waiting: set[str]

    def received(self, member: int) -> Received:
        x_RD = self.x_RD
        gate_Re = self.gate_RMe[:, member]
        if len(self.returning) > 1:  # some rows came for the other members only
            row_R = _where((gate_Re != 0).any(-1), sum(self.back[member]))
            x_RD = x_RD.index_select(0, row_R)
            gate_Re = gate_Re.index_select(0, row_R)
        splits = (self.back[member], self.to[member])
        return Received(x_RD, gate_Re, self.returning[member], *splits, self.group)


@dataclass(frozen=True)
class Received:
    """The `Dispatched` of one layer; see there."""

    x_RD: Tensor
    gate_Re: Tensor
    token_N: Tensor
    """Own token of each returning row, by peer."""
    back: list[int]
    to: list[int]
    group: ExpertGroup

    def combine(self, y_TF: Tensor, delta_RF: Tensor) -> Tensor:
        delta_NF = _AllToAll.apply(delta_RF, self.back, self.to, self.group)
        # By peer, so that a token of several is summed in one order: a recomputed forward must be the same.
        y_TF = y_TF.clone()
        for token_N, delta in zip(self.token_N.split(self.to), delta_NF.split(self.to), strict=True):
            y_TF.index_add_(0, token_N, delta)
        return y_TF


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks that `send` counts, `receive` rows from each; backward is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: ExpertGroup) -> Tensor:
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: ExpertGroup) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group.peers)
    return out
