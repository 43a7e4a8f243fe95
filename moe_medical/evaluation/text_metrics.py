"""Metrics of free text. ROUGE's subsequences and BLEU's n-grams come from rouge-score and sacrebleu."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from statistics import fmean

import numpy as np

from moe_medical.evaluation.metric import Answers, Metric, mean_of, ratio
from moe_medical.evaluation.promptcblue import report_sections
from moe_medical.evaluation.readings import (
    cblue_tokens,
    characters,
    jieba_words,
    normalise,
    spaced_tokens,
    token_counts,
)

Tokens = Callable[[str], list[str]]
HAS_JIEBA = importlib.util.find_spec("jieba") is not None
"""It is no dependency; where it is missing, the metrics that need it are left out."""
_EMPTY = "无 。"
"""What PromptCBLUE's scorer puts for an empty section (evaluators.py)."""


def _exact_match(answers: Answers) -> np.ndarray:
    rows = zip(answers.predictions, answers.targets, strict=True)
    return mean_of([normalise(p) == normalise(t) for p, t in rows])


def _overlap(share: Callable[[int, int, int], float]) -> Callable[[Answers], np.ndarray]:
    """A mean over rows of a share of (tokens in common, tokens predicted, tokens expected)."""

    def measure(answers: Answers) -> np.ndarray:
        values = []
        for prediction, target in zip(answers.predictions, answers.targets, strict=True):
            ours, theirs = (token_counts(text, answers.language) for text in (prediction, target))
            values.append(share((ours & theirs).total(), ours.total(), theirs.total()))
        return mean_of(values)

    return measure


def _f1(common: int, predicted: int, expected: int) -> float:
    return 2 * common / (predicted + expected) if predicted + expected else 1.0


def _recall(common: int, predicted: int, expected: int) -> float:
    return common / expected if expected else 1.0


def _precision(common: int, predicted: int, expected: int) -> float:
    if not predicted:
        return float(not expected)  # silence earns nothing where there was something to say
    return common / predicted


def _llava(recall: bool) -> Callable[[Answers], np.ndarray]:
    """The "recall" and "exact match" of LLaVA-Med's evaluate_metrics.py, which Med-MoE reports too.

    Words are counted as the prediction repeats them: recall is TP / (TP + FN) with TP the times that the
    prediction says words of the target; exact match is the target's words said, over all that is said.
    """

    def measure(answers: Answers) -> np.ndarray:
        values = []
        for prediction, target in zip(answers.predictions, answers.targets, strict=True):
            ours, theirs = (token_counts(text, answers.language) for text in (prediction, target))
            said = sum(ours[word] for word in theirs)
            missed = sum(times for word, times in theirs.items() if word not in ours)
            words = sum(word in ours for word in theirs)
            hits, total = (said, said + missed) if recall else (words, ours.total())
            values.append(hits / total if total else 0.0)
        return mean_of(values)

    return measure


class _Tokenizer:
    """In the form that rouge-score asks for; its own tokenizer drops Chinese."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokenize = tokens


def _rouge(tokens: Tokens) -> Callable[[str, str], float]:
    """F-measure of the longest common subsequence of a prediction and a target (ROUGE-L)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer(tokens))
    return lambda prediction, target: float(scorer.score(target, prediction)["rougeL"].fmeasure)


def _rouge_l(tokens: Tokens) -> Callable[[Answers], np.ndarray]:
    def measure(answers: Answers) -> np.ndarray:
        compare = _rouge(tokens)
        rows = zip(answers.predictions, answers.targets, strict=True)
        return mean_of([compare(p, t) for p, t in rows])

    return measure


def _sections_official(answers: Answers) -> np.ndarray:
    """Sum of ROUGE-L over the sections of the target, and their number: every section counts alike."""
    compare = _rouge(cblue_tokens)
    rows = []
    for prediction, target in zip(answers.predictions, answers.targets, strict=True):
        said = report_sections(prediction)
        pairs = [(said.get(name, "") or _EMPTY, text or _EMPTY) for name, text in _sections(target).items()]
        rows.append((sum(compare(p, t) for p, t in pairs), len(pairs)))
    return np.array(rows, dtype=np.float64)


def _sections_moelora(answers: Answers) -> np.ndarray:
    """Mean over rows of the mean over sections; a section that is not there gets 0."""
    compare = _rouge(jieba_words)
    values = []
    for prediction, target in zip(answers.predictions, answers.targets, strict=True):
        said = report_sections(prediction)
        # As published, a mark stands before both texts, so that none is empty.
        values.append(
            fmean(
                compare(f"- {said[name]}", f"- {text}") if name in said else 0.0
                for name, text in _sections(target).items()
            )
        )
    return mean_of(values)


def _sections(target: str) -> dict[str, str]:
    """Those of a target; a target without any is one section that no prediction has."""
    return report_sections(target) or {"": target}


def _has_sections(answers: Answers) -> bool:
    return any(map(report_sections, answers.targets))


def _has_words(answers: Answers) -> bool:
    return HAS_JIEBA and answers.language == "zh"


def _has_both(answers: Answers) -> bool:
    return _has_words(answers) and _has_sections(answers)


def _bleu4(tokenizer: Callable[[str], str]) -> Callable[[Answers], np.ndarray]:
    """n-grams in common (4) and in all (4), and the lengths of both sides, shape (rows, 10)."""

    def measure(answers: Answers) -> np.ndarray:
        from sacrebleu.metrics.bleu import BLEU

        # Without `effective_order` each sentence would be complained about; its counts stay the same.
        bleu = BLEU(tokenize=tokenizer(answers.language), effective_order=True, force=True)
        rows = []
        for prediction, target in zip(answers.predictions, answers.targets, strict=True):
            found = bleu.sentence_score(prediction, [target])
            rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
        return np.array(rows, dtype=np.float64)

    return measure


def _corpus_bleu(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics.bleu import BLEU

    def one(counts: np.ndarray) -> float:
        numbers = counts.astype(int).tolist()
        return BLEU.compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9]).score / 100

    return np.apply_along_axis(one, -1, sums)


def _characters_of(language: str) -> str:
    """For "zh" sacrebleu's tokenizer keeps Latin words and numbers whole."""
    return "zh" if language == "zh" else "char"


def _words_of(language: str) -> str:
    return "zh" if language == "zh" else "13a"


EXACT_MATCH = Metric(_exact_match, ratio)
TOKEN_F1 = Metric(_overlap(_f1), ratio)
"""Of token counts (SQuAD, arXiv:1606.05250), articles left out."""
TOKEN_RECALL = Metric(_overlap(_recall), ratio)
TOKEN_PRECISION = Metric(_overlap(_precision), ratio)
TOKEN_RECALL_LLAVA = Metric(_llava(recall=True), ratio)
EXACT_MATCH_LLAVA = Metric(_llava(recall=False), ratio)
ROUGE_L = Metric(_rouge_l(spaced_tokens), ratio)
ROUGE_L_CHAR = Metric(_rouge_l(characters), ratio)
ROUGE_L_CBLUE = Metric(_rouge_l(cblue_tokens), ratio)
"""Tokens of PromptCBLUE's scorer. Its package unites the subsequences of sentences; this takes the whole."""
ROUGE_L_JIEBA = Metric(_rouge_l(jieba_words), ratio, applies=_has_words)
ROUGE_L_SECTIONS = Metric(_sections_official, ratio, applies=_has_sections)
ROUGE_L_SECTIONS_JIEBA = Metric(_sections_moelora, ratio, applies=_has_both)
BLEU4_CHAR = Metric(_bleu4(_characters_of), _corpus_bleu)
BLEU4 = Metric(_bleu4(_words_of), _corpus_bleu)
