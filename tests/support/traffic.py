"""How many bytes the collectives of a block of code really send, ours and DeepSpeed's alike.

Decisions: counted where torch hands a collective to its process group, so that calls through
`deepspeed.comm`, `torch.distributed` and autograd's backward all count, at the size of the group that they
are made on. Bytes are what one rank *sends* under ring algorithms (Thakur, Rabenseifner, Gropp: Optimization
of Collective Communication Operations in MPICH, 2005), with n the bytes of the whole result and W the ranks:

    all-reduce                                    2 (W-1)/W n
    all-gather, reduce-scatter, reduce, broadcast   (W-1)/W n
    all-to-all                                    what is addressed to other ranks

A rank that only receives counts as much as one that only sends: averaged over the ranks of the group, the sum
is right. `moe_medical.planning.cost` predicts in the same convention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Bytes = Callable[[Sequence[Any], dist.ProcessGroup], float]


class CollectiveBytes(TorchDispatchMode):
    """Context manager that counts what this rank sends while it is active.

        with CollectiveBytes() as traffic:
            engine.backward(loss, last=True)
        traffic.total

    It makes every torch operation pass through Python, so time nothing inside it; compiled code runs eagerly.

    Attributes:
        sent: bytes by kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce,
            point_to_point.
        calls: collectives by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return float(sum(self.sent.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"bytes of {name} are not known")
        kind, sent = _COLLECTIVES[name]
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        self.sent[kind] += sent(args, dist.ProcessGroup.unbox(group))
        self.calls[kind] += 1


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(item) for item in value)


def _ring(argument: int, rounds: int = 1) -> Bytes:
    """`rounds` trips around the ring for the tensors of one argument, the whole result."""
    return lambda args, group: rounds * (group.size() - 1) / group.size() * _size(args[argument])


def _all_to_all_single(args: Sequence[Any], group: dist.ProcessGroup) -> float:
    sent = args[1]
    splits = args[4]
    if not splits:
        return (group.size() - 1) / group.size() * _size(sent)
    kept = splits[group.rank()] / max(sum(splits), 1)
    return (1 - kept) * _size(sent)


def _to_others(argument: int, root: int | None = None) -> Bytes:
    """One tensor per rank, all but the own one sent; by the root alone where there is one."""

    def sent(args: Sequence[Any], group: dist.ProcessGroup) -> float:
        tensors = _per_rank(args[argument])
        if root is not None and args[root] != group.rank():
            return 0.0
        return sum(_size(t) for rank, t in enumerate(tensors) if rank != group.rank())

    return sent


def _per_rank(tensors: Sequence[Any]) -> Iterable[torch.Tensor]:
    return tensors[0] if tensors and not isinstance(tensors[0], torch.Tensor) else tensors


def _gathered(args: Sequence[Any], group: dist.ProcessGroup) -> float:
    return 0.0 if args[3] == group.rank() else float(_size(args[1]))


_COLLECTIVES: dict[str, tuple[str, Bytes]] = {
    "c10d::allreduce_": ("all_reduce", _ring(0, rounds=2)),
    "c10d::allreduce_coalesced_": ("all_reduce", _ring(0, rounds=2)),
    "c10d::allgather_": ("all_gather", _ring(0)),
    "c10d::_allgather_base_": ("all_gather", _ring(0)),
    "c10d::allgather_coalesced_": ("all_gather", _ring(0)),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", _ring(0)),
    "c10d::reduce_scatter_": ("reduce_scatter", _ring(1)),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", _ring(1)),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", _ring(1)),
    "c10d::reduce_": ("reduce", _ring(0)),
    "c10d::broadcast_": ("broadcast", _ring(0)),
    "c10d::alltoall_base_": ("all_to_all", _all_to_all_single),
    "c10d::alltoall_": ("all_to_all", _to_others(1)),
    "c10d::scatter_": ("point_to_point", _to_others(1, root=3)),
    "c10d::gather_": ("point_to_point", _gathered),
    "c10d::send": ("point_to_point", lambda args, group: float(_size(args[0]))),
}
_SILENT = {"c10d::barrier", "c10d::monitored_barrier_", "c10d::check_for_nan", "c10d::recv_"}
_SILENT |= {"c10d::recv_any_source_", "_c10d_functional::wait_tensor"}
