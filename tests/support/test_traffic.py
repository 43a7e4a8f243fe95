"""CollectiveBytes sees every collective, whoever starts it, and counts what the ring convention says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.ranks import on_ranks

WORLD = 4
KIB = 1024


def _counted() -> dict[str, dict[str, float]]:
    """Bytes by kind of each block of collectives, on a tensor of 1 KiB unless said otherwise."""
    import torch
    import torch.distributed as dist

    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from support.traffic import CollectiveBytes

    rank = start_distributed(ParallelSection(device="cpu")).rank
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, one, four = pairs[rank // 2], torch.ones(256), torch.ones(1024)
    seen = {}

    def count(name: str, collective: Any) -> None:
        with CollectiveBytes() as traffic:
            collective()
        seen[name] = dict(traffic.sent)

    count("all_reduce", lambda: dist.all_reduce(one.clone()))
    count("all_reduce of a pair", lambda: dist.all_reduce(one.clone(), group=pair))
    count("all_reduce, not waited for", lambda: dist.all_reduce(one.clone(), async_op=True).wait())
    count("all_gather", lambda: dist.all_gather_into_tensor(four.clone(), one))
    count("all_gather of a list", lambda: dist.all_gather([one.clone() for _ in range(WORLD)], one))
    count("reduce_scatter", lambda: dist.reduce_scatter_tensor(one.clone(), four.clone()))
    count("broadcast", lambda: dist.broadcast(one.clone(), 0))
    count("reduce", lambda: dist.reduce(one.clone(), 0))
    count("all_to_all", lambda: dist.all_to_all_single(four.clone(), four.clone()))
    count("uneven all_to_all", lambda: _uneven(rank))
    count("nothing to send", lambda: dist.all_to_all_single(four[:0], four[:0], [0] * WORLD, [0] * WORLD))
    count("barrier", dist.barrier)
    count("objects", lambda: dist.broadcast_object_list([None], src=0))
    count("coalesced", lambda: _coalesced(one, four))
    count("deepspeed", lambda: _deepspeed(one))
    count("backward", lambda: _backward(one))
    count("two of a kind", lambda: (dist.all_reduce(one.clone()), dist.all_reduce(one.clone())))
    dist.all_reduce(one.clone())  # outside: not counted anywhere
    stop_distributed()
    return seen


def _uneven(rank: int) -> None:
    """To rank r go r + 1 rows of 4 bytes, from every rank."""
    import torch
    import torch.distributed as dist

    to, back = [1, 2, 3, 4], [rank + 1] * WORLD
    dist.all_to_all_single(torch.empty(sum(back)), torch.ones(sum(to)), back, to)


def _coalesced(one: Any, four: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    with _coalescing_manager(async_ops=True) as both:
        dist.all_reduce(one.clone())
        dist.all_reduce(four.clone())
    both.wait()


def _deepspeed(one: Any) -> None:
    import deepspeed.comm

    deepspeed.comm.all_reduce(one.clone())


def _backward(one: Any) -> None:
    import torch
    import torch.distributed as dist

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            dist.all_reduce(grad := grad.clone())
            return grad

    Sum.apply(one.clone().requires_grad_()).sum().backward()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    folder: Path = tmp_path_factory.mktemp("traffic")
    return on_ranks(WORLD, _counted, folder)


def test_every_rank_counts_what_a_ring_would_send(counted: list[dict[str, dict[str, float]]]) -> None:
    """(W-1)/W of the whole result, twice for an all-reduce."""
    expected = {
        "all_reduce": {"all_reduce": 2 * 3 / 4 * KIB},
        "all_reduce of a pair": {"all_reduce": 2 * 1 / 2 * KIB},
        "all_reduce, not waited for": {"all_reduce": 2 * 3 / 4 * KIB},
        "all_gather": {"all_gather": 3 / 4 * 4 * KIB},
        "all_gather of a list": {"all_gather": 3 / 4 * 4 * KIB},
        "reduce_scatter": {"reduce_scatter": 3 / 4 * 4 * KIB},
        "broadcast": {"broadcast": 3 / 4 * KIB},
        "reduce": {"reduce": 3 / 4 * KIB},
        "all_to_all": {"all_to_all": 3 * KIB},
        "nothing to send": {"all_to_all": 0.0},
        "barrier": {},
        "coalesced": {"all_reduce": 2 * 3 / 4 * 5 * KIB},
        "deepspeed": {"all_reduce": 2 * 3 / 4 * KIB},
        "backward": {"all_reduce": 2 * 3 / 4 * KIB},
        "two of a kind": {"all_reduce": 4 * 3 / 4 * KIB},
    }
    for seen in counted:
        assert {name: seen[name] for name in expected} == expected


def test_rows_that_stay_are_not_sent(counted: list[dict[str, dict[str, float]]]) -> None:
    sent = [seen["uneven all_to_all"]["all_to_all"] for seen in counted]
    assert sent == [4 * (10 - own) for own in (1, 2, 3, 4)]


def test_objects_are_seen_too(counted: list[dict[str, dict[str, float]]]) -> None:
    assert all(seen["objects"]["broadcast"] > 0 for seen in counted)


def test_an_unknown_collective_is_refused() -> None:
    from support.traffic import CollectiveBytes

    with pytest.raises(NotImplementedError, match="bytes of c10d::new_ are not known"):
        CollectiveBytes()._count("c10d::new_", ())
