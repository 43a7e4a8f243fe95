"""Which mixing rule serves the small tasks: one budget of tokens, several rules, several seeds, 28 real tasks.

    MOE_MEDICAL_DATA=/path/to/data python benchmarks/mixing.py     # writes benchmarks/results/mixing.json

Each arm trains the same adapters from the same start on `data_recipes/public_text.yaml` until it has seen the
same number of tokens; seeds change the adapters and the order of the samples. The base is the first layers of
SmolLM2-135M, a size that a CPU trains often enough for a spread. Everything else is as a run would have it:
the Trainer itself, packed rows, teacher-forced loss on rows that no arm trains on.

worst quartile   mean of the seven highest losses of the 28 tasks
rare quartile    mean loss of the seven tasks with the fewest training rows
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from moe_medical.base_model import locate_base
from moe_medical.base_model.embedded import CHECKSUMS
from moe_medical.config import load_config
from moe_medical.config.schema import ModelSection, RunConfig
from moe_medical.data.tokens import keep_tokens
from moe_medical.distributed.topology import start_distributed, stop_distributed
from moe_medical.training.feed import Feed
from moe_medical.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mixing.json"
BLOCK = 64

STATIC: dict[str, dict[str, Any]] = {
    "proportional": {"rule": "proportional"},
    "temperature + cap": {"rule": "temperature", "temperature": 2.0, "max_repeats": 4.0},
    "unimax": {"rule": "unimax", "epochs": 4.0, "max_repeats": None},
}
DYNAMIC = {"rule": "regret", "every_blocks": 5, "smoothing": 0.5}
ARMS = STATIC | {"regret": STATIC["temperature + cap"] | {"dynamic": DYNAMIC}}


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    layers: int
    tokens: int
    """Of each run."""
    seeds: int
    loss_rows: int
    max_length: int = 320
    global_batch: int = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss-rows", type=int, default=16)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    size = Size(options.layers, options.tokens, options.seeds, options.loss_rows)
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(Path(scratch), size, options.arms)
    options.result.write_text(json.dumps(record, indent=1) + "\n")


def measure(scratch: Path, size: Size, arms: list[str]) -> dict[str, Any]:
    """Every arm with every seed, seeds outermost, so that a drift of the machine meets all arms."""
    model = write_short_model(scratch / "smollm2-short", size.layers)
    run = write_run(scratch, model, size)
    topology = start_distributed(load_config(run).parallel)
    runs = [
        train(run, arm, seed, size, topology) | {"arm": arm, "seed": seed}
        for seed in range(1, size.seeds + 1)
        for arm in arms
    ]
    stop_distributed()
    return {
        "base": f"SmolLM2-135M, the first {size.layers} of its 30 layers",
        "settings": {**size.__dict__, "block": BLOCK, "arms": {arm: ARMS[arm] for arm in arms}},
        "summary": summarise(runs, arms),
        "winners": winners(runs, arms),
        "runs": runs,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }


def write_short_model(folder: Path, layers: int) -> Path:
    """The embedded model's first layers, with its embeddings, its last norm and its tokenizer."""
    source = locate_base(ModelSection()).folder
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != CHECKSUMS:
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                parts = name.split(".")
                if "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers:
                    tensors[name] = stored.get_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
            "recipe": str(ROOT / "data_recipes/public_text.yaml"),
            "max_length": size.max_length,
            "pack_length": size.max_length,
            "system_prompt": None,
            "max_bad_fraction": 0.0,
            "mix": {"block": BLOCK},
        },
        "training": {
            "global_batch": size.global_batch,
            "micro_batch": 4,
            "learning_rate": 2e-3,
            "warmup_ratio": 0.05,
        },
        "parallel": {"deepspeed": str(ROOT / "ds_configs/zero0.json"), "device": "cpu"},
        "evaluation": {"loss_rows": size.loss_rows, "score_rows": 0, "batch_rows": 16},
        "checkpoint": {"every_steps": 0},
        "tracking": {"log_every_steps": 1, "wandb": {"enabled": False}},
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
    losses = {name: task.loss for name, task in result.after.tasks.items()}
    samples = dict(zip(rows, result.samples_per_task.tolist(), strict=True))
    rare = sorted(rows, key=lambda name: rows[name])[: len(rows) // 4]
    shutil.rmtree(folder)
    return {
        "steps": steps,
        "tokens": trainer.tokens_seen,
        "seconds": round(time.perf_counter() - began, 1),
        "before": result.before.macro_loss,
        "macro": statistics.mean(losses.values()),
        "worst_quartile": statistics.mean(sorted(losses.values())[-(len(losses) // 4) :]),
        "rare_quartile": statistics.mean(losses[name] for name in rare),
        "samples": samples,
        "losses": losses,
    }


def mix_overrides(mix: dict[str, Any], prefix: str = "data.mix") -> list[str]:
    """The keys of a mix section as `key=value`."""
    overrides: list[str] = []
    for key, value in mix.items():
        if isinstance(value, dict):
            overrides += mix_overrides(value, f"{prefix}.{key}")
        else:
            overrides.append(f"{prefix}.{key}={'null' if value is None else value}")
    return overrides


def tokens_per_step(config: RunConfig) -> float:
    """Mean tokens of a step under the arm's static shares."""
    feed = Feed(config, locate_base(config.model))
    samples = feed.samples(config.training.steps)
    tasks = keep_tokens(feed.tasks, samples.tolist(), "always")
    tokens = sum(n * task.tokens.mean_length for n, task in zip(samples.tolist(), tasks, strict=True))
    return float(config.training.global_batch * tokens / samples.sum())


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
        best, second = sorted(arms, key=lambda arm: statistics.mean(of[arm]))[:2]
        gaps = [b - a for a, b in zip(of[best], of[second], strict=True)]
        sure = (
            "in every seed" if min(gaps) > 0 else f"in {sum(g > 0 for g in gaps)} of {len(gaps)} seeds only"
        )
        told[figure] = f"{best}, {statistics.mean(gaps):.4f} nats below {second}, {sure}"
    return told


if __name__ == "__main__":
    main()
