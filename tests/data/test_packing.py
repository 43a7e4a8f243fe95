"""Packing by lengths alone: every sample once, no row too long or empty, little padding, ranks alike."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_medical.data.packing import count_rows, deal, pack

CAPACITY = 64
steps = st.integers(1, 8).flatmap(
    lambda multiple: st.tuples(
        st.just(multiple),
        st.integers(1, 12).flatmap(
            lambda share: st.lists(
                st.integers(1, CAPACITY), min_size=share * multiple, max_size=share * multiple
            )
        ),
    )
)


@given(steps)
def test_every_sample_is_in_one_row_that_holds_it(step: tuple[int, list[int]]) -> None:
    multiple, lengths = step
    rows = pack(lengths, CAPACITY, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= CAPACITY for row in rows)
    assert len(rows) % multiple == 0


@given(steps)
def test_packing_is_a_function_of_the_lengths(step: tuple[int, list[int]]) -> None:
    multiple, lengths = step
    assert pack(lengths, CAPACITY, multiple) == pack(tuple(lengths), CAPACITY, multiple)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
def test_best_fit_needs_few_rows(lengths: list[int]) -> None:
    rows = count_rows(lengths, CAPACITY)
    assert -(-sum(lengths) // CAPACITY) <= rows <= len(lengths)
    halves = sum(length > CAPACITY // 2 for length in lengths)
    assert rows <= max(halves, 2 * -(-sum(lengths) // CAPACITY))


@pytest.mark.parametrize(
    ("lengths", "rows"), [([64, 64], 2), ([32, 32, 32], 2), ([1], 1), ([40, 30, 24, 34], 2), ([33] * 3, 3)]
)
def test_best_fit_on_cases_worked_out_by_hand(lengths: list[int], rows: int) -> None:
    assert count_rows(lengths, CAPACITY) == rows


@given(steps, st.integers(1, 4), st.booleans())
def test_ranks_have_as_many_micro_batches_of_at_most_that_size(
    step: tuple[int, list[int]], micro_batch: int, in_order: bool
) -> None:
    world, lengths = step
    rows = pack(lengths, CAPACITY, world)
    batches = deal(rows, lengths, micro_batch, world, in_order)
    assert len(batches) % world == 0
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for first in range(0, len(batches), world):
        assert len({len(batch) for batch in batches[first : first + world]}) == 1
    assert all(1 <= len(batch) <= micro_batch for batch in batches)


def test_rows_in_order_stay_in_order() -> None:
    rows = [[i] for i in range(8)]
    assert deal(rows, [0] * 8, 2, 2, in_order=True) == [[[0], [2]], [[1], [3]], [[4], [6]], [[5], [7]]]


@pytest.mark.parametrize("world", [1, 4, 8])
def test_long_tailed_lengths_fill_the_rows_and_the_ranks(world: int) -> None:
    """Log-normal lengths, as the medical tasks have them; waiting for the longest rank counts as padding."""
    rng = random.Random(5)
    tokens = positions = 0
    for _ in range(20):
        lengths = [min(1024, max(16, int(rng.lognormvariate(4.7, 0.8)))) for _ in range(256)]
        batches = deal(pack(lengths, 1024, world), lengths, 2, world, in_order=False)
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            longest = max(sum(lengths[i] for i in row) for batch in turn for row in batch)
            positions += longest * sum(len(batch) for batch in turn)
        tokens += sum(lengths)
    assert tokens / positions > 0.97
