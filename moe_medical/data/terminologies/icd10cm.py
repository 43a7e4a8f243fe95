"""ICD-10-CM as a tree of entries, read from the tabular list that `simple-icd-10-cm` ships.

Source: the CMS/NCHS tabular list (public domain). Codes made by a seventh character alone (initial encounter,
subsequent, sequela) are not expanded: they repeat their parent's title.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_medical.data.terminologies.packages import DataPackage
from moe_medical.data.terminologies.rows import digest

PACKAGE = DataPackage("simple-icd-10-cm", "1.5.0", ("icd10c-tabular-*.xml",))

_REFERENCE = re.compile(r"\(([A-Z]\d[0-9A-Z](?:\.[0-9A-Z]+)?)\.?-?\)")
_RANGE = re.compile(r"\s*\([A-Z0-9-]+\)$")


@dataclass(frozen=True)
class Entry:
    """A category (I21) or a subcategory (I21.0) with the notes below it."""

    code: str
    title: str
    chapter: str
    lineage: tuple[str, ...]
    """Codes from the block down to this entry, e.g. ("I20-I25", "I21", "I21.0")."""
    inclusion_terms: tuple[str, ...]
    excludes1: tuple[str, ...]
    excludes2: tuple[str, ...]
    code_first: tuple[str, ...]

    @property
    def category(self) -> str:
        """The three-character code above, or the entry's own."""
        return self.code[:3]

    @property
    def parent(self) -> str:
        """The code one level up, or the block."""
        return self.lineage[-2]


class Icd10cm:
    """Every entry by its code, in the order of the tabular list; blocks are entries of `blocks`."""

    def __init__(self, entries: Iterable[Entry], blocks: Iterable[Entry]):
        self.entries = {entry.code: entry for entry in entries}
        self.blocks = {block.code: block for block in blocks}

    @cached_property
    def children(self) -> dict[str, list[Entry]]:
        """The entries directly below each code that has any."""
        below: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries.values():
            below[entry.parent].append(entry)
        return dict(below)

    @cached_property
    def categories(self) -> dict[str, list[Entry]]:
        """The categories of each chapter."""
        by_chapter: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries.values():
            if entry.code == entry.category:
                by_chapter[entry.chapter].append(entry)
        return dict(by_chapter)

    @cached_property
    def bearers(self) -> dict[str, tuple[str, ...]]:
        """The codes of each title; a subcategory may repeat the title of one elsewhere."""
        codes: dict[str, list[str]] = defaultdict(list)
        for entry in self.entries.values():
            codes[entry.title].append(entry.code)
        return {title: tuple(bearers) for title, bearers in codes.items()}

    def spread(self, per_category: int) -> Iterator[Entry]:
        """At most so many entries of each category, so that injuries do not crowd out the rest."""
        by_category: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries.values():
            by_category[entry.category].append(entry)
        for entries in by_category.values():
            yield from sorted(entries, key=lambda entry: digest(entry.code))[:per_category]

    def referenced(self, note: str) -> Entry | None:
        """The one entry that a note such as `old myocardial infarction (I25.2)` points to, if just one."""
        codes = _REFERENCE.findall(note)
        return self.entries.get(codes[0]) if len(codes) == 1 else None


def read_icd10cm(files: tuple[Path, ...]) -> Icd10cm:
    """Parses the tabular list.

    Args:
        files: The XML file alone.
    """
    entries: list[Entry] = []
    blocks: list[Entry] = []
    for chapter in ElementTree.parse(files[0]).getroot().findall("chapter"):
        chapter_title = _title(chapter)
        for section in chapter.findall("section"):
            block = _entry(section, section.get("id", ""), chapter_title, ())
            blocks.append(block)
            entries.extend(_below(section, chapter_title, block.lineage))
    return Icd10cm(entries, blocks)


def _below(element: ElementTree.Element, chapter: str, lineage: tuple[str, ...]) -> Iterator[Entry]:
    for child in element.findall("diag"):
        entry = _entry(child, (child.findtext("name") or "").strip(), chapter, lineage)
        yield entry
        yield from _below(child, chapter, entry.lineage)


def _entry(element: ElementTree.Element, code: str, chapter: str, lineage: tuple[str, ...]) -> Entry:
    return Entry(
        code=code,
        title=_title(element),
        chapter=chapter,
        lineage=(*lineage, code),
        inclusion_terms=_notes(element, "inclusionTerm"),
        excludes1=_notes(element, "excludes1"),
        excludes2=_notes(element, "excludes2"),
        code_first=_notes(element, "codeFirst"),
    )


def _title(element: ElementTree.Element) -> str:
    """The description; chapters and blocks end with their range of codes, which is cut."""
    return _RANGE.sub("", " ".join((element.findtext("desc") or "").split()))


def _notes(element: ElementTree.Element, tag: str) -> tuple[str, ...]:
    notes = (" ".join((note.text or "").split()) for note in element.findall(f"{tag}/note"))
    return tuple(note for note in notes if note)
