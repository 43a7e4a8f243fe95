"""Greedy, batched generation with the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moe_medical.data.formats import ChatFormat


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    chat: ChatFormat,
    max_new_tokens: int,
    device: torch.device,
    synced: bool = False,
) -> torch.Tensor:
    """Continue tokenised prompts greedily.

    Args:
        synced: every rank keeps calling forward until the slowest is done; see `Engine`.

    Returns:
        int64 (prompts, max_new_tokens); -1 from the end token on.
    """
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), chat.pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    made = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a model folder may ask for one; scores must not depend on that
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=chat.pad_id,
        eos_token_id=chat.end_id,
        synced_gpus=synced,
    )[:, width:]
    ended = (made == chat.end_id).cumsum(1) > 0
    made = made.masked_fill(ended, -1)
    return nn.functional.pad(made, (0, max_new_tokens - made.shape[1]), value=-1)


def generate_texts(
    model: nn.Module,
    prompts: Sequence[str],
    chat: ChatFormat,
    max_new_tokens: int,
    batch_rows: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Answers to prompts, in their order, on the model's own device."""
    device = next(model.parameters()).device
    encoded = [chat.encode_prompt(p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        made = generate_ids(model, [encoded[i] for i in chosen], chat, max_new_tokens, device)
        for i, line in zip(chosen, made.tolist(), strict=True):
            texts[i] = chat.decode([token for token in line if token >= 0]).strip()
        advance(len(chosen))
    return texts
