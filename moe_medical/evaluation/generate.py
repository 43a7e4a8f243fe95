"""Batched generation with the KV cache: greedy for scores, or each row with its own settings for answers.

Decisions: transformers' `generate` runs the loop, over rows padded on the left. What differs from row to row
(sampling, length, an end of its own) enters through its logits processors and stopping criteria. A sampled
row draws from a generator of its own, so that what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from moe_medical.data.chat import ChatFormat

EndReason = Literal["stop", "length"]
"""Of a row: its end token or `Row.take` said so, or it has all the tokens it may have."""


@dataclass(frozen=True)
class Sampling:
    """How one row's next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    """Share of the probability that the likeliest tokens must reach; the others are never drawn."""
    seed: int | None = None
    """None draws anew each time."""


@dataclass(frozen=True)
class Row:
    """One prompt and how it is to be continued."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    take: Callable[[int], bool]
    """Called with each new token but the end token; True when that is enough."""
    end: Callable[[EndReason], None] = lambda _: None
    """Called once, as soon as the row has ended, while others of its batch may go on."""


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    chat: ChatFormat,
    max_new_tokens: int,
    device: torch.device,
    synced: bool = False,
    use_cache: bool = True,
) -> Tensor:
    """Continue tokenised prompts greedily.

    Args:
        synced: every rank keeps calling forward until the slowest is done; see `Engine`.
        use_cache: whether keys and values of earlier tokens are kept rather than computed again.

    Returns:
        int64 (prompts, max_new_tokens); -1 from the end token on.
    """
    ids, mask = pad_left(prompts, chat.pad_id, device)
    options = {"synced_gpus": synced, "use_cache": use_cache}
    made = _generate(model, ids, mask, chat, max_new_tokens, **options)[:, ids.shape[1] :]
    ended = (made == chat.end_id).cumsum(1) > 0
    made = made.masked_fill(ended, -1)
    return nn.functional.pad(made, (0, max_new_tokens - made.shape[1]), value=-1)


@torch.no_grad()
def continue_rows(
    model: nn.Module,
    rows: Sequence[Row],
    chat: ChatFormat,
    bind: Callable[[Tensor], AbstractContextManager[object]] = lambda _: nullcontext(),
    use_cache: bool = True,
) -> None:
    """Continue rows of any lengths and settings in one batch; their tokens go to `Row.take` as they come.

    Args:
        bind: given the mask of the prompts' tokens (B, S), what the model needs to know around the forward
            passes.
        use_cache: whether keys and values of earlier tokens are kept rather than computed again.
    """
    ids, mask = pad_left([row.prompt_ids for row in rows], chat.pad_id, next(model.parameters()).device)
    choose = LogitsProcessorList([_Choose(rows)] if any(row.sampling.temperature > 0 for row in rows) else [])
    hand_out = StoppingCriteriaList([_HandOut(rows, chat.end_id)])
    longest = max(row.max_new_tokens for row in rows)
    options = {"logits_processor": choose, "stopping_criteria": hand_out, "use_cache": use_cache}
    with bind(mask):
        _generate(model, ids, mask, chat, longest, **options)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of the real ones, both int64 (B, S)."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _generate(
    model: nn.Module, ids_BS: Tensor, mask_BS: Tensor, chat: ChatFormat, max_new_tokens: int, **options: Any
) -> Tensor:
    """The prompts and what follows them, (B, S + at most max_new_tokens)."""
    made: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids_BS,
        attention_mask=mask_BS,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a model folder may ask for one; scores must not depend on that
        no_repeat_ngram_size=0,
        pad_token_id=chat.pad_id,
        eos_token_id=chat.end_id,
        **options,
    )
    return made


class _Choose(LogitsProcessor):
    """Draws the token of each sampled row, and leaves no other to the greedy choice that follows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._sampled = [(i, row.sampling) for i, row in enumerate(rows) if row.sampling.temperature > 0]
        self._generators = [_generator(sampling.seed) for _, sampling in self._sampled]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for (i, sampling), generator in zip(self._sampled, self._generators, strict=True):
            token = _draw(scores[i], sampling, generator)
            scores[i] = -torch.inf
            scores[i, token] = 0
        return scores


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """From the smallest set of likeliest tokens whose probabilities reach top_p (arXiv 1904.09751)."""
    logits_V = logits_V.float() - logits_V.max()  # however small the temperature, one of them stays finite
    probs_V, tokens_V = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    before_V = probs_V.cumsum(-1) - probs_V
    kept_V = probs_V.masked_fill(before_V >= sampling.top_p, 0).cpu()
    return int(tokens_V[torch.multinomial(kept_V, 1, generator=generator)])


class _HandOut(StoppingCriteria):
    """Gives each row its token, and tells which rows have enough."""

    def __init__(self, rows: Sequence[Row], end_id: int) -> None:
        self._rows = rows
        self._end_id = end_id
        self._room = [row.max_new_tokens for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self._room[i]:
                self._hand(i, token)
        return torch.tensor([not room for room in self._room], device=input_ids.device)

    def _hand(self, i: int, token: int) -> None:
        more = token != self._end_id and not self._rows[i].take(token)
        self._room[i] = self._room[i] - 1 if more else 0
        if not self._room[i]:
            self._rows[i].end("length" if more else "stop")
