"""Both exchanges on real ranks, without DeepSpeed's engine: numbers, what travels, what is kept.

The model is two MLPs in a row with routed experts; the expected values are those of the same model with all
experts on each rank, and the expected traffic is counted from the routing itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_medical.adapters.routing import BatchInputs

if TYPE_CHECKING:
    from moe_medical.adapters.routing import RoutingContext
    from moe_medical.distributed.expert_group import ExpertGroup

D, INNER, EXPERTS, TOP_K, RANK, ROWS, COLUMNS = 8, 12, 4, 2, 2, 3, 7
FLOAT, INT = 4, 8
LAYERS = 6
CHECKPOINTING = ("none", "non_reentrant", "reentrant")


class _Mlp(nn.Module):
    """gate_proj and up_proj share their input; `alias` says how."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, INNER), nn.Linear(D, INNER)
        self.down_proj = nn.Linear(INNER, D)
        self.alias = torch.Tensor.view_as

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(self.alias(x, x))
        return x + self.down_proj(hidden)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": _Mlp()}) for _ in range(2))
        self.checkpointing = "none"
        self.order: tuple[int, ...] = (0, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.layers[i] for i in self.order):
            reentrant = self.checkpointing == "reentrant"
            mlp = block["mlp"]
            x = mlp(x) if self.checkpointing == "none" else checkpoint(mlp, x, use_reentrant=reentrant)
        return x


@dataclass
class _Adapted:
    """A model with adapters."""

    model: _Model
    context: RoutingContext

    def parameters(self) -> dict[str, nn.Parameter]:
        from moe_medical.adapters.model import adapter_parameters

        return adapter_parameters(self.model)

    def run(self, x: Tensor, mask: Tensor, pass_name: str = "train") -> Tensor:
        """Forward and backward of a micro-batch; gradients add up. Returns the output."""
        with self.context.bind(BatchInputs(mask), pass_name=pass_name):
            y = self.model(x)
            (y * mask.unsqueeze(-1)).square().sum().backward()
        return y.detach()


def _adapted(group: ExpertGroup | None = None, **exchange: Any) -> _Adapted:
    """The same numbers on every rank and in every call."""
    from moe_medical.adapters.model import attach_adapters, routed_layers
    from moe_medical.config import MoloraConfig
    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.expert_parallel import connect_experts

    torch.manual_seed(0)
    model = _Model()
    config = MoloraConfig(num_experts=EXPERTS, top_k=TOP_K, rank=RANK, alpha=4, dropout=0.0, lora=())
    context = attach_adapters(model, config, 1, group.shard if group else None)
    for layer in routed_layers(model).values():
        whole = torch.randn(EXPERTS, layer.out_features, RANK) / 4
        layer.lora_B.data.copy_(group.own(whole) if group else whole)
    if group is not None:
        section = ParallelSection(**{"exchange": "auto", **exchange})
        mixed = {1: "weights", 2: "tokens"}  # by how many layers share their input
        connect_experts(model, context, group, section, torch.float32, 2, lambda layers: mixed[len(layers)])
    return _Adapted(model, context)


def _micro_batch(number: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of this rank, which need a gradient, and a mask with padding on the left."""
    import torch.distributed as dist

    torch.manual_seed(100 * number + dist.get_rank())
    x = torch.randn(ROWS, COLUMNS, D, requires_grad=True)
    first = torch.arange(ROWS) + dist.get_rank() % 2
    return x, torch.arange(COLUMNS) >= first.unsqueeze(1)


def _on_each_group(world: int) -> Iterator[tuple[str, ExpertGroup]]:
    """Groups of every size that the world allows; one process group for all."""
    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.expert_group import join_expert_group
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    start_distributed(ParallelSection(device="cpu"))
    for size in range(2, world + 1, 2):
        group = join_expert_group(size)
        assert group is not None
        yield str(size), group
    stop_distributed()


# What a rank does; each returns JSON


def _measure(world: int) -> dict[str, dict[str, Any]]:
    return {
        size: {
            "numbers": {exchange: _numbers(group, exchange) for exchange in ("tokens", "weights", "auto")},
            "tokens": _tokens_travel(group),
            "padding": _padding_stays(group),
            "inputs": _unequal_inputs(group),
            "gathers": _gathers(group),
            "overlap": _overlap(group),
            "freed": {str(keep): _alive(group, keep) for keep in (False, True)},
        }
        for size, group in _on_each_group(world)
    }


def _numbers(group: ExpertGroup, exchange: str) -> dict[str, float]:
    """How far outputs and gradients are from those of the model with all experts on each rank."""
    spread, whole = _adapted(group, exchange=exchange), _adapted()
    apart = {"output": 0.0, "input": 0.0}
    for number in range(3):
        (x, mask), (same_x, _) = _micro_batch(number), _micro_batch(number)
        y, same_y = spread.run(x, mask), whole.run(same_x, mask)
        apart["output"] = max(apart["output"], float((y - same_y)[mask].abs().max()))
        apart["input"] = max(apart["input"], float((x.grad - same_x.grad)[mask].abs().max()))
    expected = whole.parameters()
    for name, parameter in spread.parameters().items():
        gradient = expected[name].grad
        if "router" not in name:  # an expert's gradient is of the tokens of all peers
            gradient = group.own(group.sum(gradient))
        apart[name] = float((parameter.grad - gradient).abs().max() / gradient.abs().max())
    return apart


def _tokens_travel(group: ExpertGroup) -> dict[str, list[float]]:
    """Bytes and calls of the all-to-alls in forward and in backward, measured and expected, of all peers."""
    from support.traffic import CollectiveBytes

    spread = _adapted(group, exchange="tokens")
    x, mask = _micro_batch()
    with spread.context.bind(BatchInputs(mask)):
        with CollectiveBytes() as forward:
            y = spread.model(x)
        expected = group.sum(torch.tensor(_expected_bytes(group, spread.context, mask)))
        with CollectiveBytes() as backward:
            y.sum().backward()
    assert forward.sent.keys() | backward.sent.keys() == {"all_to_all"}
    sent = group.sum(torch.tensor([t.sent["all_to_all"] for t in (forward, backward)]))
    calls = [t.calls["all_to_all"] for t in (forward, backward)]
    return {"measured": sent.tolist(), "expected": expected.tolist(), "calls": calls}


def _expected_bytes(group: ExpertGroup, context: RoutingContext, mask: Tensor) -> list[float]:
    """Bytes because of this rank's tokens, forward and backward: a journey for gate and up, one for down."""
    total = [0.0, 0.0]
    experts = EXPERTS // group.size
    for block in range(2):
        for names, d, f in ((("gate_proj", "up_proj"), D, INNER), (("down_proj",), INNER, D)):
            ids = [context.record.routings[f"layers.{block}.mlp.{name}"].expert_ids_TK for name in names]
            wanted = [
                [(mask.flatten() & (i // experts == peer).any(-1)) for i in ids]
                for peer in range(group.size)
                if peer != group.rank
            ]
            rows = sum(int(torch.stack(of_peer).any(0).sum()) for of_peer in wanted)
            returned = sum(int(of_member.sum()) for of_peer in wanted for of_member in of_peer)
            moved = rows * (d + len(names) * experts) * FLOAT + returned * f * FLOAT
            counts = (group.size - 1) * (1 + len(names)) * INT
            total = [total[0] + moved + counts, total[1] + moved]
    return total


def _padding_stays(group: ExpertGroup) -> dict[str, Any]:
    """Rows received with and without a mask that leaves one token of the first peer."""
    from moe_medical.adapters.model import routed_layers

    received = {}
    for case, real in (("all", slice(None)), ("one", slice(-1, None)), ("none", slice(0, 0))):
        spread = _adapted(group, exchange="tokens")
        layer = routed_layers(spread.model)["layers.0.mlp.gate_proj"]
        x, mask = _micro_batch()
        mask = torch.zeros_like(mask)
        mask[-1, real] = group.rank == 0
        with spread.context.bind(BatchInputs(mask)):
            dispatched = layer.token_exchange.dispatch(layer.name, x)
            sent = layer.context.record.routings[layer.name].expert_ids_TK[mask.flatten()]
            chosen = int((dispatched.gate_Re != 0).sum())
            received[case] = {"rows": len(dispatched.x_RD), "chosen": chosen, "sent": sent.tolist()}
    return received


def _unequal_inputs(group: ExpertGroup) -> dict[str, str]:
    """What is said when up_proj reads another tensor than gate_proj, by how it differs."""
    said = {}
    changes = {"alias": torch.Tensor.view_as, "copy": lambda x, _: x.clone(), "part": lambda x, _: x[:1]}
    for name, change in changes.items():
        spread = _adapted(group, exchange="tokens")
        for block in spread.model.layers:
            block["mlp"].alias = change
        x, mask = _micro_batch()
        try:
            with spread.context.bind(BatchInputs(mask)):
                spread.model(x)
            said[name] = ""
        except RuntimeError as e:
            said[name] = str(e)
    return said


def _counted(adapted: _Adapted) -> list[dict[str, int]]:
    """By micro-batch: how often weights were asked for, were on their way by then, and really gathered."""
    from support.traffic import CollectiveBytes

    from moe_medical.adapters.model import routed_layers
    from moe_medical.distributed.exchange import GatherAhead, GatheredWeights

    class Watched(GatherAhead):
        asked = ready = 0

        def take(self, owner: GatheredWeights) -> Any:
            gathering = super().take(owner)
            self.asked, self.ready = self.asked + 1, self.ready + (gathering is not None)
            return gathering

    ahead = Watched(adapted.context)
    for layer in routed_layers(adapted.model).values():
        assert isinstance(layer.weight_exchange, GatheredWeights)
        assert layer.weight_exchange._ahead is not None
        layer.weight_exchange._ahead = ahead
    seen = []
    repeated = _micro_batch(1)
    for number in range(4):  # a first one, another one, and that again
        x, mask = _micro_batch() if number == 0 else repeated
        ahead.asked = ahead.ready = 0
        with CollectiveBytes() as traffic:
            with torch.no_grad(), adapted.context.bind(BatchInputs(mask), pass_name="count"):
                adapted.model(x)
            adapted.run(x, mask)
        calls = traffic.calls["all_gather"]
        seen.append({"asked": ahead.asked, "ready": ahead.ready, "gathered": calls})
    return seen


def _gathers(group: ExpertGroup) -> dict[str, list[dict[str, int]]]:
    """By kept or not and kind of activation checkpointing, see `_counted`."""
    seen = {}
    for keep in (False, True):
        for kind in CHECKPOINTING:
            adapted = _adapted(group, exchange="weights", keep_gathered=keep)
            adapted.model.checkpointing = kind
            seen[f"{keep} {kind}"] = _counted(adapted)
    return seen


def _overlap(group: ExpertGroup) -> bool:
    """Whether outputs and gradients with and without overlap are the same bits; once the order changes."""
    results = []
    for overlap in (False, True):
        adapted = _adapted(group, exchange="weights", overlap=overlap)
        outputs = []
        for number, order in enumerate([(0, 1), (0, 1), (0, 0, 1), (0, 1)]):
            adapted.model.order = order
            outputs.append(adapted.run(*_micro_batch(number)))
        results.append([*outputs, *(p.grad for p in adapted.parameters().values())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _alive(group: ExpertGroup, keep: bool) -> list[int]:
    """Layers whose gathered weights are alive: after forward, after backward, after one without graph."""
    from moe_medical.adapters.model import routed_layers

    adapted = _adapted(group, exchange="weights", keep_gathered=keep)
    layers = routed_layers(adapted.model).values()
    watches = [_Watch(layer.weight_exchange) for layer in layers]
    for layer, watch in zip(layers, watches, strict=True):
        layer.weight_exchange = watch  # type: ignore[assignment]
    x, mask = _micro_batch()
    with adapted.context.bind(BatchInputs(mask)):
        y = adapted.model(x)
        seen = [sum(watch.alive for watch in watches)]
        y.sum().backward()
        seen.append(sum(watch.alive for watch in watches))
        with torch.no_grad():
            adapted.model(x)
        return [*seen, sum(watch.alive for watch in watches)]


class _Watch:
    """A `WeightExchange` that knows whether what it gathered is still there."""

    def __init__(self, inner: Any) -> None:
        self.keep, self.reduce = inner.keep, inner.reduce
        self._inner = inner
        self._gathered: list[weakref.ref[Tensor]] = []

    def gather(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        gathered: tuple[Tensor, Tensor] = self._inner.gather(lora_A, lora_B)
        self._gathered += map(weakref.ref, gathered)
        return gathered

    @property
    def alive(self) -> bool:
        return any(ref() is not None for ref in self._gathered)


# What it must be


@pytest.fixture(scope="module", params=[2, 4])
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(request.param, _measure, tmp_path_factory.mktemp("exchange"), request.param)


@pytest.fixture(scope="module")
def measured(by_rank: list[dict]) -> list[dict[str, Any]]:
    """Of each rank and each size of the groups."""
    return [of_size for of_rank in by_rank for of_size in of_rank.values()]


def test_numbers_are_those_of_replicated_experts(measured: list[dict[str, Any]]) -> None:
    for of_size in measured:
        for apart in of_size["numbers"].values():
            assert len(apart) == 2 + 4 * LAYERS
            assert apart == {name: pytest.approx(0.0, abs=1e-5) for name in apart}


def test_a_token_travels_once_to_each_rank_and_once_for_gate_and_up(measured: list[dict[str, Any]]) -> None:
    for of_size in measured:
        tokens = of_size["tokens"]
        assert tokens["measured"] == tokens["expected"]
        # Two journeys a block: counts, inputs and gates; and the way back of each layer.
        assert tokens["calls"] == [2 * 2 * 3 + LAYERS, 2 * 2 * 2 + LAYERS]


def test_padding_does_not_travel(by_rank: list[dict]) -> None:
    for size in by_rank[0]:
        for first in range(0, len(by_rank), int(size)):
            peers = [of_rank[size]["padding"] for of_rank in by_rank[first : first + int(size)]]
            for case, tokens in (("all", COLUMNS), ("one", 1), ("none", 0)):
                chosen = torch.tensor(peers[0][case]["sent"]).view(-1, TOP_K)
                assert len(chosen) == tokens
                of_peer = chosen // (EXPERTS // int(size))
                for rank, peer in enumerate(peers):
                    assert peer[case]["rows"] == int((of_peer == rank).any(-1).sum())
                    assert peer[case]["chosen"] == int((of_peer == rank).sum())


def test_layers_that_do_not_share_their_input_are_refused(measured: list[dict[str, Any]]) -> None:
    refused = "layers.0.mlp.up_proj reads another input than its siblings: use exchange=weights"
    for of_size in measured:
        assert of_size["inputs"] == {"alias": "", "copy": refused, "part": refused}


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_gathered_as_often_as_they_are_used(
    keep: bool, kind: str, measured: list[dict[str, Any]]
) -> None:
    passes = 1 + (kind != "none") + (not keep)  # forward, forward again, backward
    asked = LAYERS * (1 + passes)  # and once to count
    first = {"asked": asked, "ready": 0, "gathered": asked}
    later = {"asked": asked, "ready": asked - 2, "gathered": asked}  # the first layer of each pass waits
    for of_size in measured:
        assert of_size["gathers"][f"{keep} {kind}"] == [first, later, later, later]


def test_overlap_changes_no_bit(measured: list[dict[str, Any]]) -> None:
    assert all(of_size["overlap"] for of_size in measured)


def test_gathered_weights_are_freed_unless_kept(measured: list[dict[str, Any]]) -> None:
    for of_size in measured:
        assert of_size["freed"] == {"False": [0, 0, 0], "True": [LAYERS, 0, 0]}
