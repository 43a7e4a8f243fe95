"""Records as public medical data sets publish them -> the columns that templates use.

Decisions: a format is named in the task YAML (`format:`), never guessed from the data. A record keeps
its own columns and gains those of its kind: `question`, `choices`, `choice_letters` and `answer` for an
exam; `history`, `question` and `answer` for a conversation, one row per answer of it. Options are never
shuffled; an option without text is left out and the others keep their letters. A record that is not of
the format is a `BadShape`, which names columns and never quotes them.

Where each format was read:
- promptcblue: michael-wzhu/PromptCBLUE, datasets/PromptCBLUE/toy_examples and src/evaluation. JSON
  Lines.
- medqa: jind11/MedQA README and `questions/US/*.jsonl`: question, options {A..}, answer (the text of the
  right option), answer_idx (its letter).
- medmcqa: medmcqa/medmcqa README and dataset.py: opa..opd, cop 1-4. medmcqa_hub: the hub's copy, whose
  `cop` is a class label 0-3, -1 where hidden.
- cmb: FreedomIntelligence/CMB README and data/CMB-test-choice-answer.json: option {A..}, answer of one
  or more letters.
- cmexam: williamliujl/CMExam, src/preprocess/generate_prompt.py: CSV with Question, Options (lines "A
  text"), Answer.
- mmlu: hendrycks/test data/*.csv, no header. cmmlu: haonan-li/CMMLU data/*.csv, header with an index
  column. ceval: the columns id,question,A,B,C,D,answer,explanation of hkust-nlp/ceval; test files have
  no answer.
- ming: MediaBrain-SJTU/MING, ming/eval/model_diverse_gen_batch.py and eval_em.py: conversations,
  eval.answer.
- llava: jiangsongtao/Med-MoE, model_vqa_med.py (which also reads the misspelt `conversatons`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]
RecordFormat = Callable[[Row], list[Row]]

_OPTION_LINE = re.compile(r"\s*([A-Z])(?:\s*[.．、:：)）]\s*|\s+)(.*)")
_BETWEEN_LETTERS = re.compile(r"[\s,;、.。和]+")
_SPEAKERS = ("human", "gpt")
_IMAGE_MARK = "<image>"


class BadShape(Exception):
    """Why a record cannot be used. The reason names columns and types and never quotes a text."""


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The column as text; BadShape where there is none."""
    if column not in row:
        raise BadShape(f"missing column {column!r}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadShape(f"column {column!r} is of type {type(value).__name__}")
    return str(value).strip()


def letters_of(answer: str) -> str:
    """ "B, A" -> "AB": the option letters of an answer, each once, in order; "" where it is anything else."""
    joined = _BETWEEN_LETTERS.sub("", unicodedata.normalize("NFKC", answer)).upper()
    return "".join(sorted(set(joined))) if re.fullmatch("[A-Z]+", joined) else ""


def _exam(row: Row, question: str, options: list[tuple[str, str]], answer: str) -> list[Row]:
    """The row with its options and its answer as letters."""
    shown = [(letter, text) for letter, text in options if text]
    letters = letters_of(answer)
    if not question:
        raise BadShape("empty question")
    if len(shown) < 2:
        raise BadShape("fewer than two options")
    if not answer:
        raise BadShape("no answer")
    if not letters or not set(letters) <= {letter for letter, _ in shown}:
        raise BadShape("the answer is not the letter of an option")
    choices = {"choices": [text for _, text in shown], "choice_letters": [letter for letter, _ in shown]}
    return [{**row, **choices, "question": question, "answer": letters}]


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else text_of(row, column)


def _lettered(row: Row, column: str) -> list[tuple[str, str]]:
    """Options of an object {A: text, ...}, by letter."""
    options = row.get(column)
    if not isinstance(options, dict) or not all(re.fullmatch("[A-Z]", str(key)) for key in options):
        raise BadShape(f"column {column!r} is not an object of options A, B, ...")
    return [(letter, _optional_text(options, letter)) for letter in sorted(options)]


def _promptcblue(row: Row) -> list[Row]:
    choices = row.get("answer_choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise BadShape("column 'answer_choices' is neither a list of texts nor null")
    if not text_of(row, "target"):
        raise BadShape("no answer")
    text_of(row, "input")
    return [{**row, "choices": choices or []}]


def _medqa(row: Row) -> list[Row]:
    options = _lettered(row, "options")
    answer = _optional_text(row, "answer_idx")
    if not answer:
        written = text_of(row, "answer")
        answer = next((letter for letter, text in options if text == written), written)
    return _exam(row, text_of(row, "question"), options, answer)


def _medmcqa(first: int) -> RecordFormat:
    """`cop` is the number of the right option, counted from `first`."""

    def read(row: Row) -> list[Row]:
        options = [(letter.upper(), _optional_text(row, f"op{letter}")) for letter in "abcd"]
        number = _optional_text(row, "cop")
        if number in ("", "-1"):
            raise BadShape("no answer")
        if number not in [str(first + i) for i in range(4)]:
            raise BadShape(f"column 'cop' is not a number from {first} to {first + 3}")
        return _exam(row, text_of(row, "question"), options, "ABCD"[int(number) - first])

    return read


def _cmb(row: Row) -> list[Row]:
    return _exam(row, text_of(row, "question"), _lettered(row, "option"), _optional_text(row, "answer"))


def _cmexam(row: Row) -> list[Row]:
    options: list[tuple[str, str]] = []
    for line in text_of(row, "Options").splitlines():
        found = _OPTION_LINE.fullmatch(line)
        if found:
            options.append((found[1], found[2].strip()))
        elif options and line.strip():  # an option that goes on
            options[-1] = (options[-1][0], f"{options[-1][1]} {line.strip()}".strip())
        elif line.strip():
            raise BadShape("column 'Options' has a line before option A")
    if len({letter for letter, _ in options}) != len(options):
        raise BadShape("column 'Options' names a letter twice")
    return _exam(row, text_of(row, "Question"), options, _optional_text(row, "Answer"))


def _four_columns(question: str, answer: str) -> RecordFormat:
    """A CSV row with one column per option, A to D."""

    def read(row: Row) -> list[Row]:
        options = [(letter, text_of(row, letter)) for letter in "ABCD"]
        return _exam(row, text_of(row, question), options, _optional_text(row, answer))

    return read


def _ming(row: Row) -> list[Row]:
    rows = _conversation(row, row.get("conversations"), has_answer=False)
    evaluated = row.get("eval")
    if isinstance(evaluated, dict) and evaluated.get("answer") is not None:
        answer = evaluated["answer"]
        parts = answer if isinstance(answer, list) else [answer]
        rows[-1]["answer"] = "".join(text_of({"eval.answer": part}, "eval.answer") for part in parts)
    if not rows[-1].get("answer"):
        raise BadShape("no answer")
    return rows


def _llava(row: Row) -> list[Row]:
    turns = row["conversations"] if "conversations" in row else row.get("conversatons")
    return _conversation(row, turns, has_answer=True)


def _conversation(row: Row, turns: object, has_answer: bool) -> list[Row]:
    """One row per answer, with the turns before it as `history` ("" at the first).

    Args:
        row: The record, whose columns each row keeps.
        turns: `[{from: human, value}, {from: gpt, value}, ...]`.
        has_answer: Whether the last turn must be an answer.
    """
    values = _spoken(turns)
    if has_answer and len(values) % 2:
        raise BadShape("the conversation does not end with an answer")
    rows = []
    history = ""
    for i in range(0, len(values), 2):
        question = values[i]
        answer = "".join(values[i + 1 : i + 2])
        rows.append({**row, "history": history, "question": question, "answer": answer, "response": answer})
        history += f"User: {question}\nAssistant: {answer}\n"
    return rows


def _spoken(turns: object) -> list[str]:
    """What is said, human and gpt in turn, without the mark that stands for the image."""
    if not isinstance(turns, list) or not turns:
        raise BadShape("no conversation")
    values = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != _SPEAKERS[i % 2]:
            raise BadShape("the conversation is not human and gpt in turn")
        values.append(text_of(turn, "value").replace(_IMAGE_MARK, "").strip())
    if not all(values):
        raise BadShape("a turn of the conversation is empty")
    return values


FORMATS: Mapping[str, RecordFormat] = {
    "promptcblue": _promptcblue,
    "medqa": _medqa,
    "medmcqa": _medmcqa(1),
    "medmcqa_hub": _medmcqa(0),
    "cmb": _cmb,
    "cmexam": _cmexam,
    "mmlu": _four_columns("question", "answer"),
    "cmmlu": _four_columns("Question", "Answer"),
    "ceval": _four_columns("question", "answer"),
    "ming": _ming,
    "llava": _llava,
}

LETTERS = string.ascii_uppercase
