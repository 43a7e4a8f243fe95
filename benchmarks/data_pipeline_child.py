"""Parts of data_pipeline.py that need a process of their own; each prints one line of JSON.

memory READER FILE          how much memory grows while a JSONL is read
training BASE RECIPE STEPS FOLDER    how long training steps wait for their data
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> None:
    kind, *arguments = sys.argv[1:]
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"memory": memory, "training": training}
    found = kinds[kind](*arguments)
    sys.stdout.write(json.dumps(found) + "\n")


# Memory


def memory(reader: str, file: str) -> dict[str, Any]:
    """Peak growth in MB after a small file was read: private pages alone, and with those of mapped files."""
    read = READERS[reader]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MOE_MEDICAL_CACHE"] = scratch
        small = Path(scratch) / "small.jsonl"
        with open(file, "rb") as stream:
            small.write_bytes(b"".join(stream.readline() for _ in range(1000)))
        read(small)
        with Watch() as watch:
            began = time.perf_counter()
            rows = read(Path(file))
            seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "private_mb": round(watch.growth("RssAnon"), 1),
        "with_mapped_files_mb": round(watch.growth("VmRSS"), 1),
        "seconds": round(seconds, 2),
    }


def read_ours(file: Path) -> int:
    """Builds the row store, then reads every row in order."""
    from moe_medical.data.recipe import FilesSource, TaskSpec
    from moe_medical.data.sources import load_split

    source = FilesSource({"train": (str(file),)})
    spec = TaskSpec("t", "yes_no", "accuracy", Path("t.yaml"), source, "{input}", "{output}", id="id")
    return sum(1 for _ in load_split(spec, "train", 0.0).examples)


def read_list(file: Path) -> int:
    with file.open() as stream:
        records = [json.loads(line) for line in stream]
    return len(records)


READERS: dict[str, Callable[[Path], int]] = {"ours": read_ours, "list of records": read_list}


class Watch:
    """The largest values of /proc/self/status while it is entered, looked up every few milliseconds."""

    def __init__(self) -> None:
        self._first = self._most = status()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def growth(self, name: str) -> float:
        """MB."""
        return (self._most[name] - self._first[name]) * 1024 / 1e6

    def _look(self) -> None:
        while not self._done.wait(0.005):
            now = status()
            self._most = {name: max(value, now[name]) for name, value in self._most.items()}


def status() -> dict[str, int]:
    """KiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) for name in ("VmRSS", "RssAnon")}


# Training


def training(base: str, recipe: str, steps: str, folder: str) -> dict[str, Any]:
    """Seconds that steps of a real model wait for data, made between them and in the background."""
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "MASTER_ADDR": "127.0.0.1"}
    import torch

    from moe_medical.config import RunConfig
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    count, config = int(steps), RunConfig()
    config.run.dir, config.model.name, config.data.recipe = f"{folder}/run", base, recipe
    config.data.max_length, config.data.cache = 256, "never"
    config.training.steps = 2 * count
    config.training.global_batch, config.training.micro_batch = 16, 4
    config.training.balance_over = "micro_batch"
    config.parallel.device = "cpu"
    config.parallel.deepspeed = str(ROOT / "ds_configs" / "zero2.json")
    config.tracking.wandb.enabled = False
    trainer = Trainer(config, start_distributed(config.parallel))
    rows = [run_steps(trainer, workers, workers * count, count) for workers in (0, 1)]
    stop_distributed()
    return {
        "model": "smollm2-135m, preset ming_moe, float32, packed, tokens made as they are read",
        "threads": torch.get_num_threads(),
        "global_batch": 16,
        "max_length": 256,
        "steps": count,
        "runs": rows,
    }


def run_steps(trainer: Any, workers: int, first: int, count: int) -> dict[str, Any]:
    from moe_medical.data.batches import Loader

    waits, seconds = [], []
    with Loader(trainer.batches, workers, trainer.config.data.prefetch_steps) as loader:
        for step in range(first, first + count):
            began = time.perf_counter()
            trainer.train_step(step, loader.take(step, first + count))
            seconds.append(time.perf_counter() - began)
            waits.append(loader.waited())
    return {
        "workers": workers,
        "first_wait_ms": round(1e3 * waits[0], 2),
        "wait_ms": round(1e3 * statistics.median(waits[1:]), 2),
        "wait_ms_max": round(1e3 * max(waits[1:]), 2),
        "step_ms": round(1e3 * statistics.median(seconds[1:]), 1),
        "waiting_share": round(sum(waits[1:]) / sum(seconds[1:]), 6),
    }


if __name__ == "__main__":
    main()
