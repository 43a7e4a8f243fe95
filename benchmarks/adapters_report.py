"""What the measurements come to: aims met or not, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapters_generation import BASE, MERGED, PEFT, UNMERGED_TASK, UNMERGED_TOKEN
from adapters_measure import ratio
from adapters_ours import FLOOR, TOKEN

LORA, MING = "PEFT LoRA E*r", "MING's form"


def aims(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim in every case that was measured."""
    steps = [aim for case in record["cases"] for aim in _of_case(case)]
    return steps + [aim for batch in record["generation"] for aim in _of_generation(batch)]


def _of_case(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    arms, where = case["arms"], f"{case['model']}, {case['shape']}, {case['dtype']}"
    measured = {name: arm for name, arm in arms.items() if arm["status"] == "measured"}
    for suffix in ("", ", dropout"):
        ours, lora = TOKEN + suffix, LORA + suffix
        if ours in measured and lora in measured:
            free = _ratio(case, FLOOR, lora)["median"]
            yield _aim(f"step time, ours / {lora}", where, _ratio(case, ours, lora), free, most=1.0)
            saved, free = (arms[name]["saved_mib"] / arms[lora]["saved_mib"] for name in (ours, FLOOR))
            yield _aim(f"saved bytes, ours / {lora}", where, _alone(saved), free, most=0.95)
    if TOKEN not in measured:
        return
    routed = [name for name, arm in measured.items() if arm["routes_tokens"]]
    peers = [name for name in routed if arms[name]["family"] in ("package", "peft")]
    fastest = min(peers, key=lambda name: measured[name][_clock(case)]["median"], default="")
    for name, what, least in ((fastest, f"fastest token-routed peer ({fastest})", 1.5), (MING, MING, 2.0)):
        if name in measured:
            free = _ratio(case, name, FLOOR)["median"]
            yield _aim(f"{what} / ours", where, _ratio(case, name, TOKEN), free, least=least)


def _of_generation(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows, rounds = batch["rows"], batch["ms_of_rounds"]
    where = f"SmolLM2-135M, {batch['shape']}, {rows} {'row' if rows == 1 else 'rows'}"

    def of(above: str, below: str) -> dict[str, float]:
        return ratio(list(zip(rounds[above], rounds[below], strict=True)))

    own = max(rounds[BASE]) / min(rounds[BASE])
    yield _aim(
        "generation, task merged / base, within base's own spread", where, of(MERGED, BASE), 1.0, most=own
    )
    if PEFT in rounds:
        free = of(BASE, PEFT)["median"]
        for arm in (UNMERGED_TASK, UNMERGED_TOKEN):
            yield _aim(f"generation, {arm} unmerged / {PEFT}", where, of(arm, PEFT), free, most=1.1)


def _clock(case: dict[str, Any]) -> str:
    return "gpu_ms" if case["device"] == "cuda" else "cpu_ms"


def _ratio(case: dict[str, Any], above: str, below: str) -> dict[str, float]:
    rounds = case["rounds_ms"]
    return ratio(list(zip(rounds[above], rounds[below], strict=False)))


def _alone(value: float) -> dict[str, float]:
    return {"median": round(value, 4), "least": round(value, 4), "most": round(value, 4)}


def _aim(
    what: str,
    where: str,
    found: dict[str, float],
    free: float,
    most: float | None = None,
    least: float | None = None,
) -> dict[str, Any]:
    """One aim; `free` is the ratio if our adapters cost nothing."""
    met = found["median"] <= most if most is not None else found["median"] >= (least or 0.0)
    limit = {"at_most": round(most, 4)} if most is not None else {"at_least": least}
    known = {"aim": what, "where": where, "ratio": found, "if_adapters_cost_nothing": round(free, 4)}
    return known | limit | {"met": met}


def aim_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for aim in record["aims"]:
        ratios = aim["ratio"]
        limit = f"≤ {aim['at_most']:.2f}" if "at_most" in aim else f"≥ {aim['at_least']:.2f}"
        found = f"{ratios['median']:.3f} ({ratios['least']:.3f} to {ratios['most']:.3f})"
        free, verdict = f"{aim['if_adapters_cost_nothing']:.2f}", "met" if aim["met"] else "not met"
        rows.append((aim["aim"], aim["where"], found, limit, free, verdict))
    return rows


def arm_rows(case: dict[str, Any]) -> list[tuple[str, ...]]:
    clock, rows = _clock(case), []
    for name, arm in case["arms"].items():
        if arm["status"] != "measured":
            rows.append((name, arm["status"], "", "", ""))
            continue
        ms = arm[clock]
        cells = (
            f"{ms['median']:.0f}",
            f"{ms['least']:.0f} to {ms['most']:.0f}",
            f"{arm['wall_ms']['median']:.0f}",
        )
        rows.append((name, *cells, f"{arm['saved_mib']:.1f}"))
    return rows
