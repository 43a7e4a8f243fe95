"""What a run's W&B offline file says about it, as JSON on standard output: `read_wandb.py RUN_FOLDER`."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

from support.wandb_file import read_run


def main() -> None:
    history = read_run(Path(sys.argv[1]) / "wandb").history
    evaluations = [row for row in history if any(key.startswith("eval_loss/") for key in row)]
    before, after = evaluations[0], evaluations[-1]
    tasks = [key for key in before if key.startswith("eval_loss/")]
    steps = [row for row in history if "step_seconds" in row]
    seconds = sum(row["step_seconds"] for row in steps)
    told = {
        "seconds_train": round(seconds, 1),
        "tokens_per_second": round(steps[-1]["tokens"] / seconds, 1),
        "macro_loss_before": before["eval/macro_loss"],
        "macro_loss_after": after["eval/macro_loss"],
        "macro_score_before": before["eval/macro_score"],
        "macro_score_after": after["eval/macro_score"],
        "tasks_improved": sum(after[task] < before[task] for task in tasks),
        "tasks": len(tasks),
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "deepspeed", "transformers", "wandb")
        },
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
