"""Writes the measured quickstart into the README; with --check only tells whether it is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- quickstart: benchmarks/render_readme.py writes this -->", "<!-- /quickstart -->"


def main() -> int:
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    wanted = f"{head}{BEGIN}\n{block()}\n{END}{tail}"
    if "--check" in sys.argv:
        if wanted != text:
            sys.stderr.write(
                "README.md does not show benchmarks/results/quickstart.json: run this without --check\n"
            )
        return int(wanted != text)
    README.write_text(wanted)
    return 0


def block() -> str:
    record = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
    lines = [header(), *(row(t) for t in sorted(record["results"]["tasks"], key=lambda t: -t["rows"]))]
    return "\n".join(["```text", *lines, footer(record["results"]), "```", "", sentence(record)])


def header() -> str:
    return f"{'task':<30}{'rows':>7}{'weight':>8}{'repeats':>9}{'loss':>16}{'score':>16}"


def row(task: dict[str, Any]) -> str:
    left = f"{task['task']:<30}{task['rows']:>7,}{task['weight']:>8.4f}{task['repeats']:>9.3f}"
    return f"{left}{change(task, 'loss'):>16}{change(task, 'score'):>16}"


def footer(results: dict[str, Any]) -> str:
    return f"{'macro average':<54}{change(results, 'macro_loss'):>16}{change(results, 'macro_score'):>16}"


def change(values: dict[str, Any], what: str) -> str:
    return f"{values[f'{what}_before']:.3f} → {values[f'{what}_after']:.3f}"


def sentence(record: dict[str, Any]) -> str:
    fall = 100 * (1 - record["macro_loss_after"] / record["macro_loss_before"])
    minutes, install = record["seconds_total"] / 60, record["seconds_install"] / 60
    return (
        f"The macro-average evaluation loss fell by {fall:.0f} %; {record['tasks_improved']} of "
        f"{record['tasks']} tasks improved. {minutes:.1f} minutes from an empty machine, "
        f"{install:.1f} of them installing; "
        f"{record['tokens_per_second']:.0f} tokens/s, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB at the peak "
        f"({record['machine']['cpu']}, {record['machine']['cores']} cores)."
    )


if __name__ == "__main__":
    sys.exit(main())
