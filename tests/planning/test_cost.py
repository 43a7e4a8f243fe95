"""The cost model: its formulas by hand, and its bytes and sizes against what engines really send and hold."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import ROOT, write_tiny_run
from transformers import LlamaConfig, LlamaForCausalLM

from moe_medical.adapters.model import attach_adapters
from moe_medical.adapters.routing import BatchInputs
from moe_medical.base_model import locate_base
from moe_medical.base_model.known_shapes import known_shape, llama_shape, shape_of
from moe_medical.config import MoloraConfig, load_config
from moe_medical.planning.adapted_model import AdaptedModel, RoutedGroup, Workload, reach
from moe_medical.planning.cost import Estimate, choose_exchange, estimate, recommend
from moe_medical.planning.layouts import Layout, RankGroups, ZeroSettings, neighbours
from moe_medical.planning.memory import memory_of

if TYPE_CHECKING:
    from moe_medical.training.trainer import Trainer

EVERYWHERE = (r".*_proj",)
GIB = 2**30

# By hand


def test_reach_is_the_share_of_choices_that_touch_a_rank() -> None:
    """Counted over all pairs of choices of two layers: 6 experts, 2 of them on the rank, top-k 3."""
    choices = list(itertools.combinations(range(6), 3))
    touches = [bool({0, 1} & set(choice)) for choice in choices]
    assert reach(6, 3, 3) == pytest.approx(sum(touches) / len(touches))
    either = [a or b for a, b in itertools.product(touches, repeat=2)]
    assert reach(6, 3, 3, members=2) == pytest.approx(sum(either) / len(either))


def test_rings_and_pairs_across_nodes() -> None:
    world = Layout(8, 4, ep_size=2)
    assert world.everyone == RankGroups(8, 2 / 8, 4 / 7)  # 3 -> 4 and 7 -> 0 leave a node
    assert world.peers == RankGroups(2, 0.0, 0.0)
    assert world.replicas == RankGroups(4, 2 / 4, 2 / 3)  # 0 2 | 4 6
    assert Layout(8, 4, ep_size=4).replicas == RankGroups(2, 1.0, 1.0)
    assert Layout(8, 8).everyone == RankGroups(8, 0.0, 0.0)
    assert Layout(1, 1).everyone == RankGroups(1, 0.0, 0.0)


MODEL = AdaptedModel.of(known_shape("tiny"), MoloraConfig(num_experts=4, top_k=2, rank=8))
"""Two blocks; LoRA of q, o (64 -> 64), k, v (64 -> 32); experts of gate, up (64 -> 160), down (160 -> 64)."""
SHARED = 2 * (2 * 8 * 128 + 2 * 8 * 96 + 2 * 4 * 65 + 4 * 161)
EXPERTS = 2 * 3 * 4 * 8 * 224
WORK = Workload("bfloat16", micro_batch=2, tokens=100, positions=128, accumulation=3)


def _sent(e: Estimate) -> dict[str, float]:
    return {t.purpose: t.sent for t in e.traffic if t.purpose != "token counts"}


def test_parameters_by_owner() -> None:
    assert (MODEL.shared_parameters, MODEL.expert_parameters) == (SHARED, EXPERTS)
    assert sum(MODEL.layer_parameters(name) for name in MODEL.kinds) == SHARED + EXPERTS


@pytest.mark.parametrize(("stage", "gradients", "after"), [(0, 2, 0), (1, 2, 1), (2, 3 * 2, 1)])
def test_replicated_experts_by_stage(stage: int, gradients: int, after: int) -> None:
    """Trips around the ring of 8 ranks; ZeRO-2 reduces each of the three micro-batches."""
    sent = _sent(estimate(MODEL, Layout(8, 8, ZeroSettings(stage)), WORK))
    expected = {"expert gradients": gradients * EXPERTS, "shared gradients": gradients * SHARED}
    if after:
        expected |= {
            f"{n} parameters after the step": k for n, k in (("expert", EXPERTS), ("shared", SHARED))
        }
    assert sent == pytest.approx({name: 7 / 8 * 4 * numbers for name, numbers in expected.items()})


def test_reducing_to_the_owner_sends_half() -> None:
    layout = Layout(8, 8, ZeroSettings(2, multi_rank_buckets=False))
    assert _sent(estimate(MODEL, layout, WORK))["shared gradients"] == pytest.approx(7 / 8 * 3 * 4 * SHARED)


def test_weights_are_gathered_once_for_each_pass() -> None:
    layout = Layout(8, 4, ep_size=4, exchange="weights")

    def trips(**work: Any) -> float:
        return _sent(estimate(MODEL, layout, replace(WORK, **work)))["expert weights"] / (
            3 / 4 * 3 * 2 * EXPERTS
        )

    assert trips() == pytest.approx(2)
    assert trips(checkpointing="non_reentrant") == pytest.approx(3)
    assert trips(looks_ahead=True) == pytest.approx(3)
    layout = replace(layout, keep_gathered=True)
    assert trips() == pytest.approx(1)
    sent = _sent(estimate(MODEL, layout, WORK))
    assert sent["expert gradients to their owner"] == pytest.approx(3 / 4 * 3 * 4 * EXPERTS)
    assert sent["expert gradients"] == pytest.approx(2 * 1 / 2 * 4 * EXPERTS / 4)  # between two replicas


def test_tokens_travel_once_to_each_rank() -> None:
    """Two ranks; a token reaches the other one with 5/6, and with 35/36 for gate or up."""
    sent = _sent(estimate(MODEL, Layout(2, 2, ep_size=2, exchange="tokens"), WORK))
    both, one = 100 * 35 / 36, 100 * 5 / 6
    passes = 2 * 3  # forward and backward of three micro-batches
    gates = passes * 2 * 4 * (both * 2 + one * 1)  # experts of the rank, float32
    counts = 3 * 8 * (3 + 2)
    inputs = passes * 2 * (both * 64 + one * 160)  # numbers of two bytes
    assert sent["tokens to experts"] == pytest.approx(2 * (gates + counts + inputs))
    assert sent["deltas to tokens"] == pytest.approx(2 * passes * 2 * one * (160 + 160 + 64))


def test_the_first_layers_input_needs_no_gradient() -> None:
    everywhere = AdaptedModel.of(known_shape("tiny"), MoloraConfig(num_experts=4, molora=EVERYWHERE, lora=()))
    qkv = RoutedGroup(64, (64, 32, 32), input_needs_grad=False)
    groups = everywhere.routed_groups(WORK)
    assert (groups[qkv], groups[replace(qkv, input_needs_grad=True)]) == (1, 1)
    assert everywhere.routed_groups(replace(WORK, checkpointing="reentrant"))[qkv] == 0
    assert all(group.input_needs_grad for group in MODEL.routed_groups(WORK))  # q, k, v have adapters before
    first = MoloraConfig(num_experts=4, rank=8, molora=(r".*\.0\..*q_proj",), lora=())
    layout = Layout(2, 2, ep_size=2, exchange="tokens")
    sent = _sent(estimate(AdaptedModel.of(known_shape("tiny"), first), layout, WORK))["tokens to experts"]
    rows = 3 * 100 * 5 / 6
    assert sent == pytest.approx(
        rows * (64 * 2 + 2 * 2 * 4) + 3 * 2 * 8
    )  # no gradient of 64 numbers comes back


LLAMA_7B = AdaptedModel.of(
    known_shape("llama-7b"), MoloraConfig(num_experts=16, top_k=2, rank=16, molora=EVERYWHERE, lora=())
)


def test_the_orders_of_magnitude_at_7b() -> None:
    """E 16, r 16, K 2, 8192 tokens a GPU, bfloat16: 2.4 GiB of weights gathered twice against 152 GiB of
    tokens, sent for each layer alone and once for each expert; sharing an input saves a part of that."""
    work = Workload("bfloat16", 8, 8192, 8192)
    layout = Layout(16, 16, ep_size=16)
    weights = _sent(estimate(LLAMA_7B, replace(layout, exchange="weights"), work))["expert weights"]
    assert weights * 16 / 15 == pytest.approx(2.4 * GIB, rel=0.01)
    width = sum(times * group.width for group, times in LLAMA_7B.routed_groups(work).items())
    alone = 8192 * 15 * reach(16, 2, 16) * width * 4  # two bytes, forward and backward
    assert alone * 16 / 15 == pytest.approx(152 * GIB, rel=0.01)
    tokens = _sent(estimate(LLAMA_7B, replace(layout, exchange="tokens"), work))
    assert 0.6 * alone < sum(tokens[name] for name in ("tokens to experts", "deltas to tokens")) < alone


def test_auto_takes_what_sends_less() -> None:
    layout, group = Layout(16, 16, ep_size=16), RoutedGroup(4096, (11008, 11008))
    adapters = LLAMA_7B.adapters
    many = Workload("bfloat16", 8, 8192, 8192)
    assert choose_exchange(group, adapters, layout, many) == "weights"
    assert choose_exchange(group, adapters, layout, replace(many, tokens=100)) == "tokens"
    assert choose_exchange(group, adapters, replace(layout, exchange="tokens"), many) == "tokens"
    mixed = estimate(LLAMA_7B, layout, replace(many, tokens=250)).exchanges
    assert sum(mixed.values()) == 7 * 32


@pytest.mark.parametrize(
    ("losses", "work", "times"),
    [
        ({"balance_coefficient": 0.1}, {}, 3),
        ({"divergence_coefficient": 0.1}, {"looks_ahead": True}, 1),
        ({"z_coefficient": 0.1, "entropy_coefficient": 0.1}, {}, 1),
    ],
)
def test_statistics_of_the_router_losses(losses: dict, work: dict, times: int) -> None:
    """Of each decision and expert two numbers, of each decision two more, and the tokens."""
    for scope, decisions in (("module", 6), ("layer", 2)):
        adapters = replace(MODEL.adapters, router_scope=scope, **losses)
        model = AdaptedModel.of(known_shape("tiny"), adapters)
        sent = _sent(estimate(model, Layout(8, 8), replace(WORK, **work)))["routing counts"]
        assert sent == pytest.approx(2 * 7 / 8 * 4 * times * (decisions * (4 * 2 + 2) + 1))


def test_every_path_is_a_row_of_its_own(tmp_path: Path) -> None:
    settings = ["adapters.selection=sample", "training.router_paths=3", "adapters.entropy_coefficient=0.1"]
    config = load_config(str(write_tiny_run(tmp_path)), settings)
    work = Workload.of(config, config.adapters, accumulation=2, mean_tokens=10, targets=5)
    assert (work.micro_batch, work.tokens, work.positions, work.head_positions) == (6, 60, 6 * 96, 30)
    assert not work.looks_ahead
    localized = replace(config.adapters, localized_coefficient=0.1)
    assert Workload.of(config, localized, accumulation=2, mean_tokens=10).looks_ahead


def test_neighbours_differ_in_one_setting_and_work() -> None:
    start = Layout(8, 8, ZeroSettings(1), ep_size=2)
    near = neighbours(start, num_experts=4)
    assert {str(n) for n in near} == {
        "ZeRO-0, ep 2 auto",
        "ZeRO-2, ep 2 auto",
        "ZeRO-1",
        "ZeRO-1, ep 4 auto",
        "ZeRO-1, ep 2 tokens",
        "ZeRO-1, ep 2 weights",
        "ZeRO-1, ep 2 auto (kept)",
        "ZeRO-1, ep 2 auto, optimizer on host",
    }
    assert all(n.ep_size <= 2 for n in neighbours(start, num_experts=6))
    offloaded = Layout(8, 8, ZeroSettings(1, offload_optimizer=True))
    assert "ZeRO-0" in {str(n) for n in neighbours(offloaded, 4)}  # which has nothing to offload


def test_the_recommendation_fits_and_says_why() -> None:
    adapters = MoloraConfig()
    large = AdaptedModel.of(known_shape("llama-70b"), adapters)
    work = Workload("bfloat16", 1, 512, 512)
    sharded = recommend(large, Layout(64, 8), work, 80 * GIB)
    assert (sharded.fits, sharded.estimate.layout.zero.stage) == (True, 3)
    assert "ZeRO-0 would send fewer, but needs" in sharded.reason
    small = recommend(AdaptedModel.of(known_shape("llama-1b"), adapters), Layout(64, 8), work, 80 * GIB)
    assert (small.estimate.layout.zero.stage, small.estimate.layout.ep_size) == (0, 1)
    assert "no layout sends clearly fewer" in small.reason
    few_tokens = recommend(
        AdaptedModel.of(known_shape("llama-1b"), adapters), Layout(8, 8), replace(work, tokens=8), 80 * GIB
    )
    assert few_tokens.estimate.layout.ep_size == 8  # no gradients of experts, and hardly a token
    hopeless = recommend(large, Layout(2, 2), work, 8 * GIB)
    assert not hopeless.fits
    assert "activation_checkpointing" in hopeless.reason


def test_settings_of_the_json() -> None:
    zero = {
        "stage": 3,
        "stage3_max_reuse_distance": 5,
        "offload_optimizer": {"device": "cpu"},
        "overlap_comm": False,
    }
    read = ZeroSettings.from_json({"zero_optimization": zero})
    assert read == ZeroSettings(3, offload_optimizer=True, max_reuse_distance=5)
    assert ZeroSettings.from_json({}) == ZeroSettings()
    assert not ZeroSettings.from_json(
        {"zero_optimization": {"offload_param": {"device": "none"}}}
    ).offload_parameters


def test_the_model_needs_no_torch() -> None:
    code = "import sys, moe_medical.planning.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Activations, against autograd's own account


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(dtype: str, checkpointing: str, dropout: float) -> None:
    """The growth from 2 to 6 blocks, so that what comes before and after them does not matter."""
    kept = [_kept(blocks, dtype, checkpointing, dropout) for blocks in (2, 6)]
    told = [_activations(blocks, dtype, checkpointing, dropout) for blocks in (2, 6)]
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


ROWS, COLUMNS = 4, 32


def _shape(blocks: int) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }


def _activations(blocks: int, dtype: Any, checkpointing: Any, dropout: float) -> float:
    model = AdaptedModel.of(llama_shape("it", _shape(blocks)), MoloraConfig(rank=4, dropout=dropout))
    work = Workload(dtype, ROWS, ROWS * COLUMNS, ROWS * COLUMNS, checkpointing=checkpointing)
    return memory_of(model, Layout(1, 1), work).activations


def _kept(blocks: int, dtype: str, checkpointing: str, dropout: float) -> float:
    """Bytes of distinct storages that a forward pass keeps for backward or in the routings."""
    model = LlamaForCausalLM(LlamaConfig(**_shape(blocks))).to(getattr(torch, dtype)).train()
    context = attach_adapters(model, MoloraConfig(rank=4, dropout=dropout), seed=0)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[0, -1] = False
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
        context.bind(BatchInputs(mask)),
    ):
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        for tensor in itertools.chain.from_iterable(context.record.routings.values()):
            hold(tensor)
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in weights)


# Real engines

TOLERANCE = 0.05
BALANCED = "adapters.balance_coefficient=0.1"
WHOLE = {"stage3_param_persistence_threshold": 0}
SHORT = {**WHOLE, "stage3_max_reuse_distance": 20_000, "stage3_prefetch_bucket_size": 0}


@dataclass(frozen=True)
class Cell:
    """One layout to measure; two micro-batches a step unless the settings say otherwise."""

    zero: int
    ep: int = 1
    exchange: str = "auto"
    settings: tuple[str, ...] = ()
    json: dict[str, Any] = field(default_factory=dict)
    evaluate: bool = False

    def overrides(self, folder: Path, ranks: int) -> list[str]:
        common = [f"parallel.ranks={ranks}", f"training.micro_batch={8 // ranks}", "data.batching=grouped"]
        parallel = [f"parallel.ep_size={self.ep}", f"parallel.exchange={self.exchange}"]
        return [*common, f"parallel.deepspeed={self._written(folder)}", *parallel, *self.settings]

    def _written(self, folder: Path) -> Path:
        settings = json.loads((ROOT / "ds_configs" / f"zero{self.zero}.json").read_text())
        settings["zero_optimization"] |= self.json
        if "offload_optimizer" in self.json:
            settings["zero_force_ds_cpu_optimizer"] = False
        path = folder / f"zero{self.zero}-{len(list(folder.glob('zero*.json')))}.json"
        path.write_text(json.dumps(settings))
        return path


def _checkpointed(kind: str) -> str:
    return f"training.activation_checkpointing={kind}"


CELLS = {
    2: [
        Cell(0),
        Cell(1, settings=(BALANCED, "training.balance_over=micro_batch")),
        Cell(2, settings=(BALANCED,)),
        Cell(2, json={"use_multi_rank_bucket_allreduce": False, "offload_optimizer": {"device": "cpu"}}),
        Cell(3),
        Cell(3, json=WHOLE),
        Cell(3, json=WHOLE, evaluate=True),
        Cell(3, json=WHOLE, settings=(BALANCED,)),
        Cell(3, json=SHORT, settings=(_checkpointed("non_reentrant"),)),
        Cell(3, json=SHORT, settings=(_checkpointed("reentrant"), "model.dtype=bfloat16")),
        Cell(0, 2, "weights", ("parallel.keep_gathered=true",)),
        Cell(1, 2, "weights", (_checkpointed("non_reentrant"), BALANCED)),
        Cell(2, 2, "tokens"),
        Cell(2, 2, "weights", ("model.dtype=bfloat16",)),
        Cell(3, 2, "tokens", (_checkpointed("non_reentrant"),), WHOLE),
    ],
    4: [
        Cell(2),
        Cell(3, json=WHOLE),
        Cell(1, 2, "weights"),
        Cell(0, 4, "tokens"),
        Cell(3, 2, "weights", (), WHOLE),
    ],
}


def _measure(run: str, cells: list[list[Any]]) -> list[dict[str, Any]]:
    """What this rank sends in a step of each cell once DeepSpeed has settled, and what it holds."""
    from support.traffic import CollectiveBytes
    from support.training import step

    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    seen = []
    for overrides, evaluate in cells:
        config = load_config(run, overrides)
        trainer = Trainer(config, start_distributed(config.parallel))
        if evaluate:
            trainer.evaluator.run(trainer.engine.module, 0, lambda: None)
        for number in range(2):
            step(trainer, number)
        with CollectiveBytes() as traffic:
            step(trainer, 2)
        tokens = [batch.num_tokens for batch in trainer.batches.step(2)]
        seen.append({"sent": dict(traffic.sent), "tokens": sum(tokens) / len(tokens), **_held(trainer)})
    stop_distributed()
    return seen


def _held(trainer: Trainer) -> dict[str, int]:
    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    engine, parameters = trainer.engine, list(trainer.engine.module.parameters())
    held, outer = sum(size(p) for p in parameters), engine.deepspeed.optimizer
    masters: list[torch.Tensor] = []
    if engine.stage == 3:
        held = sum(size(p.ds_tensor) + p.ds_persist * size(p) for p in cast(list[Any], parameters))
        masters = outer.fp32_partitioned_groups_flat
    elif engine.stage:
        masters = outer.single_partition_of_fp32_groups
    optimizer = outer.optimizer if engine.stage else outer
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return {"parameters": held, "optimizer": sum(map(size, [*states, *masters]))}


@pytest.fixture(scope="module", params=CELLS, ids="{} ranks".format)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """(Cell, estimate, mean of the ranks' bytes by kind, a rank's sizes) of each cell."""
    ranks, folder = request.param, tmp_path_factory.mktemp("cost")
    run = write_tiny_run(folder, training={"steps": 6, "global_batch": 16, "learning_rate": 0.01})
    cells = [cell.overrides(folder, ranks) for cell in CELLS[ranks]]
    jobs = [[overrides, cell.evaluate] for overrides, cell in zip(cells, CELLS[ranks], strict=True)]
    by_rank = on_ranks(ranks, _measure, folder, str(run), jobs)
    result = []
    for i, (cell, overrides) in enumerate(zip(CELLS[ranks], cells, strict=True)):
        sent = Counter[str]()
        for rank in by_rank:
            sent.update({kind: n / ranks for kind, n in rank[i]["sent"].items()})
        tokens = sum(rank[i]["tokens"] for rank in by_rank) / ranks
        result.append((cell, _told(run, overrides, cell, ranks, tokens), sent, by_rank[0][i]))
    return result


def _told(run: Path, overrides: list[str], cell: Cell, ranks: int, tokens: float) -> Estimate:
    config = load_config(run, overrides)
    adapters = config.adapters
    model = AdaptedModel.of(shape_of(locate_base(config.model)), adapters)
    training = config.training
    work = Workload.of(
        config,
        adapters,
        accumulation=training.global_batch // (training.micro_batch * ranks),
        mean_tokens=tokens / training.micro_batch,
        num_tasks=2,
    )
    return estimate(model, Layout.of(config, ranks, ranks), replace(work, evaluated=cell.evaluate))


def test_bytes_on_the_wire(measured: list[Any]) -> None:
    """Of each kind, and so in sum. Token routing is assumed uniform, that of the tiny model is not quite."""
    wrong = {}
    for cell, told, sent, _ in measured:
        by_kind = Counter[str]()
        for t in told.traffic:
            by_kind[t.kind] += t.sent
        assert by_kind.keys() == sent.keys(), cell
        wrong |= {
            f"{cell} {kind}": (by_kind[kind], sent[kind])
            for kind in sent
            if abs(by_kind[kind] - sent[kind])
            > max(TOLERANCE * sent[kind], TOLERANCE / 20 * sum(sent.values()))
        }
    assert not wrong


def test_parameters_and_optimizer_states(measured: list[Any]) -> None:
    for cell, told, _, held in measured:
        memory = told.memory
        parameters = memory.base + memory.experts + memory.shared
        assert parameters == pytest.approx(held["parameters"], rel=0.01), cell
        # On the host are two moments, the master copy and a gradient of each number.
        states = 3 / 4 * memory.host if memory.host else memory.optimizer
        assert states == pytest.approx(held["optimizer"], rel=0.01), cell
