"""What a row says for itself, apart from what its whole task says, as normalised text and as shingles.

Decisions: two rows of a task share the instruction, the labels in front of the fields ("Question:") and
often a list of options. So three things are taken away: the literal text of the prompt's template, the lines
and labels that stand in most rows of the task, and the shingles of more than 2 % of its rows. The first two
leave the text that has to be equal in a duplicate, the third the shingles that near-duplicates share. What
is common is judged on rows spread evenly over the task, each different prompt once, so that many copies of
one row do not make that row common.
A shingle is 3 words, or 4 characters where at least 3 in 10 characters are Chinese, Japanese or Korean,
whatever language the task is said to have. A punctuation mark is a word of its own, because some tasks ask
about a marked part of a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from moe_medical.data.recipe import parse_template

Words = NDArray[np.uint64]

MIN_SHINGLES = 10
"""A row with fewer is too short to be nearly equal to another: it is compared for equality only."""
SAMPLED_ROWS = 2000
"""Of each task, to find what is common."""
_COMMON_SHARE = 0.02
_COMMON_ROWS = 20
"""A shingle is common in more than this share of the rows, and more than so many of them."""
_LABELS = re.compile(r"(?m)^[^\n:：]{1,30}[:：]")
_TOKENS = re.compile(r"\w+|[^\w\s]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalise(text: str) -> str:
    """NFKC, case-folded, with white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingle_hashes(text: str) -> Words:
    """Sorted distinct 64-bit hashes of a normalised text's shingles, the same on every machine."""
    cjk = 0 if text.isascii() else sum(1 for _ in _CJK.finditer(text))
    by_character = 10 * cjk >= 3 * max(len(text), 1)
    tokens = text.replace(" ", "") if by_character else _TOKENS.findall(text)
    width = 4 if by_character else 3
    hashes = np.fromiter(map(_token_hash, tokens), np.uint64, len(tokens))
    count = max(len(hashes) - width + 1, 0)
    shingles = hashes[:count].copy()
    for i in range(1, width):
        shingles *= _BASE
        shingles += hashes[i : i + count]
    return np.unique(shingles)


@lru_cache(maxsize=2**18)
def _token_hash(token: str) -> int:
    return int.from_bytes(blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class OwnText:
    """The own text and own shingles of a task's rows.

    Args:
        template: The task's prompt template.
        prompts: A sample of the task's filled prompts, at most `SAMPLED_ROWS` or so.
    """

    def __init__(self, template: str, prompts: Iterable[str]) -> None:
        literals = (literal.strip() for literal, _ in parse_template(template))
        self._literals = [literal for literal in literals if literal]
        different = list(dict.fromkeys(prompts))
        counts = Counter(piece for prompt in different for piece in set(self._pieces(prompt)))
        self._boilerplate = frozenset(
            piece for piece, n in counts.items() if n > 2 and 2 * n > len(different)
        )
        # Only then, as what is common is judged on the text that is left.
        each = [shingle_hashes(self.text(prompt)) for prompt in different]
        shingles, rows = np.unique(np.concatenate(each or [np.zeros(0, np.uint64)]), return_counts=True)
        self._common = shingles[rows > max(_COMMON_ROWS, _COMMON_SHARE * len(different))]

    def text(self, prompt: str) -> str:
        """Normalised; the whole prompt where nothing in it is the row's own."""
        own = [piece for piece in self._pieces(prompt) if piece not in self._boilerplate]
        return normalise("\n".join(own) or prompt)

    def shingles(self, text: str) -> Words:
        """Sorted hashes of the shingles of `text`, which `text` has returned, without the common ones."""
        found = shingle_hashes(text)
        if not len(self._common):
            return found
        places = np.searchsorted(self._common, found).clip(max=len(self._common) - 1)
        return found[self._common[places] != found]

    def _pieces(self, prompt: str) -> list[str]:
        """Lines, and the labels they start with, outside of the template's literal text."""
        own = []
        rest = prompt
        for literal in self._literals:
            before, found, after = rest.partition(literal)
            if found:
                own.append(before)
                rest = after
        separated = _LABELS.sub(lambda label: f"{label[0]}\n", "\n".join([*own, rest]))
        return [piece for line in separated.splitlines() if (piece := line.strip())]
