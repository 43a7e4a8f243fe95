"""Which mixing rule serves the small tasks: one budget of tokens, four rules, three seeds, 28 real tasks.

    MOE_MEDICAL_DATA=/path/to/data python benchmarks/mixing.py     # writes benchmarks/results/mixing.json

Each arm trains the same adapters from the same start on `data_recipes/public_text.yaml` until it has seen the
same number of tokens; seeds change the adapters and the order of the samples. The base is a small Llama that
the benchmark trains first, on prompts alone: a size that a CPU adapts often enough for a spread. Everything
else is as a run would have it: the Trainer itself, packed rows, teacher-forced loss on rows that no arm saw.

worst quartile   mean of the seven highest losses of the 28 tasks
rare quartile    mean loss of the seven tasks with the fewest training rows
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from small_model import RECIPE, ROOT, BaseSize, mix_overrides, tokens_per_step, write_base

from moe_medical.config import load_config
from moe_medical.distributed.topology import start_distributed, stop_distributed
from moe_medical.training.trainer import Trainer

LOG = logging.getLogger("mixing")
RESULT = ROOT / "benchmarks" / "results" / "mixing.json"
BLOCK = 64

STATIC: dict[str, dict[str, Any]] = {
    "proportional": {"rule": "proportional"},
    "temperature + cap": {"rule": "temperature", "temperature": 2.0, "max_repeats": 4.0},
    "unimax": {"rule": "unimax", "epochs": 4.0, "max_repeats": None},
}
DYNAMIC = {"rule": "regret", "every_blocks": 3, "smoothing": 0.5}
ARMS = STATIC | {"regret": STATIC["temperature + cap"] | {"dynamic": DYNAMIC}}


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    tokens: int
    """Of each run."""
    seeds: int
    loss_rows: int
    base: BaseSize
    max_length: int = 384
    global_batch: int = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=320_000)
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss-rows", type=int, default=12)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    size = Size(options.tokens, options.seeds, options.loss_rows, BaseSize(options.pretraining_steps))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(Path(scratch), size, options.arms)
    options.result.write_text(json.dumps(record, indent=1) + "\n")


def measure(scratch: Path, size: Size, arms: list[str]) -> dict[str, Any]:
    """Every arm with every seed, seeds outermost, so that a drift of the machine meets all arms."""
    model = write_base(scratch / "base", size.base)
    run = write_run(scratch, model, size)
    topology = start_distributed(load_config(run).parallel)
    runs = [
        train(run, arm, seed, size, topology) | {"arm": arm, "seed": seed}
        for seed in range(1, size.seeds + 1)
        for arm in arms
    ]
    stop_distributed()
    return {
        "base": size.base.title,
        "settings": {**asdict(size), "block": BLOCK, "arms": {arm: ARMS[arm] for arm in arms}},
        "summary": summarise(runs, arms),
        "winners": winners(runs, arms),
        "runs": runs,
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "platform": platform.platform()},
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }


def write_run(scratch: Path, model: Path, size: Size) -> Path:
    run = {
        "run": {"name": "mixing", "dir": str(scratch / "run")},
        "model": {"name": str(model)},
        "adapters": {
            "preset": "ming_moe",
            "num_experts": 4,
            "top_k": 2,
            "rank": 8,
            "alpha": 16,
            "dropout": 0.0,
        },
        "data": {
            "recipe": str(RECIPE),
            "max_length": size.max_length,
            "pack_length": size.max_length,
            "system_prompt": None,
            "mix": {"block": BLOCK},
        },
        "training": {
            "global_batch": size.global_batch,
            "micro_batch": 4,
            "learning_rate": 5e-3,
            "warmup_ratio": 0.05,
        },
        "parallel": {"deepspeed": str(ROOT / "ds_configs/zero0.json"), "device": "cpu"},
        "evaluation": {"loss_rows": size.loss_rows, "score_rows": 0, "batch_rows": 16},
        "checkpoint": {"every_steps": 0},
        "tracking": {"log_every_steps": 10, "wandb": {"enabled": False}},
    }
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def train(run: Path, arm: str, seed: int, size: Size, topology: Any) -> dict[str, Any]:
    """One run; its number of steps is the one that comes nearest to the budget of tokens."""
    overrides = [*mix_overrides(ARMS[arm]), f"run.seed={seed}"]
    steps = round(size.tokens / tokens_per_step(load_config(run, overrides)))
    folder = run.parent / f"run-{arm.replace(' ', '')}-{seed}"
    config = load_config(run, [*overrides, f"training.steps={steps}", f"run.dir={folder}"])
    began = time.perf_counter()
    trainer = Trainer(config, topology)
    result = trainer.run()
    rows = {task.name: len(task.train) for task in result.tasks}
    LOG.info("%s, seed %d: macro loss %.4f after %d steps", arm, seed, result.after.macro_loss, steps)
    losses = {name: task.loss for name, task in result.after.tasks.items()}
    samples = dict(zip(rows, result.samples_per_task.tolist(), strict=True))
    rare = sorted(rows, key=lambda name: rows[name])[: len(rows) // 4]
    shutil.rmtree(folder)
    return {
        "steps": steps,
        "tokens": trainer.log.tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "before": result.before.macro_loss,
        "macro": statistics.mean(losses.values()),
        "worst_quartile": statistics.mean(sorted(losses.values())[-(len(losses) // 4) :]),
        "rare_quartile": statistics.mean(losses[name] for name in rare),
        "samples": samples,
        "losses": losses,
    }


def summarise(runs: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each figure of each arm."""
    figures = ("macro", "worst_quartile", "rare_quartile", "tokens", "steps")
    return {
        arm: {
            figure: {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            for figure in figures
            if (values := [run[figure] for run in runs if run["arm"] == arm])
        }
        for arm in arms
    }


def winners(runs: list[dict[str, Any]], arms: list[str]) -> dict[str, str]:
    """The arm of the least mean for each figure, and how sure that is, seed by seed."""
    told = {}
    for figure in ("macro", "worst_quartile", "rare_quartile"):
        of = {arm: [run[figure] for run in runs if run["arm"] == arm] for arm in arms}
        best, second, *_ = [*sorted(arms, key=lambda arm: statistics.mean(of[arm])), *arms]
        gaps = [b - a for a, b in zip(of[best], of[second], strict=True)]
        sure = (
            "in every seed" if min(gaps) > 0 else f"in {sum(g > 0 for g in gaps)} of {len(gaps)} seeds only"
        )
        told[figure] = f"{best}, {statistics.mean(gaps):.4f} nats below {second}, {sure}"
    return told


if __name__ == "__main__":
    main()
