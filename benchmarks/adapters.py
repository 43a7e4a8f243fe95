"""Step time, saved bytes and generation speed of low-rank experts: ours, PEFT, others, published forms.

    python benchmarks/adapters.py                  # writes benchmarks/results/adapters.json
    python benchmarks/adapters.py --quick          # a reduced run that writes only where --result says
    python benchmarks/adapters.py --peers-env DIR  # in an environment with the other packages, made if absent

All arms of a base model and a shape live in one process, share the frozen weights, and take turns in every
round, each time another one first; one thread. Before anything is timed, arms that should compute the same
function are given the same numbers and their logits compared.

timed        forward from token ids to logits, mean of their squares, backward; no optimizer step, no router
             loss. `base` starts at the embeddings' output and back-propagates to it, a little further than
             adapters do; the second arm of the base ends its backward where theirs does.
cpu_ms       time of the process over all its threads; stands on a busy machine, where wall_ms does not
saved_mib    storages that autograd holds for backward, each once, without parameters and buffers (nor what an
             operator keeps beside its saved tensors: of ours that is the state of a random generator)
same_as      arm of ours with the same function; `deviation` is the norm of the difference of a token's
             logits, relative to that of what the adapters change, median over the tokens
if free      what a ratio would be if our adapters cost nothing, over that second arm

What ran is on disk after each part, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import adapters_generation
import torch
from adapters_arms import FLOOR, FORM_KINDS, OURS_KINDS, PEFT_KINDS, TOKEN
from adapters_common import (
    BASES,
    LARGE,
    POSITIONS,
    ROWS,
    SCALING,
    SEED,
    SHAPES,
    SMALL,
    TASKS,
    Arm,
    Budget,
    Case,
    Kind,
    Shape,
    TooDifferent,
    batch_of,
    deviation,
    evaluated,
    looked_at,
    ratio,
    shifted,
    spreads,
    step,
    timed,
)
from adapters_generation import BASE, MERGED, PEFT, UNMERGED_TASK, UNMERGED_TOKEN, in_words, profile
from adapters_packages import PACKAGE_KINDS, environment, import_installed, installed, run_in_environment
from torch import Tensor

from moe_medical.console import progress_line, setup_logging, show, show_table

LOG = logging.getLogger("benchmarks.adapters")
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "adapters.json"
KINDS = (*OURS_KINDS, *PEFT_KINDS, *PACKAGE_KINDS, *FORM_KINDS)
COMPARED = {kind.same_as for kind in KINDS} | {"base"}
COSTLY = 1500
"""Experts times linears above which a costly arm is left out: it would take minutes a step."""
WEIGHTS = {SMALL: 1.0, LARGE: 3.5, "generation": 1.5, "profile": 0.3}
"""Shares of the time, roughly what a round takes; one of 64 experts takes twice as long."""
PROFILED = Shape(16, 16)
LORA, MING = "PEFT LoRA E*r", "MING's form"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shapes: tuple[Shape, ...] = SHAPES
    models: tuple[str, ...] = tuple(BASES)
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 64
    least_rounds: int = 2
    most_rounds: int = 9


QUICK = Size(shapes=SHAPES[:1], models=(SMALL,), batches=(1,), new_tokens=8, least_rounds=1, most_rounds=1)


def main() -> None:
    options = parse()
    if options.peers_env:
        run_in_environment(options.peers_env, Path(__file__))
        return
    import_installed()
    setup_logging(True)
    LOG.setLevel(logging.INFO)
    torch.set_num_threads(1)
    size = QUICK if options.quick else Size()
    result = options.result or (None if options.quick else RESULT)
    record = measure(size, 1.0 if options.quick else options.budget, torch.device(options.device), result)
    for case in record["cases"]:
        show(f"{case['model']}, {case['shape']}, {case['dtype']}: {case['rounds']} rounds")
        show_table(("arm", "ms", "range", "wall ms", "saved MiB"), arm_rows(case))
    show_table(("aim", "where", "ratio", "limit", "if free", ""), aim_rows(record))
    show(record["profile"]["in_words"] if record["profile"] else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=15.0, metavar="MINUTES")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers-env", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--result", type=Path)
    return parser.parse_args()


def measure(size: Size, minutes: float, device: torch.device, result: Path | None) -> dict[str, Any]:
    """Every part; the record is written after each."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    record: dict[str, Any] = {"setting": setting(size), "environment": environment(device)}
    record |= {"cases": [], "generation": [], "profile": {}, "aims": []}
    weights = [WEIGHTS[m] * (1 + (s.experts >= 64)) for m in size.models for _ in dtypes for s in size.shapes]
    weights += [WEIGHTS["generation"]] * len(size.batches) + [WEIGHTS["profile"]]
    with progress_line("adapters", int(60 * minutes), True) as line:
        budget = Budget(minutes, weights, size.least_rounds, size.most_rounds, line)
        for done in measured_parts(size, device, dtypes, budget, record):
            record["aims"] = aims(record)
            record["environment"]["load_average_after"] = os.getloadavg()
            LOG.info("done: %s", done)
            if result:
                result.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def measured_parts(
    size: Size, device: torch.device, dtypes: tuple[torch.dtype, ...], budget: Budget, record: dict[str, Any]
) -> Iterator[str]:
    """Fills the record, part by part; yields what was measured."""
    for title in size.models:
        for dtype in dtypes:
            base = BASES[title]().to(device, dtype).requires_grad_(False)
            for shape in size.shapes:
                case = Case(title, base, shape, *batch_of(base, device))
                budget.begin(f"{title} {shape}")
                record["cases"].append(measure_case(case, dtype, budget))
                yield f"{title}, {shape}"
    if size.batches:
        budget.begin("generation")
    batches = adapters_generation.measure(device, size.batches, size.new_tokens, budget.more)
    for batch in batches if size.batches else ():
        record["generation"].append(batch)
        yield f"generation of {batch['rows']} rows"
        if len(record["generation"]) < len(size.batches):
            budget.begin("generation")
    budget.begin("profile")
    record["profile"] = profiled(device)
    yield "profile"


def measure_case(case: Case, dtype: torch.dtype, budget: Budget) -> dict[str, Any]:
    """All arms of one base model and shape."""
    arms, told = build_arms(case, dtype, budget)
    rounds: list[dict[str, dict[str, float]]] = []
    took = 0.0
    while budget.more(f"{case.title} {case.shape}", took):
        began, one = time.monotonic(), {}
        for name in shifted(arms, len(rounds)):
            torch.manual_seed(SEED)
            one[name] = timed(lambda arm=arms[name]: step(arm, dtype), case.device)
        rounds.append(one)
        took = time.monotonic() - began
    clock = "gpu_ms" if case.device.type == "cuda" else "cpu_ms"
    for name in arms:
        told[name] |= {"status": "measured", **spreads([one[name] for one in rounds])}
    return {
        "model": case.title,
        "shape": str(case.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": case.device.type,
        "rounds": len(rounds),
        "arms": told,
        "rounds_ms": {name: [round(one[name][clock], 2) for one in rounds] for name in arms},
    }


def build_arms(
    case: Case, dtype: torch.dtype, budget: Budget
) -> tuple[dict[str, Arm], dict[str, dict[str, Any]]]:
    """(what can be timed, what is told of every arm); checks and counts on the way."""
    arms: dict[str, Arm] = {}
    told: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    for kind in KINDS:
        budget.tell(f"{case.title} {case.shape}: {kind.name}")
        told[kind.name] = describe(kind) | {"status": why_not(kind, case)}
        if told[kind.name]["status"]:
            continue
        try:
            arm = kind.build(case)
            told[kind.name] |= inspect(kind, arm, dtype, outputs)
        except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, AssertionError) as error:
            LOG.warning("%s: %s", kind.name, error)
            told[kind.name]["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        arms[kind.name] = arm
    return arms, told


def describe(kind: Kind) -> dict[str, Any]:
    known = {"family": kind.family, "gate": kind.gate, "routes_tokens": kind.routes_tokens}
    return known | {"dropout": kind.dropout, "same_as": kind.same_as or None, "note": kind.note}


def why_not(kind: Kind, case: Case) -> str:
    """Why an arm is not measured; empty if it is."""
    if kind.package and not installed(kind.package):
        return "not installed"
    if case.title != SMALL and not kind.lead:
        return "left out on this model, to save time"
    if kind.costly and case.shape.experts * len(case.linears) > COSTLY:
        return f"left out: {case.shape.experts} experts in {len(case.linears)} linears take minutes a step"
    return ""


def inspect(kind: Kind, arm: Arm, dtype: torch.dtype, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Parameters, saved bytes, and how far the arm is from ours; keeps outputs that others are compared with.

    Raises:
        TooDifferent: It does not compute what it should.
    """
    saved, logits = looked_at(arm, dtype)
    found = {
        "trainable_parameters": sum(p.numel() for p in arm.parameters),
        "saved_mib": round(saved / 2**20, 3),
    }
    if kind.name in COMPARED:
        outputs[kind.name] = logits
    if kind.same_as and dtype is torch.float32:
        if kind.same_as not in outputs:
            raise TooDifferent(f"{kind.same_as} was not measured, so nothing tells what is computed")
        plain = evaluated(arm) if kind.dropout else logits
        found["deviation"] = deviation(plain, outputs[kind.same_as], outputs["base"])
    return found


def profiled(device: torch.device) -> dict[str, Any]:
    """Where a step of ours and of PEFT's spends its time, on one shape of the small model."""
    base = BASES[SMALL]().to(device).requires_grad_(False)
    case = Case(SMALL, base, PROFILED, *batch_of(base, device))
    kinds = {kind.name: kind for kind in KINDS if kind.name in (TOKEN, LORA, "base")}
    arms = {name: kind.build(case) for name, kind in kinds.items() if not why_not(kind, case)}
    profiles = profile({n: partial(step, arm, torch.float32) for n, arm in arms.items()}, times=3)
    words = in_words(profiles, TOKEN, LORA if LORA in profiles else "base", "A step")
    return {"case": f"{case.title}, {case.shape}, float32", "arms": profiles, "in_words": words}


def setting(size: Size) -> dict[str, Any]:
    return {
        "rows": ROWS,
        "positions": POSITIONS,
        "scaling": SCALING,
        "tasks": TASKS,
        "adapted": "gate_proj, up_proj, down_proj of every layer",
        "timed": "forward from token ids, mean squared logits, backward; no optimizer step, no router loss",
        "seed": SEED,
        "threads": 1,
        "shapes": [asdict(shape) for shape in size.shapes],
    }


# What the measurements come to: aims met or not, and tables


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


if __name__ == "__main__":
    main()
