"""How a step's samples become rows, and its rows the micro-batches of every rank.

Decisions:
- The window of packing is the step. So a step trains on the same samples whatever the batching mode, the
  objective is the same number, and resuming at any step needs no more than its number.
- Best-fit decreasing finds how few rows will do. The samples are then spread evenly over that many rows,
  longest first to the emptiest row (Graham 1969), so that rows have nearly one length: the ranks have equal
  work and little is padded.
- Rows are taken by decreasing length, so the first micro-batch is the largest: one that does not fit into
  memory fails at once.
Knows lengths only. Imports neither torch nor numpy.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Rows = list[list[int]]
"""Rows of sample numbers."""


def pack(lengths: Sequence[int], capacity: int, multiple: int) -> Rows:
    """Rows of several samples each, near one another in length.

    Args:
        lengths: Tokens of each sample, at most `capacity`; as many samples as `multiple` at least.
        capacity: Tokens of a row at most.
        multiple: The number of rows is a multiple of it.

    Returns:
        Every sample once; no row is empty.
    """
    count = -(-count_rows(lengths, capacity) // multiple) * multiple
    # An even spread may need more rows than best fit; each turn adds some, and with one sample a row it fits.
    while True:
        rows = _spread(lengths, count)
        if max(sum(lengths[i] for i in row) for row in rows) <= capacity:
            return rows
        count += multiple


def count_rows(lengths: Sequence[int], capacity: int) -> int:
    """Rows that best-fit decreasing fills: at most 11/9 of the fewest, plus 4 (Johnson 1974)."""
    room: list[int] = []  # of the rows that are open, ascending
    rows = 0
    for length in sorted(lengths, reverse=True):
        fit = bisect_left(room, length)  # the fullest row that still takes it
        if fit == len(room):
            rows += 1
            insort(room, capacity - length)
        else:
            insort(room, room.pop(fit) - length)
    return rows


def _spread(lengths: Sequence[int], count: int) -> Rows:
    """Longest first to the emptiest row: at most 4/3 of the least longest row (Graham 1969)."""
    rows: Rows = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, number = emptiest[0]
        rows[number].append(i)
        heapq.heapreplace(emptiest, (total + lengths[i], number))
    return rows


def deal(rows: Rows, lengths: Sequence[int], micro_batch: int, world_size: int, in_order: bool) -> list[Rows]:
    """Micro-batches of all ranks: number `m * world_size + rank` is the m-th of that rank.

    Rows of like length meet in one micro-batch, and the ranks' micro-batches of one turn are alike.

    Args:
        rows: A multiple of `world_size` of them.
        lengths: Tokens of each sample.
        micro_batch: Rows of a micro-batch at most.
        world_size: Ranks.
        in_order: Leave the rows as they are.
    """
    assert len(rows) % world_size == 0, "each rank needs as many rows as every other"
    if not in_order:
        rows = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    # One turn is a micro-batch of every rank; rank r takes its rows r, r + world_size, ... of like length.
    turns = [rows[i : i + micro_batch * world_size] for i in range(0, len(rows), micro_batch * world_size)]
    return [turn[rank::world_size] for turn in turns for rank in range(world_size)]
