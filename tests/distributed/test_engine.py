"""ZeRO 0 to 3 start, agree with each other and with plain PyTorch, and do not care about the layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.ranks import on_ranks
from support.tiny import ROOT, write_tiny_run

if TYPE_CHECKING:
    from moe_medical.config import RunConfig
    from moe_medical.distributed.topology import Topology

STEPS = 4


def _train_losses(
    run: str, presets: list[str], micro_batch: int, dtype: str = "float32"
) -> dict[str, list[float]]:
    """By preset: mean loss, then gradient norm, of each step. All presets share one process group."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import launched_ranks, start_distributed, stop_distributed

    seen = {}
    for preset in presets:
        overrides = [
            f"parallel.deepspeed={ROOT / 'ds_configs' / preset}.json",
            f"parallel.ranks={launched_ranks()}",
            f"training.micro_batch={micro_batch}",
            f"model.dtype={dtype}",
            "adapters.dropout=0",
        ]
        config = load_config(run, overrides)
        seen[preset] = _train(config, start_distributed(config.parallel))
    stop_distributed()
    return seen


def _train(config: RunConfig, topology: Topology) -> list[float]:
    from moe_medical.training.schedule import learning_rate
    from moe_medical.training.step import accumulate, count_step, seed_step
    from moe_medical.training.trainer import Trainer

    trainer = Trainer(config, topology)
    seen = []
    for step in range(STEPS):
        seed_step(config.run.seed, step, topology.rank)
        batches = trainer.batches.step(step)
        counts = count_step(trainer.engine, batches, len(trainer.tasks), stop=False)
        sums = topology.sum(
            accumulate(trainer.engine, trainer.context, trainer.router_losses, batches, counts)
        )
        norm = trainer.engine.step(learning_rate(config.training, step))
        present = sums[1] > 0
        loss = (sums[0][present] / sums[1][present] * sums[2][present]).sum() / sums[2].sum()
        seen += [float(loss), norm]
    return seen


def _reference_losses(run: str) -> list[float]:
    """The same steps in plain PyTorch on one process: AdamW, clipping, the objective of the design."""
    import torch

    from moe_medical.adapters.model import adapter_parameters, attach_adapters
    from moe_medical.base_model import locate_base
    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config, resolve_adapters
    from moe_medical.data.batches import collate
    from moe_medical.data.formats import ChatFormat
    from moe_medical.data.tasks import build_plan, load_tasks
    from moe_medical.training.schedule import learning_rate

    config = load_config(run, ["adapters.dropout=0"])
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    samples = config.training.steps * config.training.global_batch
    plan = build_plan(tasks, config.data, config.run.seed, samples)
    model = load_base(base, "float32").train()
    attach_adapters(model, resolve_adapters(config.adapters), config.run.seed)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    seen = []
    for step in range(STEPS):
        size = config.training.global_batch
        refs = [plan.at(g) for g in range(step * size, (step + 1) * size)]
        per_task: dict[int, list[torch.Tensor]] = {}
        for ref in refs:  # one row at a time: no padding
            example = tasks[ref.task].train[ref.row]
            batch = collate([chat.encode(example.prompt, example.target)], [ref.task], chat.pad_id)
            logits = model(input_ids=batch.input_ids_BS).logits[0, :-1]
            labels = batch.labels_BS[0, 1:]
            losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            per_task.setdefault(ref.task, []).append(losses[labels != -100])
        loss = sum(torch.cat(rows).mean() * len(rows) for rows in per_task.values()) / len(refs)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.training.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(config.training, step)
        optimizer.step()
        seen += [loss.item(), norm.item()]
    return seen


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def reference(run_file: Path) -> list[float]:
    return _reference_losses(str(run_file))


def test_every_stage_equals_plain_pytorch(run_file: Path, reference: list[float], tmp_path: Path) -> None:
    presets = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    by_rank = on_ranks(2, _train_losses, tmp_path, str(run_file), presets, 2)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0] == {preset: pytest.approx(reference, rel=1e-5) for preset in presets}
    assert reference[-2] < reference[0]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 2), (4, 1)])
def test_loss_does_not_depend_on_the_layout(
    world: int, micro_batch: int, run_file: Path, reference: list[float], tmp_path: Path
) -> None:
    results = on_ranks(world, _train_losses, tmp_path, str(run_file), ["zero2"], micro_batch)
    assert results[0]["zero2"] == pytest.approx(reference, rel=1e-5)


def test_a_bfloat16_base_trains_alike_at_every_stage(
    run_file: Path, reference: list[float], tmp_path: Path
) -> None:
    """Compared with each other: fp32 is another computation. See docs/one_batch.md on ZeRO-3."""
    presets = ["zero0", "zero2", "zero3"]
    losses = on_ranks(2, _train_losses, tmp_path, str(run_file), presets, 2, "bfloat16")[0]
    assert losses["zero2"] == pytest.approx(losses["zero0"], rel=1e-6)
    assert losses["zero3"] == pytest.approx(losses["zero0"], rel=5e-3)
    assert losses["zero0"] == pytest.approx(reference, rel=3e-2)
    assert losses["zero0"] != reference
