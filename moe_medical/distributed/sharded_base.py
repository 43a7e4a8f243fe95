"""The frozen base as ZeRO-3 wants it: each rank reads its own part of every parameter from the files.

Decisions: no rank ever holds more of the base than its part and one parameter at a time, and even that one
is memory asked for, not filled; only the rows around the own part are read. Nothing travels between ranks.
The parts are DeepSpeed's own, made by its own code, so that `deepspeed.initialize` takes the model as if
`zero.Init` had built it. `zero.Init` as a context is not used: it would patch torch while the model is
made, broadcast each parameter, and round buffers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moe_medical.base_model import BaseModel
from moe_medical.base_model.load import load_base, load_unread_base
from moe_medical.base_model.stored import StoredTensor
from moe_medical.config.deepspeed import zero_stage
from moe_medical.config.schema import RunConfig
from moe_medical.distributed.engine import deepspeed_settings
from moe_medical.distributed.topology import Topology


def load_base_for_engine(base: BaseModel, config: RunConfig, topology: Topology) -> nn.Module:
    """The frozen base for `build_engine`: under ZeRO-3 this rank's part of it, else all of it.

    Raises:
        DataError: damaged or missing weights, or some that cannot be read in parts.
    """
    settings = deepspeed_settings(config, topology.world_size)
    if zero_stage(settings) < 3:
        return load_base(base, config.model.dtype, config.model.quantization)
    return load_sharded_base(base, config.model.dtype, settings)


def load_sharded_base(base: BaseModel, dtype: str, settings: dict[str, Any]) -> nn.Module:
    """The model that `load_base` makes, of which this rank holds 1 / world size.

    Args:
        base: The located model.
        dtype: "float32" or "bfloat16", of the parameters; buffers are as `load_base` has them.
        settings: The same DeepSpeed settings that `deepspeed.initialize` will get; their offload of
            parameters is obeyed.

    Raises:
        DataError: damaged or missing weights, or some that cannot be read in parts.
    """
    import deepspeed

    unread = load_unread_base(base, dtype)
    # The empty module makes DeepSpeed install its linear function here; it will not do so again for a model
    # that is in parts already, and without it backward would keep every gathered weight.
    partitioner = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
    for name, tensor in unread.stored.items():
        _keep_own_part(unread.model.get_parameter(name), tensor, partitioner)
    return unread.model


@torch.no_grad()
def _keep_own_part(parameter: Any, stored: StoredTensor, partitioner: Any) -> None:
    whole = torch.empty(stored.shape, dtype=parameter.dtype, device=partitioner.local_device)
    parameter.data = whole
    # NOTE(deepspeed): zero.Init does these two steps too, with a broadcast from rank 0 between them.
    partitioner._convert_to_deepspeed_param(parameter)
    start, stop = _own_range(parameter)
    whole.view(-1)[start:stop] = stored.read(start, stop)
    parameter.partition()


def _own_range(parameter: Any) -> tuple[int, int]:
    """Where DeepSpeed cuts: equal parts, of which the last may be short or empty."""
    numel = parameter.ds_numel
    if parameter.ds_zero_param_process_group is not None:
        return 0, numel  # hpZ keeps a second part, of the node's own cut
    part = math.ceil(numel / parameter.ds_zero_partition_world_size)
    start = min(part * parameter.ds_zero_partition_rank, numel)
    return start, min(start + part, numel)
