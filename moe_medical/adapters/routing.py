"""What a router has decided, and the object that carries a batch's side inputs to it.

Routing is data: it is returned and recorded, never kept in a module. No capacity limit, no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        begins_BS = (position_ids_BS == 0) | (place_BS % place_BS.shape[1] == 0)
        start_BS = torch.where(begins_BS, place_BS, 0).cummax(dim=1).values
        return cls(start_BS.flatten(), prompt_mask_BS.flatten())

    def mean(self, x_TD: Tensor) -> Tensor:
        """(T, D) float32: the mean over the prompt of each token's sample; zeros where it has none."""
        weight_T = self.prompt_T.float()
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


@dataclass
class _Decision:
    """A routing that several layers use, until the last of them has."""

    routing: Routing
    users: int


class RoutingContext:
    """Side inputs of one batch on the way in, the layers' routings on the way out; shared by all layers.

    A plain object rather than a context variable: autograd recomputes checkpointed layers in its own
    threads, which would not see one. Outside `bind` layers work and record nothing.
    """

    def __init__(self) -> None:
        self.token_mask_BS: Tensor | None = None
        self.task_ids_BS: Tensor | None = None
        self.sequences: Sequences | None = None
        self.scalings: dict[str, Tensor] = {}
        """Of X-LoRA: layer -> (T, E), decided before the layers run."""
        self.adapters_off = False
        self.routings: dict[str, Routing] = {}
        self.router_gradients: dict[str, RouterGradient] = {}
        self.pass_name = ""
        self.binding: object | None = None  # another one in each `bind`, whose mask may be an earlier one's
        self._decisions: dict[str, _Decision] = {}
        self._prompts: dict[str, Tensor] = {}
        self._rows = 0

    @contextmanager
    def bind(
        self,
        token_mask_BS: Tensor,
        task_ids_BS: Tensor | None = None,
        pass_name: str = "train",
        sequences: Sequences | None = None,
    ) -> Iterator[RoutingContext]:
        """Bind one micro-batch; must span forward **and** backward, which may run forward again.

        Args:
            token_mask_BS: True where the token is real, False where it is padding.
            task_ids_BS: Task of each token.
            pass_name: Passes of one name run the layers in one order, which the weight exchange learns.
            sequences: Samples and prompts, which a sequence router needs.

        Raises:
            RuntimeError: A batch is bound already.
        """
        self._refuse_second()
        self.token_mask_BS, self.task_ids_BS, self.sequences = token_mask_BS, task_ids_BS, sequences
        self.pass_name, self.binding = pass_name, object()
        try:
            yield self
        finally:
            self.token_mask_BS = self.binding = None
            self.routings, self.router_gradients, self.pass_name = {}, {}, ""
            self._release()

    @contextmanager
    def bind_tasks(
        self, task_ids_B: Tensor | None, prompt_mask_BS: Tensor | None = None
    ) -> Iterator[RoutingContext]:
        """Bind what is known of whole rows, for any number of positions; nothing is recorded.

        For evaluation and generation, where a row is one sample and the cache leaves one position of it.

        Args:
            task_ids_B: Task of each row; or (B, M), several tasks, -1 where there are fewer.
            prompt_mask_BS: True on the tokens of the prompts, which a sequence router needs. What it decides
                for them in the first forward pass holds until the binding ends.
        """
        self._refuse_second()
        self.task_ids_BS = None if task_ids_B is None else task_ids_B[:, None]
        if prompt_mask_BS is not None:
            rows = torch.arange(prompt_mask_BS.shape[1], device=prompt_mask_BS.device)
            self.sequences = Sequences.of(rows.expand_as(prompt_mask_BS), prompt_mask_BS.bool())
            self._rows = len(prompt_mask_BS)
        try:
            yield self
        finally:
            self._release()

    @contextmanager
    def bind_sequences(self, sequences: Sequences) -> Iterator[RoutingContext]:
        """Bind nothing but samples and their prompts; nothing is recorded."""
        self._refuse_second()
        self.sequences = sequences
        try:
            yield self
        finally:
            self._release()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Let the base model run alone."""
        before, self.adapters_off = self.adapters_off, True
        try:
            yield
        finally:
            self.adapters_off = before

    def side_inputs(
        self,
        layer_name: str,
        num_tokens: int,
        tap: Callable[[Tensor], Tensor] | None = None,
        with_tasks: bool = True,
    ) -> SideInputs:
        """What is bound, for a layer's tokens; without their tasks where the router knows none."""
        tasks = self.task_ids_of(num_tokens) if with_tasks else None
        side = SideInputs(tasks, scalings_TE=self.scalings.get(layer_name), tap=tap)
        kept_BE = self._prompts.get(layer_name)
        if kept_BE is not None:
            later_TE = kept_BE.repeat_interleave(num_tokens // len(kept_BE), dim=0)
            return side._replace(prompt_logits_TE=later_TE)
        if self.sequences is not None and len(self.sequences.start_T) == num_tokens:
            return side._replace(sequences=self.sequences)
        return side

    def task_ids_of(self, num_tokens: int) -> Tensor | None:
        """Task, or tasks, of each of a layer's tokens, None where no tasks are bound."""
        if self.task_ids_BS is None:
            return None
        ids_BS = self.task_ids_BS
        positions = num_tokens // len(ids_BS)
        return ids_BS.expand(-1, positions, *ids_BS.shape[2:]).reshape(num_tokens, *ids_BS.shape[2:])

    @property
    def token_mask_T(self) -> Tensor:
        """Bound mask, flattened the way layers flatten their tokens."""
        if self.token_mask_BS is None:
            raise RuntimeError("no batch is bound: use `with context.bind(token_mask, task_ids):`")
        return self.token_mask_BS.reshape(-1)

    def record(self, layer_name: str, routing: Routing) -> None:
        """Keep the routing of a layer until `bind` ends. Assigns: a recomputed forward replaces, not adds."""
        if self.token_mask_BS is not None:
            self.routings[layer_name] = routing

    def share(self, scope: str, routing: Routing, users: int) -> None:
        """Offer a decision to the other layers of a scope, which all run before the next one is made."""
        if users:
            self._decisions[scope] = _Decision(routing, users)

    def shared(self, scope: str) -> Routing:
        """The decision of a scope; the last of its users takes it away.

        Raises:
            RuntimeError: The layer that decides has not run before this one.
        """
        decision = self._decisions.get(scope)
        if decision is None:
            rule = "its first layer by name must run first. Use a narrower adapters.router_scope"
            raise RuntimeError(f"no routing was decided for {scope or 'the model'}: {rule}.")
        decision.users -= 1
        if not decision.users:
            del self._decisions[scope]
        return decision.routing

    def keep_prompt(self, layer_name: str, logits_TE: Tensor) -> None:
        """Keep what rows' prompts decided, for the tokens that are generated after them."""
        if self._rows and self.sequences is not None and len(logits_TE) == len(self.sequences.start_T):
            self._prompts[layer_name] = logits_TE.unflatten(0, (self._rows, -1))[:, -1]

    def _refuse_second(self) -> None:
        if self.token_mask_BS is not None or self.task_ids_BS is not None:
            raise RuntimeError("a batch is bound already: one context serves one batch at a time")

    def _release(self) -> None:
        self.task_ids_BS = self.sequences = None
        self.scalings = {}
        self._decisions, self._prompts, self._rows = {}, {}, 0
