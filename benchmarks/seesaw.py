"""Who pays for whom: six ways to adapt to 28 real tasks with one budget of tokens and of parameters.

    MOE_MEDICAL_DATA=/path/to/data python benchmarks/seesaw.py --work FOLDER   # writes results/seesaw.json

Each arm trains adapters of equally many parameters from the same base on `data_recipes/public_text.yaml`
until it has seen the same number of tokens; seeds change the adapters and the order of the samples. Every
run is the Trainer's own: packed rows, teacher-forced losses of held-out rows, evaluated as it goes, so that
the seesaw is measured with the tracker's paired gate. Before the arms, each family's learning rate is
chosen in a short run with a seed that no arm uses; one plain LoRA per task, trained on that task alone with
its share of the tokens, gives the single-task references.

Everything finished stays in the work folder: the same command again goes on where the last one ended, and
judges what is there anew.

Figures of an arm:

macro, worst_quartile   mean loss of the 28 tasks, and of the seven highest, nats per token
below_single            tasks worse than their single-task reference by more than the paired gate
index                   seesaw index, mean over the evaluations; window_index: over the window, at the end
regret                  mean over the tasks at the end: relative loss above the best seen
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
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from small_model import RECIPE, ROOT, BaseSize, mix_overrides, tokens_per_step, write_base

from moe_medical.base_model import locate_base
from moe_medical.config import load_config
from moe_medical.config.schema import RunConfig, SeesawSection
from moe_medical.distributed.topology import Topology, start_distributed, stop_distributed
from moe_medical.tracking.reference import Reference, TaskReference
from moe_medical.tracking.report import write_report
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.seesaw import SeesawTracker
from moe_medical.tracking.task_track import ProbeLosses, paired_error
from moe_medical.training.data_module import DataModule
from moe_medical.training.trainer import Trainer

LOG = logging.getLogger("seesaw")
RESULT = ROOT / "benchmarks" / "results" / "seesaw.json"
BLOCK = 32

PROPORTIONAL: dict[str, Any] = {"rule": "proportional"}
DEFAULT: dict[str, Any] = {"rule": "temperature", "temperature": 2.0, "max_repeats": 4.0}
REGRET: dict[str, Any] = DEFAULT | {"dynamic": {"rule": "regret", "every_blocks": 6, "smoothing": 0.5}}
FAMILIES: dict[str, dict[str, Any]] = {
    "LoRA": {"preset": "lora", "rank": 24, "alpha": 48},
    "token-routed": {"preset": "ming_moe", "num_experts": 8, "top_k": 2, "rank": 4, "alpha": 8},
    "task-gated": {
        "preset": "ming_moe",
        "router": "task",
        "num_experts": 8,
        "top_k": 8,
        "rank": 4,
        "alpha": 8,
    },
}
"""Plain LoRA has the rank whose parameters come nearest to those of the eight experts and their routers."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, proportional": ("LoRA", PROPORTIONAL),
    "LoRA, default": ("LoRA", DEFAULT),
    "token-routed, default": ("token-routed", DEFAULT),
    "task-gated, default": ("task-gated", DEFAULT),
    "token-routed, regret": ("token-routed", REGRET),
    "task-gated, regret": ("task-gated", REGRET),
}
PAIRS = (
    ("LoRA, default", "LoRA, proportional"),
    ("token-routed, default", "LoRA, default"),
    ("task-gated, default", "LoRA, default"),
    ("task-gated, default", "token-routed, default"),
    ("token-routed, regret", "token-routed, default"),
    ("task-gated, regret", "task-gated, default"),
    ("token-routed, regret", "LoRA, default"),
    ("task-gated, regret", "LoRA, default"),
)
"""What is compared seed by seed: the first against the second."""
FIGURES = ("macro", "worst_quartile", "below_single", "index", "window_index", "regret")
"""The less, the better."""


@dataclass(frozen=True)
class Size:
    """How much is trained; a work folder belongs to one of them."""

    tokens: int
    """Of each run."""
    loss_rows: int
    """Held-out rows of each task."""
    base: BaseSize
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2, 2e-2)
    """Learning rates to choose from."""
    sweep_share: float = 0.5
    """Tokens of a run that chooses one, of an arm's."""
    max_length: int = 384
    global_batch: int = 8
    evaluate_samples: int = 192
    """Between two evaluations, and between two decisions of the regret rule."""
    single_batch: int = 4
    """Samples of a step of a single-task run, whose share of the tokens makes few steps."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=160_000, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--loss-rows", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a minute's worth, to see that it works")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "seesaw-benchmark")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("moe_medical").setLevel(logging.WARNING)
    size, seeds = Size(options.tokens, options.loss_rows, BaseSize(options.pretraining_steps)), options.seeds
    if options.quick:
        small = BaseSize(5, layers=1, hidden=32)
        size, seeds = Size(10_000, 2, small, rates=(5e-3,), evaluate_samples=32), 1
    record = Benchmark(options.work, size).measure(options.arms, seeds)
    pages = options.result.with_suffix("")
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    write_pages(options.work, options.arms, pages)


class Benchmark:
    """Runs what is not in the work folder yet; a run is one JSON file beside its run folder.

    Raises:
        SystemExit: the work folder is of other settings.
    """

    def __init__(self, work: Path, size: Size) -> None:
        self.work, self.size = work.resolve(), size
        self._check_settings()
        base = self.work / "base"
        if not base.exists():
            write_base(self.work / "base.draft", size.base).rename(base)
        self.run_file = write_run(self.work, base, size)
        self.topology: Topology = start_distributed(load_config(self.run_file).parallel)

    def measure(self, arms: Sequence[str], seeds: int) -> dict[str, Any]:
        """Every arm with every seed, seeds outermost, so that a drift of the machine meets all arms."""
        rates = {family: self._choose_rate(family) for family in dict.fromkeys(ARMS[a][0] for a in arms)}
        single = self._single_tasks(rates["LoRA"] if "LoRA" in rates else self.size.rates[0])
        runs = []
        for seed in range(1, seeds + 1):
            for arm in arms:
                family, mix = ARMS[arm]
                key = run_key(arm, seed)
                runs.append(self._run(key, self._overrides(family, rates[family], mix, seed)) | {"arm": arm})
        stop_distributed()
        alone = {task: self._last_probes(run["key"])[task] for task, run in single.items()}
        judge = partial(judged, alone=alone, reference=reference_of(single))
        runs = [run | judge(RunPaths(self.work / run["key"])) for run in runs]
        return {
            "what": __doc__,
            "base": self.size.base.title,
            "settings": {
                **asdict(self.size),
                "seeds": seeds,
                "block": BLOCK,
                "families": FAMILIES,
                "arms": {arm: {"family": ARMS[arm][0], "mix": ARMS[arm][1]} for arm in arms},
            },
            "conclusion": [*conclusions(runs, arms)],
            "summary": summarise(runs, arms),
            "differences": list(differences(runs)),
            "learning_rates": {"chosen": rates, "tried": self._tried()},
            "single": {task: {k: v for k, v in run.items() if k != "key"} for task, run in single.items()},
            "runs": runs,
            "machine": machine(),
        }

    def _check_settings(self) -> None:
        mine = json.loads(json.dumps({"size": asdict(self.size), "families": FAMILIES, "arms": ARMS}))
        path = self.work / "settings.json"
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(mine, indent=1))
        elif json.loads(path.read_text()) != mine:
            sys.exit(f"{path} is of other settings; use another --work")

    def _overrides(self, family: str, rate: float, mix: dict[str, Any], seed: int) -> list[str]:
        adapters = [f"adapters.{key}={value}" for key, value in FAMILIES[family].items()]
        return [*adapters, *mix_overrides(mix), f"training.learning_rate={rate}", f"run.seed={seed}"]

    def _choose_rate(self, family: str) -> float:
        """The rate of the least macro loss in a short run on the default mixture; from the least rate up, and
        none above the first that does worse."""
        if len(self.size.rates) == 1:
            return self.size.rates[0]
        macro = {}
        for rate in self.size.rates:
            overrides = [*self._overrides(family, rate, DEFAULT, seed=0), "evaluation.every_steps=0"]
            key = run_key(f"rate {family} {rate:g}", 0)
            macro[rate] = self._run(key, overrides, self.size.sweep_share)["macro"]
            if macro[rate] > min(macro.values()):
                break
        return min(macro, key=lambda rate: macro[rate])

    def _tried(self) -> list[dict[str, Any]]:
        """Macro losses of the runs that have chosen the learning rates."""
        records = [json.loads(path.read_text()) for path in sorted(self.work.glob("rate-*.json"))]
        return [{k: record[k] for k in ("key", "macro", "steps", "tokens", "seconds")} for record in records]

    def _single_tasks(self, rate: float) -> dict[str, dict[str, Any]]:
        """One LoRA per task, with as many samples of it as the default mixture gives it."""
        batch = self.size.single_batch
        mixed = self._overrides("LoRA", rate, DEFAULT, seed=1)
        steps = self._steps(mixed, 1.0)
        data = self._data([*mixed, f"training.steps={steps}"])
        single = {}
        for task, samples in zip(data.tasks, data.samples(steps).tolist(), strict=True):
            overrides = [
                *self._overrides("LoRA", rate, PROPORTIONAL | {"max_repeats": None}, seed=1),
                f"data.only=[{task.name}]",
                f"training.global_batch={batch}",
                f"training.steps={max(1, round(samples / batch))}",
                "evaluation.every_steps=0",
            ]
            single[task.name] = self._run(run_key(f"single {task.name}", 1), overrides)
        return single

    def _run(self, key: str, overrides: list[str], share: float = 1.0) -> dict[str, Any]:
        """One run to its end, or what is known of it; its number of steps comes nearest to its tokens."""
        path, folder = self.work / f"{key}.json", self.work / key
        if path.exists():
            return dict(json.loads(path.read_text()))
        if not any(text.startswith("training.steps=") for text in overrides):
            overrides = [*overrides, f"training.steps={self._steps(overrides, share)}"]
        config = load_config(self.run_file, [*overrides, f"run.dir={folder}", f"run.name={key}"])
        began, load = time.perf_counter(), os.getloadavg()[0]
        trainer = Trainer(config, self.topology)
        after = trainer.run().after
        record = {
            "key": key,
            "seed": config.run.seed,
            "steps": config.training.steps,
            "tokens": trainer.log.tokens,
            "learning_rate": config.training.learning_rate,
            "trainable_parameters": trainable_parameters(trainer),
            "macro": after.macro_loss,
            "samples": named_samples(trainer),
            "losses": {name: task.loss for name, task in after.tasks.items()},
            "seconds": round(time.perf_counter() - began, 1),
            "load": [load, os.getloadavg()[0]],
            "commit": commit(),
        }
        for part in ("checkpoints", "adapter"):
            shutil.rmtree(folder / part)
        path.write_text(json.dumps(record, indent=1) + "\n")
        LOG.info(
            "%s: macro loss %.4f, %d steps, %.0f s", key, after.macro_loss, record["steps"], record["seconds"]
        )
        return record

    def _last_probes(self, key: str) -> Probes:
        seen = evaluations(RunPaths(self.work / key))
        return seen[max(seen)]

    def _steps(self, overrides: list[str], share: float) -> int:
        tokens = tokens_per_step(load_config(self.run_file, overrides))
        return max(1, round(share * self.size.tokens / tokens))

    def _data(self, overrides: list[str]) -> DataModule:
        config: RunConfig = load_config(self.run_file, overrides)
        return DataModule(config, locate_base(config.model))


def run_key(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def write_run(work: Path, model: Path, size: Size) -> Path:
    every = size.evaluate_samples // size.global_batch
    run = {
        "run": {"name": "seesaw"},
        "model": {"name": str(model)},
        "adapters": {"dropout": 0.0},
        "data": {
            "recipe": str(RECIPE),
            "max_length": size.max_length,
            "pack_length": size.max_length,
            "system_prompt": None,
            "mix": {"block": BLOCK},
        },
        "training": {"global_batch": size.global_batch, "micro_batch": 4, "warmup_ratio": 0.05},
        "parallel": {"deepspeed": str(ROOT / "ds_configs/zero0.json"), "device": "cpu"},
        "evaluation": {
            "loss_rows": size.loss_rows,
            "score_rows": 0,
            "batch_rows": 16,
            "every_steps": every,
        },
        "checkpoint": {"every_steps": 0},
        "tracking": {
            "log_every_steps": 10,
            "routing_every_steps": every,
            "conflict_every_steps": 10_000,  # at the last step only
            "wandb": {"enabled": False},
        },
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def trainable_parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.engine.module.parameters() if p.requires_grad)


def named_samples(trainer: Trainer) -> dict[str, int]:
    """Samples of each task that a run has trained on."""
    samples = trainer.data.samples(trainer.config.training.steps).tolist()
    return {task.name: int(n) for task, n in zip(trainer.tasks, samples, strict=True)}


# What the evaluations say


Probes = dict[str, ProbeLosses]
"""Task -> its held-out rows at one evaluation."""


def judged(paths: RunPaths, alone: Probes, reference: Reference) -> dict[str, Any]:
    """Figures of a run, from the evaluations that it has written."""
    seen = evaluations(paths)
    probes_now = seen[max(seen)]
    section = SeesawSection(window=len(seen))
    tracker = SeesawTracker(list(probes_now), section, reference)
    steps = {step: tracker.update(probes).values() for step, probes in seen.items()}
    _, *later = steps.values()
    losses = sorted(probe.loss for probe in probes_now.values())
    below = worse_than(alone, probes_now, section.gate)
    return {
        "worst_quartile": statistics.mean(losses[-(len(losses) // 4) :]),
        "below_single": len(below),
        "tasks_below_single": below,
        "index": statistics.mean(values["seesaw/index"] for values in later),
        "window_index": later[-1]["seesaw/window_index"],
        "regret": later[-1]["seesaw/regret_mean"],
        "evaluations": [
            {"step": step, "macro": statistics.mean(probe.loss for probe in seen[step].values())}
            | {name: value for name, value in values.items() if name.startswith("seesaw/")}
            for step, values in steps.items()
        ],
    }


def evaluations(paths: RunPaths) -> dict[int, Probes]:
    """Step -> what the run has measured there, in order."""
    records = [json.loads(path.read_text()) for path in paths.of_each_step(paths.evaluation(0))]
    return {
        record["step"]: {
            name: ProbeLosses(tuple(task["row_losses"]), task["tokens"])
            for name, task in record["tasks"].items()
        }
        for record in records
    }


def worse_than(alone: Probes, together: Probes, gate: float) -> list[str]:
    """Tasks whose loss is above the single-task run's by more than `gate` and twice the paired error."""
    worse = []
    for task, mine in together.items():
        noise = max(gate * alone[task].loss, 2 * paired_error(alone[task], mine))
        if mine.loss > alone[task].loss + noise:
            worse.append(task)
    return worse


def reference_of(single: dict[str, dict[str, Any]]) -> Reference:
    """As `moe-medical baseline` would write it."""
    return Reference(
        run="seesaw",
        tokens=sum(run["tokens"] for run in single.values()),
        single={
            task: TaskReference(run["macro"], None, "loss", run["tokens"], run["steps"])
            for task, run in single.items()
        },
    )


def summarise(runs: list[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each figure of each arm."""
    figures = (*FIGURES, "tokens", "steps", "seconds", "trainable_parameters")
    return {
        arm: {figure: spread([run[figure] for run in runs if run["arm"] == arm]) for figure in figures}
        for arm in arms
    }


def spread(values: list[float]) -> dict[str, float]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd}


def differences(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """First minus second arm of each pair, seed by seed: below 0 the first is better."""
    of = {(run["arm"], run["seed"]): run for run in runs}
    for first, second in PAIRS:
        seeds = sorted(s for arm, s in of if arm == first and (second, s) in of)
        for figure in FIGURES if seeds else ():
            gaps = [of[first, s][figure] - of[second, s][figure] for s in seeds]
            yield {"figure": figure, "first": first, "second": second, "seeds": gaps, **spread(gaps)}


def conclusions(runs: list[dict[str, Any]], arms: Sequence[str]) -> Iterator[str]:
    """The arm of the least mean for each figure, and what each change did, as sentences."""
    summary = summarise(runs, arms)
    for figure in FIGURES:
        ordered = sorted(arms, key=lambda arm: summary[arm][figure]["mean"])
        told = ", ".join(f"{arm} {summary[arm][figure]['mean']:.4g}" for arm in ordered)
        yield f"{figure}, least first: {told}."
    for gap in differences(runs):
        better = sum(g < 0 for g in gap["seeds"])
        worse, count = sum(g > 0 for g in gap["seeds"]), len(gap["seeds"])
        verdict = f"better in {better}, worse in {worse} of {count} seeds"
        change = f"{gap['mean']:+.4g} ± {gap['sd']:.2g}"
        yield f"{gap['first']} against {gap['second']}, {gap['figure']}: {change}, {verdict}."


def write_pages(work: Path, arms: Sequence[str], folder: Path) -> None:
    """One page that compares the arms' first seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_report([work.resolve() / run_key(arm, 1) for arm in arms], folder / "comparison.html", None)


def machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "deepspeed", "numpy")
    return {
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


if __name__ == "__main__":
    main()
