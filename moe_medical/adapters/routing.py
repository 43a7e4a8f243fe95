"""What a router has decided, and the context that carries a micro-batch's side inputs to the routers.

    with context.bind(inputs):      BatchInputs in: padding, tasks, samples and prompts
        loss = model(...)           each layer leaves its Routing in `context.record`
        context.record.gradients =  what the router losses want of each layer's backward
        loss.backward()

Decisions: routing is data, which is returned and recorded, never kept in a module. Each `bind` makes one
`ForwardPass` and throws it away whole, so nothing of a micro-batch can reach the next one. The context is a
plain object rather than a context variable: autograd recomputes checkpointed layers in its own threads,
which would not see one.

Not here: expert capacity. No token is ever dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    weights_TK: Tensor
    """Gate of each chosen expert, float32; a dense gate has K = E, and may hold zeros."""
    expert_ids_TK: Tensor
    """Chosen experts, int64; highest gate first unless the gate is dense."""
    logits_TE: Tensor
    """Router logits, float32; the z-loss needs them."""

    @property
    def probs_TE(self) -> Tensor:
        """Softmax of the logits over all experts, made when asked for: most runs have no loss that does."""
        return self.logits_TE.softmax(-1)


class RouterGradient(NamedTuple):
    """What a layer's backward needs to know for the router losses of the global batch; see losses.py."""

    of_probs_CE: Tensor
    """Derivative by the probability of each expert, for each class of tokens."""
    classes_T: Tensor | None
    """Class of each token of the bound micro-batch; None where there is one class only."""
    entropy_weight: float
    """Of log p in the derivative by p."""
    z_weight: float


@dataclass(frozen=True)
class RouterGroup:
    """Layers that share one routing decision; a layer that decides for itself is a group of one."""

    name: str
    """A module's full name, that of what contains the members; empty for the whole model."""
    members: tuple[str, ...]
    """Layers in the order in which they run. The first decides, the others take over its decision."""
    owner: str
    """Layer whose router decides: the first member, or another group's where all depths share one router."""

    @classmethod
    def alone(cls, layer: str) -> RouterGroup:
        """A layer with a router of its own."""
        return cls(layer, (layer,), layer)

    @property
    def decider(self) -> str:
        """The member that calls the router, under whose name the routing is recorded."""
        return self.members[0]


class Sequences(NamedTuple):
    """Which tokens are one sample's, and which of them are its prompt."""

    start_T: Tensor
    """Place of the first token of each token's sample among the T tokens, int64."""
    prompt_T: Tensor
    """True on prompts; a sequence's router sees no more, as an answer is not there when it is wanted."""

    @classmethod
    def of(cls, position_ids_BS: Tensor, prompt_mask_BS: Tensor) -> Sequences:
        """From positions that start at 0 with each sample, and a mask of the prompts' tokens."""
        place_BS = torch.arange(position_ids_BS.numel(), device=position_ids_BS.device).view_as(
            position_ids_BS
        )
        # A row begins a sample whatever its first position says, so that none reaches across rows.
        begins_BS = (position_ids_BS == 0) | (place_BS % place_BS.shape[1] == 0)
        start_BS = torch.where(begins_BS, place_BS, 0).cummax(dim=1).values
        return cls(start_BS.flatten(), prompt_mask_BS.flatten())

    def mean(self, x_TD: Tensor) -> Tensor:
        """(T, D) float32: the mean over the prompt of each token's sample; zeros where it has none."""
        weight_T = self.prompt_T.float()
        # Each sample's sum stands at the place of its first token: T bounds the number of samples, so the
        # host need not wait for the device to count them.
        sums_TD = torch.zeros(x_TD.shape, device=x_TD.device).index_add(
            0, self.start_T, x_TD.float() * weight_T[:, None]
        )
        counts_T = torch.zeros_like(weight_T).index_add(0, self.start_T, weight_T)
        return (sums_TD / counts_T.clamp(min=1)[:, None])[self.start_T]


class SideInputs(NamedTuple):
    """What a router may know of T tokens beside their hidden states."""

    task_ids_T: Tensor | None = None
    """Task of each token; or (T, M), several tasks, -1 where there are fewer; None where not known."""
    sequences: Sequences | None = None
    prompt_logits_TE: Tensor | None = None
    """What the sequence's prompt decided in an earlier pass, for tokens that came after it."""
    scalings_TE: Tensor | None = None
    """Gates that were decided before the layers ran (X-LoRA)."""
    tap: Callable[[Tensor], Tensor] | None = None
    """Applied to the logits before the choice; the router losses enter backward through it."""


@dataclass(frozen=True, eq=False)
class BatchInputs:
    """What is known of a micro-batch beside its tokens; nothing of it changes while it is bound."""

    token_mask_BS: Tensor | None = None
    """True where the token is real, False where it is padding. Without it no routing is recorded."""
    task_ids_BS: Tensor | None = None
    """Task of each token; or of whole rows (B, 1), or (B, 1, M): several tasks, -1 where there are fewer."""
    sequences: Sequences | None = None
    """Samples and prompts, which a sequence router needs."""
    num_rows: int = 0
    """B, where each row is one sample whose prompt decides for the tokens that are generated later."""

    @classmethod
    def of_rows(cls, task_ids_B: Tensor | None = None, prompt_mask_BS: Tensor | None = None) -> BatchInputs:
        """What is known of whole rows, for any number of positions; nothing is recorded.

        For evaluation and generation, where a row is one sample and the cache leaves one position of it.

        Args:
            task_ids_B: Task of each row; or (B, M), several tasks, -1 where there are fewer.
            prompt_mask_BS: True on the tokens of the prompts, which a sequence router needs. What it decides
                for them in the first forward pass holds until the binding ends.
        """
        task_ids_BS = None if task_ids_B is None else task_ids_B[:, None]
        if prompt_mask_BS is None:
            return cls(task_ids_BS=task_ids_BS)
        positions_S = torch.arange(prompt_mask_BS.shape[1], device=prompt_mask_BS.device)
        sequences = Sequences.of(positions_S.expand_as(prompt_mask_BS), prompt_mask_BS.bool())
        return cls(task_ids_BS=task_ids_BS, sequences=sequences, num_rows=len(prompt_mask_BS))

    @property
    def token_mask_T(self) -> Tensor:
        """The mask, flattened the way layers flatten their tokens.

        Raises:
            RuntimeError: There is none.
        """
        if self.token_mask_BS is None:
            raise RuntimeError(
                "no batch is bound: use `with context.bind(BatchInputs(token_mask, task_ids)):`"
            )
        return self.token_mask_BS.reshape(-1)

    def task_ids_of(self, num_tokens: int) -> Tensor | None:
        """(T,) or (T, M): task, or tasks, of each of a layer's tokens; None where no tasks are known."""
        ids_BS = self.task_ids_BS
        if ids_BS is None:
            return None
        # (B, 1) of whole rows becomes (B, S) for whatever S the layer runs on; (B, S) stays as it is.
        positions = num_tokens // len(ids_BS)
        return ids_BS.expand(-1, positions, *ids_BS.shape[2:]).reshape(num_tokens, *ids_BS.shape[2:])


@dataclass
class RoutingRecord:
    """What leaves a forward pass, and what enters its backward; by the name of the layer that decided."""

    routings: dict[str, Routing] = field(default_factory=dict)
    """Assigned, not appended: a recomputed forward replaces what the first one left."""
    gradients: dict[str, RouterGradient] = field(default_factory=dict)
    """Of the router losses; each layer's backward looks here for its own."""


class SharedDecisions:
    """Routings that other layers of a group still have to take over.

    The last to take one removes it: a layer that runs out of turn then fails, instead of routing its tokens
    by a decision about other ones.
    """

    def __init__(self) -> None:
        self._routings: dict[str, Routing] = {}
        self._takers: dict[str, int] = {}

    def share(self, group: RouterGroup, routing: Routing) -> None:
        """Offer a decision to the other members, which all run before the group decides again."""
        if len(group.members) > 1:
            self._routings[group.name] = routing
            self._takers[group.name] = len(group.members) - 1

    def take(self, group: RouterGroup) -> Routing:
        """The decision of the group's first member.

        Raises:
            RuntimeError: It has not run before this one.
        """
        if group.name not in self._routings:
            rule = "its first layer by name must run first. Use a narrower adapters.router_scope"
            raise RuntimeError(f"no routing was decided for {group.name or 'the model'}: {rule}.")
        self._takers[group.name] -= 1
        if self._takers[group.name]:
            return self._routings[group.name]
        return self._routings.pop(group.name)


class PromptMemory:
    """What each row's prompt has decided, for the tokens that are generated after it.

    Args:
        inputs: Of the binding. Remembers only where they say that rows are samples.
    """

    def __init__(self, inputs: BatchInputs) -> None:
        self._num_rows = inputs.num_rows
        self._num_tokens = 0 if inputs.sequences is None else len(inputs.sequences.start_T)
        self._logits: dict[str, Tensor] = {}

    def keep(self, layer_name: str, logits_TE: Tensor) -> None:
        """Keep the logits of the pass that saw the whole prompts; later ones see single positions."""
        if self._num_rows and len(logits_TE) == self._num_tokens:
            # (B, S, E) -> (B, E): a sequence router gives all tokens of a row the same logits.
            self._logits[layer_name] = logits_TE.unflatten(0, (self._num_rows, -1))[:, -1]

    def logits_of(self, layer_name: str, num_tokens: int) -> Tensor | None:
        """(T, E) for tokens after the prompts; None in the pass over the prompts themselves."""
        kept_BE = self._logits.get(layer_name)
        return None if kept_BE is None else kept_BE.repeat_interleave(num_tokens // len(kept_BE), dim=0)


class ForwardPass:
    """All that layers read and leave while one micro-batch runs.

    Args:
        number: Of the binding, from 1; 0 where nothing is bound.
        name: Passes of one name run the layers in one order, which the weight exchange learns.
        inputs: Of the micro-batch.
    """

    def __init__(self, number: int = 0, name: str = "", inputs: BatchInputs | None = None) -> None:
        self.number = number
        self.name = name
        self.inputs = inputs or BatchInputs()
        self.record = RoutingRecord()
        self.decisions = SharedDecisions()
        self.prompts = PromptMemory(self.inputs)
        self.scalings: dict[str, Tensor] = {}
        """Of X-LoRA: layer -> (T, E), decided before the layers run."""

    def side_inputs(
        self,
        layer_name: str,
        num_tokens: int,
        tap: Callable[[Tensor], Tensor] | None = None,
        with_tasks: bool = True,
    ) -> SideInputs:
        """What is known of a layer's tokens; without their tasks where the router knows none."""
        tasks_T = self.inputs.task_ids_of(num_tokens) if with_tasks else None
        side = SideInputs(tasks_T, scalings_TE=self.scalings.get(layer_name), tap=tap)
        later_TE = self.prompts.logits_of(layer_name, num_tokens)
        if later_TE is not None:  # the cache holds the prompt, so this pass cannot see it
            return side._replace(prompt_logits_TE=later_TE)
        sequences = self.inputs.sequences
        # A pass over single positions after the prompts has no whole samples.
        if sequences is not None and len(sequences.start_T) == num_tokens:
            return side._replace(sequences=sequences)
        return side

    def keep(self, layer_name: str, routing: Routing) -> None:
        """Record a layer's routing, and remember what it means for the tokens to come."""
        self.prompts.keep(layer_name, routing.logits_TE)
        if self.inputs.token_mask_BS is not None:  # else nobody reads it, and it would hold the graph
            self.record.routings[layer_name] = routing


class RoutingContext:
    """The bound micro-batch of a model; one object that all its adapters share.

    Outside `bind` layers work: they know no tasks and no prompts, and record nothing.
    """

    def __init__(self) -> None:
        self.current = ForwardPass()
        self.adapters_off = False
        self._numbers = itertools.count(1)

    @property
    def inputs(self) -> BatchInputs:
        """Of the bound micro-batch; all unknown where none is bound."""
        return self.current.inputs

    @property
    def record(self) -> RoutingRecord:
        """Of the bound micro-batch; empty where none is bound."""
        return self.current.record

    @contextmanager
    def bind(self, inputs: BatchInputs, pass_name: str = "train") -> Iterator[RoutingContext]:
        """Bind one micro-batch; must span forward **and** backward, which may run forward again.

        Args:
            inputs: What is known of it.
            pass_name: Passes of one name run the layers in one order, which the weight exchange learns.

        Raises:
            RuntimeError: A batch is bound already.
        """
        if self.current.number:  # checkpointing would recompute the outer batch by the inner one's inputs
            raise RuntimeError("a batch is bound already: one context serves one batch at a time")
        self.current = ForwardPass(next(self._numbers), pass_name, inputs)
        try:
            yield self
        finally:
            self.current = ForwardPass()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Let the base model run alone."""
        before = self.adapters_off
        self.adapters_off = True
        try:
            yield
        finally:
            self.adapters_off = before
