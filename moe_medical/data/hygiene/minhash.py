"""MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).

Decisions: written in numpy over many rows at a time, because `datasketch` takes one Python call per row and
per band. A row is kept as its band keys alone, 8 bytes a band: whoever asks verifies each candidate pair by
the exact Jaccard similarity, so the signature itself is not needed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

_HASHES = 128
_MISSED = 0.01
"""Chance, at most, that a pair exactly at the threshold shares no band; above it the chance is smaller."""
_HEADS = 16
_SEED = 20240607
_HIGH = np.uint64(32)


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, hashes in each): the longest bands that find a pair at the threshold."""
    for width in range(_HASHES, 1, -1):
        bands = _HASHES // width
        if (1 - threshold**width) ** bands <= _MISSED:
            return bands, width
    return _HASHES, 1


class Bands:
    """Turns the shingle hashes of rows into band keys; the same on every machine."""

    def __init__(self, threshold: float) -> None:
        self.count, self._width = choose_bands(threshold)
        random = np.random.default_rng(_SEED)
        size = (self.count, self._width)
        self._factors = random.integers(0, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, size, dtype=np.uint64)
        self._folds = random.integers(0, 2**63, self._width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def keys(self, rows: Sequence[Words]) -> Words:
        """Band keys, shape (rows, bands), of rows given as non-empty arrays of shingle hashes."""
        if not rows:
            return np.zeros((0, self.count), np.uint64)
        shingles = np.concatenate(rows)
        starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
        keys = np.zeros((len(rows), self.count), np.uint64)
        for band in range(self.count):
            for i in range(self._width):
                # multiply-shift (Dietzfelbinger 1997): the upper half of a product modulo 2 ** 64
                hashed = (shingles * self._factors[band, i] + self._offsets[band, i]) >> _HIGH
                keys[:, band] += np.minimum.reduceat(hashed, starts) * self._folds[i]
        return keys


def candidate_pairs(keys: Words) -> Ints:
    """Pairs of rows that share a band, shape (pairs, 2), first < second, sorted, each once.

    In a bucket of many rows, each is paired with the first 16, not with all: a thousand copies of one text
    make thousands of pairs, not half a million.

    Args:
        keys: Of `Bands.keys`, shape (rows, bands).
    """
    found = [np.zeros(0, np.int64)]
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        found.append(np.unique(_bucket_pairs(keys[order, band], order)))
    codes = np.unique(np.concatenate(found))
    return np.stack(np.divmod(codes, max(len(keys), 1)), axis=1)


def _bucket_pairs(keys: Words, order: Ints) -> Ints:
    """Pairs in runs of equal sorted keys, coded as first * rows + second."""
    rows = len(keys)
    positions = np.arange(len(keys))
    is_start = np.concatenate([np.ones(min(rows, 1), np.bool_), keys[1:] != keys[:-1]])
    starts = np.maximum.accumulate(np.where(is_start, positions, 0))
    codes = [np.zeros(0, np.int64)]
    for step in range(_HEADS):
        heads = starts + step
        paired = heads < positions
        codes.append(order[heads[paired]] * rows + order[positions[paired]])
    return np.concatenate(codes)
