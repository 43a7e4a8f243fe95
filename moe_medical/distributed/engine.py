"""The DeepSpeed engine, built from the run file and the DeepSpeed JSON.

The run file owns batch, learning rate, clipping and steps; the JSON owns ZeRO stage, offload and
buckets. The optimizer is torch's AdamW at every stage, so that its state has one form.
Only adapters and routers are handed to the optimizer; the base has no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_medical.config.deepspeed_keys import read_deepspeed, zero_stage
from moe_medical.config.schema import RunConfig, TrainingSection
from moe_medical.distributed.topology import Topology


class Engine:
    """A model under DeepSpeed: forward, backward over accumulated micro-batches, one step.

    Attributes:
        named: trainable parameters by name, in a stable order.
        accumulation: micro-batches of this rank per step.
    """

    def __init__(
        self, deepspeed_engine: Any, named: Mapping[str, nn.Parameter], topology: Topology, clip_norm: float
    ) -> None:
        self.deepspeed = deepspeed_engine
        self.named = dict(named)
        self.topology = topology
        self.stage = int(deepspeed_engine.zero_optimization_stage())
        self._clip_norm = clip_norm
        self.accumulation = int(deepspeed_engine.gradient_accumulation_steps())

    @property
    def module(self) -> nn.Module:
        """The model itself, for evaluation and generation."""
        return self.deepspeed.module

    @property
    def needs_equal_forwards(self) -> bool:
        """Whether every rank must run the same number of forward passes (ZeRO-3 gathers in each)."""
        return self.stage == 3 and self.topology.world_size > 1

    def __call__(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of this rank's share of the *global* loss.

        DeepSpeed averages over ranks and accumulation steps; scaling by both first makes the summed
        shares of all ranks and micro-batches the loss whose gradient is taken.
        """
        self.deepspeed.backward(loss * (self.topology.world_size * self.accumulation))
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear; returns the global gradient norm before clipping."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        own_norm = self._clip_unsharded() if self.stage == 0 else None
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() if own_norm is None else own_norm)

    def _clip_unsharded(self) -> float:
        # NOTE(deepspeed): ZeRO-0 does not tell the norm, and averages it wrongly over sharded experts.
        limit = self._clip_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(list(self.named.values()), limit))


def build_engine(
    model: nn.Module, named: Mapping[str, nn.Parameter], config: RunConfig, topology: Topology
) -> Engine:
    """Hand the model and its trainable parameters to DeepSpeed. Collective: every rank must call."""
    import deepspeed

    settings = deepspeed_settings(config, topology.world_size)
    model.to(topology.device)
    optimizer = _adamw(list(named.values()), config.training, settings, topology.device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return Engine(engine, named, topology, config.training.clip_norm)


def deepspeed_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of the run with the run file's own keys filled in."""
    training = config.training
    settings = read_deepspeed(config.parallel.deepspeed)
    return settings | {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.global_batch // (training.micro_batch * world_size),
        # NOTE(deepspeed): left out, clipping would silently default to 1.0.
        "gradient_clipping": training.clip_norm if zero_stage(settings) else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def _adamw(
    parameters: list[nn.Parameter],
    training: TrainingSection,
    settings: Mapping[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    offloaded = "offload_optimizer" in settings.get("zero_optimization", {})
    return torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        betas=(training.betas[0], training.betas[1]),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=device.type == "cuda" and not offloaded,
    )
