"""The DeepSpeed engine, built from the run file and the DeepSpeed JSON.

The run file owns batch, learning rate, clipping and steps; the JSON owns ZeRO stage, offload and
buckets. The optimizer is torch's AdamW at every stage, so that its state has one form.
Only adapters and routers are handed to the optimizer; the base has no gradients.

Every rank's loss is its share of the *global* loss, so gradients must be summed over ranks and micro-batches;
DeepSpeed averages them, experts too (over all ranks, although only their replicas are added up).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_medical.adapters.model import routed_layers, trainable_parameters
from moe_medical.config.deepspeed import offloads, read_deepspeed, zero_stage
from moe_medical.config.schema import RunConfig, TrainingSection
from moe_medical.distributed.expert_group import ExpertGroup
from moe_medical.distributed.topology import Topology, limit_waiting


@dataclass(frozen=True)
class Trainable:
    """What the optimizer gets."""

    named: dict[str, nn.Parameter]
    """Adapters and routers by name, in a stable order."""
    experts: frozenset[str]
    """Names of those that differ from rank to rank; none without expert parallelism."""

    @classmethod
    def of(cls, model: nn.Module, group: ExpertGroup | None) -> Trainable:
        """Found by type: adapters of the model, experts of its routed layers."""
        layers = routed_layers(model).items() if group else ()
        experts = (f"{prefix}.{name}" for prefix, layer in layers for name in layer.expert_parameters())
        return cls(trainable_parameters(model), frozenset(experts))

    def split(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that all ranks share, and this rank's experts."""
        shared = [p for name, p in self.named.items() if name not in self.experts]
        return shared, [p for name, p in self.named.items() if name in self.experts]


class Engine:
    """A model under DeepSpeed: forward, backward over accumulated micro-batches, one step.

    Attributes:
        named: trainable parameters by name, in a stable order.
        experts: names of those of which this rank holds its experts only.
        group: ranks that share the experts; None where each has them all.
        applied_steps: optimizer steps that have updated something, those before a resume included.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        trainable: Trainable,
        topology: Topology,
        group: ExpertGroup | None,
        clip: float,
    ) -> None:
        self.deepspeed = deepspeed_engine
        self.named = trainable.named
        self.experts = trainable.experts
        self.topology = topology
        self.group = group
        self.stage = int(deepspeed_engine.zero_optimization_stage())
        self._clip_norm = clip
        self.applied_steps = 0

    @property
    def module(self) -> nn.Module:
        """The model itself, for evaluation and generation."""
        return self.deepspeed.module

    @property
    def needs_equal_forwards(self) -> bool:
        """Whether every rank must run the same number of forward passes, since each is collective."""
        return (self.stage == 3 or self.group is not None) and self.topology.world_size > 1

    @property
    def gradient_scale(self) -> float:
        """What a gradient that enters behind the loss must be multiplied by; see `backward`."""
        return float(self.topology.world_size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place. Collective: every rank must call."""
        dist.all_reduce(values)
        return values

    def __call__(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradients of this rank's share of the *global* loss.

        DeepSpeed averages gradients over the ranks; scaling by their number first makes the gradient that of
        the summed shares of all ranks and micro-batches.

        Args:
            loss: Of one micro-batch.
            last: Whether it is the step's last one on this rank, after which gradients are reduced.
        """
        # NOTE(deepspeed): it would count a fixed number of micro-batches; packed steps differ in theirs.
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.topology.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear.

        Where a gradient of any rank is not finite nothing is updated, on any rank and at any ZeRO stage:
        neither parameters nor what the optimizer remembers of them, its number of steps included.

        Returns:
            The global gradient norm before clipping, the same on all ranks; not finite where nothing was
            updated.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_unsharded() if self.stage == 0 else None
        self.deepspeed.step()
        if norm is None:
            # NOTE(deepspeed): ZeRO drops such a step by itself; ZeRO-3 then keeps the norm of the one before.
            norm = float(self.deepspeed.get_global_grad_norm())
            norm = norm if self.deepspeed.was_step_applied() else math.inf
        self.applied_steps += math.isfinite(norm)
        return norm

    def _clip_unsharded(self) -> float:
        # NOTE(deepspeed): ZeRO-0 does not tell the norm, and averages it wrongly over sharded experts.
        norm = float(total := self._unsharded_norm())
        if math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(list(self.named.values()), self._clip_norm or math.inf, total)
        else:
            for parameter in self.named.values():
                parameter.grad = None  # AdamW passes over what has none, and does not count the step
        return norm

    def _unsharded_norm(self) -> torch.Tensor:
        """Norm over the shared parameters and the experts of all peers."""
        grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        norms = [nn.utils.get_total_norm([g for name, g in grads.items() if name not in self.experts])]
        if self.group is not None:
            own = nn.utils.get_total_norm([g for name, g in grads.items() if name in self.experts])
            norms.append(self.group.sum(own.square()).sqrt())
        return torch.stack(norms).norm()


def build_engine(
    model: nn.Module, config: RunConfig, topology: Topology, group: ExpertGroup | None = None
) -> Engine:
    """Hand the model and its trainable parameters to DeepSpeed. Collective: every rank must call.

    Args:
        model: With adapters attached, sharded and connected if there is a `group`.
        config: The run.
        topology: This process among all.
        group: This process among those that share its experts.
    """
    import deepspeed

    settings = deepspeed_settings(config, topology.world_size)
    trainable = Trainable.of(model, group)
    model.to(topology.device)
    shared, experts = trainable.split()
    groups: list[dict[str, Any]] = [{"params": shared}] if shared else []
    if group is not None:  # DeepSpeed looks for these keys
        groups.append({"params": experts, "moe": True, "name": group.name})
        num_experts = config.adapters.num_experts
        group.mark(model, experts, num_experts, zero_stage(settings))
    optimizer = _adamw(groups, config.training, settings, topology.device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    limit_waiting(config.parallel)  # the last groups have just been made
    return Engine(engine, trainable, topology, group, config.training.clip_norm)


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
    groups: list[dict[str, Any]],
    training: TrainingSection,
    settings: Mapping[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    offloaded = offloads(settings, "offload_optimizer")
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.betas[0], training.betas[1]),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=device.type == "cuda" and not offloaded,
    )
