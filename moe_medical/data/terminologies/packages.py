"""The installed distributions that carry the terminologies' files.

Decisions: the files are read as they ship; the packages are located by their metadata and never imported,
so asking what is there costs milliseconds. The fingerprint changes with the package, its version, the
sizes of its data files and `BUILDER_VERSION`.
Does not download anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from moe_medical.data.terminologies.rows import digest
from moe_medical.errors import DataError

BUILDER_VERSION = 3
"""Raise it with every change of the rows, so that old caches are not read."""


@dataclass(frozen=True)
class DataPackage:
    """A distribution on PyPI, the version that the recipes name, and the files that are read."""

    name: str
    version: str
    patterns: tuple[str, ...]

    @property
    def advice(self) -> str:
        """How to get it, as the end of an error message."""
        return f"Install it with: pip install {self.name}=={self.version}"


@dataclass(frozen=True)
class InstalledData:
    """The data files of an installed package, in the order of its patterns."""

    name: str
    version: str
    files: tuple[Path, ...]

    @property
    def fingerprint(self) -> str:
        """Short sha256 of what the built rows depend on."""
        sizes = [f"{path.name}:{path.stat().st_size}" for path in self.files]
        return digest("\n".join([f"builder {BUILDER_VERSION}", self.name, self.version, *sizes]))[:12]


def find_data(package: DataPackage) -> InstalledData:
    """Locates the data files of a package without importing it.

    Raises:
        DataError: The package is not installed, or one of its files is missing.
    """
    try:
        installed = distribution(package.name)
    except PackageNotFoundError as error:
        raise DataError(f"The package {package.name} is not installed. {package.advice}") from error
    paths = sorted(Path(str(path.locate())) for path in installed.files or [])
    files = tuple(_matching(paths, pattern) for pattern in package.patterns)
    if missing := [pattern for pattern, file in zip(package.patterns, files, strict=True) if file is None]:
        raise DataError(f"{package.name} {installed.version} lacks {', '.join(missing)}. {package.advice}")
    return InstalledData(package.name, installed.version, tuple(filter(None, files)))


def _matching(paths: list[Path], pattern: str) -> Path | None:
    """The first existing file whose path ends in the pattern."""
    return next((path for path in paths if fnmatch(path.as_posix(), f"*/{pattern}") and path.is_file()), None)
