"""Everything that knows DeepSpeed: process groups, the engine, and access to its sharded state."""

from moe_medical.distributed.engine import Engine, build_engine
from moe_medical.distributed.state import TrainableState, gather_state, load_state
from moe_medical.distributed.topology import (
    Topology,
    naming_lost_peers,
    start_distributed,
    stop_distributed,
)

__all__ = [
    "Engine",
    "Topology",
    "TrainableState",
    "build_engine",
    "gather_state",
    "load_state",
    "naming_lost_peers",
    "start_distributed",
    "stop_distributed",
]
