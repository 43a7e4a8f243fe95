"""Routing statistics: hand-made routers with known answers, what small numbers do, alarms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_medical.tracking.routing_stats import RoutingStats, RoutingWatch

TASKS = ("a", "b", "c", "d")


def _stats(counts_TE: object, *more: object, **options: object) -> RoutingStats:
    """Of layers `l0`, `l1` ... with these counts."""
    counts_LTE = np.array([counts_TE, *more], dtype=float)
    tasks = [f"t{i}" for i in range(counts_LTE.shape[1])]
    return RoutingStats(counts_LTE, tasks, [f"l{i}" for i in range(len(counts_LTE))], **options)  # type: ignore[arg-type]


# Information


def test_an_even_router_tells_nothing() -> None:
    stats = _stats(np.full((4, 8), 500))
    assert stats.task_information_L == pytest.approx([0])
    assert stats.effective_experts_L == pytest.approx([8])
    assert stats.balance_L == pytest.approx([1])
    assert stats.entropy_LT == pytest.approx(np.full((1, 4), np.log(8)))


@pytest.mark.parametrize("experts", [4, 6])
def test_an_expert_for_each_task_tells_all_whatever_the_shares_of_the_tasks(experts: int) -> None:
    counts = np.zeros((4, experts))
    counts[range(4), range(4)] = [10, 1000, 20, 5000]
    assert _stats(counts).task_information_L == pytest.approx([1])


def test_more_tasks_than_experts_can_tell_all_too() -> None:
    counts = np.zeros((6, 3))
    counts[range(6), [0, 0, 1, 1, 2, 2]] = 100
    assert _stats(counts).task_information_L == pytest.approx([1])


def test_information_by_hand() -> None:
    """Shares (3/4, 1/4) and (1/4, 3/4): log 2 - H(1/4), over log 2."""
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    many = 1e9  # so many tokens that nothing is taken off
    stats = _stats(np.array([[0.75, 0.25], [0.25, 0.75]]) * many)
    assert stats.task_information_L == pytest.approx([1 - entropy / np.log(2)])


@pytest.mark.parametrize(("tasks", "experts"), [(28, 8), (8, 4), (3, 16)])
def test_few_tokens_of_a_router_that_tells_nothing_are_not_read_as_information(
    tasks: int, experts: int
) -> None:
    """The plain estimate is never near zero; the corrected one is as often below it as above."""
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(experts, 20.0))
    tokens = generator.integers(60, 400, tasks)
    counts_LTE = np.stack([generator.multinomial(tokens, shares) for _ in range(400)]).astype(float)
    stats = RoutingStats(counts_LTE, [""] * tasks, [""] * 400)
    usage = counts_LTE / counts_LTE.sum(-1, keepdims=True)
    mean = np.broadcast_to(usage.mean(1, keepdims=True), usage.shape)
    logs = np.log(np.divide(usage, mean, out=np.ones_like(usage), where=usage > 0))
    plain = (usage * logs).sum(-1).mean(1) / np.log(min(tasks, experts))
    # Without bias a little more than half of them are below zero, and cut off there.
    assert 0.45 < (stats.task_information_L == 0).mean() < 0.65
    assert stats.task_information_L.mean() < 0.3 * plain.mean()


def test_absent_tasks_do_not_count() -> None:
    counts = np.zeros((5, 4))
    counts[[0, 2], [1, 3]] = 50
    stats = _stats(counts)
    assert stats.task_information_L == pytest.approx([1])
    assert np.isnan(stats.entropy_LT[0]).tolist() == [False, True, False, True, True]
    assert {task for task, _, _ in stats.task_expert()} == {"t0", "t2"}
    assert np.isnan(stats.overlap_TT()[1]).all()


def test_one_task_alone_has_no_information() -> None:
    stats = _stats([[3, 5]])
    assert np.isnan(stats.task_information_L).all()
    assert "router/task_information" not in stats.values()
    assert stats.values()["router/effective_experts"] > 1


def test_nothing_routed_says_nothing() -> None:
    none = RoutingStats(np.zeros((0, 2, 0)), ["a", "b"], [])
    assert (none.values(), none.task_expert(), none.alarms()) == ({}, [], [])
    assert _stats(np.zeros((2, 4))).values() == {}


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**31))
def test_names_of_tasks_and_experts_do_not_matter(tasks: int, experts: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 50, (3, tasks, experts)).astype(float)
    turned = counts[:, generator.permutation(tasks)][:, :, generator.permutation(experts)]
    values, other = _stats(*counts).values(), _stats(*turned).values()
    assert other == pytest.approx(values)
    assert all(0 <= v <= 1 for k, v in values.items() if k in ("router/task_information", "router/balance"))


# Experts


def test_the_most_used_experts_of_a_task() -> None:
    stats = _stats([[1, 6, 0, 3], [0, 0, 0, 0]])
    assert stats.top_experts(0, 0, 2) == [(1, 0.6), (3, 0.3)]
    assert [e for e, _ in stats.top_experts(0, 0, 4)] == [1, 3, 0]
    assert stats.top_experts(0, 1) == []


def test_overlap_of_tasks_is_the_cosine_over_all_layers() -> None:
    first, second = [[1, 0], [1, 0], [0, 1]], [[1, 0], [0, 1], [0, 1]]
    assert _stats(first, second).overlap_TT() == pytest.approx(
        np.array([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])
    )


def test_the_heat_map_shows_the_layer_that_tells_most() -> None:
    stats = _stats(np.full((2, 2), 50), [[90, 10], [10, 90]])
    assert stats.task_expert() == [
        ("t0", "l1: 0", 0.9),
        ("t0", "l1: 1", 0.1),
        ("t1", "l1: 0", 0.1),
        ("t1", "l1: 1", 0.9),
    ]
    assert stats.task_expert(0)[0] == ("t0", "l0: 0", 0.5)


def test_an_expert_without_tokens_is_dead_once_there_are_enough() -> None:
    dead = np.array([[500, 500, 0, 500], [500, 500, 8, 500]])
    assert _stats(dead).dead_LE.tolist() == [[False, False, True, False]]
    assert not _stats(dead / 10).dead_LE.any(), "300 tokens on 4 experts are too few to tell"
    assert not _stats(dead + np.array([0, 0, 30, 0])).dead_LE.any(), "used, if little"
    assert _stats(dead).values()["router/dead_experts"] == 1


def test_a_fair_router_has_no_dead_expert_by_chance() -> None:
    generator = np.random.default_rng(0)
    counts_LTE = generator.multinomial(800, np.full(8, 1 / 8), (2000, 2)).astype(float)
    assert not _stats(*counts_LTE).dead_LE.any()


@pytest.mark.parametrize(
    ("loads", "top_k", "collapsed"),
    [
        ([960, 20, 10, 10], 1, True),
        ([800, 100, 50, 50], 1, False),
        ([500, 500, 0, 0], 1, False),  # two experts at work
        ([500, 500, 0, 0], 2, True),  # each token has the same two
        ([450, 450, 50, 50], 2, False),
        ([940, 20, 20, 20], 2, True),  # chosen for the look of it: one has nearly all the gate
        ([250, 250, 250, 250], 4, False),  # a dense gate
        ([970, 10, 10, 10], 4, True),
    ],
)
def test_collapsed_layers(loads: list[int], top_k: int, collapsed: bool) -> None:
    stats = _stats([loads, loads], top_k=top_k)
    assert stats.collapsed_L.tolist() == [collapsed]
    assert stats.values()["router/collapsed_layers"] == collapsed
    assert not _stats(np.array([loads, loads]) / 1000, top_k=top_k).collapsed_L.any(), "no tokens to speak of"


def test_tasks_that_choose_for_their_tokens_are_few() -> None:
    """One task has chosen once, however many tokens it has: its experts are not all there are."""
    one = np.array([[5000, 5000, 0, 0]])
    assert _stats(one, top_k=2).collapsed_L.all()
    assert not _stats(one, top_k=2, per_task=True).collapsed_L.any()
    assert not _stats(one, top_k=2, per_task=True).dead_LE.any()
    assert _stats(np.repeat(one, 3, axis=0), top_k=2, per_task=True).collapsed_L.all()


# Alarms


def test_alarms_name_what_is_wrong() -> None:
    well, dead, collapsed = np.full((2, 4), 500), [[500, 500, 0, 500]] * 2, [[5000, 0, 0, 0]] * 2
    assert _stats(well).alarms() == []
    assert _stats(well, dead).alarms() == [("dead experts", "1 of 8: expert 2 of l1")]
    titles = dict(_stats(well, collapsed).alarms())
    assert titles["router collapse"] == "1 of 2 layers: l1 uses 1.0 of 4 experts"
    many = _stats(*[dead] * 6).alarms()
    assert many == [("dead experts", "6 of 24: expert 2 of l0, expert 2 of l1, expert 2 of l2 and 3 more")]


def test_the_watch_waits_and_says_it_once() -> None:
    watch = RoutingWatch(looks=3)
    well, dead = _stats(np.full((2, 4), 500)), _stats([[500, 500, 0, 500]] * 2)
    assert [len(watch.look(s)) for s in (dead, dead, well, dead, dead)] == [0] * 5
    assert watch.look(dead) == [("dead experts", "1 of 4: expert 2 of l0")]
    assert watch.look(dead) == []
    assert [len(watch.look(s)) for s in (well, dead, dead, dead)] == [0, 0, 0, 1], "well again, then not"


def test_the_watch_tells_only_what_is_new() -> None:
    watch = RoutingWatch(looks=2)
    first, both = [[500, 500, 0, 500]] * 2, [[500, 0, 0, 500]] * 2
    told = [watch.look(_stats(counts)) for counts in (first, first, both, both)]
    assert told == [
        [],
        [("dead experts", "1 of 4: expert 2 of l0")],
        [],
        [("dead experts", "1 of 4: expert 1 of l0")],
    ]


# JSON


def test_json_brings_everything_back() -> None:
    stats = _stats([[1.25, 2], [0, 3]], top_k=2, per_task=True)
    data = json.loads(json.dumps(stats.to_json(7)))
    back = RoutingStats.from_json(data)
    assert data["step"] == 7
    assert (back.counts_LTE == stats.counts_LTE).all()
    assert (list(back.tasks), list(back.layers)) == (list(stats.tasks), list(stats.layers))
    assert (back.top_k, back.per_task) == (2, True)


def test_whole_numbers_stay_whole_in_json() -> None:
    assert json.dumps(_stats([[1, 2]]).to_json(0)["counts_LTE"]) == "[[[1, 2]]]"
    least = {"step": 1, "tasks": ["a"], "layers": ["l"], "counts_LTE": [[[1, 2]]]}
    assert RoutingStats.from_json(least).top_k == 1


def test_layers_with_fewer_experts_have_no_dead_ones_beyond() -> None:
    counts = np.zeros((2, 2, 4))
    counts[0, :, :2] = [[900, 100], [100, 900]]  # two experts
    counts[1] = [[500, 500, 0, 0], [500, 500, 0, 0]]  # four, two of them dead
    stats = RoutingStats(counts, ["a", "b"], ["first", "second"], 1, False, (2, 4))
    assert stats.dead_LE.tolist() == [[False] * 4, [False, False, True, True]]
    np.testing.assert_allclose(stats.balance_L, [1.0, 0.5])
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert stats.task_information_L[0] == pytest.approx((np.log(2) - entropy) / np.log(2), abs=2e-3)
    assert {name for _, name, _ in stats.task_expert(0)} == {"first: 0", "first: 1"}
    again = RoutingStats.from_json(stats.to_json(5))
    assert again.dead_LE.tolist() == stats.dead_LE.tolist()


# Layers with different numbers of experts (MoLA)


def _uneven(**options: object) -> RoutingStats:
    """Two experts of which one has it all, and eight that are used alike."""
    narrow = [[2000, 0, 0, 0, 0, 0, 0, 0]]
    wide = [[250] * 8]
    return _stats(narrow, wide, experts=(2, 8), **options)


def test_alarms_count_the_experts_that_there_are() -> None:
    texts = dict(_uneven().alarms())
    assert texts["router collapse"] == "1 of 2 layers: l0 uses 1.0 of 2 experts"
    assert texts["dead experts"] == "1 of 10: expert 1 of l0"


def test_a_narrow_layer_has_no_more_choices_than_experts() -> None:
    """With top-8 of a wide layer each token makes two choices in a narrow one: too few to call one dead."""
    few = _stats([[150, 0, 0, 0, 0, 0, 0, 0]], [[150 / 8] * 8], experts=(2, 8), top_k=8)
    assert not few.dead_LE.any()
    many = _stats([[250, 0, 0, 0, 0, 0, 0, 0]], [[250 / 8] * 8], experts=(2, 8), top_k=8)
    assert np.argwhere(many.dead_LE).tolist() == [[0, 1]]
