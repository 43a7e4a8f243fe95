"""The usable rows of a split on disk: written in one pass, read at random through a memory map.

Decisions: memory does not grow with the data, neither while a store is written (batches of 1024 rows; of
ids, 64 bits of hash) nor while it is read (pages of a memory map, which belong to the system). Rows that
are left out later make a view with 8 bytes a row, not a copy. A store keeps line and digest of each record,
so a row can be rejected at any time without its text; file names are given at opening, as files may move.
The store holds record text: see `store.py` for who may read it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import index
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_medical.data.store import content_key, damaged, load_array

BATCH_ROWS = 1024
_KEPT_BATCHES = 1024
# NOTE(pyarrow): a thread of its pools may abort the process as the interpreter ends (apache/arrow#34314), so
# none is started: no threads, and the map is read as a buffer, not as a file.
_READ = pa.ipc.IpcReadOptions(use_threads=False)
_WRITE = pa.ipc.IpcWriteOptions(use_threads=False)
_BATCH_CHARACTERS = 2**24
_DIGEST_BYTES = 6
_FIELDS = ("id", "prompt", "target", "choices", "image")
_BAD = "bad.jsonl"
_KEPT = "kept"
_META = "meta.json"

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """One record as text, ready for the chat format."""

    task: str
    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    image: str | None = None
    """File of the record's image, or `archive.zip/member`."""


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """Where a record is that was rejected, and why. Never its text."""

    file: str
    line: int
    reason: str
    digest: str
    """First 12 hex digits of the sha256 of the raw record."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.reason}:{self.digest}"


def record_digest(data: bytes) -> str:
    """What stands for a raw record in reports."""
    return hashlib.sha256(data).hexdigest()[: 2 * _DIGEST_BYTES]


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
        except (OSError, EOFError, ValueError):  # ArrowInvalid is a ValueError
            raise damaged(folder) from None
        self._starts: Rows = load_array(folder, f"{name}.starts")
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
        # Sorted by batch, so that each batch is read once whatever the order that is asked for.
        order = batches.argsort(kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(batches[order])) + 1):
            if len(group):
                yield group, self.batch(int(batches[group[0]])).take(pa.array(places[group]))

    def _read(self, number: int) -> pa.RecordBatch:
        with self._lock:  # the reader makes no promise to threads
            return self._reader.get_batch(number)


class _Store:
    """The files that `RowWriter` left, with the names of their sources."""

    def __init__(self, folder: Path, task: str, files: Sequence[str], key: str) -> None:
        self.folder = folder
        self.task = task
        self.files = list(files)
        self.key = key
        self.table = BatchFile(folder, "rows")
        try:
            self.meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise damaged(folder) from None
        self._ends = np.cumsum([source["rows"] for source in self.meta["sources"]])

    def sources(self, places: Rows) -> list[str]:
        """File of each row."""
        return [self.files[source] for source in self._ends.searchsorted(places, side="right")]


class TextRows(Sequence[Example]):
    """Rows of a store, or some of them in any order. Read-only; safe to read from several threads."""

    def __init__(self, store: _Store, selection: Rows | None) -> None:
        self._store = store
        self._selection = selection

    @classmethod
    def open(cls, folder: Path, task: str, files: Sequence[str], key: str) -> TextRows:
        """The rows of a store, but for those whose id an earlier row has.

        Args:
            folder: where a `RowWriter` has written.
            task: the name that the examples bear.
            files: names of the store's sources, in order.
            key: of the store's content.

        Raises:
            StorageError: the store is damaged.
        """
        # The file is there only where a row has the id of an earlier one.
        kept = load_array(folder, _KEPT, mapped=True) if (folder / f"{_KEPT}.npy").exists() else None
        return cls(_Store(folder, task, files, key), kept)

    def __len__(self) -> int:
        return len(self._store.table) if self._selection is None else len(self._selection)

    @overload
    def __getitem__(self, i: int) -> Example: ...

    @overload
    def __getitem__(self, i: slice) -> TextRows: ...

    def __getitem__(self, i: int | slice) -> Example | TextRows:
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        return self.take([index(i)])[0]

    def __iter__(self) -> Iterator[Example]:
        return (example for batch in self.batches() for example in batch)

    def batches(self, rows: int = BATCH_ROWS) -> Iterator[list[Example]]:
        """All rows in order, so many at a time."""
        for first in range(0, len(self), rows):
            yield self.take(range(first, min(first + rows, len(self))))

    def take(self, rows: Sequence[int]) -> list[Example]:
        """The rows with these numbers, quicker than one by one."""
        places = self._places(rows)
        found: list[Example | None] = [None] * len(places)
        for group, batch in self._store.table.take(places):
            for place, example in zip(group.tolist(), self._examples(places[group], batch), strict=True):
                found[place] = example
        return [example for example in found if example is not None]

    def select(self, rows: Rows) -> TextRows:
        """A view of the rows with these numbers, in this order."""
        return TextRows(self._store, self._places(rows))

    @cached_property
    def key(self) -> str:
        """Hash of all that the rows depend on, file names apart."""
        if self._selection is None:
            return self._store.key
        selected = hashlib.sha256(np.ascontiguousarray(self._selection).data).hexdigest()
        return content_key([self._store.key, selected])

    def distinct_choices(self) -> set[str]:
        """All options of all rows."""
        found: set[str] = set()
        for first in range(0, len(self) if self._store.meta["choices"] else 0, BATCH_ROWS):
            places = self._places(range(first, min(first + BATCH_ROWS, len(self))))
            for _, batch in self._store.table.take(places):
                found.update(pc.unique(batch.column("choices").flatten()).to_pylist())
        return found

    def records(self, rows: Sequence[int], reason: str) -> list[RejectedRecord]:
        """The rows with these numbers as rejected records."""
        places = self._places(rows)
        found: dict[int, RejectedRecord] = {}
        for group, batch in self._store.table.take(places):
            files = self._store.sources(places[group])
            lines = batch.column("line").to_pylist()
            digests = batch.column("digest").to_pylist()
            for place, file, line, digest in zip(group.tolist(), files, lines, digests, strict=True):
                found[place] = RejectedRecord(file, line, reason, digest.hex())
        return [found[place] for place in range(len(places))]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What `RowWriter.end_source` was given about each source."""
        return [source["about"] for source in self._store.meta["sources"]]

    def rejected(self) -> list[RejectedRecord]:
        """What was rejected when the store was written, in the order of the sources."""
        lines = (self._store.folder / _BAD).read_text(encoding="utf-8").splitlines()
        found = sorted(map(json.loads, lines))
        return [RejectedRecord(self._store.files[source], *rest) for source, *rest in found]

    def _places(self, rows: Sequence[int] | Rows) -> Rows:
        """Row numbers of the view -> of the file."""
        numbers = np.asarray(rows, dtype=np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"a row is outside of the {len(self)} there are")
        return numbers if self._selection is None else np.asarray(self._selection[numbers])

    def _examples(self, places: Rows, batch: pa.RecordBatch) -> Iterator[Example]:
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names if name != "digest"}
        choices = columns.get("choices") or [()] * batch.num_rows
        ids = columns.get("id")
        if ids is None:  # records without an identity are known by file name and line
            files = self._store.sources(places)
            ids = [f"{Path(file).name}:{line}" for file, line in zip(files, columns["line"], strict=True)]
        images = columns.get("image") or [None] * batch.num_rows
        texts = zip(ids, columns["prompt"], columns["target"], map(tuple, choices), images, strict=True)
        return (Example(self._store.task, *text) for text in texts)


class RowWriter:
    """Writes a store into an empty folder: `add` and `reject`, `end_source` per source, `finish`."""

    def __init__(self, folder: Path, has_ids: bool, has_choices: bool, has_images: bool = False) -> None:
        self._folder = folder
        self._has_ids = has_ids
        schema = [("prompt", pa.large_string()), ("target", pa.large_string())]
        schema += [("id", pa.large_string())] if has_ids else []
        schema += [("choices", pa.list_(pa.large_string()))] if has_choices else []
        schema += [("image", pa.large_string())] if has_images else []
        schema += [("line", pa.int64()), ("digest", pa.binary(_DIGEST_BYTES))]
        self._schema = pa.schema(schema)
        self._writer = BatchWriter(folder, "rows", self._schema)
        self._bad = (folder / _BAD).open("w", encoding="utf-8")
        self._meta: dict[str, Any] = {"sources": [], "choices": has_choices}
        self._hashes = array("q")
        self._empty_batch()
        self._rows = 0

    def add(self, example: Example, line: int, data: bytes) -> None:
        """One usable record; `id`, `choices` and `image` are kept where the store was made to."""
        digest = bytes.fromhex(record_digest(data))
        row = {name: getattr(example, name) for name in _FIELDS} | {"line": line, "digest": digest}
        for name, values in self._batch.items():
            values.append(row[name])
        if self._has_ids:
            self._hashes.append(hash(example.id))  # of this process only: it is never stored
        self._rows += 1
        self._characters += len(example.prompt) + len(example.target)
        if len(self._batch["line"]) == BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def reject(self, line: int, reason: str, digest: str) -> None:
        """One record that cannot be used."""
        self._note(len(self._meta["sources"]), line, reason, digest)

    def end_source(self, about: dict[str, Any]) -> None:
        """What follows is of the next source; `about` are JSON values that `TextRows.sources` gives back."""
        self._meta["sources"].append({"rows": self._rows, "about": about})
        self._rows = 0

    def finish(self) -> None:
        """Reject each row whose id an earlier row has, and close the files."""
        self._flush()
        self._writer.close()
        (self._folder / _META).write_text(json.dumps(self._meta), encoding="utf-8")
        if self._has_ids:
            self._reject_repeats()
        self._bad.close()

    def _empty_batch(self) -> None:
        self._batch: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._characters = 0

    def _flush(self) -> None:
        if self._batch["line"]:
            self._writer.write(pa.RecordBatch.from_pydict(self._batch, self._schema))
            self._empty_batch()

    def _note(self, source: int, line: int, reason: str, digest: str) -> None:
        self._bad.write(json.dumps([source, line, reason, digest]) + "\n")

    def _reject_repeats(self) -> None:
        file = BatchFile(self._folder, "rows")
        repeats = np.array(
            sorted(_repeats(np.frombuffer(self._hashes, dtype=np.int64), file)), dtype=np.int64
        )
        if not len(repeats):
            return
        np.save(self._folder / f"{_KEPT}.npy", np.delete(np.arange(len(file)), repeats))
        ends = np.cumsum([source["rows"] for source in self._meta["sources"]])
        sources = ends.searchsorted(repeats, side="right")
        for group, batch in file.take(repeats):
            lines = batch.column("line").to_pylist()
            digests = batch.column("digest").to_pylist()
            for source, line, digest in zip(sources[group].tolist(), lines, digests, strict=True):
                self._note(source, line, "duplicate id", digest.hex())


def _repeats(hashes: Rows, file: BatchFile) -> Iterator[int]:
    """Rows whose id an earlier row has; rows of one hash are compared by the id itself."""
    # 64 bits a row find the few rows that may repeat an id, so that only their ids are read back.
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    suspects = _found_in(twice, hashes)
    order = np.argsort(hashes[suspects], kind="stable")
    suspects = suspects[order]
    for group in np.split(suspects, np.flatnonzero(np.diff(hashes[suspects])) + 1):
        seen: set[str] = set()
        ids: dict[int, str] = {}
        for places, batch in file.take(group):
            ids.update(zip(places.tolist(), batch.column("id").to_pylist(), strict=True))
        for place, row in enumerate(group.tolist()):
            if ids[place] in seen:
                yield row
            seen.add(ids[place])


def _found_in(values: Rows, hashes: Rows, piece: int = 2**20) -> Rows:
    """Places of `hashes` that hold one of the sorted `values`."""
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(hashes) if len(values) else 0, piece):
        part = hashes[first : first + piece]
        near = values[np.minimum(values.searchsorted(part), len(values) - 1)]
        found.append(np.flatnonzero(near == part) + first)
    return np.concatenate(found)
