"""The order of samples: same for every world size and history of calls, exact shares, caps, permutations."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.mixing import weights_at

from moe_medical.data.mixture import Exhausted, MixPlan, SampleRef, permute
from moe_medical.data.static_mixing import row_limits

SIZES = [4000, 1800, 500, 60, 5]


def make(sizes=SIZES, weights=None, block=64, seed=7, cap=4.0) -> MixPlan:  # type: ignore[no-untyped-def]
    weights = np.sqrt(sizes) if weights is None else weights
    return MixPlan(sizes, weights, block, seed, [cap] * len(sizes))


def order(plan: MixPlan, num_samples: int) -> list[SampleRef]:
    return [plan.at(g) for g in range(num_samples)]


@st.composite
def mixtures(draw: st.DrawFn) -> MixPlan:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    weights = draw(st.lists(st.floats(1e-6, 1e6), min_size=len(sizes), max_size=len(sizes)))
    caps = draw(st.lists(st.none() | st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)))
    return MixPlan(sizes, weights, draw(st.integers(1, 33)), draw(st.integers(0, 2**64)), caps)


def samples_until_exhausted(plan: MixPlan, at_most: int) -> list[SampleRef]:
    found = []
    for g in range(at_most):
        try:
            found.append(plan.at(g))
        except Exhausted:
            break
    return found


# --- the order is a pure function -------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_together_read_the_same_order_for_every_world_size(world: int) -> None:
    global_batch, steps = 24, 40
    share = global_batch // world
    ranks = [make() for _ in range(world)]
    seen = [
        plan.at(step * global_batch + rank * share + i)
        for step in range(steps)
        for rank, plan in enumerate(ranks)
        for i in range(share)
    ]
    assert seen == order(make(), global_batch * steps)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 150), min_size=1, max_size=30))
def test_random_access_equals_iteration(plan: MixPlan, positions: list[int]) -> None:
    expected = samples_until_exhausted(plan, 151)
    fresh = MixPlan.from_state(plan.state())
    for g in positions:
        if g < len(expected):
            assert fresh.at(g) == expected[g]
        else:
            with pytest.raises(Exhausted):
                fresh.at(g)


def test_order_is_pinned() -> None:
    """Another order would change every resumed run: a change here needs a new state version."""
    found = [tuple(make().at(g)) for g in (0, 1, 2, 63, 64, 1000)]
    assert found == [(0, 0, 2674), (1, 0, 1355), (0, 0, 3175), (1, 0, 840), (0, 0, 3451), (0, 0, 64)]


def test_seed_changes_the_order() -> None:
    assert order(make(seed=1), 64) != order(make(seed=2), 64)


def test_negative_position() -> None:
    with pytest.raises(IndexError):
        make().at(-1)


# --- epochs, caps and shares ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_epochs_are_permutations_and_caps_hold(plan: MixPlan) -> None:
    state = plan.state()
    seen = samples_until_exhausted(plan, state["block"] * 12)
    limits = row_limits(state["sizes"], state["max_repeats"])
    for task, size in enumerate(state["sizes"]):
        rows = [(ref.epoch, ref.row) for ref in seen if ref.task == task]
        assert len(set(rows)) == len(rows) <= limits[task]
        assert all(0 <= row < size for _, row in rows)
        epochs = Counter(epoch for epoch, _ in rows)
        assert all(epochs[e] == size for e in range(max(epochs, default=0))), "an epoch ended early"


def test_each_epoch_has_its_own_permutation() -> None:
    plan = MixPlan([50], [1.0], 50, 3, [None])
    first, second = ([plan.at(g).row for g in range(e * 50, e * 50 + 50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=12), st.sampled_from([1, 7, 64]))
def test_realised_shares_stay_within_two_samples_of_the_target(weights: list[float], block: int) -> None:
    plan = MixPlan([10**6] * len(weights), weights, block, 0, [None] * len(weights))
    target = np.array(weights) / np.sum(weights)
    for blocks in (1, 3, 50, 200):
        n = blocks * block
        assert np.abs(plan.counts(n) - target * n).max() < 2.0


def test_shares_below_one_sample_per_block() -> None:
    tail = np.array([400000, 180000, 120000, 60000, 20000, 10000, 5000, 2500, 1200, 500])
    plan = MixPlan(tail, tail, 64, 1, [None] * len(tail))
    counts = np.array([plan.counts(64 * b) for b in range(2001)])
    target = np.outer(np.arange(2001) * 64, tail / tail.sum())
    assert np.diff(counts, axis=0).min() >= 0
    assert (counts.sum(1) == np.arange(2001) * 64).all()
    assert np.abs(counts - target).max() < 1.5
    assert counts[-1].min() > 0


def test_share_of_a_capped_task_flows_to_the_others() -> None:
    plan = MixPlan([1000, 1000, 10], [1, 1, 2], 40, 0, [None, None, 2.0])
    assert plan.counts(40).tolist() == [10, 10, 20]
    assert plan.counts(80).tolist() == [30, 30, 20]


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 200))
def test_counts_are_those_of_the_order(plan: MixPlan, num_samples: int) -> None:
    seen = samples_until_exhausted(plan, num_samples)
    if len(seen) < num_samples:
        with pytest.raises(Exhausted):
            plan.counts(num_samples)
        return
    tasks = [ref.task for ref in seen]
    assert plan.counts(num_samples).tolist() == [tasks.count(t) for t in range(len(plan.state()["sizes"]))]


def test_caps_end_the_run_with_the_number_of_samples_they_allow() -> None:
    plan = MixPlan([10, 5], [1, 1], 8, 0, [2.0, 1.0])
    assert len({plan.at(g) for g in range(25)}) == 25
    with pytest.raises(Exhausted, match=r"asks for 26 samples.* only 25.*max_repeats"):
        plan.at(25)
    with pytest.raises(Exhausted, match="asks for 99 samples"):
        plan.report(99)


def test_report_and_warnings() -> None:
    plan = MixPlan([100, 10, 7], [90, 10, 0], 10, 0, [None] * 3)
    shares = plan.report(50)
    assert [(s.task, s.rows, s.share, s.samples, s.repeats) for s in shares] == [
        (0, 100, 0.9, 45, 0.45),
        (1, 10, 0.1, 5, 0.5),
        (2, 7, 0.0, 0, 0.0),
    ]
    [warning] = plan.warnings(50, ["a", "b", "c"])
    assert "'c' gets 0 of 50 samples" in warning


# --- changing weights and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefetched", [0, 5, 64 * 19 + 5, 64 * 20 - 1])
def test_weight_change_is_the_same_before_and_after_prefetch(prefetched: int) -> None:
    eager, lazy = make(), make()
    eager.at(prefetched)
    eager.counts(64 * 40)  # looking ahead is no reading ahead
    for plan in (eager, lazy):
        plan.set_weights([1, 1, 1, 1, 1], from_block=20)
    assert order(eager, 64 * 30) == order(lazy, 64 * 30)
    assert order(eager, 64 * 20) == order(make(), 64 * 20)
    assert lazy.at(64 * 21) != make().at(64 * 21)


@pytest.mark.parametrize("read", [64 * 20, 64 * 39])
def test_weights_of_a_block_that_was_read_cannot_change(read: int) -> None:
    plan = make()
    plan.at(read)
    with pytest.raises(ValueError, match=f"after block {read // 64}, got 20"):
        plan.set_weights([1, 1, 1, 1, 1], from_block=20)
    again = make()
    again.restore(plan.state(read + 1))
    with pytest.raises(ValueError, match=f"after block {read // 64}, got 20"):
        again.set_weights([1, 1, 1, 1, 1], from_block=20)
    assert order(again, 64 * 30) == order(make(), 64 * 30)


def test_history_and_weights_of_a_block() -> None:
    plan = make(weights=[4, 2, 1, 1, 0])
    plan.set_weights([1, 1, 1, 1, 0], from_block=3)
    assert [(block, shares.tolist()) for block, shares in plan.history] == [
        (0, [0.5, 0.25, 0.125, 0.125, 0]),
        (3, [0.25, 0.25, 0.25, 0.25, 0]),
    ]
    assert plan.last_change == 3
    assert [weights_at(plan, b)[0] for b in (0, 2, 3, 9)] == [0.5, 0.5, 0.25, 0.25]
    assert [plan.block_of(g) for g in (0, 63, 64, 64 * 7)] == [0, 0, 1, 7]


def test_weight_changes_move_forward() -> None:
    plan = make()
    plan.set_weights([1, 0, 0, 0, 0], from_block=3)
    with pytest.raises(ValueError, match="after block 3"):
        plan.set_weights([1, 0, 0, 0, 0], from_block=3)
    assert {plan.at(g).task for g in range(3 * 64, 6 * 64)} == {0}


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.integers(1, 5), st.data())
def test_state_round_trip(plan: MixPlan, from_block: int, data: st.DataObject) -> None:
    count = len(plan.state()["sizes"])
    weights = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    assume(max(weights) > 0)
    plan.set_weights(weights, from_block)
    again = MixPlan.from_state(json.loads(json.dumps(plan.state())))
    assert again.state() == plan.state()
    assert again.fingerprint == plan.fingerprint
    assert samples_until_exhausted(again, 200) == samples_until_exhausted(plan, 200)


@settings(max_examples=15, deadline=None)
@given(mixtures(), st.integers(1, 5), st.data())
def test_resume_at_every_position(plan: MixPlan, from_block: int, data: st.DataObject) -> None:
    """A state of position s gives the order from s on, and before it, without what lies before it."""
    count = len(plan.state()["sizes"])
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    plan.set_weights(weights, from_block)
    whole = samples_until_exhausted(plan, 40)
    for s in range(len(whole)):
        state = json.loads(json.dumps(plan.state(s)))
        resumed = MixPlan.from_state(state)
        assert [resumed.at(g) for g in range(s, len(whole))] == whole[s:]
        assert resumed.state(s) == plan.state(s) == MixPlan.from_state(plan.state()).state(s)
        assert resumed.counts(len(whole)).tolist() == plan.counts(len(whole)).tolist()
        assert resumed.at(s // 2) == whole[s // 2]


def test_a_state_with_a_position_is_not_planned_again() -> None:
    """What lies before it could be anything: only the counters of its block are used."""
    state = make().state(64 * 200)
    assert MixPlan.from_state(state).at(64 * 200) == make().at(64 * 200)
    state["start"]["used"][0] += 1
    assert [MixPlan.from_state(state).at(64 * 200 + i) for i in range(64)] != order(make(), 64 * 201)[-64:]


def test_a_state_of_another_mixture_is_refused() -> None:
    for other in (make(seed=8), make(cap=3.0), make(block=32), make(sizes=[4000, 1800, 500, 60, 6])):
        with pytest.raises(ValueError, match="another mixture"):
            make().restore(other.state())


def test_fingerprint_ignores_the_history_only() -> None:
    plan = make()
    before = plan.fingerprint
    plan.set_weights([1, 1, 1, 1, 1], from_block=2)
    assert plan.fingerprint == before
    assert make(seed=8).fingerprint != before
    assert make(sizes=[4000, 1800, 500, 60, 6]).fingerprint != before


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1]])
def test_weights_that_are_no_shares(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        MixPlan([1, 2], weights, 4, 0, [None, None])


@pytest.mark.parametrize(("sizes", "block"), [([], 4), ([3, 0], 4), ([3, 1], 0)])
def test_sizes_and_blocks_that_cannot_be(sizes: list[int], block: int) -> None:
    with pytest.raises(ValueError, match=r"row|block"):
        MixPlan(sizes, [1.0] * len(sizes), block, 0, [None] * len(sizes))


# --- the keyed permutation --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size)
    found = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(found), index)


def test_permute_sends_each_index_everywhere_alike() -> None:
    size, trials = 6, 6000
    keys = np.repeat(np.arange(trials, dtype=np.uint64), size)
    index = np.tile(np.arange(size), trials)
    found = permute(index, np.full_like(index, size), keys).reshape(trials, size)
    frequency = np.array([np.bincount(found[:, i], minlength=size) for i in range(size)]) / trials
    assert np.abs(frequency - 1 / size).max() < 0.03
