"""What watching a run costs: evaluation, routing counts and gradient conflict, as shares of training time.

    MOE_MEDICAL_DATA=/path/to/data python benchmarks/tracking_overhead.py
                                           # writes benchmarks/results/tracking_overhead.json

Two runs: SmolLM2-135M on the embedded terminologies (26 tasks), and the small Llama of the other benchmarks
on `data_recipes/public_text.yaml` (28 tasks). Each round takes a plain step, a step with routing counts, a
look at the tasks' gradients, and an evaluation with and without scores, one after the other, so that a drift
of the machine meets all of them. All go through the trainer's own callbacks, files and metrics included.

    share    cost of one look / (steps between two of them * seconds of a plain step), at the default cadence

Seconds are those of the processor, which other work on the machine does not stretch. A look costs the same
whatever the batch, so that its share falls as the global batch grows: shares are given for several batches,
those not measured with a step that grows in proportion. Where fewer rows than the default's are looked at,
cost is multiplied up, as if all of it went with the positions that batches have, padding included. A case
that is in the result already is kept unless it is asked for by name.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
import yaml
from small_model import RECIPE as PUBLIC_TEXT
from small_model import BaseSize, write_base

from moe_medical.config import load_config
from moe_medical.config.schema import EvaluationSection, TrackingSection
from moe_medical.distributed.topology import Topology, start_distributed, stop_distributed
from moe_medical.tracking.sinks import JsonlSink
from moe_medical.training.callback import Callback
from moe_medical.training.callbacks.conflict import Conflicts
from moe_medical.training.callbacks.routing import Routing
from moe_medical.training.trainer import Trainer

Kind = TypeVar("Kind", bound=Callback)

LOG = logging.getLogger("tracking_overhead")
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tracking_overhead.json"
DEFAULTS, LOOKS = EvaluationSection(), TrackingSection()
CADENCE = {
    "routing": LOOKS.routing_every_steps,
    "conflict": LOOKS.conflict_every_steps,
    "evaluation": DEFAULTS.every_steps,
    "scores": DEFAULTS.every_steps,
}
"""Steps between two looks; scores are made then only under `evaluation.scores: always`."""
ROWS = {"conflict": LOOKS.conflict_rows, "evaluation": DEFAULTS.loss_rows, "scores": DEFAULTS.score_rows}
"""Of each task in a look."""
PLAIN, ROUTING, CONFLICT = 1, 2, 3
"""Steps at which nothing, routing and conflict are due in the runs below."""
BATCHES = (16, 32, 128)


@dataclass(frozen=True)
class Case:
    """One run to be watched.

    Attributes:
        sections: Of its run file, over those of `write_run`.
        rows: Of each task that a look takes, by part; scaled to the default.
        base: Of the small base model; None takes the one that `sections` name.
    """

    sections: dict[str, dict[str, Any]]
    rows: dict[str, int]
    base: BaseSize | None = None


CASES = {
    "SmolLM2-135M, 26 tasks": Case(
        {
            "model": {"name": "smollm2-135m"},
            "data": {"recipe": str(ROOT / "data_recipes" / "terminologies.yaml"), "max_length": 256},
        },
        rows={"conflict": 2, "evaluation": 1, "scores": 1},
    ),
    "small Llama, 28 tasks": Case(
        {
            "adapters": {"num_experts": 4, "top_k": 2, "rank": 8, "alpha": 16},
            "data": {"recipe": str(PUBLIC_TEXT), "max_length": 384, "system_prompt": None},
        },
        rows={"conflict": LOOKS.conflict_rows, "evaluation": 8, "scores": 4},
        base=BaseSize(pretraining_steps=2),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=list(CASES))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    known = json.loads(options.result.read_text())["cases"] if options.result.exists() else {}
    for name in options.cases or [name for name in CASES if name not in known]:
        with tempfile.TemporaryDirectory() as scratch:
            known[name] = measure(Path(scratch), CASES[name], options.rounds)
    for name, case in known.items():
        medians = {part: values["median"] for part, values in case["seconds"].items()}
        batch = case["settings"]["global_batch"]
        case["shares"] = {size: shares(medians, size / batch) for size in BATCHES}
        LOG.info("%s: %s", name, case["shares"])
    options.result.write_text(json.dumps({"cadence_steps": CADENCE, "cases": known}, indent=1) + "\n")
    stop_distributed()


def measure(scratch: Path, case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of every part in every round, after a step that does not count."""
    run = write_run(scratch, case)
    config = load_config(run)
    trainer = Trainer(config, start_distributed(config.parallel))
    trainer.folder.create(config)
    trainer.log.sinks.append(JsonlSink(trainer.folder.metrics))
    seconds: dict[str, list[float]] = defaultdict(list)
    scale = {
        part: positions(trainer, rows) / positions(trainer, case.rows[part]) for part, rows in ROWS.items()
    }
    take_step(trainer, 0, PLAIN)
    for number in range(1, rounds + 1):
        for part, value in one_round(trainer, number).items():
            seconds[part].append(value * scale.get(part, 1.0))
        LOG.info("round %d of %d: %s", number, rounds, {k: round(v[-1], 2) for k, v in seconds.items()})
    batch = config.training.global_batch
    return {
        "seconds": {part: spread(values) for part, values in seconds.items()},
        "settings": {
            "tasks": len(trainer.tasks),
            "global_batch": batch,
            "rows": ROWS,
            "measured_rows": case.rows,
            "multiplied_by": scale,
            "trainable_parameters": sum(p.numel() for p in trainer.engine.named.values()),
            "rounds": rounds,
        },
        "machine": machine(trainer.topology),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }


def write_run(scratch: Path, case: Case) -> Path:
    run: dict[str, dict[str, Any]] = {
        "run": {"name": "overhead", "dir": str(scratch / "run")},
        "model": {},
        "adapters": {"preset": "ming_moe"},
        "training": {"global_batch": 16, "micro_batch": 4, "steps": 1000},
        "parallel": {"deepspeed": str(ROOT / "ds_configs" / "zero0.json"), "device": "cpu"},
        "evaluation": {"loss_rows": case.rows["evaluation"], "score_rows": case.rows["scores"]},
        "tracking": {
            "routing_every_steps": ROUTING,
            "conflict_every_steps": CONFLICT,
            "conflict_rows": case.rows["conflict"],
            "wandb": {"enabled": False},
        },
    }
    for section, values in case.sections.items():
        run[section] = run.get(section, {}) | values
    if case.base is not None:
        run["model"]["name"] = str(write_base(scratch / "base", case.base))
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def positions(trainer: Trainer, rows: int) -> int:
    """Positions of the batches of an evaluation of so many rows of each task."""
    chat, size = trainer.data.chat, trainer.config.evaluation.batch_rows
    examples = [example for task in trainer.tasks for example in task.evaluation[:rows]]
    lengths = sorted((len(chat.encode(e.prompt, e.target).input_ids) for e in examples), reverse=True)
    return sum(length * len(lengths[i : i + size]) for i, length in enumerate(lengths) if i % size == 0)


def one_round(trainer: Trainer, number: int) -> dict[str, float]:
    """Seconds of each part."""
    first = 1000 * number
    plain = timed(lambda: take_step(trainer, number, PLAIN))
    routing = take_step(trainer, number, ROUTING)
    result = replace(trainer.train_step(number, trainer.batches.step(number)), step=CONFLICT - 1)
    conflict = timed(lambda: the(trainer, Conflicts).after_step(result))
    losses = timed(lambda: trainer.evaluate(first + 1, "losses", scores=False))
    both = timed(lambda: trainer.evaluate(first + 2, "scores"))
    looks = {"conflict": conflict, "evaluation": losses, "scores": max(both - losses, 0.0)}
    return {"step": plain, "routing": routing, **looks}


def the(trainer: Trainer, kind: type[Kind]) -> Kind:
    """The trainer's callback of a kind."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def take_step(trainer: Trainer, number: int, done: int) -> float:
    """One optimizer step as the trainer takes it, watched as the one that ends at `done`.

    Returns:
        Seconds that counting routings took.
    """
    routing, watched = the(trainer, Routing), list[float]()
    count = routing.after_forward
    routing.after_forward = lambda: watched.append(timed(count))  # type: ignore[method-assign]
    routing.before_step(done - 1)
    result = trainer.train_step(number, trainer.batches.step(number))
    routing.after_forward = count  # type: ignore[method-assign]
    return sum(watched) + timed(lambda: routing.after_step(replace(result, step=done - 1)))


def timed(action: Callable[[], object]) -> float:
    """Seconds of the processor."""
    began = time.process_time()
    action()
    return time.process_time() - began


def shares(median: dict[str, float], growth: float) -> dict[str, float]:
    """Of training time; `growth` is the step's against the measured one."""
    step = growth * median["step"]
    each = {part: median[part] / (every * step) for part, every in CADENCE.items()}
    every_look = sum(each.values())
    each |= {"all by default": every_look - each["scores"], "all with scores": every_look}
    return {part: round(share, 5) for part, share in each.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def machine(topology: Topology) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "device": topology.device.type,
        "platform": platform.platform(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
