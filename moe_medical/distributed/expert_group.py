"""Ranks that share the experts of a layer, and the ranks that hold the same ones; as DeepSpeed arranges them.

Adjacent ranks form an expert-parallel group, so that with ep_size at most the GPUs of a node the exchange
stays within it. `ExpertGroup` also tells DeepSpeed which parameters are experts: their gradients are summed
over the replicas only. The marks are private hooks of DeepSpeed 0.19.8; tests/distributed is their canary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from moe_medical.adapters.exchange import ExpertShard


@dataclass(frozen=True)
class ExpertGroup:
    """This rank among those that share a layer's experts."""

    name: str
    """What DeepSpeed calls the groups of this size."""
    size: int
    """ep_size."""
    rank: int
    """Position of this rank among its peers."""
    peers: dist.ProcessGroup
    """Ranks that together hold all experts."""
    replicas: dist.ProcessGroup
    """Ranks that hold the same experts as this one."""

    @property
    def shard(self) -> ExpertShard:
        return ExpertShard(self.rank, self.size)

    def whole(self, own: Tensor) -> Tensor:
        """Concatenate the experts of all peers. Collective: every rank must call."""
        whole = own.new_empty(self.size * len(own), *own.shape[1:])
        dist.all_gather_single(whole, own.contiguous(), group=self.peers)
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """This rank's experts of a whole tensor."""
        return whole[self.shard.slice(len(whole))]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the peers, in place. Collective: every rank must call."""
        dist.all_reduce(value, group=self.peers)
        return value

    def mark(self, model: nn.Module, experts: Iterable[nn.Parameter], num_experts: int, stage: int) -> None:
        """Tell DeepSpeed which parameters differ from peer to peer; before its engine is built."""
        for parameter in experts:
            marks = {"allreduce": False, "group_name": self.name}
            if stage == 3:
                marks |= {
                    "ds_zero_placement_family": "autoep_expert",
                    "ds_zero_partition_group_name": self.name,
                    "ds_zero_partition_process_group": self.replicas,
                }
            for key, value in marks.items():
                setattr(parameter, key, value)
        if stage < 3:  # ZeRO-3 refuses DeepSpeed's own MoE class
            model.add_module("expert_parallel_marker", _marker(self, num_experts))


def join_expert_group(ep_size: int) -> ExpertGroup | None:
    """Make the groups; None where every rank holds all experts. Collective: every rank must call."""
    if ep_size == 1:
        return None
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    peers = groups._get_expert_parallel_group(name)
    replicas = groups._get_expert_data_parallel_group(name)
    return ExpertGroup(name, ep_size, dist.get_rank(peers), peers, replicas)


def _marker(group: ExpertGroup, num_experts: int) -> nn.Module:
    """Switches DeepSpeed's handling of expert gradients on, and does nothing else."""
    from deepspeed.moe.layer import MoE

    class ExpertParallelMarker(MoE):
        """The engine looks for an instance of `MoE`; with no local experts it owns no expert files."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts
            self.ep_size = group.size
            self.num_local_experts = 0
            self.expert_group_name = group.name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already."""

    return ExpertParallelMarker()
