"""The tasks on ICD-10-CM: coding, normalisation, classification, hierarchy and coding rules.

Decisions: titles are never shortened; rows that are too long are dropped by `rows.py`. Where siblings differ
in one character only (right or left, stage 1 or 2), the concept is the parent: siblings share a split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from moe_medical.data.terminologies.icd10cm import Entry, Icd10cm
from moe_medical.data.terminologies.rows import Choice, Row, TaskRecipe, choose, digest, seeded

MIN_CHAPTER_CATEGORIES = 10
MAX_SUBDIVISIONS = 5
MAX_CAUSES = 2
SIDES = ("right", "left", "bilateral", "unspecified")
DEEP_DAMAGE = "deep tissue damage"
STAGES = ("stage 1", "stage 2", "stage 3", "stage 4", "unstageable", DEEP_DAMAGE, "unspecified stage")

# The organ goes with the side, since `right eye` has the sibling `bilateral`.
_SIDE = re.compile(rf"\b({'|'.join(SIDES)})\b(?: (?:eye|ear)\b)?", re.IGNORECASE)
_STAGE = re.compile(rf"^Pressure ulcer of (?P<site>.+), (?P<stage>{'|'.join(STAGES)})$")
_DEEP = re.compile(r"^Pressure-induced deep tissue damage of (?P<site>.+)$")


def code_to_description(icd: Icd10cm) -> Iterator[Row]:
    """I21 -> Acute myocardial infarction."""
    for entry in icd.spread(per_category=4):
        yield Row(entry.code, entry.title, (entry.code,))


def description_to_code(icd: Icd10cm) -> Iterator[Row]:
    """Acute myocardial infarction -> I21."""
    for entry in icd.spread(per_category=4):
        yield Row(entry.title, entry.code, (entry.code,))


def synonym_to_description(icd: Icd10cm) -> Iterator[Row]:
    """An inclusion term -> the title of the code that it is filed under, unless that is a catch-all."""
    for entry in icd.spread(per_category=12):
        for term in entry.inclusion_terms:
            catch_all = entry.title.startswith("Other ") or term.endswith(":")
            if not catch_all and term.lower() not in entry.title.lower():
                yield Row(term, entry.title, (entry.code,))


def chapter(icd: Icd10cm) -> Iterator[Row]:
    """A title -> the title of its chapter."""
    for entry in icd.spread(per_category=4):
        if len(icd.categories[entry.chapter]) >= MIN_CHAPTER_CATEGORIES:
            yield Row(entry.title, entry.chapter, (entry.code,))


def laterality(icd: Icd10cm) -> Iterator[Row]:
    """A code and its title with the side blanked out -> the side that the code's character stands for."""
    for parent, children in icd.children.items():
        for masked, by_side in _sides(children).items():
            if {"right", "left"} <= by_side.keys():
                for side, code in by_side.items():
                    yield Row(f"{code}: {masked}", side, (parent,), SIDES)


def _sides(children: list[Entry]) -> dict[str, dict[str, str]]:
    """Masked title -> side -> code, of the entries that name just one side."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in children:
        if len(found := _SIDE.findall(entry.title)) == 1:
            groups[_SIDE.sub("___", entry.title)][found[0].lower()] = entry.code
    return groups


def pressure_ulcer_stage(icd: Icd10cm) -> Iterator[Row]:
    """A code of L89 and its site -> the stage that its last character stands for."""
    for entry in icd.entries.values():
        if match := _STAGE.match(entry.title) or _DEEP.match(entry.title):
            stage = match.groupdict().get("stage", DEEP_DAMAGE)
            yield Row(f"{entry.code}: pressure ulcer of {match['site']}", stage, (entry.parent,), STAGES)


def is_a(icd: Icd10cm) -> Iterator[Row]:
    """A title and a category of its block -> whether it is filed under that category."""
    for entry in icd.spread(per_category=8):
        if entry.code == entry.category:
            continue
        own = icd.entries[entry.category]
        others = [each for each in icd.children[entry.lineage[0]] if each != own]
        if others:
            yield _filed_below(entry, own, "yes")
            yield _filed_below(entry, seeded("is_a", entry.code).choice(others), "no")


def _filed_below(entry: Entry, category: Entry, answer: str) -> Row:
    text = f"{entry.title}\nCategory: {category.title}"
    return Row(text, answer, (entry.code, category.code), ("yes", "no"))


def coded_together(icd: Icd10cm) -> Iterator[Row]:
    """Two titles -> no if an Excludes1 note keeps them apart, yes if an Excludes2 note allows both."""
    apart = _excluded_pairs(icd, "excludes1")
    allowed = _excluded_pairs(icd, "excludes2")
    for first, second in sorted(apart - allowed):
        yield _together(icd, first, second, "no")
    for first, second in sorted(allowed - apart):
        if not _kept_apart(icd, first, second, apart):
            yield _together(icd, first, second, "yes")


def _excluded_pairs(icd: Icd10cm, note_kind: str) -> set[tuple[str, str]]:
    """Sorted code pairs, one of which names the other in a note of its own or of its block."""
    pairs = set()
    for entry in [*icd.blocks.values(), *icd.entries.values()]:
        for note in getattr(entry, note_kind):
            other = icd.referenced(note)
            if other and other.code not in entry.lineage and entry.code not in other.lineage:
                pairs.add((min(entry.code, other.code), max(entry.code, other.code)))
    return pairs


def _kept_apart(icd: Icd10cm, first: str, second: str, apart: set[tuple[str, str]]) -> bool:
    """Whether an Excludes1 note anywhere above the two codes names the other's line."""
    above = ((x, y) for x in _lineage(icd, first) for y in _lineage(icd, second))
    return any((min(pair), max(pair)) in apart for pair in above)


def _lineage(icd: Icd10cm, code: str) -> tuple[str, ...]:
    return (icd.entries.get(code) or icd.blocks[code]).lineage


def _together(icd: Icd10cm, first: str, second: str, answer: str) -> Row:
    titles = [f"{code} {(icd.entries.get(code) or icd.blocks[code]).title}" for code in (first, second)]
    return Row("\n".join(titles), answer, (first, second), ("yes", "no"))


def choose_description(icd: Icd10cm) -> Iterator[Choice]:
    """A code -> which of four titles of its block, all of codes as long as its own, it stands for."""
    by_level: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in icd.entries.values():
        by_level[entry.lineage[0], len(entry.code)].append(entry)
    for entry in icd.spread(per_category=4):
        level = by_level[entry.lineage[0], len(entry.code)]
        yield Choice(entry.code, entry.title, icd.bearers[entry.title], _others(level, entry))


def _others(pool: Iterable[Entry], answer: Entry) -> dict[str, str]:
    return {each.title: each.code for each in pool if each.title != answer.title}


def odd_one_out(icd: Icd10cm) -> Iterator[Row]:
    """Three titles of one category and one of another chapter -> the stranger's letter."""
    chapters = sorted(icd.categories)
    for chapter_title, categories in icd.categories.items():
        for category in categories:
            family = [each.title for each in icd.children.get(category.code, [])]
            for turn in range(4 if len(family) >= 4 else 0):
                random = seeded("odd_one_out", category.code, str(turn))
                elsewhere = random.choice([each for each in chapters if each != chapter_title])
                stranger = random.choice(icd.categories[elsewhere])
                concepts = (category.code, stranger.code)
                yield choose("", stranger.title, random.sample(family, 3), concepts)


def subdivisions(icd: Icd10cm) -> Iterator[Row]:
    """An entry -> the titles directly below it, as a set; not where they name the two sides."""
    for code, children in icd.children.items():
        titles = [each.title for each in children]
        if code not in icd.entries or not 2 <= len(titles) <= MAX_SUBDIVISIONS:
            continue
        sides = {side for title in titles for side in _SIDE.findall(title.lower())}
        if not {"right", "left"} <= sides and not any(";" in title for title in titles):
            yield Row(f"{code} {icd.entries[code].title}", "; ".join(titles), (code,))


def code_first(icd: Icd10cm) -> Iterator[Choice]:
    """A manifestation -> which of four conditions its `code first` note names; three are of other blocks."""
    for entry in icd.entries.values():
        causes = [cause for note in entry.code_first if (cause := icd.referenced(note))]
        blocks = {each.lineage[0] for each in [*causes, entry]}
        for cause in sorted(causes, key=lambda each: digest(f"{entry.code} {each.code}"))[:MAX_CAUSES]:
            pool = [each for each in icd.categories[cause.chapter] if each.lineage[0] not in blocks]
            concepts = (entry.code, *icd.bearers[cause.title])
            yield Choice(entry.title, cause.title, concepts, _others(pool, cause))


TASKS: dict[str, TaskRecipe[Icd10cm]] = {
    "code_to_description": TaskRecipe("Give the title of this ICD-10-CM code.", code_to_description),
    "description_to_code": TaskRecipe("Give the ICD-10-CM code of this title.", description_to_code),
    "synonym_to_description": TaskRecipe(
        "Give the ICD-10-CM title that this diagnosis is coded under.", synonym_to_description
    ),
    "chapter": TaskRecipe("Name the ICD-10-CM chapter of this condition.", chapter),
    "laterality": TaskRecipe("Which side does this ICD-10-CM code stand for?", laterality),
    "pressure_ulcer_stage": TaskRecipe(
        "Which stage does this ICD-10-CM code stand for?", pressure_ulcer_stage, holdout=0.2
    ),
    "is_a": TaskRecipe(
        "Is this condition filed under this ICD-10-CM category? Answer yes or no.",
        is_a,
        holdout=0.2,
        balanced=True,
    ),
    "coded_together": TaskRecipe(
        "Do the ICD-10-CM Excludes notes allow coding these two together? Answer yes or no.",
        coded_together,
        holdout=0.2,
        balanced=True,
    ),
    "choose_description": TaskRecipe(
        "Which is the title of this ICD-10-CM code? Answer with the letter.",
        choose_description,
        balanced=True,
    ),
    "odd_one_out": TaskRecipe(
        "Which condition does not belong with the others? Answer with the letter.",
        odd_one_out,
        holdout=0.2,
        balanced=True,
    ),
    "subdivisions": TaskRecipe("List the direct subdivisions of this ICD-10-CM entry.", subdivisions),
    "code_first": TaskRecipe(
        "Which condition does ICD-10-CM code first when this one comes with it? Answer with the letter.",
        code_first,
        holdout=0.25,
    ),
}
