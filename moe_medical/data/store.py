"""Derived data on disk: folders of the cache that are private, whole, and named by their content.

Decisions:
- A folder's name is the hash of all that its content depends on, the code that made it as well: it is never
  stale and never changed.
- It may hold the text of records, so only its owner may read it (mode 0700). It lies where
  $MOE_MEDICAL_CACHE says.
- One process of a machine builds while the others wait, on a lock that the kernel frees when its owner
  ends. Without such locks the work may be done twice, never wrongly.
- Tables are Arrow IPC files in batches, read through a memory map: opening costs nothing, and pages that
  are not in use belong to the system.
Does not sweep the cache: it may be deleted whenever no run is using it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moe_medical.errors import StorageError
from moe_medical.files import CACHE_VARIABLE, default_cache, one_at_a_time, publish_folder

_LOG = logging.getLogger(__name__)
_KEPT_BATCHES = 1024
# NOTE(pyarrow): a thread of its pools may abort the process as the interpreter ends (apache/arrow#34314), so
# none is started: no threads, and the map is read as a buffer, not as a file.
_READ = pa.ipc.IpcReadOptions(use_threads=False)
_WRITE = pa.ipc.IpcWriteOptions(use_threads=False)

Rows = NDArray[np.int64]


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
    with one_at_a_time(target):
        return publish_folder(lambda draft: _build(draft, build), target)


def damaged(folder: Path) -> StorageError:
    """The error for a derived folder that cannot be read."""
    return StorageError(f"{folder} is damaged. Delete it; it is made again from the data.")


def _build(draft: Path, build: Callable[[Path], None]) -> None:
    draft.chmod(0o700)  # records are private
    build(draft)


class BatchWriter:
    """Writes an Arrow IPC file batch by batch. `BatchFile` reads it."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self._starts_file = folder / f"{name}.starts.npy"
        self._writer = pa.ipc.new_file(folder / f"{name}.arrow", schema, options=_WRITE)
        self._starts = [0]

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self._starts.append(self._starts[-1] + batch.num_rows)

    def close(self) -> None:
        self._writer.close()
        np.save(self._starts_file, np.array(self._starts, dtype=np.int64))


class BatchFile:
    """Random access to the batches of a memory-mapped Arrow IPC file, from any thread.

    Raises:
        StorageError: the files are not what `BatchWriter` left.
    """

    def __init__(self, folder: Path, name: str) -> None:
        try:
            mapped = pa.memory_map(str(folder / f"{name}.arrow")).read_buffer()
            self._reader = pa.ipc.open_file(pa.BufferReader(mapped), options=_READ)
            self._starts: Rows = np.load(folder / f"{name}.starts.npy")
        except (OSError, EOFError, ValueError):  # ArrowInvalid is a ValueError
            raise damaged(folder) from None
        if len(self._starts) != self._reader.num_record_batches + 1:
            raise damaged(folder)
        self._lock = threading.Lock()
        self.batch = lru_cache(maxsize=_KEPT_BATCHES)(self._read)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, rows: Rows) -> tuple[Rows, Rows]:
        """Batch of each row, and its place there."""
        batches = self._starts.searchsorted(rows, side="right") - 1
        return batches, rows - self._starts[batches]

    def take(self, rows: Rows) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        """The rows batch by batch, each with the places that they have in `rows`."""
        batches, places = self.locate(rows)
        order = batches.argsort(kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(batches[order])) + 1):
            if len(group):
                yield group, self.batch(int(batches[group[0]])).take(pa.array(places[group]))

    def _read(self, number: int) -> pa.RecordBatch:
        with self._lock:  # the reader makes no promise to threads
            return self._reader.get_batch(number)
