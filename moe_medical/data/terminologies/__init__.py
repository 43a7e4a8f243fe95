"""Twenty-six tasks built from two real terminologies that come with PyPI packages: ICD-10-CM and the HPO.

Decisions: a terminology's tasks are all built at once, the first time that one of them is asked for, into
`<cache>/terminologies/<fingerprint>/<task>/<split>.jsonl`; later calls only look at the installed package's
metadata. The bytes are a function of the package's files and of this code.
Does not download anything, and does not import the packages that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.data.terminologies import hpo, hpo_tasks, icd10cm, icd10cm_tasks
from moe_medical.data.terminologies.packages import DataPackage, InstalledData, find_data
from moe_medical.data.terminologies.rows import SPLITS, TaskRecipe, write_task
from moe_medical.errors import DataError
from moe_medical.files import publish_folder

__all__ = ["BUILDERS", "TERMINOLOGIES", "Terminology", "build_task", "build_terminology"]


@dataclass(frozen=True)
class Terminology:
    """A terminology: the package that holds it, how its files are read, its tasks by short name."""

    package: DataPackage
    read: Callable[[tuple[Path, ...]], Any]
    tasks: dict[str, TaskRecipe[Any]]


TERMINOLOGIES = {
    "icd10cm": Terminology(icd10cm.PACKAGE, icd10cm.read_icd10cm, icd10cm_tasks.TASKS),
    "hpo": Terminology(hpo.PACKAGE, hpo.read_hpo, hpo_tasks.TASKS),
}
BUILDERS = tuple(f"{name}/{task}" for name, each in TERMINOLOGIES.items() for task in each.tasks)
"""Every name that `build_task` accepts; knowing them builds nothing."""


def build_task(builder: str, cache: Path) -> dict[str, Path]:
    """The JSONL files of one task, built if they are not in the cache yet.

    Args:
        builder: `<terminology>/<task>`, one of `BUILDERS`.
        cache: The cache folder, see `moe_medical.files.default_cache`.

    Returns:
        train, validation and test -> file. Each row has id, task, instruction, input, output, concepts
        and, where the answer is one of a few, options.

    Raises:
        DataError: No such builder, or the terminology's package is not installed.
        StorageError: The cache cannot be written.
    """
    if builder not in BUILDERS:
        raise DataError(f"source.builder must be one of {', '.join(BUILDERS)}; got {builder!r}.")
    name, task = builder.split("/")
    folder = build_terminology(name, TERMINOLOGIES[name], cache) / f"{name}_{task}"
    return {split: folder / f"{split}.jsonl" for split in SPLITS}


def build_terminology(name: str, terminology: Terminology, cache: Path) -> Path:
    """The folder of all tasks of one terminology, built if it is not in the cache yet.

    Raises:
        DataError: The package is not installed, lacks a file or holds one of another layout; the message
            names the pip command.
        StorageError: The cache cannot be written.
    """
    data = find_data(terminology.package)

    def build(folder: Path) -> None:
        source = _read(terminology, data)
        counts = {
            f"{name}_{task}": write_task(f"{name}_{task}", recipe, source, folder / f"{name}_{task}")
            for task, recipe in terminology.tasks.items()
        }
        (folder / "source.json").write_text(_provenance(data, counts), encoding="utf-8")

    return publish_folder(build, cache / "terminologies" / data.fingerprint)


def _read(terminology: Terminology, data: InstalledData) -> Any:
    try:
        return terminology.read(data.files)
    except (KeyError, ValueError, SyntaxError, StopIteration) as error:
        raise DataError(
            f"The files of {data.name} {data.version} are not laid out as expected ({type(error).__name__}). "
            f"{terminology.package.advice}"
        ) from error


def _provenance(data: InstalledData, counts: dict[str, dict[str, int]]) -> str:
    """Package, version and row counts; a licence asks that copies say what they are copies of."""
    files = [path.name for path in data.files]
    about = {"package": data.name, "version": data.version, "files": files, "rows": counts}
    return json.dumps(about, indent=2) + "\n"
