"""The answer texts of PromptCBLUE's extraction tasks -> the items that they state.

Decisions: a line's own shape tells what it states, so one reader serves entities, triples, events, findings
with an attribute, and standard terms. The shapes are those that PromptCBLUE's own scorer reads
(src/evaluation/post_generate_process.py). Unlike it, this reads no list of choices: a type or term that was
not offered counts as a wrong item.
"""

from __future__ import annotations

import re

Item = tuple[str, ...]

_LEAD = ("上述", "当前对话")
"""What the line that introduces the answer begins with; it states nothing."""
_NOTHING = "没有对应的标准化实体"
_EVENT = "主体词："
_TRIPLES = re.compile("具有(.+?)关系的头尾实体对如下：(.*)")
_TRIPLE = re.compile("头实体为(.*?)，尾实体为(.*?)(?:。|$)")


def answer_items(text: str) -> set[Item]:
    """What a text states: (relation, head, tail), a tuple of an event's "field：value", or (label, item)."""
    return {item for line in text.splitlines() for item in _line_items(line.strip())}


def _line_items(line: str) -> list[Item]:
    if not line or line.startswith(_LEAD) or line == _NOTHING:
        return []
    if found := _TRIPLES.match(line):
        return [(found[1], *pair) for pair in _TRIPLE.findall(found[2])]
    if line.startswith(_EVENT):
        fields = (field.split("：", 1) for field in line.split("；") if "：" in field)
        return [tuple(sorted(f"{name}：{part}" for name, values in fields for part in _parts(values)))]
    label, colon, values = line.partition("：")
    return [(label if colon else "", part) for part in _parts(values if colon else line)]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split("，") if part.strip()]
