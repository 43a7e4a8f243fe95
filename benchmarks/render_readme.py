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
    printed = "\n".join(line.rstrip() for line in record["printed"]).strip()
    return f"```text\n{printed}\n```\n\n{sentence(record)}"


def sentence(record: dict[str, Any]) -> str:
    fall = 100 * (1 - record["macro_loss_after"] / record["macro_loss_before"])
    minutes, install = record["seconds_total"] / 60, record["seconds_install"] / 60
    return (
        f"Read back from W&B: the loss fell by {fall:.0f} %, {record['tasks_improved']} of "
        f"{record['tasks']} tasks improved. {minutes:.1f} minutes from an empty home and environment, "
        f"{install:.1f} of them installing; "
        f"{record['tokens_per_second']:.0f} tokens/s, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB at the peak "
        f"({record['machine']['cpu']}, {record['machine']['cores']} cores)."
    )


if __name__ == "__main__":
    sys.exit(main())
