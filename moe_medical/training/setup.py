"""What a run is made of: the engine with its adapted model, and the callbacks."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_medical.adapters.model import attach_adapters, routed_layers
from moe_medical.adapters.routing import RoutingContext
from moe_medical.adapters.warm_start import start_from
from moe_medical.base_model import BaseModel
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.config.deepspeed import read_deepspeed, zero_stage
from moe_medical.data.batches import Loader
from moe_medical.distributed.engine import Engine, build_engine
from moe_medical.distributed.expert_group import join_expert_group
from moe_medical.distributed.expert_parallel import Chooser, connect_experts
from moe_medical.distributed.sharded_base import load_base_for_engine
from moe_medical.distributed.topology import Topology
from moe_medical.training.callback import Callback
from moe_medical.training.callbacks import guard, mixing, step_log
from moe_medical.training.callbacks.conflict import ConflictProbe, Conflicts
from moe_medical.training.callbacks.divergence import Divergence
from moe_medical.training.callbacks.routing import Routing
from moe_medical.training.callbacks.seesaw import Seesaw
from moe_medical.training.callbacks.task_losses import TaskLosses
from moe_medical.training.data_module import DataModule
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.run_log import RunLog
from moe_medical.training.step import TaskFactors

_LOG = logging.getLogger(__name__)


def assemble(
    config: RunConfig,
    base: BaseModel,
    adapters: MoloraConfig,
    topology: Topology,
    choose_exchange: Chooser,
    began: bool = False,
) -> tuple[Engine, RoutingContext]:
    """Load, adapt and distribute a model. Collective: every rank must call.

    Args:
        config: The run.
        base: Its base model.
        adapters: Its adapter settings.
        topology: This process among all.
        choose_exchange: Decides for layers that share an input where `parallel.exchange` is `auto`.
        began: Whether a checkpoint holds the values of what is trained.
    """
    model = load_base_for_engine(base, config, topology).train()
    group = join_expert_group(config.parallel.ep_size)
    shard = group.shard if group else None
    context = attach_adapters(model, adapters, config.run.seed, shard)
    start_from(model, adapters.lasting() if began else adapters, config.run.seed, shard)
    if group is not None:
        stage = zero_stage(read_deepspeed(config.parallel.deepspeed))
        dtype = getattr(torch, config.model.dtype)
        used = connect_experts(model, context, group, config.parallel, dtype, stage, choose_exchange)
        _LOG.info("experts spread over %d ranks; layers by exchange: %s", group.size, dict(used))
    else:
        where = (topology.device.type, getattr(torch, config.model.dtype))
        paths = Counter(layer.path.on(*where) for layer in routed_layers(model).values())
        if paths:
            _LOG.info("layers by the way their experts are computed: %s", dict(paths))
    _checkpoint_activations(model, config.training.activation_checkpointing)
    if config.training.compile:
        _compile_blocks(model)
    return build_engine(model, config, topology, group), context


def _checkpoint_activations(model: PreTrainedModel, kind: str) -> None:
    if kind != "none":
        model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})


def _compile_blocks(model: PreTrainedModel) -> None:
    """Compile each transformer block in place; blocks of one shape share the compiled code."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)  # rows differ in length


def build_callbacks(
    config: RunConfig,
    data: DataModule,
    adapters: MoloraConfig,
    engine: Engine,
    context: RoutingContext,
    loader: Loader,
    factors: TaskFactors,
    router_losses: RouterLosses,
    log: RunLog,
) -> list[Callback]:
    """All that looks at a run, in the order in which it is called; one that reads another comes after it."""
    topology = engine.topology
    names = [task.name for task in data.tasks]
    losses = TaskLosses(len(names), (step_log.READER, mixing.READER, guard.READER), topology)
    seesaw = Seesaw(config, data.tasks, log)
    callbacks: list[Callback] = [losses, seesaw]
    if config.training.guard.action != "none":
        callbacks.append(guard.Guard(config, data, factors, seesaw, losses, topology, log))
    callbacks.append(mixing.Mixing(config, data, engine, context, losses, log))
    callbacks.append(step_log.StepLog(config, data, loader, topology, losses, router_losses))
    routing = Routing(config, adapters, names, engine, context, log)
    probe = ConflictProbe(config, data.tasks, data.chat, engine, context)
    divergence = Divergence(names, topology, log)
    return [*callbacks, routing, Conflicts(config, probe, routing, log), divergence]
