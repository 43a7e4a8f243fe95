"""Rules of `data.mix`: each broken one is told with its key; what belongs together is taken."""

from __future__ import annotations

import pytest

from moe_medical.config.ranges import range_problems
from moe_medical.config.rules import mix_problems
from moe_medical.config.schema import DataSection, DynamicMixSection, MixSection


def told(mix: MixSection) -> list[str]:
    data = DataSection(mix=mix)
    return [str(problem) for problem in (*range_problems(data, "data."), *mix_problems(data))]


@pytest.mark.parametrize(
    "mix",
    [
        MixSection(),
        MixSection(rule="cap", temperature_from=1.0, temperature_blocks=1),
        MixSection(rule="explicit", shares={"a": 0.0, "b": 2.0}),
        MixSection(rule="unimax", by="tokens", floor=0.01, ceiling=0.5),
        MixSection(dynamic=DynamicMixSection(rule="regret", low=1.0, high=1.0, smoothing=0.0)),
    ],
)
def test_what_fits_together(mix: MixSection) -> None:
    assert told(mix) == []


@pytest.mark.parametrize(
    ("mix", "problem"),
    [
        (MixSection(temperature_blocks=0), "temperature_blocks must be at least 1, got 0."),
        (MixSection(cap=0), "cap must be at least 1, got 0."),
        (MixSection(beta=1.0), "beta must be between 0 and 1, got 1.0."),
        (MixSection(epochs=float("inf")), "epochs must be finite and > 0, got inf."),
        (MixSection(floor=-0.1), "floor must be in [0, 1), got -0.1."),
        (MixSection(floor=0.2, ceiling=0.1), "ceiling must be > floor (0.2) and at most 1, got 0.1."),
        (MixSection(temperature_from=0.0), "temperature_from must be finite and > 0, or null, got 0.0."),
        (
            MixSection(rule="unimax", temperature_from=1.0),
            "temperature_from must be null under rule 'unimax', which has no temperature, got 1.0.",
        ),
        (
            MixSection(temperature_from=1.0, dynamic=DynamicMixSection(rule="odm")),
            "temperature_from must be null under a dynamic rule, which sets the same shares, got 1.0.",
        ),
        (
            MixSection(shares={"a": 1.0}),
            "shares must be given under rule 'explicit' and under no other, got {'a': 1.0}. "
            "Set data.mix.rule=explicit.",
        ),
        (MixSection(rule="explicit"), "shares must be given under rule 'explicit' and under no other."),
        (MixSection(rule="explicit", shares={"a": 0.0}), "shares must leave a task above 0, got {'a': 0.0}."),
        (
            MixSection(rule="explicit", shares={"a": -1.0, "b": 1.0}),
            "shares.a must be finite and not negative, got -1.0.",
        ),
        (
            MixSection(dynamic=DynamicMixSection(every_blocks=0)),
            "dynamic.every_blocks must be at least 1, got 0.",
        ),
        (MixSection(dynamic=DynamicMixSection(rate=0.0)), "dynamic.rate must be finite and > 0, got 0.0."),
        (
            MixSection(dynamic=DynamicMixSection(smoothing=1.0)),
            "dynamic.smoothing must be in [0, 1), got 1.0.",
        ),
        (MixSection(dynamic=DynamicMixSection(low=1.5)), "dynamic.low must be > 0 and at most 1, got 1.5."),
        (MixSection(dynamic=DynamicMixSection(low=0.0)), "dynamic.low must be > 0 and at most 1, got 0.0."),
        (
            MixSection(dynamic=DynamicMixSection(high=0.5)),
            "dynamic.high must be finite and at least 1, got 0.5.",
        ),
    ],
)
def test_what_does_not(mix: MixSection, problem: str) -> None:
    assert told(mix) == [f"data.mix.{problem}"]
