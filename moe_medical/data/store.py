"""Derived data on disk: folders of the cache that are private, whole, and named by what they are made from.

Decisions:
- A folder's name is the hash of all that its content depends on, the code that made it as well: it is never
  stale and never changed.
- It may hold the text of records, so only its owner may read it (mode 0700). It lies where
  $MOE_MEDICAL_CACHE says.
- One process of a machine builds while the others wait, on a lock that the kernel frees when its owner
  ends. Without such locks the work may be done twice, never wrongly.
- A source file is known by its fingerprint: sha256 says whether it changed, a CRC-32 of each MiB says where
  (8 hex digits: 80 kB for 10 GB). The fingerprint of a file is kept by path, inode, size and both times, so
  a file that has not been touched is not read again; a touched one costs one reading and is no change.
Does not sweep the cache: it may be deleted whenever no run is using it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_medical.errors import StorageError
from moe_medical.files import CACHE_VARIABLE, default_cache, one_at_a_time, publish_folder, write_json

CHUNK_BYTES = 2**20
_SETTLED_NS = 2 * 10**9
"""A file changed so shortly before may change again within one tick of its time stamp."""


def content_key(value: object) -> str:
    """32 hex digits of the sha256 of a JSON value; what is none counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def code_key(*modules: str) -> str:
    """Hash of the code of modules of `moe_medical.data`; without it an edit would meet old results.

    Args:
        modules: Such as "rows" or "hygiene/drop".
    """
    running = hashlib.sha256()
    for name in modules:
        running.update(Path(__file__).parent.joinpath(f"{name}.py").read_bytes())
    return running.hexdigest()[:16]


def derived_folder(kind: str, key: str) -> Path:
    """Where `published` keeps what has this key."""
    return default_cache() / kind / key


def published(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of `kind` with this key, built by `build` into an empty folder unless it is there.

    Raises:
        StorageError: the disk or file system refused.
    """
    target = derived_folder(kind, key)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        fix = f"Point {CACHE_VARIABLE} elsewhere."
        raise StorageError(f"{target.parent} cannot be made ({e.strerror}). {fix}") from None

    def build_private(draft: Path) -> None:
        draft.chmod(0o700)  # before anything is in it: records are private
        build(draft)

    with one_at_a_time(target):
        return publish_folder(build_private, target)


def damaged(folder: Path) -> StorageError:
    """The error for a derived folder that cannot be read."""
    return StorageError(f"{folder} is damaged. Delete it; it is made again from the data.")


def load_array(folder: Path, name: str, mapped: bool = False) -> NDArray[Any]:
    """An array of a derived folder.

    Raises:
        StorageError: the folder is damaged.
    """
    try:
        array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r" if mapped else None)
    except (OSError, EOFError, ValueError):
        raise damaged(folder) from None
    return array


@dataclass(frozen=True)
class Fingerprint:
    """The content of one file, or of the records of one split of a hub data set."""

    sha256: str
    size: int
    """Bytes."""
    lines: int | None
    """None where the format has no lines."""
    chunks: str
    """8 hex digits for each MiB."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fingerprint:
        return cls(**value)

    def first_difference(self, other: Fingerprint) -> int:
        """Number of the first MiB that differs, counted from 0; the two must differ."""
        mine = self.chunks
        theirs = other.chunks
        pairs = range(0, min(len(mine), len(theirs)), 8)
        return next((i for i in pairs if mine[i : i + 8] != theirs[i : i + 8]), len(pairs) * 8) // 8


class Fingerprinter:
    """Takes a stream of bytes in pieces of any size."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._size = self._newlines = self._crc = 0
        self._chunks: list[str] = []
        self._last = b"\n"

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        self._newlines += data.count(b"\n")
        self._last = data[-1:] or self._last
        view = memoryview(data)
        while view:
            piece = view[: CHUNK_BYTES - self._size % CHUNK_BYTES]
            self._crc = zlib.crc32(piece, self._crc)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size % CHUNK_BYTES == 0:
                self._end_chunk()

    def result(self, has_lines: bool = True) -> Fingerprint:
        """Call it once, at the end."""
        if self._size % CHUNK_BYTES:
            self._end_chunk()
        lines = self._newlines + (self._last != b"\n") if has_lines else None
        return Fingerprint(self._sha256.hexdigest(), self._size, lines, "".join(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(f"{self._crc:08x}")
        self._crc = 0


def fingerprint_file(file: Path, clock_ns: Callable[[], int] = time.time_ns) -> Fingerprint:
    """The fingerprint of a file, from the cache where the file has not been touched since.

    Raises:
        OSError: the file cannot be read.
    """
    state = _state(file)
    known_in = derived_folder("fingerprints", f"{content_key(str(file.absolute()))}.json")
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(known_in.read_text(encoding="utf-8"))
        if known["state"] == state:
            return Fingerprint.from_json(known["fingerprint"])
    running = Fingerprinter()
    with file.open("rb") as stream:
        while data := stream.read(CHUNK_BYTES):
            running.update(data)
    fingerprint = running.result(has_lines=file.suffix != ".parquet")
    settled = clock_ns() - max(state["changed"], state["modified"]) > _SETTLED_NS
    if settled and _state(file) == state:  # it did not change while it was read
        # A cache that cannot be written costs time, nothing else.
        with suppress(OSError, StorageError):
            known_in.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(known_in, {"state": state, "fingerprint": fingerprint.to_json()}, indent=None)
    return fingerprint


def _state(file: Path) -> dict[str, int]:
    info = os.stat(file)
    return {
        "device": info.st_dev,
        "inode": info.st_ino,
        "size": info.st_size,
        "modified": info.st_mtime_ns,
        "changed": info.st_ctime_ns,
    }
