"""Expert parallelism put into a model: which experts this rank holds and how each layer exchanges.

group = join_expert_group(ep_size)            # process groups
attach_adapters(model, ..., group.shard)      # each rank keeps its own experts only
connect_experts(model, context, group, ...)   # here
build_engine(model, config, topology, group)  # DeepSpeed learns which parameters are experts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from moe_medical.adapters.layer import MoloraLinear
from moe_medical.adapters.model import routed_layers
from moe_medical.adapters.placement import shared_input_groups
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.schema import ParallelSection
from moe_medical.distributed.exchange import GatherAhead, GatheredWeights, SharedDispatch
from moe_medical.distributed.expert_group import ExpertGroup

Chooser = Callable[[Mapping[str, MoloraLinear]], str]
"""Layers that share an input -> `tokens` or `weights`."""


def connect_experts(
    model: nn.Module,
    context: RoutingContext,
    group: ExpertGroup,
    parallel: ParallelSection,
    dtype: torch.dtype,
    stage: int,
    choose: Chooser,
) -> Counter[str]:
    """Give every routed layer its exchange.

    Args:
        model: With adapters attached, each layer holding `group.shard`.
        context: Of the adapters.
        group: Ranks that share the experts.
        parallel: The run file's section.
        dtype: Of the base model; weights and tokens travel in it.
        stage: ZeRO stage.
        choose: Decides where `parallel.exchange` is `auto`.

    Returns:
        Layers by exchange.
    """
    layers = routed_layers(model)
    used = Counter[str]()
    # ZeRO-3 has a layer's weights only while it runs, so they cannot be sent ahead of that.
    ahead = GatherAhead(context) if parallel.overlap and stage < 3 else None
    for names in shared_input_groups(layers):
        members = {name: layers[name] for name in names}
        exchange = choose(members) if parallel.exchange == "auto" else parallel.exchange
        used[exchange] += len(members)
        dispatch = SharedDispatch(members, group, context) if exchange == "tokens" else None
        for layer in members.values():
            layer.token_exchange = dispatch
            if dispatch is None:
                layer.weight_exchange = GatheredWeights(layer, group, dtype, parallel.keep_gathered, ahead)
    return used
