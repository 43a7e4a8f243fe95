"""The same training run under any layout: what the tests of distributed/ do on each rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.reference import Row, Rules, Trained, task_token_mean, train
from support.tiny import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from moe_medical.config import RunConfig
    from moe_medical.data.batches import Batch
    from moe_medical.distributed.topology import Topology
    from moe_medical.training.trainer import Trainer

Arrange = Callable[[Sequence[Row]], Sequence[Row]]
Weigh = Callable[[Sequence[Row]], Sequence[float]]
PERSISTENCE = 200
"""Elements up to which ZeRO-3 keeps a parameter whole: biases, norms and routers of the tiny model."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread over its ranks."""

    zero: int = 2
    ep_size: int = 1
    exchange: str = "auto"
    offload: bool = False
    accumulation: int = 1
    checkpointing: str = "none"
    keep_gathered: bool = False
    overlap: bool = True
    batching: str = "grouped"

    def configured(self, run: str, ranks: int, settings: Sequence[str] = ()) -> RunConfig:
        """The run file in this layout; its DeepSpeed JSONs are those of `write_zero_settings`."""
        from moe_medical.config import load_config

        size = load_config(run).training.global_batch
        overrides = {
            "training.micro_batch": size // (ranks * self.accumulation),
            "training.activation_checkpointing": self.checkpointing,
            "data.batching": self.batching,
            "parallel.ranks": ranks,
            "parallel.ep_size": self.ep_size,
            "parallel.exchange": self.exchange,
            "parallel.keep_gathered": self.keep_gathered,
            "parallel.overlap": self.overlap,
            "parallel.deepspeed": zero_settings(Path(run).parent, self.zero, self.offload),
        }
        return load_config(run, [*(f"{key}={value}" for key, value in overrides.items()), *settings])


def zero_settings(folder: Path, stage: int, offload: bool = False) -> Path:
    """Where `write_zero_settings` puts a DeepSpeed JSON."""
    return folder / f"zero{stage}{'_offload' if offload else ''}.json"


def write_zero_settings(folder: Path) -> None:
    """The shipped DeepSpeed JSONs with, for each stage from 1, an offloaded one too; ZeRO-3 spreads more."""
    for stage in range(4):
        settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENCE
        zero_settings(folder, stage).write_text(json.dumps(settings))
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        settings["zero_force_ds_cpu_optimizer"] = False
        if stage:
            zero_settings(folder, stage, offload=True).write_text(json.dumps(settings))


def start(layout: Layout, run: str, topology: Topology, settings: Sequence[str] = ()) -> Trainer:
    """A trainer at step 0. Collective: every rank must call."""
    from moe_medical.training.trainer import Trainer

    return Trainer(layout.configured(run, topology.world_size, settings), topology)


def step(trainer: Trainer, number: int, batches: Sequence[Batch] | None = None) -> dict[str, float]:
    """One optimizer step; loss, gradient norm and, where they are active, the router losses."""
    result = trainer.train_step(number, trainer.batches.step(number) if batches is None else batches)
    loss, tokens, rows = trainer.topology.sum(result.task_sums)
    present = tokens > 0
    of_tasks = loss[present] / tokens[present] * rows[present] / rows.sum()
    return {"loss": float(of_tasks.sum()), "norm": result.grad_norm, **trainer.router_losses.values()}


def reference(
    run: str, steps: int, arranged: Arrange = list, token_weights: Weigh = task_token_mean
) -> Trained:
    """The first steps of a run in plain PyTorch, from the run's rows, first adapters and learning rates.

    `arranged` may change the rows of each global batch; `token_weights` gives those of its target tokens.
    """
    from moe_medical.adapters.model import adapter_parameters, attach_adapters
    from moe_medical.base_model import locate_base
    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config
    from moe_medical.training.step import learning_rate

    config = load_config(run)
    base, adapters, training = locate_base(config.model), config.adapters, config.training
    model = load_base(base, "float32")
    attach_adapters(model, adapters, config.run.seed)
    first = {name: p.detach() for name, p in adapter_parameters(model).items()}
    rules = Rules(
        top_k=adapters.top_k,
        scaling=adapters.alpha / adapters.rank,
        rates=[learning_rate(training, number) for number in range(steps)],
        clip=training.clip_norm,
        balance=adapters.balance_coefficient,
        z=adapters.z_coefficient,
        weight_decay=training.weight_decay,
        epsilon=training.epsilon,
        token_weights=token_weights,
    )
    return train(base.folder, first, [arranged(rows) for rows in rows_of_steps(config, steps)], rules)


def rows_of_steps(config: RunConfig, steps: int) -> list[list[Row]]:
    """The global batches of the first steps of a run."""
    from moe_medical.base_model import locate_base
    from moe_medical.data.chat import ChatFormat
    from moe_medical.data.tasks import build_plan, load_tasks

    folder, data = locate_base(config.model).folder, config.data
    chat = ChatFormat.from_folder(folder, data.system_prompt, data.max_length)
    tasks = load_tasks(data, config.evaluation.split, chat)
    size = config.training.global_batch
    plan = build_plan(tasks, data, config.run.seed, config.training.steps * size)
    rows = []
    for ref in map(plan.at, range(steps * size)):
        example = tasks[ref.task].train[ref.row]
        encoded = chat.encode(example.prompt, example.target)
        rows.append(Row(encoded.input_ids, encoded.num_prompt_tokens, ref.task))
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def apart(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """By name: the largest difference, relative to the largest number of the expected tensor."""
    assert tensors.keys() == expected.keys()
    return {n: float((tensors[n] - e).abs().max() / e.abs().max()) for n, e in expected.items()}


def worst(values: Mapping[str, Any]) -> tuple[str, float]:
    """The name and the value of the largest."""
    return max(values.items(), key=lambda item: item[1])
