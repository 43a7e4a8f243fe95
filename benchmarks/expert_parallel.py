"""Expert parallelism against replicated experts: bytes on the wire and step time, in one run.

    PYTHONPATH=tests python benchmarks/expert_parallel.py   # writes results/expert_parallel.json

Every case trains the same random Llama (hidden 256, 2 blocks) with routed experts in its MLPs under ZeRO-2,
on real processes joined by gloo. Its four arms take turns step by step, so that noise hits them alike:
experts replicated on each rank, `exchange: weights` (gathered again for backward, or kept) and `tokens`.
`measured_bytes` is what one rank hands to collectives in a step, `predicted_bytes` what the cost model says.

Loopback is no network: the bytes carry over to a cluster, the seconds do not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.traffic import CollectiveBytes
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from moe_medical.base_model import locate_base
from moe_medical.base_model.known_shapes import shape_of
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.data.batches import IGNORE, Batch
from moe_medical.distributed.engine import Engine
from moe_medical.distributed.topology import start_distributed, stop_distributed
from moe_medical.planning.adapted_model import AdaptedModel, Workload
from moe_medical.planning.cost import estimate
from moe_medical.planning.layouts import Layout
from moe_medical.ports import free_port
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.setup import assemble
from moe_medical.training.step import TaskFactors, TrainStep

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "expert_parallel.json"
SEED, ROUNDS, ROW = 17, 5, 256
ARMS = ("replicated", "weights", "weights kept", "tokens")


@dataclass(frozen=True)
class Case:
    """What all arms of a comparison share."""

    world: int
    experts: int
    rank: int
    tokens: int
    """Of a rank's micro-batch."""


CASES = [
    *(Case(2, e, r, t) for e, r in ((8, 8), (16, 16), (64, 16)) for t in (256, 1024, 4096)),
    *(Case(4, e, r, 256) for e, r in ((8, 8), (16, 16), (64, 16))),
]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(Path(scratch) / "base")
        for case in CASES:
            out = Path(scratch) / "rows.json"
            port = free_port()
            multiprocessing.spawn(run_rank, (case, str(base), port, str(out)), nprocs=case.world)
            rows += json.loads(out.read_text())
            sys.stdout.write("".join(describe(row) for row in rows[-len(ARMS) :]))
    record = {
        "rows": rows,
        "model": "random Llama: hidden 256, intermediate 688, 2 blocks, MLP experts, top-2, fp32, ZeRO-2",
        "seed": SEED,
        "rounds": ROUNDS,
        "backend": "gloo over loopback, one thread a rank",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


def write_base(folder: Path) -> Path:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_rank(index: int, case: Case, base: str, port: int, out: str) -> None:
    """One rank of a case; the main rank writes the rows."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": case.world, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["OMP_NUM_THREADS"] = "1"
    arms = {arm: Arm(arm, case, base) for arm in ARMS}
    for arm in arms.values():
        arm.step()  # DeepSpeed traces and torch allocates in the first
    measured = {name: arm.measure() for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            seconds[name].append(arm.timed_step())
    if index == 0:
        rows = [row(case, arms[name], measured[name], seconds[name]) for name in ARMS]
        Path(out).write_text(json.dumps(rows))
    stop_distributed()


class Arm:
    """One way of training a case."""

    def __init__(self, name: str, case: Case, base: str) -> None:
        self.name, self.config = name, configure(name, case, base)
        self.adapters = self.config.adapters
        self.topology = start_distributed(self.config.parallel)
        self.base = locate_base(self.config.model)
        self.engine, self.context = assemble(
            self.config, self.base, self.adapters, self.topology, lambda members: "weights"
        )
        losses = RouterLosses(self.engine, self.context, self.adapters, "global_batch")
        factors = TaskFactors(self.config, self.engine, self.context, num_tasks=1)
        self.train_step = TrainStep(self.config, self.engine, self.context, factors, losses)
        self.batches = list(random_batches(self.engine, case))

    def step(self) -> None:
        self.train_step(0, self.batches)

    def measure(self) -> float:
        """Bytes of a step, averaged over ranks."""
        with CollectiveBytes() as traffic:
            self.step()
        return float(self.topology.sum(torch.tensor([traffic.total]).numpy())[0] / self.topology.world_size)

    def timed_step(self) -> float:
        """Seconds of a step of the slowest rank."""
        self.topology.barrier()
        began = time.perf_counter()
        self.step()
        seconds = torch.tensor([time.perf_counter() - began])
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def predicted(self, case: Case) -> float:
        model = AdaptedModel.of(shape_of(self.base), self.adapters)
        layout = Layout.of(self.config, case.world, ranks_per_node=case.world)
        workload = Workload.of(
            self.config, self.adapters, accumulation=1, mean_tokens=ROW, longest=ROW, num_tasks=1
        )
        return estimate(model, layout, workload).sent


def configure(arm: str, case: Case, base: str) -> RunConfig:
    config = RunConfig()
    config.run.seed = SEED
    config.model.name = base
    config.adapters = MoloraConfig(num_experts=case.experts, rank=case.rank, alpha=32.0, dropout=0.0)
    config.training.micro_batch = case.tokens // ROW
    config.training.global_batch = config.training.micro_batch * case.world
    config.parallel.device, config.parallel.ranks = "cpu", case.world
    config.parallel.deepspeed = str(ROOT / "ds_configs" / "zero2.json")
    if arm != "replicated":
        config.parallel.ep_size = case.world
        config.parallel.exchange = "tokens" if arm == "tokens" else "weights"
        config.parallel.keep_gathered = arm == "weights kept"
    return config


def random_batches(engine: Engine, case: Case) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(SEED + engine.topology.rank)
    ids = torch.randint(1024, (case.tokens // ROW, ROW), generator=generator)
    labels = ids.clone()
    labels[:, : ROW // 2] = IGNORE
    positions = torch.arange(ROW).expand_as(ids)
    yield Batch(ids, torch.ones_like(ids, dtype=torch.bool), positions, labels, 0 * ids, ROW // 2, 0)


def row(case: Case, arm: Arm, measured: float, seconds: list[float]) -> dict[str, Any]:
    return {
        "world": case.world,
        "ep_size": arm.config.parallel.ep_size,
        "experts": case.experts,
        "rank": case.rank,
        "tokens": case.tokens,
        "exchange": arm.name,
        "measured_bytes": round(measured),
        "predicted_bytes": round(arm.predicted(case)),
        "step_seconds": round(statistics.median(seconds), 4),
        "step_seconds_min": round(min(seconds), 4),
        "step_seconds_max": round(max(seconds), 4),
    }


def describe(row: dict[str, Any]) -> str:
    sizes = f"{row['measured_bytes'] / 1e6:9.2f} MB (predicted {row['predicted_bytes'] / 1e6:9.2f})"
    what = f"{row['world']} ranks E{row['experts']} r{row['rank']} T{row['tokens']}"
    return f"{what:24} {row['exchange']:13} {sizes} {row['step_seconds'] * 1e3:8.1f} ms\n"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
