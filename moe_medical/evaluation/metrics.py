"""Scores of generated text against reference text: the metrics by name, and which are told beside which.

Decisions: a metric is a name in `METRICS`, so a task file can ask only for what is here. Higher is better;
the range is [0, 1], but [-1, 1] for `spearman` and `pearson`. Published systems score the same tasks in
different ways; `VARIANTS` names those ways, and every evaluation tells them beside the task's own metric:

    macro_f1_union          PromptCBLUE's scorer and MING-MOE, where `macro_f1` is asked for: labels that were
                            only predicted are classes too
    micro_f1                MOELoRA for CHIP-CTC
    weighted_f1             PromptCBLUE's scorer and MING-MOE for STS, QTR, QQR and IR, named micro-F1
    promptcblue_f1_strict   PromptCBLUE's scorer to the letter
    rouge_l_cblue           PromptCBLUE's tokens;  rouge_l_jieba: MOELoRA's words
    rouge_l_sections        PromptCBLUE's scorer for IMCS-V2-MRG;  rouge_l_sections_jieba: MOELoRA
    token_recall_llava, exact_match_llava    LLaVA-Med and Med-MoE for open questions
    contains_answer         the same for closed ones, but of whole words

It does not generate text, judge meaning, or look up terminologies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_medical.evaluation import item_metrics as items
from moe_medical.evaluation import label_metrics as labels
from moe_medical.evaluation import number_metrics as numbers
from moe_medical.evaluation import text_metrics as texts
from moe_medical.evaluation.metric import Answers, Metric

METRICS: dict[str, Metric] = {
    "exact_match": texts.EXACT_MATCH,
    "accuracy": labels.ACCURACY,
    "letter_accuracy": labels.LETTER_ACCURACY,
    "macro_f1": labels.MACRO_F1,
    "micro_f1": labels.MICRO_F1,
    "f1_yes": labels.F1_YES,
    "set_f1": items.SET_F1,
    "entity_f1": items.ENTITY_F1,
    "promptcblue_f1": items.PROMPTCBLUE_F1,
    "token_f1": texts.TOKEN_F1,
    "token_recall": texts.TOKEN_RECALL,
    "rouge_l": texts.ROUGE_L,
    "rouge_l_char": texts.ROUGE_L_CHAR,
    "bleu4_char": texts.BLEU4_CHAR,
    "spearman": numbers.SPEARMAN,
    "pearson": numbers.PEARSON,
}
"""What a task may be scored by."""

ALL_METRICS: dict[str, Metric] = METRICS | {
    "macro_f1_union": labels.MACRO_F1_UNION,
    "weighted_f1": labels.WEIGHTED_F1,
    "contains_answer": labels.CONTAINS_ANSWER,
    "promptcblue_f1_strict": items.PROMPTCBLUE_F1_STRICT,
    "token_precision": texts.TOKEN_PRECISION,
    "token_recall_llava": texts.TOKEN_RECALL_LLAVA,
    "exact_match_llava": texts.EXACT_MATCH_LLAVA,
    "bleu4": texts.BLEU4,
    "rouge_l_cblue": texts.ROUGE_L_CBLUE,
    "rouge_l_jieba": texts.ROUGE_L_JIEBA,
    "rouge_l_sections": texts.ROUGE_L_SECTIONS,
    "rouge_l_sections_jieba": texts.ROUGE_L_SECTIONS_JIEBA,
}
"""Those and the ones that are only told beside them."""

ONE_LABEL = frozenset({"accuracy", "letter_accuracy", "macro_f1", "micro_f1", "f1_yes", "exact_match"})
"""Metrics of answers that may be one of listed options."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "exact_match": ("token_f1",),
    "accuracy": ("macro_f1", "contains_answer"),
    "macro_f1": ("macro_f1_union", "micro_f1", "weighted_f1"),
    "micro_f1": ("weighted_f1", "macro_f1"),
    "f1_yes": ("accuracy",),
    "promptcblue_f1": ("promptcblue_f1_strict",),
    "token_f1": ("exact_match",),
    "token_recall": (
        "token_precision",
        "token_f1",
        "exact_match",
        "bleu4",
        "token_recall_llava",
        "exact_match_llava",
    ),
    "rouge_l": ("token_f1",),
    "rouge_l_char": ("rouge_l_cblue", "rouge_l_jieba", "rouge_l_sections", "rouge_l_sections_jieba"),
    "spearman": ("pearson",),
    "pearson": ("spearman",),
}
"""Metric -> the variants that are told beside it, as far as they apply to the answers."""


@dataclass(frozen=True)
class Scores:
    """What a task's answers are worth."""

    score: float
    low: float | None = None
    """Of the 95 % interval; None without resamples."""
    high: float | None = None
    all: dict[str, float] = field(default_factory=dict)
    """Score by the task's metric and by each variant that applies."""


def score(
    metric: str,
    predictions: Sequence[str],
    targets: Sequence[str],
    language: str = "en",
    choices: Sequence[Sequence[str]] = (),
) -> float:
    """Scores `predictions` against `targets`, row by row in the same order.

    Args:
        metric: A name in `ALL_METRICS`.
        predictions: Generated text, one per row.
        targets: Reference text, one per row.
        language: Code of the task's language; for "zh" tokens are Chinese characters.
        choices: The options of each row, for `promptcblue_f1`.

    Returns:
        A number where higher is better, in [0, 1], or in [-1, 1] for the correlations.

    Raises:
        ValueError: The metric is unknown, there are no rows, or the lists differ in length.
    """
    if metric not in ALL_METRICS:
        raise ValueError(f"metric must be one of {', '.join(ALL_METRICS)}, got {metric!r}")
    found = ALL_METRICS[metric]
    return found.score(found.measure(_checked(metric, Answers(predictions, targets, language, choices))))


def all_scores(metric: str, answers: Answers, resamples: int) -> Scores:
    """A task's score with its 95 % interval over rows, and the scores by the metric's variants.

    Raises:
        ValueError: as `score`.
    """
    main = METRICS[metric]
    measured = main.measure(_checked(metric, answers))
    value = main.score(measured)
    low, high = main.interval(measured, resamples) if resamples else (None, None)
    beside = {name: ALL_METRICS[name] for name in VARIANTS.get(metric, ())}
    others = {n: m.score(m.measure(answers)) for n, m in beside.items() if m.applies(answers)}
    return Scores(value, low, high, {metric: value, **others})


def left_out(metrics: Iterable[str]) -> list[str]:
    """Variants of these metrics that are not told because jieba, which is no dependency, is missing."""
    names = {name for metric in metrics for name in VARIANTS.get(metric, ())}
    return [] if texts.HAS_JIEBA else sorted(name for name in names if name.endswith("_jieba"))


def _checked(metric: str, answers: Answers) -> Answers:
    sizes = {len(answers.targets), len(answers.predictions), len(answers.choices or answers.targets)}
    if not answers.targets or len(sizes) > 1:
        raise ValueError(
            f"{metric} needs one prediction per target and at least one row, "
            f"got {len(answers.predictions)} predictions and {len(answers.targets)} targets"
        )
    return answers
