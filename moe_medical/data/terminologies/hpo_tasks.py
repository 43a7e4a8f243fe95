"""The tasks on the HPO: its terms (names, definitions, systems, hierarchy), and its annotations of diseases.

Decisions: the ontology's texts are used whole and unaltered, as its licence asks, so the long definitions of
phenotypes are left out; a definition that holds the term's own name is not asked for that name.
Multiple-choice distractors lie close by in the ontology, never above or below the answer. Phenotypes,
inheritance, onset and genes are those of OMIM entries, frequencies those of Orphanet's, which are given as
classes. Diseases with more than one answer are left out, and so are those whose name tells it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from moe_medical.data.terminologies.hpo import Hpo, Term
from moe_medical.data.terminologies.rows import Choice, Row, TaskRecipe, digest, seeded

MAX_PHENOTYPES = 5
FEATURES_PER_DISEASE = 2
INHERITANCES = (
    "HP:0000006",  # autosomal dominant
    "HP:0000007",  # autosomal recessive
    "HP:0001417",  # X-linked
)
ONSETS = (
    "HP:0030674",  # antenatal
    "HP:0003577",  # congenital
    "HP:0003623",  # neonatal
    "HP:0003593",  # infantile
    "HP:0011463",  # childhood
    "HP:0003621",  # juvenile
    "HP:0003581",  # adult
)
FREQUENCIES = ("HP:0040280", "HP:0040281", "HP:0040282", "HP:0040283", "HP:0040284")  # obligate ... very rare

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]%]{2}\.)\s+(?=[A-Z])")
_ACRONYM = re.compile(r"^[A-Z][A-Za-z0-9-]{1,6}$")
_NAMES_INHERITANCE = re.compile(r"autosomal|linked|dominant|recessive|mitochondrial", re.IGNORECASE)
_NAMES_ONSET = re.compile(
    r"onset|fetal|prenatal|congenital|neonatal|newborn|infan|child|juvenile|adult|adolescent|late|early",
    re.IGNORECASE,
)


# --- terms ---


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
        # Below the root and not an organ system itself, which `organ_system` asks for.
        above = sorted(
            id for id in hpo.ancestors[term.id] - {term.id} if hpo.systems(id) and hpo.systems(id) != [id]
        )
        if not above:
            continue
        right = random.choice(above)
        yield _kind_of(hpo, term.id, right, "yes")
        beside = [each for each in _siblings(hpo, right) if not hpo.related(each, term.id)]
        if beside:
            yield _kind_of(hpo, term.id, random.choice(beside), "no")


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


# --- diseases ---


def _omim(hpo: Hpo) -> list[str]:
    return [disease for disease in hpo.diseases if disease.startswith("OMIM:")]


def disease_phenotypes(hpo: Hpo) -> Iterator[Row]:
    """A disease with few annotated phenotypes -> all of them, as a set."""
    for disease in _omim(hpo):
        found = {each.term for each in hpo.annotations[disease] if each.aspect == "P"}
        names = sorted(hpo.terms[term].name for term in found)
        if 2 <= len(names) <= MAX_PHENOTYPES:
            yield Row(hpo.diseases[disease], "; ".join(names), (disease,))


def disease_inheritance(hpo: Hpo) -> Iterator[Row]:
    """A disease -> its one mode of inheritance."""
    for disease, mode in _single_class(hpo, "I", INHERITANCES):
        if not _NAMES_INHERITANCE.search(hpo.diseases[disease]):
            yield Row(hpo.diseases[disease], mode, (disease,), _names(hpo, INHERITANCES))


def disease_onset(hpo: Hpo) -> Iterator[Row]:
    """A disease -> its one age of onset; young, middle-aged and late adults are adults."""
    for disease, onset in _single_class(hpo, "C", ONSETS):
        if not _NAMES_ONSET.search(hpo.diseases[disease]):
            yield Row(hpo.diseases[disease], onset, (disease,), _names(hpo, ONSETS))


def _single_class(hpo: Hpo, aspect: str, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """OMIM diseases and the name of the one class that all their annotations of an aspect lie in."""
    for disease in _omim(hpo):
        terms = [each.term for each in hpo.annotations[disease] if each.aspect == aspect]
        found = {each for term in terms for each in hpo.ancestors[term].intersection(classes)}
        if len(found) == 1:
            yield disease, hpo.terms[found.pop()].name


def _names(hpo: Hpo, terms: Sequence[str]) -> tuple[str, ...]:
    return tuple(hpo.terms[term].name for term in terms)


def feature_frequency(hpo: Hpo) -> Iterator[Row]:
    """A disease and one of its features -> how often patients have it."""
    options = _names(hpo, FREQUENCIES)
    for disease in filter(lambda id: id.startswith("ORPHA:"), hpo.diseases):
        features = [each for each in hpo.annotations[disease] if each.frequency in FREQUENCIES]
        for each in sorted(features, key=lambda each: digest(disease + each.term))[:FEATURES_PER_DISEASE]:
            text = f"Disease: {hpo.diseases[disease]}\nFeature: {hpo.terms[each.term].name}"
            yield Row(text, hpo.terms[each.frequency].name, (disease, each.term), options)


def gene_disease(hpo: Hpo) -> Iterator[Row]:
    """A gene with just one OMIM disease -> that disease."""
    for gene, diseases in hpo.genes.items():
        omim = sorted(each for each in diseases if each.startswith("OMIM:") and each in hpo.diseases)
        if len(omim) == 1:
            yield Row(gene, hpo.diseases[omim[0]], (f"GENE:{gene}", omim[0]))


TASKS: dict[str, TaskRecipe[Hpo]] = {
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
    "disease_phenotypes": TaskRecipe("List the phenotypes of this rare disease.", disease_phenotypes),
    "disease_inheritance": TaskRecipe("How is this disease inherited?", disease_inheritance),
    "disease_onset": TaskRecipe("At what age does this disease begin?", disease_onset),
    "feature_frequency": TaskRecipe(
        "How frequent is this feature in this disease?", feature_frequency, holdout=0.15
    ),
    "gene_disease": TaskRecipe("Name the disease that this gene is linked to.", gene_disease, holdout=0.15),
}
