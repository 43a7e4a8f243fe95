"""Runs that were recorded once give the same numbers still: samples exactly, numbers up to rounding.

golden.json holds the record. Another processor rounds differently, so digests are not kept there: they are
compared on one machine, by `make golden BASE=<commit>`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from golden.cases import CASES, RESUMED, all_names
from golden.compare import compared, difference
from golden.frozen import FROZEN, HOW_TO_ANNOUNCE, current
from golden.run import GOLDEN, Record, committed

RELATIVE = {"series": 1e-6, "decisions": 1e-6, "norms": 1e-5}
QUOTIENTS = ("seesaw/", "regret/", "mix_next/")
"""What is a quotient of differences of losses amplifies their rounding: up to 6e-6 between two processors."""
COARSE = {"bf16": 1e-2}
"""Of a case that computes in a number format with few digits, elsewhere than on the recording machine."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_recorded(name: str, golden_record: Record) -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = json.loads(json.dumps(committed(golden_record)[name]))
    assert found["order"] == recorded["order"], "other samples, or in another order"
    for part in ("series", "decisions", "norms"):
        tolerance = max(RELATIVE[part], COARSE.get(name, 0.0))
        apart = _apart(recorded[part], found[part], tolerance, part)
        assert not apart, f"{apart}. If this is meant: `make golden-record`, and say why in CHANGELOG.md"


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(name: str, golden_record: Record) -> None:
    origin, first = RESUMED[name]
    whole, resumed = (compared(golden_record[n]) for n in (origin, name))
    whole["order"] = whole["order"][first:]
    assert not difference(whole, resumed)


def test_every_recorded_case_is_still_run() -> None:
    assert list(json.loads(GOLDEN.read_text(encoding="utf-8"))) == [n for n in all_names() if n in CASES]


def test_the_least_difference_is_told() -> None:
    loss = {"series": {"loss": [[1, 0.5], [2, 0.25]]}, "order": ["0:1 1:2"]}
    later = {"series": {"loss": [[1, 0.5], [2, math.nextafter(0.25, 1)]]}, "order": ["0:1 1:2"]}
    swapped = {**loss, "order": ["1:2 0:1"]}
    assert difference(loss, json.loads(json.dumps(loss))) == ""
    assert difference(loss, later) == "series/loss[1][1]: 0.25 -> 0.25000000000000006"
    assert difference(loss, swapped) == "order[0]: '0:1 1:2' -> '1:2 0:1'"
    assert difference(loss, {"series": {}, "order": []}) == "series/loss only at the base"
    assert difference({"x": 0.0}, {"x": -0.0}) == "x: 0.0 -> -0.0"


def _apart(recorded: Any, found: Any, tolerance: float, path: str) -> str:
    """The first place where two values are not the same up to rounding."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        if recorded.keys() != found.keys():
            return f"{path} has other names: {sorted(recorded.keys() ^ found.keys())}"
        parted = (_apart(recorded[k], found[k], tolerance, f"{path}/{k}") for k in recorded)
        return next(filter(None, parted), "")
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        pairs = enumerate(zip(recorded, found, strict=True))
        return next(filter(None, (_apart(r, f, tolerance, f"{path}[{i}]") for i, (r, f) in pairs)), "")
    if isinstance(recorded, float) and isinstance(found, float):
        if any(name in path for name in QUOTIENTS):
            tolerance = max(tolerance, 1e-4)
        is_near = math.isclose(recorded, found, rel_tol=tolerance, abs_tol=tolerance)
        return "" if is_near else f"{path} was {recorded}, is {found}"
    return "" if recorded == found or path.endswith("/cause") else f"{path} was {recorded}, is {found}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["run file keys", "presets", "exit codes", "metrics", "files"])
def test_no_name_changes_unannounced(kind: str, golden_record: Record) -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(current(golden_record)))
    assert found.keys() == frozen.keys()
    apart = [
        f"{name}: {frozen[kind].get(name, 'new')} -> {found[kind].get(name, 'gone')}"
        for name in sorted(frozen[kind].keys() | found[kind].keys())
        if name not in frozen[kind] or name not in found[kind] or frozen[kind][name] != found[kind][name]
    ]
    assert not apart, "\n".join([f"{kind} changed:", *apart, HOW_TO_ANNOUNCE])
