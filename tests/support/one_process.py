"""A tiny adapted model in training without DeepSpeed: steps in milliseconds, gradients in `.grad`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import RunConfig
from moe_medical.config.adapters import MoloraConfig
from moe_medical.data.batches import Batch
from moe_medical.data.chat import Encoded
from moe_medical.training.callback import Callback
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.step import StepCounts, StepResult, TaskFactors, TrainStep
from support.families import DECODER


class OneProcess:
    """What an engine does, for one process: forward, backward, sums over no other rank."""

    def __init__(self, model: nn.Module) -> None:
        self.module, self.gradient_scale = model, 1.0
        self.topology = SimpleNamespace(device=torch.device("cpu"), rank=0, sum=lambda values: values)

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Nothing is updated: the gradients stay to be looked at."""
        return 0.0


def tiny_engine(config: MoloraConfig, checkpointing: str = "none") -> tuple[OneProcess, RoutingContext]:
    """The same adapted Llama of two layers at each call, its B not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**DECODER), attn_implementation="eager").train()
    context = attach_adapters(model, config, seed=7)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return OneProcess(model), context


def one_step(
    engine: OneProcess,
    context: RoutingContext,
    losses: RouterLosses,
    batches: Sequence[Batch],
    *callbacks: Callback,
    config: RunConfig | None = None,
) -> StepResult:
    """A training step of two tasks without DeepSpeed and without an update."""
    config = config or RunConfig()
    factors = TaskFactors(config, engine, context, 2)  # type: ignore[arg-type]
    return TrainStep(config, engine, context, factors, losses, callbacks)(0, batches)  # type: ignore[arg-type]


def tiny_samples(count: int = 6) -> list[tuple[Encoded, int]]:
    """Samples of several lengths and two tasks, in turn."""
    generator = torch.Generator().manual_seed(1)
    sizes = [5 + 3 * (i % 3) for i in range(count)]
    ids = [torch.randint(3, 64, (size,), generator=generator).tolist() for size in sizes]
    return [(Encoded(tokens, len(tokens) - 2 - i % 2, 0), i % 2) for i, tokens in enumerate(ids)]


def gradients(engine: OneProcess) -> dict[str, Tensor]:
    """Of every trained parameter, by name."""
    return {name: p.grad for name, p in adapter_parameters(engine.module).items() if p.grad is not None}


def counts_of(batches: Sequence[Batch]) -> StepCounts:
    """Of a step of one rank with two tasks."""
    tokens = sum(batch.targets_per_task(2) for batch in batches).numpy()
    rows = sum(batch.samples_per_task(2) for batch in batches).numpy()
    return StepCounts(tokens, rows, sum(batch.num_tokens for batch in batches), 0, 0, False)
