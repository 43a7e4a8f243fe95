"""Closed questions answered by the likeliest of the listed options.

Decisions: an option's likelihood is the probability that the model gives exactly this answer, the end of the
turn included: the sum of the log-probabilities of its tokens. It is not divided by their number, which would
favour long options over the model's own word. Where the answers are letters the options are letters. A task
is answered so if each of its scored targets is one of the row's options; whether a single row is does not
matter, as that would tell the model something about the answer. Options that are equally likely, to 1e-4
nats, are decided by their order, so that the sums' last digits, which depend on the batch, do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from string import ascii_uppercase

import numpy as np

from moe_medical.data.chat import ChatFormat, Encoded, TargetTooLong
from moe_medical.data.rows import Example
from moe_medical.evaluation.metrics import ONE_LABEL

_TIE = 1e-4


def answer_options(metric: str, examples: Sequence[Example]) -> list[tuple[str, ...]] | None:
    """What can be answered to each row of a task; None where its answers are not one of listed options."""
    if metric not in ONE_LABEL or not all(e.choices for e in examples):
        return None
    letters = all(re.fullmatch("[A-Z]", e.target.strip()) for e in examples)
    options = [_letters(e) if letters else tuple(c.strip() for c in e.choices) for e in examples]
    found = (e.target.strip() in listed for e, listed in zip(examples, options, strict=True))
    return options if all(found) else None


def _letters(example: Example) -> tuple[str, ...]:
    """The letters that the prompt gives the options, else A, B and so on."""
    patterns = (rf"^\W*([A-Z])\W*?\s*{re.escape(choice.strip())}\s*$" for choice in example.choices)
    shown = [re.search(pattern, example.prompt, re.MULTILINE) for pattern in patterns]
    found = [match[1] for match in shown if match]
    if len(set(found)) == len(example.choices):
        return tuple(found)
    return tuple(ascii_uppercase[: len(example.choices)])


def encode_options(chat: ChatFormat, prompt: str, options: Sequence[str]) -> dict[int, Encoded]:
    """Each option behind the prompt, which is cut alike for all of them.

    Returns:
        Tokens of the options that are short enough for the format, by their number.
    """
    targets: dict[int, list[int]] = {}
    for number, option in enumerate(options):
        with suppress(TargetTooLong):
            encoded = chat.encode(prompt, option)
            targets[number] = encoded.input_ids[encoded.num_prompt_tokens :]
    longest = max(map(len, targets.values()), default=0)
    start = chat.encode_prompt(prompt, reserve=longest)
    return {n: Encoded(start + target, len(start), 0) for n, target in targets.items()}


def likeliest(losses: np.ndarray) -> int:
    """Number of the option with the least loss; the first of those within the tie."""
    close = np.flatnonzero(losses <= losses.min() + _TIE)
    return int(close[0]) if len(close) else 0
