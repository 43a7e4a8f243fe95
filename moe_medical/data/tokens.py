"""Rows of a task as tokens: made when they are asked for, or read from the cache.

Decisions: both forms give the same tokens and lengths, so a run does not depend on what the cache holds.
Fresh tokens stay in a memo of bounded size, because a step asks for the lengths of its samples first and for
the tokens then. Cached tokens are an Arrow file in the row order of the task, under the hash of rows,
tokenizer and template, with the lengths beside it. Tokens can be turned into text again: `store.py` says who
may read them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.rows import BatchFile, BatchWriter, TextRows
from moe_medical.data.store import code_key, content_key, damaged, derived_folder, load_array, published

_CODE = (tokenizers.__version__, code_key("chat", "tokens", "rows", "store"))
_ROWS_MEASURED = 1024
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("num_prompt_tokens", pa.int32()),
        ("num_truncated", pa.int32()),
    ]
)

Ids = NDArray[np.int32]


class TokenRows(ABC):
    """Tokens of the rows of one task, by row number; any thread may ask."""

    def __init__(self, rows: TextRows, chat: ChatFormat) -> None:
        self._rows = rows
        self._chat = chat

    def __len__(self) -> int:
        return len(self._rows)

    @abstractmethod
    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each of the rows."""

    @abstractmethod
    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """The rows as tokens."""

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a row on average, from evenly spread ones."""
        # Evenly spread and not drawn, so that plan and run measure the same.
        picks = np.linspace(0, len(self) - 1, min(_ROWS_MEASURED, len(self))).astype(np.int64)
        return float(np.mean(self.lengths(picks.tolist())))

    @property
    def is_cached(self) -> bool:
        """Whether `cached` would return at once."""
        return derived_folder("tokens", self._key).is_dir()

    def cached(self, advance: Callable[[int], None] = lambda rows: None) -> TokenRows:
        """The same from disk, where they are made now unless they are there.

        Args:
            advance: Told of so many more rows made.

        Raises:
            StorageError: the cache cannot be written, or is damaged.
        """
        folder = published("tokens", self._key, lambda draft: self._write(draft, advance))
        return _CachedTokens(self._rows, self._chat, folder)

    @cached_property
    def _key(self) -> str:
        return content_key([*_CODE, self._rows.key, self._chat.fingerprint])

    def _write(self, folder: Path, advance: Callable[[int], None]) -> None:
        writer = BatchWriter(folder, "tokens", _SCHEMA)
        lengths = []
        for examples in self._rows.batches():
            encoded = self._chat.encode_many([(e.prompt, e.target) for e in examples])
            sizes = np.array([len(e.input_ids) for e in encoded], dtype=np.int32)
            writer.write(_as_batch(encoded, sizes))
            lengths.append(sizes)
            advance(len(examples))
        writer.close()
        np.save(folder / "lengths.npy", np.concatenate(lengths))


class TokenMemo:
    """The latest tokens of all tasks of a run, up to a number of tokens."""

    def __init__(self, max_tokens: int = 2**23) -> None:
        self._room = max_tokens
        self._kept: OrderedDict[tuple[str, int], _Packed] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, owner: str, rows: Sequence[int]) -> dict[int, _Packed]:
        """Those of the rows that are there."""
        with self._lock:
            found = {row: kept for row in rows if (kept := self._kept.get((owner, row))) is not None}
            for row in found:
                self._kept.move_to_end((owner, row))
        return found

    def put(self, owner: str, made: dict[int, _Packed]) -> None:
        with self._lock:
            for row, packed in made.items():
                # Two threads may have made the same row: the newer takes the place of the older.
                before = self._kept.pop((owner, row), None)
                self._room -= len(packed.ids) - (len(before.ids) if before else 0)
                self._kept[owner, row] = packed
            while self._room < 0:  # the one that was asked for longest ago is first
                _, oldest = self._kept.popitem(last=False)
                self._room += len(oldest.ids)


class _Packed(NamedTuple):
    """`Encoded` in a tenth of the memory."""

    ids: Ids
    num_prompt_tokens: int
    num_truncated: int


class FreshTokens(TokenRows):
    """Tokenises when asked.

    Args:
        rows: The task's.
        chat: The token format.
        memo: Shared by the tasks of a run.
        owner: This task's name there.
    """

    def __init__(self, rows: TextRows, chat: ChatFormat, memo: TokenMemo, owner: str) -> None:
        super().__init__(rows, chat)
        self._memo = memo
        self._owner = owner

    def lengths(self, rows: Sequence[int]) -> list[int]:
        return [len(packed.ids) for packed in self._packed(rows)]

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        return [Encoded(p.ids.tolist(), p.num_prompt_tokens, p.num_truncated) for p in self._packed(rows)]

    def _packed(self, rows: Sequence[int]) -> list[_Packed]:
        found = self._memo.get(self._owner, rows)
        missing = sorted(set(rows) - found.keys())
        if missing:  # without the lock: tokenising is what takes the time
            examples = self._rows.take(missing)
            encoded = self._chat.encode_many([(e.prompt, e.target) for e in examples])
            packed = (
                _Packed(np.array(e.input_ids, dtype=np.int32), e.num_prompt_tokens, e.num_truncated)
                for e in encoded
            )
            made = dict(zip(missing, packed, strict=True))
            self._memo.put(self._owner, made)
            found |= made
        return [found[row] for row in rows]


class _Columns(NamedTuple):
    """One batch of a token file without copies."""

    starts: Ids
    ids: Ids
    num_prompt_tokens: Ids
    num_truncated: Ids


class _CachedTokens(TokenRows):
    def __init__(self, rows: TextRows, chat: ChatFormat, folder: Path) -> None:
        super().__init__(rows, chat)
        self._table = BatchFile(folder, "tokens")
        self._lengths: Ids = load_array(folder, "lengths", mapped=True)
        if not len(self._lengths) == len(self._table) == len(rows):
            raise damaged(folder)
        self._columns = lru_cache(maxsize=1024)(self._read_columns)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        found: list[int] = self._lengths[np.asarray(rows, dtype=np.int64)].tolist()
        return found

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        batches, places = self._table.locate(np.asarray(rows, dtype=np.int64))
        found = []
        for batch, place in zip(batches.tolist(), places.tolist(), strict=True):
            starts, ids, prompt, truncated = self._columns(batch)
            tokens = ids[starts[place] : starts[place + 1]].tolist()
            found.append(Encoded(tokens, int(prompt[place]), int(truncated[place])))
        return found

    def _read_columns(self, number: int) -> _Columns:
        batch = self._table.batch(number)
        ids = batch.column("input_ids")
        rest = (batch.column(name).to_numpy() for name in ("num_prompt_tokens", "num_truncated"))
        return _Columns(ids.offsets.to_numpy(), ids.values.to_numpy(), *rest)


def fitting(rows: TextRows, chat: ChatFormat) -> NDArray[np.bool_]:
    """Which rows have a target that the token format takes; shape (rows,). Kept on disk, one byte a row.

    Raises:
        StorageError: the cache cannot be written, or is damaged.
    """

    def build(folder: Path) -> None:
        fits = chain.from_iterable(chat.fits_many([e.target for e in batch]) for batch in rows.batches())
        np.save(folder / "fits.npy", np.fromiter(fits, dtype=np.bool_, count=len(rows)))

    folder = published("fits", content_key([*_CODE, rows.key, chat.fingerprint]), build)
    return load_array(folder, "fits")


def _as_batch(encoded: Sequence[Encoded], sizes: Ids) -> pa.RecordBatch:
    starts = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(sizes, dtype=np.int32)])
    tokens = chain.from_iterable(e.input_ids for e in encoded)
    ids = np.fromiter(tokens, dtype=np.int32, count=int(starts[-1]))
    columns = [
        pa.ListArray.from_arrays(pa.array(starts), pa.array(ids)),
        pa.array([e.num_prompt_tokens for e in encoded], pa.int32()),
        pa.array([e.num_truncated for e in encoded], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
