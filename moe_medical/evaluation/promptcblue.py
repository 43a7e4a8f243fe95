"""The answer texts of PromptCBLUE's extraction tasks -> the items that they state, and reports' sections.

Decisions: the rules are those of PromptCBLUE's own scorer (src/evaluation/post_generate_process.py), also
where it drops or changes what was not offered in `answer_choices`. It knows the data set of a row; here the
targets of a task tell which of five shapes its answers have:

    entities  CMeEE-V2, IMCS-V2-NER    lines "类型实体：甲，乙"; types that were not offered are dropped
    triples   CMeIE                    lines "具有…关系的头尾实体对如下：头实体为甲，尾实体为乙。…"
    events    CHIP-CDEE                a line of four fields, all of which must be right, lists in order
    findings  CHIP-MDCFNPC, IMCS-V2-SR lines "甲：结论"; a conclusion that was not offered becomes the default
    terms     CHIP-CDN                 the last line, "甲，乙"; terms that were not offered are dropped

Without choices nothing is dropped or changed. Of findings and events the first line is the lead and states
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

Item = tuple[str, ...]
Shape = Literal["entities", "triples", "events", "findings", "terms"]

SECTIONS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")
"""Of a report of IMCS-V2-MRG."""
_NOTHING = "没有对应的标准化实体"
_FIELDS = ("主体词", "发生状态", "描述词", "解剖部位")
_LISTS = ("描述词", "解剖部位")
_UNSURE = "无法根据上下文确定病人是否患有该症状"
_UNMARKED = "不标注"
_TRIPLES = "关系的头尾实体对"
_TAIL = "，尾实体为"
_FULL_WIDTH = str.maketrans(":,;", "：，；")


def full_width(text: str) -> str:
    """With the Chinese forms of the marks that separate items, as MOELoRA's scorer reads answers."""
    return text.translate(_FULL_WIDTH)


def answer_shape(targets: Iterable[str]) -> Shape:
    """The shape of a task's answers."""
    texts = [target.strip().split("\n") for target in targets]
    lines = [line for text in texts for line in text]
    if any(_TRIPLES in line for line in lines):
        return "triples"
    if any(line.startswith(f"{_FIELDS[0]}：") for line in lines):
        return "events"
    if any("实体：" in line for line in lines):
        return "entities"
    return "findings" if any("：" in line for text in texts for line in text[1:]) else "terms"


def answer_items(
    text: str, shape: Shape, choices: Sequence[str] = (), spell: Callable[[str], str] = str
) -> set[Item]:
    """What a text states.

    Args:
        text: An answer.
        shape: Of the task's answers.
        choices: What the prompt offered: types, conclusions or terms.
        spell: One spelling of a text; items and choices are compared in it.
    """
    offered = {spell(choice): None for choice in choices}
    items = _READERS[shape](text.strip().split("\n"), offered, spell)
    return {tuple(map(spell, item)) for item in items}


_Offered = dict[str, None]
_Spell = Callable[[str], str]


def _entities(lines: list[str], offered: _Offered, spell: _Spell) -> list[Item]:
    found: list[Item] = []
    for line in lines:
        kind, mark, mentions = line.partition("实体：")
        if mark and (not offered or spell(kind) in offered):
            found += [(kind, mention) for mention in _parts(mentions)]
    return found


def _triples(lines: list[str], offered: _Offered, spell: _Spell) -> list[Item]:
    found: list[Item] = []
    for line in lines:
        relation = line.partition(_TRIPLES)[0][len("具有") :].strip()
        for piece in line.replace(f"具有{relation}{_TRIPLES}如下：", "").split("。"):
            head, *tails = piece.split(_TAIL)
            if tails:
                names = (head.replace("头实体为", "").strip(), tails[0].replace("尾实体为", "").strip())
                found.append((relation, *names))
    return found


def _events(lines: list[str], offered: _Offered, spell: _Spell) -> list[Item]:
    return [_event(line) for line in lines[1:]]


def _event(line: str) -> Item:
    values = dict.fromkeys(_FIELDS, "")
    for field in line.split("；"):
        name, mark, value = field.partition("：")
        if mark and name in values:
            values[name] = "，".join(_parts(value)) if name in _LISTS else value.strip()
    return tuple(f"{name}：{value}" for name, value in values.items())


def _findings(lines: list[str], offered: _Offered, spell: _Spell) -> list[Item]:
    default = _UNSURE if spell(_UNSURE) in offered else _UNMARKED
    found: list[Item] = []
    for line in lines[1:]:
        if line.count("：") == 1:
            finding, conclusion = line.split("：")
            known = not offered or spell(conclusion) in offered
            found.append((finding.strip(), conclusion if known else default))
    return found


def _terms(lines: list[str], offered: _Offered, spell: _Spell) -> list[Item]:
    terms = [term for term in _parts(lines[-1]) if term != _NOTHING]
    return [(term,) for term in terms if not offered or spell(term) in offered]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split("，") if part.strip()]


_READERS: dict[Shape, Callable[[list[str], _Offered, _Spell], list[Item]]] = {
    "entities": _entities,
    "triples": _triples,
    "events": _events,
    "findings": _findings,
    "terms": _terms,
}


def report_sections(text: str) -> dict[str, str]:
    """Section -> text of a report of IMCS-V2-MRG, whose first line is the lead; of two, the later one."""
    found = {}
    for line in text.strip().split("\n")[1:]:
        name, mark, rest = line.partition("：")
        if mark and name in SECTIONS:
            found[name] = rest.rpartition(f"{name}：")[2].strip()
    return found
