"""The task kinds: what each asks, how its answer is written, and which metrics suit it.

Decisions: one table, `KINDS`. A task YAML names a kind and may leave out prompt, target and metric; it
then gets the kind's, in the task's language. Default templates exist in English and Chinese. Answers are
written in the form that the metrics read (`evaluation/metrics.py`): a letter or letters, one label,
items joined by "; ", one line per entity type, one line per relation or event. Metrics are listed here
by name only, as data may not import them. Does not read records: `columns.py` makes the derived columns
that the templates use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FREE_TEXT = ("rouge_l", "rouge_l_char", "bleu4_char", "token_f1")
_LABELS = ("accuracy", "macro_f1", "micro_f1")


@dataclass(frozen=True)
class Kind:
    """One task kind."""

    prompts: Mapping[str, str]
    """Language -> default prompt template."""
    target: str
    metrics: tuple[str, ...]
    """Those that suit the kind, the default first."""
    prompts_with_choices: Mapping[str, str] | None = None
    """Default prompts of a task that names a `choices` column, where they differ."""
    chinese_metric: str | None = None
    """The default in Chinese, where it differs."""

    def prompt(self, language: str, has_choices: bool) -> str | None:
        """The default prompt; None where there is none in this language."""
        prompts = self.prompts_with_choices if has_choices and self.prompts_with_choices else self.prompts
        return prompts.get(language.partition("-")[0])

    def metric(self, language: str) -> str:
        """The default metric."""
        is_chinese = language.partition("-")[0] == "zh"
        return self.chinese_metric if is_chinese and self.chinese_metric else self.metrics[0]


_CLASSIFICATION = Kind(
    {
        "en": "Which class does the text belong to?\n{text}",
        "zh": "判断下面文本的类别。\n{text}",
    },
    "{label}",
    ("macro_f1", "accuracy", "micro_f1"),
    {
        "en": "Which class does the text belong to? Answer with one of: {options_listed}.\n{text}",
        "zh": "判断下面文本的类别，从以下类别中选择一个：{options_listed}。\n{text}",
    },
)

_NORMALISATION = Kind(
    {
        "en": "Give the standard term for the expression. Join several with a semicolon.\n{term}",
        "zh": "给出下面表述对应的标准术语，多个术语用分号隔开。\n{term}",
    },
    "{answer}",
    ("exact_match", "accuracy", "set_f1", "token_f1", "promptcblue_f1"),
    {
        "en": "Give the standard terms for the expression, chosen from: {options_listed}. "
        "Join several with a semicolon.\n{term}",
        "zh": "从以下候选中选出与表述对应的标准术语，多个术语用分号隔开。\n"
        "候选：{options_listed}\n表述：{term}",
    },
)

KINDS: Mapping[str, Kind] = {
    "multiple_choice": Kind(
        {
            "en": "Answer the multiple-choice question. Reply with the letter of the correct option, or with "
            "all letters if several are correct.\n{question}\n{options_lettered}",
            "zh": "回答下面的选择题，只写出正确选项的字母；有多个正确选项时写出全部字母。\n"
            "{question}\n{options_lettered}",
        },
        "{answer_letters}",
        ("letter_accuracy", *_LABELS),
    ),
    "yes_no": Kind(
        {
            "en": "Answer the question with yes, no or maybe.\n{question}",
            "zh": "回答下面的问题，只回答“是”“否”或“不确定”。\n{question}",
        },
        "{yes_no}",
        (*_LABELS, "f1_yes"),
    ),
    "classification": _CLASSIFICATION,
    "ner": Kind(
        {
            "en": 'Find every entity in the text. Give one line per type as "type: mention; mention", '
            'or "none".\n{text}',
            "zh": "找出文本中的所有实体，每类一行，格式为“类型：实体；实体”；没有实体时回答“无”。\n{text}",
        },
        "{entity_lines}",
        ("entity_f1", "promptcblue_f1"),
    ),
    "relation": Kind(
        {
            "en": 'Find every relation in the text. Give one line per relation as "head | relation | tail", '
            'or "none".\n{text}',
            "zh": "找出文本中的所有关系，每个关系一行，格式为“头实体 | 关系 | 尾实体”；"
            "没有关系时回答“无”。\n{text}",
        },
        "{relation_lines}",
        ("set_f1", *_LABELS, "exact_match", "token_f1", "promptcblue_f1"),
    ),
    "event": Kind(
        {
            "en": 'Find every event in the text. Give one line per event as "field: value, value | field: '
            'value", or "none".\n{text}',
            "zh": "找出文本中的所有事件，每个事件一行，格式为“字段：值，值 | 字段：值”；"
            "没有事件时回答“无”。\n{text}",
        },
        "{event_lines}",
        ("set_f1", "promptcblue_f1"),
    ),
    "normalisation": _NORMALISATION,
    "set": Kind(
        {
            "en": "List all answers to the question, joined by semicolons.\n{question}",
            "zh": "列出问题的所有答案，用分号隔开。\n{question}",
        },
        "{items}",
        ("set_f1", "promptcblue_f1"),
    ),
    "nli": Kind(
        {
            "en": "Does the premise entail the hypothesis? Answer with the label.\n"
            "Premise: {premise}\nHypothesis: {hypothesis}",
            "zh": "判断前提与假设之间的关系，回答标签。\n前提：{premise}\n假设：{hypothesis}",
        },
        "{label}",
        (*_LABELS, "f1_yes"),
        {
            "en": "What does the premise say about the hypothesis? Answer with one of: {options_listed}.\n"
            "Premise: {premise}\nHypothesis: {hypothesis}",
            "zh": "判断前提与假设之间的关系，从以下标签中选择一个：{options_listed}。\n"
            "前提：{premise}\n假设：{hypothesis}",
        },
    ),
    "similarity": Kind(
        {
            "en": "How similar are the two texts? Answer with the score.\nText 1: {first}\nText 2: {second}",
            "zh": "判断两段文本的相似程度，回答分数。\n文本一：{first}\n文本二：{second}",
        },
        "{score}",
        ("spearman", "pearson", *_LABELS, "f1_yes"),
    ),
    "summarisation": Kind(
        {
            "en": "Summarise the text.\n{text}",
            "zh": "概括下面的内容。\n{text}",
        },
        "{summary}",
        _FREE_TEXT,
        chinese_metric="rouge_l_char",
    ),
    "dialogue": Kind(
        {
            "en": "You are a doctor. Write your next reply in the conversation.\n{dialogue_lines}",
            "zh": "你是一名医生，请写出对话中的下一句回复。\n{dialogue_lines}",
        },
        "{reply}",
        _FREE_TEXT,
        chinese_metric="rouge_l_char",
    ),
    "qa": Kind(
        {
            "en": "Answer the medical question.\n{question}",
            "zh": "回答下面的医学问题。\n{question}",
        },
        "{answer}",
        ("rouge_l", "rouge_l_char", "bleu4_char", "token_f1", "token_recall", "exact_match"),
        chinese_metric="rouge_l_char",
    ),
    "vqa": Kind(
        {
            "en": "Answer the question about the image in a few words.\n{question}",
            "zh": "根据图像用几个词回答问题。\n{question}",
        },
        "{answer}",
        ("exact_match", *_LABELS, "token_recall", "token_f1", "rouge_l"),
    ),
    "generation": Kind(
        {"en": "{input}", "zh": "{input}"},
        "{output}",
        ("token_f1", "exact_match", "rouge_l", "rouge_l_char", "bleu4_char", "set_f1"),
    ),
}

KNOWN_METRICS = tuple(sorted({metric for kind in KINDS.values() for metric in kind.metrics}))
