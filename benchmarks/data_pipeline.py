"""The data pipeline against `datasets` in one run: tokens per core, useful positions, memory, waiting.

    python benchmarks/data_pipeline.py           # writes benchmarks/results/data_pipeline.json
    python benchmarks/data_pipeline.py --quick   # a reduced run that writes nothing but what it prints

Real data: the 28 tasks of data_recipes/public_text.yaml in $MOE_MEDICAL_DATA, with SmolLM2's tokenizer. Every
arm makes the micro-batches of the same number of steps, without training; arms take turns, so that noise hits
them alike. A core is a second of CPU time over all threads, so the figures per core stand on a busy machine
too. Rank 0 of 8 is measured alone, as if its seven peers were elsewhere. Caches start empty.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import numpy as np
import torch
from datasets_baseline import BATCH, Baseline, Tensors, Tokenise, timed

from moe_medical.base_model import locate_base
from moe_medical.config.schema import Batching, DataSection, ModelSection, TokenCache
from moe_medical.data.batches import BatchShape, TrainingBatches
from moe_medical.data.chat import ChatFormat
from moe_medical.data.recipe import load_mixture
from moe_medical.data.sources import load_split, splits_of
from moe_medical.data.static_mixing import weight_schedule
from moe_medical.data.tasks import TaskData, build_plan, cache_tokens, load_tasks, mix_sizes
from moe_medical.files import CACHE_VARIABLE

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "data_pipeline.json"
SEED, GLOBAL_BATCH, MAX_LENGTH = 17, 256, 1024
RUN_SAMPLES = 500 * GLOBAL_BATCH
ROWS_PER_MICRO_BATCH: dict[Batching, int] = {"packed": 2, "grouped": BATCH, "padded": BATCH}
"""Packed rows hold several samples each."""
WORLDS = (1, 8)


Filled = tuple[int, int]
"""Tokens and positions of a micro-batch."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    steps: int
    """Of a round, per arm."""
    training_steps: int
    memory_megabytes: tuple[int, ...]


FULL = Size(rounds=5, steps=6, training_steps=4, memory_megabytes=(50, 200))
QUICK = Size(rounds=2, steps=1, training_steps=2, memory_megabytes=(5, 20))


def main() -> None:
    quick = "--quick" in sys.argv
    size, began = QUICK if quick else FULL, time.perf_counter()
    load_before = os.getloadavg()
    base = locate_base(ModelSection()).folder
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[CACHE_VARIABLE] = f"{scratch}/cache"
        record = measure(size, base, Path(scratch))
    record["environment"] = environment(load_before, time.perf_counter() - began)
    text = json.dumps(record, indent=1) + "\n"
    if quick:
        sys.stdout.write(text)
    else:
        RESULT.write_text(text)


def measure(size: Size, base: Path, scratch: Path) -> dict[str, Any]:
    section = DataSection(recipe=str(ROOT / "data_recipes" / "public_text.yaml"), max_length=MAX_LENGTH)
    chat = ChatFormat.from_folder(base, section.system_prompt, MAX_LENGTH)
    ours = Ours(section, chat)
    say(f"ready, ours: {ours.seconds}")
    files = [Path(next(iter(task.fingerprints["train"]))) for task in ours.tasks]
    tokenise = Tokenise(base, str(section.system_prompt), MAX_LENGTH)
    baseline = Baseline(files, ours.shares(), tokenise, SEED, scratch / "datasets")
    say(f"ready, datasets: {baseline.seconds}")
    arms = [*our_arms(ours), *baseline_arms(baseline)]
    run_rounds(arms, size)
    say("".join(f"\n{row}" for row in map(Arm.row, arms)))
    return {
        "setting": setting(size, ours),
        "ready": {"ours": ours.ready(), "datasets": ready_datasets(baseline)},
        "arms": [arm.row() for arm in arms],
        "useful": [*useful_ours(ours, size), *useful_baseline(baseline, size)],
        "same_tokens": same_tokens(ours, tokenise),
        "memory": list(memory_rows(size.memory_megabytes, scratch)),
        "training": child("training", str(base), section.recipe, str(size.training_steps), str(scratch)),
    }


class Ours:
    """The tasks and the plan, and the seconds that it took to make them ready, cold and warm."""

    def __init__(self, section: DataSection, chat: ChatFormat) -> None:
        self._section, self._chat = section, chat
        self.seconds: dict[str, dict[str, float]] = {}
        for state in ("cold", "warm"):
            with timed(self.seconds, f"rows_{state}"):
                self.rows_read = read_splits(Path(section.recipe), section.max_bad_fraction)
            with timed(self.seconds, f"hygiene_{state}"):
                self.tasks = self.fresh()
            with timed(self.seconds, f"tokens_{state}"):
                self.tasks = cache_tokens(self.tasks, [0] * len(self.tasks), "always", ranks=1)

    def fresh(self) -> list[TaskData]:
        """The tasks with tokens made when they are asked for, and none remembered yet."""
        return load_tasks(self._section, "validation", self._chat)

    def shares(self) -> list[float]:
        sizes = mix_sizes(self.tasks, self._section)
        ((_, weights),) = weight_schedule(self._section.mix, sizes, RUN_SAMPLES)
        return [float(weight) for weight in weights / weights.sum()]

    def batches(self, cache: TokenCache, batching: Batching, rank: int, world: int) -> TrainingBatches:
        tasks = self.fresh() if cache == "never" else self.tasks
        plan = build_plan(tasks, self._section, SEED, RUN_SAMPLES)
        micro_batch = ROWS_PER_MICRO_BATCH[batching]
        shape = BatchShape(GLOBAL_BATCH, micro_batch, rank, world, batching, MAX_LENGTH)
        return TrainingBatches(plan, tasks, self._chat, shape)

    def ready(self) -> dict[str, Any]:
        """What making ready has cost: the stores of all splits, then hygiene, then the tokens of training."""
        tokens = sum(sum(task.tokens.lengths(range(len(task.train)))) for task in self.tasks)
        return {
            "rows": self.rows_read,
            "rows_per_second": round(self.rows_read / self.seconds["rows_cold"]["wall"]),
            "training_rows": sum(len(task.train) for task in self.tasks),
            "tokens": tokens,
            **token_speed(tokens, self.seconds["tokens_cold"]),
            "seconds": self.seconds,
        }

    def encode(self, task: int, rows: Sequence[int]) -> list[list[int]]:
        return [encoded.input_ids for encoded in self.tasks[task].tokens.encoded(rows)]


def read_splits(recipe: Path, max_bad_fraction: float) -> int:
    """Builds or opens the row store of every split; returns their rows."""
    specs = load_mixture(recipe).tasks
    splits = [load_split(spec, name, max_bad_fraction) for spec in specs for name in splits_of(spec)]
    return sum(len(split.examples) for split in splits)


def ready_datasets(baseline: Baseline) -> dict[str, Any]:
    speed = token_speed(baseline.num_tokens, baseline.seconds["map"])
    return {"tokens": baseline.num_tokens, **speed, "seconds": baseline.seconds}


class Arm:
    """One way to make the micro-batches of rank 0.

    Args:
        pipeline: `ours` or `datasets`.
        tokens: When tokens are made.
        batching: How samples become rows.
        world: Ranks.
        produce: Step -> (tokens, positions) of each of its micro-batches.
    """

    def __init__(
        self,
        pipeline: str,
        tokens: str,
        batching: str,
        world: int,
        produce: Callable[[int], Iterator[Filled]],
    ) -> None:
        self._names = {"pipeline": pipeline, "tokens": tokens, "batching": batching, "world": world}
        self._produce = produce
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._cpu_ms: list[float] = []
        self._made = np.zeros(2, dtype=np.int64)

    def step(self, number: int) -> np.ndarray:
        """Tokens and positions of a step."""
        return np.array(list(self._produce(number))).sum(axis=0)

    def round(self, steps: range) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        made = np.sum([self.step(number) for number in steps], axis=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self._wall.append(made[0] / wall)
        self._cpu.append(made[0] / cpu)
        self._cpu_ms.append(1e3 * cpu / len(steps))
        self._made += made

    def row(self) -> dict[str, Any]:
        return {
            **self._names,
            "tokens_per_second": spread(self._wall),
            "tokens_per_core_second": spread(self._cpu),
            "cpu_ms_per_step": spread(self._cpu_ms),
            "measured_tokens": int(self._made[0]),
            "useful": round(float(self._made[0] / self._made[1]), 4),
        }


def our_arms(ours: Ours) -> Iterator[Arm]:
    caches: list[tuple[TokenCache, str, Batching]] = [
        ("never", "as read", "packed"),
        ("always", "kept", "packed"),
        ("always", "kept", "grouped"),
        ("always", "kept", "padded"),
    ]
    for world in WORLDS:
        for cache, name, batching in caches:
            batches = ours.batches(cache, batching, 0, world)
            yield Arm("ours", name, batching, world, partial(filled_by_us, batches))


def filled_by_us(batches: TrainingBatches, step: int) -> Iterator[Filled]:
    return ((batch.num_tokens, batch.token_mask_BS.numel()) for batch in batches.step(step))


def baseline_arms(baseline: Baseline) -> Iterator[Arm]:
    for world in WORLDS:
        for name, make in (("as read", baseline.on_the_fly), ("kept", baseline.mapped)):
            yield Arm("datasets", name, "padded", world, partial(filled_by_datasets, make, world))


def filled_by_datasets(make: Callable[[range], Iterator[Tensors]], world: int, step: int) -> Iterator[Filled]:
    """Rank 0 takes every `world`-th sample, as `DistributedSampler` deals them."""
    samples = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, world)
    masks = (batch["attention_mask"] for batch in make(samples))
    return ((int(mask.sum()), mask.numel()) for mask in masks)


def run_rounds(arms: Sequence[Arm], size: Size) -> None:
    """Every round takes steps that no earlier one has taken, so that nothing is remembered."""
    for arm in arms:
        arm.step(size.rounds * size.steps)
    for number in range(size.rounds):
        for arm in arms:
            arm.round(range(number * size.steps, (number + 1) * size.steps))


def useful_ours(ours: Ours, size: Size) -> Iterator[dict[str, Any]]:
    """Tokens over positions, on the ranks themselves and where each waits for the longest of a turn."""
    for batching in ROWS_PER_MICRO_BATCH:
        for world in (1, 2, 8):
            ranks = [ours.batches("always", batching, rank, world) for rank in range(world)]
            steps = range(size.rounds * size.steps)
            filled = [[pair for step in steps for pair in filled_by_us(rank, step)] for rank in ranks]
            yield {"pipeline": "ours", "batching": batching, "world": world, **useful(filled)}


def useful_baseline(baseline: Baseline, size: Size) -> Iterator[dict[str, Any]]:
    lengths = baseline.lengths(range(size.rounds * size.steps * GLOBAL_BATCH))
    for world in (1, 2, 8):
        ranks = [lengths[rank::world] for rank in range(world)]
        filled = [[padded(rank[i : i + BATCH]) for i in range(0, len(rank), BATCH)] for rank in ranks]
        yield {"pipeline": "datasets", "batching": "padded", "world": world, **useful(filled)}


def padded(lengths: Sequence[int]) -> Filled:
    return sum(lengths), len(lengths) * max(lengths)


def useful(filled: Sequence[Sequence[Filled]]) -> dict[str, float]:
    """Of the micro-batches of each rank, in turns."""
    made = np.array(filled)
    tokens, positions = made[..., 0].sum(), made[..., 1]
    waiting = positions.max(axis=0).sum() * len(filled)
    return {
        "useful": round(float(tokens / positions.sum()), 4),
        "useful_waiting": round(float(tokens / waiting), 4),
    }


def same_tokens(ours: Ours, tokenise: Tokenise, rows: int = 64) -> float:
    """Share of the first rows of each task that both pipelines turn into the same tokens."""
    same = []
    for number, task in enumerate(ours.tasks):
        picked = range(min(rows, len(task.train)))
        examples = task.train.take(picked)
        columns = {
            "instruction": ["" for _ in picked],
            "input": [example.prompt for example in examples],
            "output": [example.target for example in examples],
        }
        theirs = tokenise(columns)["input_ids"]
        same += [a == b for a, b in zip(ours.encode(number, picked), theirs, strict=True)]
    return round(sum(same) / len(same), 4)


def child(*arguments: str) -> Any:
    """What data_pipeline_child.py prints, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "data_pipeline_child.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_rows(megabytes: Sequence[int], scratch: Path) -> Iterator[dict[str, Any]]:
    for size in megabytes:
        file = write_records(scratch / f"{size}.jsonl", size)
        for reader in ("ours", "list of records"):
            yield {"megabytes": size, "reader": reader, **child("memory", reader, str(file))}


def write_records(file: Path, megabytes: int) -> Path:
    text = "The patient reports fever, cough and pain on both sides. " * 16
    with file.open("w") as stream:
        while stream.tell() < megabytes * 1e6:
            first = stream.tell()
            stream.writelines(
                json.dumps({"id": f"{first}-{i}", "input": f"{first} {i} {text}", "output": "yes"}) + "\n"
                for i in range(1000)
            )
    return file


def setting(size: Size, ours: Ours) -> dict[str, Any]:
    return {
        "tasks": len(ours.tasks),
        "tokenizer": ModelSection().name,
        "global_batch": GLOBAL_BATCH,
        "max_length": MAX_LENGTH,
        "rows_per_micro_batch": ROWS_PER_MICRO_BATCH | {"datasets": BATCH},
        "rounds": size.rounds,
        "steps_per_round": size.steps,
        "seed": SEED,
        "mixing": "temperature 2, at most 4 repeats",
    }


def environment(load_before: tuple[float, ...], seconds: float) -> dict[str, Any]:
    packages = ("torch", "datasets", "tokenizers", "transformers", "pyarrow", "numpy", "deepspeed")
    return {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "torch_threads": torch.get_num_threads(),
        "load_average_before": [round(load, 1) for load in load_before],
        "load_average_after": [round(load, 1) for load in os.getloadavg()],
        "seconds_total": round(seconds),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(float(statistics.median(values)), 1),
        "min": round(float(min(values)), 1),
        "max": round(float(max(values)), 1),
    }


def token_speed(tokens: int, seconds: Mapping[str, float]) -> dict[str, int]:
    return {
        "tokens_per_second": round(tokens / seconds["wall"]),
        "tokens_per_core_second": round(tokens / seconds["cpu"]),
    }


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
