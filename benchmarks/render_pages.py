"""Writes measured results into the pages that show them; with --check only tells whether they are there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    stale = [page for page, name in BLOCKS if render(ROOT / page, name, "--check" not in sys.argv)]
    if stale and "--check" in sys.argv:
        told = f"{', '.join(stale)} do not show benchmarks/results: run this without --check\n"
        sys.stderr.write(told)
        return 1
    return 0


def render(page: Path, name: str, write: bool) -> bool:
    """Put a block between its marks; returns whether the page said something else."""
    begin, end = f"<!-- {name}: benchmarks/render_pages.py writes this -->", f"<!-- /{name} -->"
    text = page.read_text()
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    wanted = f"{head}{begin}\n{BLOCKS[str(page.relative_to(ROOT)), name]()}\n{end}{tail}"
    if write:
        page.write_text(wanted)
    return wanted != text


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def quickstart() -> str:
    record = read("quickstart")
    printed = "\n".join(line.rstrip() for line in record["printed"]).strip()
    fall = 100 * (1 - record["macro_loss_after"] / record["macro_loss_before"])
    minutes, install = record["seconds_total"] / 60, record["seconds_install"] / 60
    sentence = (
        f"Read back from W&B: the loss fell by {fall:.0f} %, {record['tasks_improved']} of "
        f"{record['tasks']} tasks improved. {minutes:.1f} minutes from an empty home and environment, "
        f"{install:.1f} of them installing; "
        f"{record['tokens_per_second']:.0f} tokens/s, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB at the peak "
        f"({record['machine']['cpu']}, {record['machine']['cores']} cores)."
    )
    return f"```text\n{printed}\n```\n\n{sentence}"


def expert_parallel() -> str:
    record = read("expert_parallel")
    cases: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        key = (row["world"], row["experts"], row["rank"], row["tokens"])
        cases.setdefault(key, {})[row["exchange"]] = row
    arms = list(next(iter(cases.values())))
    lines = [f"| ranks | E | rank | T | {' | '.join(arms)} | fewest bytes |", "|---" * (len(arms) + 5) + "|"]
    for key, of in cases.items():
        cells = [
            f"{of[arm]['measured_bytes'] / 1e6:.1f} MB, {of[arm]['step_seconds'] * 1e3:.0f} ms"
            for arm in arms
        ]
        fewest = min(arms, key=lambda arm: of[arm]["measured_bytes"])
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {fewest} |")
    worst = max(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in record["rows"])
    return "\n".join(lines) + (
        f"\n\n{record['model']}; {record['backend']} ({record['machine']['cpu']}, "
        f"{record['machine']['cores']} cores); bytes that a rank sends per step, median step time of "
        f"{record['rounds']} rounds. The cost model is off by {100 * worst:.1f} % at worst."
    )


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "quickstart"): quickstart,
    ("docs/parallelism.md", "expert_parallel"): expert_parallel,
}


if __name__ == "__main__":
    sys.exit(main())
