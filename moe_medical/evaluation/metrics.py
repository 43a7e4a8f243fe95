"""Scores of generated text against reference text, one number per task.

Decisions: a metric is a name in `METRICS`, so a task file can ask only for what is here. Higher is better;
the range is [0, 1], but [-1, 1] for `spearman` and `pearson`. Multi-class F1, ROUGE, BLEU and correlations
come from scikit-learn, rouge-score, sacrebleu and scipy, which are imported when a metric first needs them.
Where nothing was to be found and nothing was predicted, an F1 is 1: silence was the right answer.
It does not generate text, judge meaning, or look up terminologies.

Normalisation (`normalise`) forgives case, full-width forms, spacing and punctuation, but keeps what carries
meaning: punctuation between digits ("1.5", "2023-01"), a minus before a number, and symbols ("HER2+", "<").
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TypeVar

from moe_medical.evaluation.promptcblue import answer_items

Metric = Callable[[Sequence[str], Sequence[str], str], float]
Item = TypeVar("Item")

OTHER = "\0other"  # no normalised label holds a NUL
POSITIVE_LABELS = frozenset({"yes", "是"})
NOTHING = frozenset({"none", "无"})

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019`")
_SPACE_BESIDE_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")
_CJK_OR_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_ARTICLES = frozenset({"a", "an", "the"})
_LETTER_FIRST = re.compile(r"[(\[*\s]*([A-Za-z])\s*(?:[).,:\]*]|$)")
_LETTER_AFTER = re.compile(
    r"(?i:answer|option|choice|答案|选项|选)(?i:\s|is|[:是为(*])*"  # "The answer is: ("
    r"([A-Z](?![A-Za-z])|[a-z](?=[).,:\]]|$))"  # a small letter before a word is an article
)
_LETTERS = r"(?<![A-Za-z])([A-Z](?:[\s,、;&和]*(?:and\s+)?[A-Z])*)\s*"
_LETTERS_FIRST = re.compile(rf"[(\[*\s]*{_LETTERS}(?:[).,:\]*。，]|$)")
_LETTERS_AFTER = re.compile(
    rf"(?i:answers?|options?|choices?|答案|选项|选)(?i:\s|is|are|[:是为(*])*{_LETTERS}(?![A-Za-z])"
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def score(metric: str, predictions: Sequence[str], targets: Sequence[str], language: str = "en") -> float:
    """Scores `predictions` against `targets`, row by row in the same order.

    Args:
        metric: A name in `METRICS`.
        predictions: Generated text, one per row.
        targets: Reference text, one per row.
        language: Code of the task's language; for "zh" `token_f1` and `bleu4_char` count Chinese characters.

    Returns:
        A number where higher is better, in [0, 1], or in [-1, 1] for the correlations.

    Raises:
        ValueError: The metric is unknown, there are no rows, or the two lists differ in length.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not targets or len(predictions) != len(targets):
        raise ValueError(
            f"{metric} needs one prediction per target and at least one row, "
            f"got {len(predictions)} predictions and {len(targets)} targets"
        )
    return float(METRICS[metric](predictions, targets, language))


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
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    joins_digits = before.isdigit() and after.isdigit()
    is_minus = text[at] == "-" and after.isdigit() and not before.strip()
    return joins_digits or is_minus


def _exact_match(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    return fmean(normalise(p) == normalise(t) for p, t in zip(predictions, targets, strict=True))


# --- closed labels ---


def _accuracy(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    answers, references = _labels(predictions, targets)
    return fmean(a == r for a, r in zip(answers, references, strict=True))


def _letter_accuracy(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Share of rows whose set of option letters is the target's: "B", "ABD", "A, B and D", "答案为ABD"."""
    rows = zip(predictions, targets, strict=True)
    return fmean(_letters_meant(p, t) == _letters_meant(t, t) for p, t in rows)


def _letters_meant(text: str, target: str) -> frozenset[str]:
    """Option letters of a text; its normalised line where there are none or the target has none."""
    line = unicodedata.normalize("NFKC", _first_line(text))
    found = _LETTERS_FIRST.match(line) or _LETTERS_AFTER.search(line)
    if found and re.fullmatch("[A-Z]+", target.strip()):
        return frozenset(re.findall("[A-Z]", found.group(1)))
    return frozenset([_option_letter(text).upper() if len(target.strip()) == 1 else normalise(line)])


def _macro_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    return _label_f1(predictions, targets, "macro")


def _micro_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    return _label_f1(predictions, targets, "micro")


def _label_f1(predictions: Sequence[str], targets: Sequence[str], average: str) -> float:
    """F1 over the labels that occur among the targets.

    Any other prediction is one more class, always wrong: `micro` counts it, `macro` does not average over it.
    """
    from sklearn.metrics import f1_score

    answers, references = _labels(predictions, targets)
    known = sorted(set(references))
    answers = [a if a in known else OTHER for a in answers]
    labels = known if average == "macro" else [*known, OTHER]
    return float(f1_score(references, answers, labels=labels, average=average, zero_division=0.0))


def _f1_yes(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """F1 of the class "yes" or "是"; every other answer is a no."""
    answers, references = _labels(predictions, targets)
    pairs = [(a in POSITIVE_LABELS, r in POSITIVE_LABELS) for a, r in zip(answers, references, strict=True)]
    hits = sum(a and r for a, r in pairs)
    return _f1(hits, sum(a for a, _ in pairs), sum(r for _, r in pairs))


def _labels(predictions: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both sides as labels: the first line normalised, or the letter where every target is a letter."""
    references = [normalise(_first_line(t)) for t in targets]
    letters = all(re.fullmatch("[a-z]", r) for r in references)
    read = _option_letter if letters else _line_label
    return [read(p) for p in predictions], references


def _line_label(text: str) -> str:
    return normalise(_first_line(text))


def _option_letter(text: str) -> str:
    """The letter meant by "B", "B.", "(B) aspirin" or "The answer is B"; else the normalised line.

    A letter that begins a sentence, as in "A patient ...", is no answer.
    """
    line = unicodedata.normalize("NFKC", _first_line(text))
    found = _LETTER_FIRST.match(line) or _LETTER_AFTER.search(line)
    return found.group(1).casefold() if found else normalise(line)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# --- sets of items and entities ---


def _set_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Micro-F1 of the items between semicolons or line ends; order and repetition do not count."""
    return _micro_set_f1(map(_items, predictions), map(_items, targets))


def _entity_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Micro-F1 of (type, mention) pairs read from lines "type: mention; mention", or "none"."""
    return _micro_set_f1(map(_entities, predictions), map(_entities, targets))


def _promptcblue_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Micro-F1 of the items that PromptCBLUE's answer texts state (`promptcblue.py`), spelling normalised."""
    return _micro_set_f1(map(_stated, predictions), map(_stated, targets))


def _stated(text: str) -> set[tuple[str, ...]]:
    return {tuple(map(normalise, item)) for item in answer_items(text)}


def _items(text: str) -> set[str]:
    return {normalise(part) for part in re.split(r"[;\uff1b\n]", text) if part.strip()}


def _entities(text: str) -> set[tuple[str, str]]:
    """(type, mention) pairs; a line without a type keeps its mentions, under a type that matches none."""
    pairs: set[tuple[str, str]] = set()
    for line in text.splitlines():
        kind, colon, mentions = line.replace("\uff1a", ":").partition(":")
        kind, mentions = (normalise(kind), mentions) if colon else (OTHER, line)
        pairs |= {(kind, mention) for mention in _items(mentions) - NOTHING}
    return pairs


def _micro_set_f1(predicted: Iterable[set[Item]], expected: Iterable[set[Item]]) -> float:
    hits = num_predicted = num_expected = 0
    for ours, theirs in zip(predicted, expected, strict=True):
        hits += len(ours & theirs)
        num_predicted += len(ours)
        num_expected += len(theirs)
    return _f1(hits, num_predicted, num_expected)


def _f1(hits: int, num_predicted: int, num_expected: int) -> float:
    """2 TP / (2 TP + FP + FN), which needs no guard at zero hits; 1 where there is nothing on either side."""
    total = num_predicted + num_expected
    return 2 * hits / total if total else 1.0


# --- free text ---


def _token_f1(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Mean over rows of the F1 of token counts (SQuAD, arXiv:1606.05250), articles left out.

    Tokens are the words of `normalise`; for "zh" each Chinese character is one token.
    """
    rows = zip(predictions, targets, strict=True)
    return fmean(_overlap_f1(_tokens(p, language), _tokens(t, language)) for p, t in rows)


def _token_recall(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Mean over rows of the share of the target's tokens that the prediction has (open VQA of LLaVA-Med)."""
    rows = ((_tokens(p, language), _tokens(t, language)) for p, t in zip(predictions, targets, strict=True))
    return fmean((ours & theirs).total() / theirs.total() if theirs else 1.0 for ours, theirs in rows)


def _tokens(text: str, language: str) -> Counter[str]:
    text = normalise(text)
    words = _CJK_OR_WORD.findall(text) if language == "zh" else text.split()
    return Counter(word for word in words if word not in _ARTICLES)


def _overlap_f1(ours: Counter[str], theirs: Counter[str]) -> float:
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


class _Words:
    """Case-folded words between spaces, in the form rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return text.casefold().split()


class _Characters:
    """Case-folded characters other than spaces: rouge-score's own tokenizer drops Chinese."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(text.casefold().split()))


def _rouge_l(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    return _mean_rouge_l(predictions, targets, _Words())


def _rouge_l_char(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    return _mean_rouge_l(predictions, targets, _Characters())


def _mean_rouge_l(
    predictions: Sequence[str], targets: Sequence[str], tokenizer: _Words | _Characters
) -> float:
    """Mean over rows of the F-measure of the longest common subsequence (ROUGE-L)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    rows = zip(predictions, targets, strict=True)
    return fmean(scorer.score(target, prediction)["rougeL"].fmeasure for prediction, target in rows)


def _bleu4_char(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    """Corpus BLEU-4 over characters; for "zh" sacrebleu's tokenizer keeps Latin words and numbers whole."""
    from sacrebleu import corpus_bleu

    tokenizer = "zh" if language == "zh" else "char"
    return float(corpus_bleu(list(predictions), [list(targets)], tokenize=tokenizer).score) / 100


# --- numbers ---


def _pearson(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, targets)


def _spearman(predictions: Sequence[str], targets: Sequence[str], language: str) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, targets)


def _correlation(
    correlate: Callable[..., tuple[float, float]], predictions: Sequence[str], targets: Sequence[str]
) -> float:
    """Correlation of the first number of each text; 0 where it is undefined (a constant side, one row).

    A prediction without a number takes the mean of those with one. Such a row adds nothing to the covariance,
    so it can only pull a Pearson coefficient towards 0: silence earns nothing.
    """
    expected = [_number(t) for t in targets]
    if None in expected:
        raise ValueError(f"a correlation needs numbers, target {expected.index(None)} has none")
    parsed = [_number(p) for p in predictions]
    known = [p for p in parsed if p is not None]
    if len(set(known)) < 2 or len(set(expected)) < 2:
        return 0.0
    filled = [fmean(known) if p is None else p for p in parsed]
    return float(correlate(filled, expected)[0])


def _number(text: str) -> float | None:
    found = _NUMBER.search(unicodedata.normalize("NFKC", text))
    value = float(found.group()) if found else float("inf")
    return value if abs(value) != float("inf") else None


METRICS: dict[str, Metric] = {
    "exact_match": _exact_match,
    "accuracy": _accuracy,
    "letter_accuracy": _letter_accuracy,
    "macro_f1": _macro_f1,
    "micro_f1": _micro_f1,
    "f1_yes": _f1_yes,
    "set_f1": _set_f1,
    "entity_f1": _entity_f1,
    "promptcblue_f1": _promptcblue_f1,
    "token_f1": _token_f1,
    "token_recall": _token_recall,
    "rouge_l": _rouge_l,
    "rouge_l_char": _rouge_l_char,
    "bleu4_char": _bleu4_char,
    "spearman": _spearman,
    "pearson": _pearson,
}
"""Name -> metric. All are in [0, 1] but `spearman` and `pearson`, in [-1, 1]; higher is better."""
