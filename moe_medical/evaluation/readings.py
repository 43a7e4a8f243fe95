"""What a text says: one spelling of it, its label, its letters, its words, its number.

Normalisation (`normalise`) forgives case, full-width forms, spacing and punctuation, but keeps what carries
meaning: punctuation between digits ("1.5", "2023-01"), a minus before a number, and symbols ("HER2+", "<").
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019`")
_SPACE_BESIDE_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")
_CJK_OR_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_CJK_WORD_OR_MARK = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]|_")
_ARTICLES = frozenset({"a", "an", "the"})
_LETTER_FIRST = re.compile(r"[(\[*\s]*([A-Za-z])\s*(?:[).,:\]*]|$)")
_LETTER_AFTER = re.compile(
    r"(?i:answer|option|choice|答案|选项|选)(?i:\s|is|[:是为(*])*"  # "The answer is: ("
    r"([A-Z](?![A-Za-z])|[a-z](?=[).,:\]]|$))"  # a small letter before a word is an article
)
_LETTERS = r"(?<![A-Za-z])([A-Z](?:[\s,、;&和]*(?:and\s+)?[A-Z])*)\s*"
_LETTERS_ONLY = re.compile(_LETTERS)
_AND = re.compile(r"(?i)\band\b")
_LETTERS_FIRST = re.compile(rf"[(\[*\s]*{_LETTERS}(?:[).,:\]*。，]|$)")
_LETTERS_AFTER = re.compile(
    rf"(?i:answers?|options?|choices?|答案|选项|选)(?i:\s|is|are|[:是为(*])*{_LETTERS}(?![A-Za-z])"
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_SAME = {"相同": "是的", "不同": "不是"}
"""Two ways in which CHIP-STS of PromptCBLUE spells its two labels (post_generate_process.py)."""


def normalise(text: str) -> str:
    """`text` in one spelling: NFKC, case folded, no punctuation (but see the module), single spaces.

    Spaces beside Chinese characters go, as Chinese text is written with or without them. Text of nothing but
    punctuation is kept as it is, so that an empty prediction does not equal it.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES).strip()
    kept = "".join(char if _carries_meaning(folded, at) else " " for at, char in enumerate(folded))
    return _SPACE_BESIDE_CJK.sub("", " ".join(kept.split())) or folded


def _carries_meaning(text: str, at: int) -> bool:
    if not unicodedata.category(text[at]).startswith("P"):
        return True
    before = text[at - 1 : at]
    after = text[at + 1 : at + 2]
    joins_digits = before.isdigit() and after.isdigit()
    is_minus = text[at] == "-" and after.isdigit() and not before.strip()
    return joins_digits or is_minus


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def read_labels(predictions: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both sides as labels: the first line normalised, or the letter where every target is a letter."""
    references = [_line_label(t) for t in targets]
    read = _option_letter if are_letters(targets) else _line_label
    answers = [read(p) for p in predictions]
    if {*_SAME, *_SAME.values()} >= set(references):
        answers, references = ([_SAME.get(label, label) for label in side] for side in (answers, references))
    return answers, references


def are_letters(targets: Sequence[str]) -> bool:
    """Whether each target is the letter of an option."""
    return all(re.fullmatch("[a-z]", _line_label(t)) for t in targets)


def _line_label(text: str) -> str:
    return normalise(first_line(text))


def _option_letter(text: str) -> str:
    """The letter meant by "B", "B.", "(B) aspirin" or "The answer is B"; else the normalised line.

    A letter that begins a sentence, as in "A patient ...", is no answer.
    """
    line = unicodedata.normalize("NFKC", first_line(text))
    found = _LETTER_FIRST.match(line) or _LETTER_AFTER.search(line)
    return found.group(1).casefold() if found else normalise(line)


def letters_meant(text: str, target: str) -> frozenset[str]:
    """Option letters of a text; its normalised line where there are none or the target has none."""
    line = unicodedata.normalize("NFKC", first_line(text))
    found = _LETTERS_FIRST.match(line) or _LETTERS_AFTER.search(line)
    if found and _LETTERS_ONLY.fullmatch(unicodedata.normalize("NFKC", target.strip())):
        return frozenset(re.findall("[A-Z]", _AND.sub(" ", found.group(1))))
    return frozenset([_option_letter(text).upper() if len(target.strip()) == 1 else normalise(line)])


def token_list(text: str, language: str) -> list[str]:
    """Words of `normalise`, articles left out; for "zh" each Chinese character is one."""
    text = normalise(text)
    words = _CJK_OR_WORD.findall(text) if language == "zh" else text.split()
    return [word for word in words if word not in _ARTICLES]


def token_counts(text: str, language: str) -> Counter[str]:
    """How often each token occurs."""
    return Counter(token_list(text, language))


def spaced_tokens(text: str) -> list[str]:
    """Case-folded words between spaces."""
    return text.casefold().split()


def characters(text: str) -> list[str]:
    """Case-folded characters other than spaces."""
    return list("".join(text.casefold().split()))


def cblue_tokens(text: str) -> list[str]:
    """Chinese characters, other words whole, and marks: what PromptCBLUE's scorer compares."""
    return _CJK_WORD_OR_MARK.findall(text.casefold())


def jieba_words(text: str) -> list[str]:
    """Chinese words by jieba, which must be installed."""
    jieba = importlib.import_module("jieba")  # no dependency
    jieba.setLogLevel("WARNING")
    return [word for word in jieba.lcut(text) if word.strip()]


def first_number(text: str) -> float | None:
    """The first number in a text, if it is finite."""
    found = _NUMBER.search(unicodedata.normalize("NFKC", text))
    value = float(found.group()) if found else float("inf")
    return value if abs(value) != float("inf") else None
