"""The tasks on the annotations of the HPO: phenotypes, inheritance, onset, frequency and genes of diseases.

Decisions: phenotypes, inheritance, onset and genes are those of OMIM entries, frequencies those of
Orphanet's, which are given as classes. Diseases with more than one answer are left out, and so are those
whose name tells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from moe_medical.data.terminologies.hpo import Hpo
from moe_medical.data.terminologies.rows import Row, TaskRecipe, digest

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

_NAMES_INHERITANCE = re.compile(r"autosomal|linked|dominant|recessive|mitochondrial", re.IGNORECASE)
_NAMES_ONSET = re.compile(
    r"onset|fetal|prenatal|congenital|neonatal|newborn|infan|child|juvenile|adult|adolescent|late|early",
    re.IGNORECASE,
)


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


DISEASE_TASKS: dict[str, TaskRecipe[Hpo]] = {
    "disease_phenotypes": TaskRecipe("List the phenotypes of this rare disease.", disease_phenotypes),
    "disease_inheritance": TaskRecipe("How is this disease inherited?", disease_inheritance),
    "disease_onset": TaskRecipe("At what age does this disease begin?", disease_onset),
    "feature_frequency": TaskRecipe(
        "How frequent is this feature in this disease?", feature_frequency, holdout=0.15
    ),
    "gene_disease": TaskRecipe("Name the disease that this gene is linked to.", gene_disease, holdout=0.15),
}
