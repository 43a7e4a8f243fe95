"""The tasks on the terms of the HPO: names, lay names, definitions, organ systems, hierarchy.

Decisions: the ontology's texts are used whole and unaltered, as its licence asks, so the long definitions of
phenotypes are left out; a definition that holds the term's own name is not asked for that name.
Multiple-choice distractors lie close by in the ontology, never above or below the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from moe_medical.data.terminologies.hpo import Hpo, Term
from moe_medical.data.terminologies.rows import Choice, Row, TaskRecipe, seeded

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]%]{2}\.)\s+(?=[A-Z])")
_ACRONYM = re.compile(r"^[A-Z][A-Za-z0-9-]{1,6}$")


def is_one_sentence(definition: str) -> bool:
    """Whether the definition has no full stop that ends a sentence before its end."""
    return bool(definition) and not _SENTENCE_END.search(definition)


def _hides_name(term: Term) -> bool:
    return bool(term.definition) and term.name.lower() not in term.definition.lower()


def _briefly_defined(hpo: Hpo) -> Iterator[Term]:
    return (term for term in hpo.phenotypes if is_one_sentence(term.definition))


def named_by(type: str) -> Callable[[Hpo], Iterator[Row]]:
    """The rows that ask for the term behind its exact synonyms of one type."""

    def rows(hpo: Hpo) -> Iterator[Row]:
        for term in hpo.phenotypes:
            for text in term.names(type):
                yield Row(text, term.name, (term.id,))

    return rows


def abbreviation(hpo: Hpo) -> Iterator[Row]:
    """VSD -> Ventricular septal defect; acronyms only, not `Abnormal EEG`."""
    for term in hpo.phenotypes:
        for text in term.names("abbreviation"):
            if _ACRONYM.match(text) and sum(letter.isupper() for letter in text) >= 2:
                yield Row(text, term.name, (term.id,))


def definition_to_term(hpo: Hpo) -> Iterator[Row]:
    """A definition -> the phenotype."""
    for term in filter(_hides_name, _briefly_defined(hpo)):
        yield Row(term.definition, term.name, (term.id,))


def term_to_definition(hpo: Hpo) -> Iterator[Row]:
    """A phenotype -> its definition."""
    for term in _briefly_defined(hpo):
        yield Row(term.name, term.definition, (term.id,))


def qualifier(hpo: Hpo) -> Iterator[Row]:
    """The definition of a mode of inheritance, an onset or a course -> its name."""
    for term in filter(_hides_name, hpo.qualifiers):
        yield Row(term.definition, term.name, (term.id,))


def organ_system(hpo: Hpo) -> Iterator[Row]:
    """A phenotype of just one organ system -> that system."""
    for term in hpo.phenotypes:
        systems = hpo.systems(term.id)
        if len(systems) == 1 and systems[0] != term.id:
            yield Row(term.name, hpo.terms[systems[0]].name, (term.id,))


def is_a(hpo: Hpo) -> Iterator[Row]:
    """Two phenotypes -> whether the first lies below the second; a wrong one is a right one's sibling."""
    for term in hpo.phenotypes:
        random = seeded("is_a", term.id)
        above = sorted(each for each in _proper_ancestors(hpo, term) if not _is_system(hpo, each))
        if not above:
            continue
        right = random.choice(above)
        yield _kind_of(hpo, term.id, right, "yes")
        beside = [each for each in _siblings(hpo, right) if not hpo.related(each, term.id)]
        if beside:
            yield _kind_of(hpo, term.id, random.choice(beside), "no")


def _proper_ancestors(hpo: Hpo, term: Term) -> frozenset[str]:
    below_root = {id for id in hpo.ancestors[term.id] if hpo.systems(id)}
    return frozenset(below_root - {term.id})


def _is_system(hpo: Hpo, id: str) -> bool:
    return hpo.systems(id) == [id]


def _siblings(hpo: Hpo, id: str) -> list[str]:
    return sorted({each for parent in hpo.terms[id].parents for each in hpo.children[parent]} - {id})


def _kind_of(hpo: Hpo, first: str, second: str, answer: str) -> Row:
    text = f"{hpo.terms[first].name}\nUnder: {hpo.terms[second].name}"
    return Row(text, answer, (first, second), ("yes", "no"))


def choose_term(hpo: Hpo) -> Iterator[Choice]:
    """A definition -> which of four neighbouring phenotypes it defines."""
    for term in filter(_hides_name, _briefly_defined(hpo)):
        near = [each for each in _siblings(hpo, term.id) if not hpo.related(each, term.id)]
        yield Choice(term.definition, term.name, (term.id,), {hpo.terms[each].name: each for each in near})


TERM_TASKS: dict[str, TaskRecipe[Hpo]] = {
    "synonym_to_term": TaskRecipe("Give the HPO term for this clinical finding.", named_by("")),
    "lay_to_term": TaskRecipe(
        "Give the HPO term for this plain-language description.", named_by("layperson")
    ),
    "abbreviation": TaskRecipe("Spell out this clinical abbreviation.", abbreviation, holdout=0.2),
    "definition_to_term": TaskRecipe("Name the phenotype that is defined here.", definition_to_term),
    "term_to_definition": TaskRecipe("Define this phenotype in one sentence.", term_to_definition),
    "qualifier": TaskRecipe(
        "Name the mode of inheritance or clinical course that is defined here.", qualifier, holdout=0.2
    ),
    "organ_system": TaskRecipe("Which organ system does this phenotype belong to?", organ_system),
    "is_a": TaskRecipe(
        "Does the HPO file the first phenotype under the second? Answer yes or no.",
        is_a,
        holdout=0.15,
        balanced=True,
    ),
    "choose_term": TaskRecipe(
        "Which phenotype is defined here? Answer with the letter.", choose_term, balanced=True
    ),
}
