"""Mixing rules: the design's table, exact bounds, caps over the whole run, orders that follow the shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_medical.config.schema import MixSection
from moe_medical.data.mixture import MixPlan
from moe_medical.data.static_mixing import (
    MIX_RULES,
    Floats,
    TaskSize,
    bounded_shares,
    row_limits,
    spread_caps,
    task_weights,
    weight_schedule,
)
from moe_medical.errors import ConfigError

LONG_TAIL = (
    *(400_000, 150_000, 140_000, 110_000, 52_000, 43_000, 35_000, 23_000, 20_000, 17_000, 16_000, 12_000),
    *(9_500, 7_400, 7_200, 6_800, 4_900, 3_100, 3_000, 2_800, 2_000, 1_200, 1_100, 500),
)
"""24 tasks that give all figures of the design's table, which names the first, the last and their number."""


def sized(*rows: int, cap: float | None = None, lengths: Sequence[float] = ()) -> list[TaskSize]:
    lengths = lengths or [1.0] * len(rows)
    return [TaskSize(f"t{i}", n, m, 1.0, cap) for i, (n, m) in enumerate(zip(rows, lengths, strict=True))]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[MixSection, list[TaskSize]]:
    """Any rule with any settings, on tasks of which some are capped, off or weighed."""
    count = draw(st.integers(1, 7))
    tasks = [
        TaskSize(
            name=f"t{i}",
            rows=draw(st.integers(1, 20_000)),
            mean_tokens=draw(st.floats(1, 500)),
            weight=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) if i else 1.0,
            max_repeats=draw(st.none() | st.floats(0.2, 6)),
        )
        for i in range(count)
    ]
    mix = MixSection(
        rule=draw(st.sampled_from(sorted(MIX_RULES))),
        by=draw(st.sampled_from(["examples", "tokens"])),
        temperature=draw(st.floats(0.5, 20)),
        cap=draw(st.integers(1, 30_000)),
        beta=draw(st.floats(0.1, 0.99999)),
        epochs=draw(st.floats(0.5, 8)),
        shares={t.name: draw(st.floats(0.01, 1)) for t in tasks},
        floor=draw(st.sampled_from([0.0, 0.3 / count])),
        ceiling=draw(st.sampled_from([1.0, min(1.0, 1.5 / sum(t.weight > 0 for t in tasks))])),
        block=draw(st.sampled_from([16, 100])),
    )
    return mix, tasks


def capacity(tasks: Sequence[TaskSize]) -> int:
    limits = row_limits([t.rows for t in tasks], [t.max_repeats for t in tasks])
    return int(limits[[t.weight > 0 for t in tasks]].sum())


# --- the design's table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "cap", "figures"),
    [
        ({"rule": "proportional"}, None, (0.375, 0.0005, 1.0, 8.3, 0.97)),
        ({"temperature": 2.0}, None, (0.170, 0.0060, 12.8, 17.0, 0.68)),
        ({"temperature": 1 / 0.3}, None, (0.105, 0.0142, 30.2, 21.1, 0.40)),
        ({"rule": "uniform"}, None, (0.042, 0.0417, 89.0, 24.0, 0.07)),
        ({"rule": "cap", "cap": 2**14, "temperature": 1.0}, None, (0.068, 0.0021, 4.4, 18.9, 0.88)),
        ({"rule": "effective_number", "beta": 0.9999}, None, (0.337, 0.0087, 18.5, 10.9, 0.57)),
        ({"rule": "effective_number", "beta": 0.99999}, None, (0.132, 0.0324, 69.2, 22.0, 0.12)),
        ({"rule": "unimax", "epochs": 4.0}, None, (0.072, 0.0019, 4.0, 18.4, 0.89)),
        ({"temperature": 2.0}, 4.0, (0.175, 0.0019, 4.0, 16.0, 0.89)),
    ],
)
def test_the_designs_table(settings: dict, cap: float | None, figures: tuple[float, ...]) -> None:
    """Shares of head and tail, epochs of the tail, effective tasks, P(no tail in a batch of 64)."""
    samples = sum(LONG_TAIL)
    p = task_weights(MixSection(**settings), sized(*LONG_TAIL, cap=cap), samples)
    tail = p[-1]
    found = (p[0], tail, tail * samples / LONG_TAIL[-1], np.exp(-(p * np.log(p)).sum()), (1 - tail) ** 64)
    one_unit = np.array((0.001, 0.0001, 0.1, 0.1, 0.01))
    assert (np.abs(np.array(found) - figures) <= one_unit * 1.001).all()


# --- single rules -----------------------------------------------------------------------------------------


def test_simple_rules_by_hand() -> None:
    tasks = sized(100, 4)
    for mix, expected in (
        (MixSection(rule="proportional"), [100, 4]),
        (MixSection(rule="uniform"), [1, 1]),
        (MixSection(temperature=2.0), [10, 2]),
        (MixSection(rule="cap", cap=16, temperature=2.0), [4, 2]),
        (MixSection(rule="effective_number", beta=0.5), [100 / 2, 4 / 1.875]),
        (MixSection(rule="explicit", shares={"t1": 3.0, "t0": 1.0}), [1, 3]),
    ):
        assert task_weights(mix, tasks, 10) == pytest.approx(np.array(expected) / sum(expected))


def test_unimax_by_hand() -> None:
    """Budget 100, two epochs: 10 -> 20 of 100/3, 15 -> 30 of 80/2, the rest for the last."""
    mix = MixSection(rule="unimax", epochs=2.0)
    assert task_weights(mix, sized(1000, 10, 15), 100) == pytest.approx([0.5, 0.2, 0.3])
    assert task_weights(mix, sized(1000, 10, 90), 60) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    # All at their epochs before the budget is spent: shares are the sizes'.
    assert task_weights(mix, sized(10, 30), 1000) == pytest.approx([0.25, 0.75])


def test_unimax_by_tokens_spends_the_tokens_of_the_run() -> None:
    lengths = np.array([10.0, 40.0, 5.0])
    tasks = sized(10_000, 15, 60, lengths=lengths.tolist())
    tokens = 300 * task_weights(MixSection(rule="unimax", by="tokens", epochs=2.0), tasks, 300) * lengths
    # Two epochs of 60 rows of 5 and of 15 of 40; what is left of the 300 samples is the first task's.
    assert tokens == pytest.approx([(300 - 120 - 30) * 10, 1200, 600])


@settings(max_examples=60, deadline=None)
@given(mixes())
def test_by_tokens_is_the_same_rule_on_tokens(drawn: tuple[MixSection, list[TaskSize]]) -> None:
    mix, tasks = drawn
    free = [replace(t, max_repeats=None) for t in tasks]
    weights = task_weights(replace(mix, by="tokens"), free, 1000)
    lengths = np.array([t.mean_tokens for t in tasks])
    if mix.rule != "unimax":  # its budget depends on the unit
        as_rows = [replace(t, rows=t.rows * t.mean_tokens, mean_tokens=1.0) for t in free]
        expected = task_weights(replace(mix, by="examples"), as_rows, 1000)
        assert weights * lengths / (weights * lengths).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", sorted(MIX_RULES))
def test_weights_of_tasks_multiply_and_zero_leaves_out(rule: str) -> None:
    shares = {"t0": 2.0, "t1": 1.0, "t2": 1.0}
    mix = MixSection(rule=rule, shares=shares)  # type: ignore[arg-type]
    plain = sized(500, 400, 300)
    part = task_weights(mix, plain[:2], 300) if rule != "explicit" else np.array([2 / 3, 1 / 3])
    off = [*plain[:2], replace(plain[2], weight=0.0)]
    assert task_weights(mix, off, 300) == pytest.approx([*part, 0])
    heavy = task_weights(mix, [replace(plain[0], weight=3.0), off[1], off[2]], 300)
    assert heavy[0] / heavy[1] == pytest.approx(3 * part[0] / part[1])


def test_an_explicit_share_of_zero_leaves_out_even_when_the_others_are_capped() -> None:
    mix = MixSection(rule="explicit", shares={"t0": 1.0, "t1": 0.0}, floor=0.1)
    assert task_weights(mix, sized(10, 10, cap=1.0), 100).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("mix", "problem"),
    [
        (MixSection(floor=0.4), "data.mix.floor must be at most 1 / 3 tasks, got 0.4. Try 0.1667."),
        (MixSection(ceiling=0.2), "data.mix.ceiling must be at least 1 / 3 tasks, got 0.2. Try 0.6667."),
        (
            MixSection(rule="explicit", shares={"t0": 1, "t2": 1}),
            "data.mix.shares must give a share to each task of the recipe. Missing: t1.",
        ),
        (
            MixSection(rule="explicit", shares={"t0": 1, "t1": 1, "t2": 1, "t9": 1}),
            "data.mix.shares.t9 must be a task of the recipe. Tasks there: t0, t1, t2.",
        ),
        (
            MixSection(rule="explicit", shares={"t0": 0, "t1": 0, "t2": 0}),
            "data.tasks must leave a task with a weight and a share above 0.",
        ),
    ],
)
def test_settings_that_do_not_fit_the_tasks(mix: MixSection, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_weights(mix, sized(10, 20, 30), 100)
    assert [str(p) for p in caught.value.problems] == [problem]


# --- bounds -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bounds_hold_after_normalisation(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    weights = np.array(data.draw(st.lists(st.floats(1e-9, 1e9), min_size=count, max_size=count)))
    share = np.array(data.draw(st.lists(st.floats(1e-6, 1), min_size=count, max_size=count)))
    share /= share.sum()
    low, high = share * data.draw(st.floats(0, 1)), share * data.draw(st.floats(1, 5))
    found = bounded_shares(weights, low, high)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (low <= found).all()
    assert (found <= high).all()
    free = (found > low * (1 + 1e-9)) & (found < high * (1 - 1e-9)) & (found > 1e-11)
    ratio = (found / weights)[free]
    assert ratio == pytest.approx(ratio[:1].repeat(len(ratio)), rel=1e-6)


def test_floor_and_ceiling_of_a_mixture() -> None:
    mix = MixSection(rule="proportional", floor=0.1, ceiling=0.6)
    assert task_weights(mix, sized(9000, 900, 100), 100) == pytest.approx([0.6, 0.3, 0.1])
    assert task_weights(replace(mix, ceiling=1.0), sized(9000, 900, 100), 100) == pytest.approx(
        [0.8, 0.1, 0.1]
    )


def test_caps_win_over_floors() -> None:
    mix = MixSection(rule="uniform", floor=0.3)
    assert task_weights(mix, sized(1000, 1000, 5, cap=2.0), 100) == pytest.approx([0.45, 0.45, 0.1])


# --- caps -------------------------------------------------------------------------------------------------


def test_row_limits() -> None:
    assert row_limits([10, 3, 5], [1.5, 0.1, None]).tolist() == [15, 1, 2**62]


def test_spread_caps_by_hand() -> None:
    # Shares .5 .3 .2 of 100 samples with limits 20, -, -: the surplus of 30 goes 3:2 to the others.
    found = spread_caps(np.array([5.0, 3.0, 2.0]), np.array([20, 10**9, 10**9]), 100)
    assert np.allclose(found, [0.2, 0.48, 0.32])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 10**6))
def test_spread_caps_keeps_to_the_limits_where_they_suffice(data: st.DataObject, num_samples: int) -> None:
    count = data.draw(st.integers(1, 8))
    weights = np.array(data.draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count)))
    limits = np.array(data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count)))
    found = spread_caps(weights, limits, num_samples)
    assert np.isclose(found.sum(), 1)
    if limits.sum() >= num_samples:
        assert (found * num_samples <= limits * (1 + 1e-9)).all()
        free = found * num_samples < limits * (1 - 1e-6)
        ratio = (found / weights)[free]
        assert np.allclose(ratio, ratio[:1])
    else:
        assert np.allclose(found, limits / limits.sum())


# --- warm-up ----------------------------------------------------------------------------------------------


def test_warm_up_goes_in_equal_steps_of_the_inverse_temperature() -> None:
    mix = MixSection(temperature=4.0, temperature_from=1.0, temperature_blocks=3)
    schedule = weight_schedule(mix, sized(10_000, 1), 100)
    assert [block for block, _ in schedule] == [0, 1, 2, 3]
    exponents = [np.log(w[0] / w[1]) / np.log(10_000) for _, w in schedule]
    assert exponents == pytest.approx([1, 0.75, 0.5, 0.25])


def planned(
    mix: MixSection, tasks: Sequence[TaskSize], samples: int
) -> tuple[MixPlan, list[tuple[int, Floats]]]:
    (_, first), *later = schedule = weight_schedule(mix, tasks, samples)
    plan = MixPlan([t.rows for t in tasks], first, mix.block, 3, [t.max_repeats for t in tasks])
    for block, weights in later:
        plan.set_weights(weights, from_block=block)
    return plan, schedule


@settings(max_examples=60, deadline=None)
@given(mixes(), st.sampled_from([None, 1.0, 9.0]), st.integers(1, 6), st.floats(0.05, 1.0))
def test_orders_follow_the_rule_and_its_caps(
    drawn: tuple[MixSection, list[TaskSize]], start: float | None, blocks: int, part: float
) -> None:
    """Realised shares are within 0.1 % of the samples, or within two samples; no cap is passed."""
    mix, tasks = drawn
    if mix.rule in ("temperature", "cap"):
        mix = replace(mix, temperature_from=start, temperature_blocks=blocks)
    samples = max(1, int(min(capacity(tasks) * part, 5_000)))
    plan, schedule = planned(mix, tasks, samples)
    found = plan.counts(samples)
    limits = row_limits([t.rows for t in tasks], [t.max_repeats for t in tasks])
    assert (found <= limits).all()
    firsts = [block * mix.block for block, _ in schedule] + [10**9]
    spans = [min(b, samples) - min(a, samples) for a, b in pairwise(firsts)]
    expected = sum(span * weights for span, (_, weights) in zip(spans, schedule, strict=True))
    inside_a_block = mix.block if samples % mix.block else 0  # shares are exact at the ends of blocks
    slack = max(0.001 * samples, 2.0 * len(schedule)) + inside_a_block * max(w.max() for _, w in schedule)
    assert np.abs(found - expected).max() <= slack


@pytest.mark.parametrize("rule", sorted(MIX_RULES))
def test_shares_are_within_a_thousandth_of_the_rule(rule: str) -> None:
    tasks = sized(*LONG_TAIL, cap=4.0)
    shares = {t.name: float(i + 1) for i, t in enumerate(tasks)}
    mix = MixSection(rule=rule, shares=shares)  # type: ignore[arg-type]
    samples = 200 * mix.block
    plan, [(_, weights)] = planned(mix, tasks, samples)
    found = plan.counts(samples)
    assert np.abs(found / samples - weights).max() < 1e-5
    assert (found <= 4 * np.array(LONG_TAIL)).all()
