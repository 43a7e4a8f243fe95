"""Looks for words in everything below a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def files_holding(words: Iterable[str], folder: Path, exempt: Iterable[Path] = ()) -> list[str]:
    """Files below `folder` whose bytes or name hold a word, as UTF-8, UTF-16 or escaped as in JSON.

    Args:
        exempt: Files and folders that are not looked at.
    """
    words, exempt = list(words), list(exempt)
    needles = {form for word in words for form in _forms(word)}
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(path.is_relative_to(other) for other in exempt)
    ]
    return [
        str(path.relative_to(folder))
        for path in found
        if any(word in path.name for word in words) or _holds(path.read_bytes(), needles)
    ]


def _forms(word: str) -> set[bytes]:
    return {word.encode(), word.encode("utf-16-le"), json.dumps(word)[1:-1].encode()}


def _holds(content: bytes, needles: set[bytes]) -> bool:
    return any(needle in content for needle in needles)
