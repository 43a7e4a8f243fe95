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
    left = f"{'task':<30}{'rows':>6}{'weight':>8}{'repeats':>9}"
    return f"{left}{'loss before':>13}{'after':>8}{'score before':>14}{'after':>8}"


def row(task: dict[str, Any]) -> str:
    scores = f"{task['score_before']:>14.3f}{task['score_after']:>8.3f}"
    losses = f"{task['loss_before']:>13.3f}{task['loss_after']:>8.3f}"
    return (
        f"{task['task']:<30}{task['rows']:>6,}{task['weight']:>8.4f}{task['repeats']:>9.3f}{losses}{scores}"
    )


def footer(results: dict[str, Any]) -> str:
    losses = f"{results['macro_loss_before']:>13.3f}{results['macro_loss_after']:>8.3f}"
    scores = f"{results['macro_score_before']:>14.3f}{results['macro_score_after']:>8.3f}"
    return f"{'macro average':<53}{losses}{scores}"


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
