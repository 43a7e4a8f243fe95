"""The shipped DeepSpeed JSONs against plain PyTorch, without router losses; and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ranks import on_ranks
from support.reference import Row, Trained
from support.tiny import ROOT, write_tiny_run
from support.training import Layout, apart, reference, start, step, worst, write_zero_settings

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 4
PRESETS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}


def _train_presets(run: str, presets: list[str], micro_batch: int) -> dict[str, list[float]]:
    """By preset: mean loss, then gradient norm, of each step. All presets share one process group."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import launched_ranks, start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    seen = {}
    for preset in presets:
        overrides = [
            f"parallel.deepspeed={ROOT / 'ds_configs' / preset}.json",
            f"parallel.ranks={launched_ranks()}",
            f"training.micro_batch={micro_batch}",
        ]
        config = load_config(run, overrides)
        trainer = Trainer(config, start_distributed(config.parallel))
        steps = [step(trainer, number) for number in range(STEPS)]
        seen[preset] = [value for of_step in steps for value in of_step.values()]
    stop_distributed()
    return seen


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("engine"), adapters=ADAPTERS)


@pytest.fixture(scope="module")
def plain(run_file: Path) -> Trained:
    return reference(str(run_file), STEPS)


@pytest.fixture(scope="module")
def expected(plain: Trained) -> list[float]:
    return [value for of_step in zip(plain.loss, plain.norm, strict=True) for value in of_step]


def test_every_shipped_json_equals_plain_pytorch(
    run_file: Path, expected: list[float], tmp_path: Path
) -> None:
    by_rank = on_ranks(2, _train_presets, tmp_path, str(run_file), PRESETS, 2)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0] == {preset: pytest.approx(expected, rel=1e-5) for preset in PRESETS}
    assert expected[-2] < expected[0]


def test_many_micro_batches_make_the_same_step(run_file: Path, expected: list[float], tmp_path: Path) -> None:
    losses = on_ranks(1, _train_presets, tmp_path, str(run_file), ["zero2"], 1)[0]["zero2"]
    assert losses == pytest.approx(expected, rel=1e-5)


# Balance over a micro-batch

BALANCED = ADAPTERS | {"balance_coefficient": 0.5}
LAYOUT = Layout(zero=2, ep_size=2, exchange="tokens", accumulation=2)


def _train_balanced(run: str) -> list[list[float]]:
    """Balance loss and gradient norm of each step."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    settings = ["training.balance_over=micro_batch"]
    topology = start_distributed(LAYOUT.configured(run, 2).parallel)
    trainer = start(LAYOUT, run, topology, settings)
    steps = [step(trainer, number) for number in range(STEPS)]
    stop_distributed()
    return [[of_step["balance"], of_step["norm"]] for of_step in steps]


def _by_micro_batch(rows: Sequence[Row]) -> list[Row]:
    """Rows as two ranks have them in two micro-batches each: the four longest at once, then the others."""
    long_to_short = sorted(rows, key=lambda row: -len(row.tokens))
    return [replace(row, group=i // 4) for i, row in enumerate(long_to_short)]


def test_balance_may_be_taken_over_the_micro_batches_of_all_ranks(tmp_path: Path) -> None:
    run = str(write_tiny_run(tmp_path, adapters=BALANCED, training={"epsilon": 1e-4}))
    write_zero_settings(tmp_path)
    plain, whole = reference(run, STEPS, _by_micro_batch), reference(run, STEPS)
    for seen in on_ranks(2, _train_balanced, tmp_path, run):
        for values, *expected in zip(seen, plain.balance, plain.norm, strict=True):
            assert values == pytest.approx(expected, rel=1e-5)
    assert plain.balance != pytest.approx(whole.balance, rel=1e-3)


# bfloat16: another computation than fp32, so layouts are compared with each other

SPREAD = ["tokens", "weights"]


def _train_bfloat16(run: str) -> dict[str, Any]:
    """By ZeRO stage and exchange: values of each step, how far they are from ep_size 1, and the dtypes."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(Layout().configured(run, 2).parallel)
    seen: dict[str, Any] = {}
    for zero in (0, 2, 3):
        replicated = None
        for exchange in ("replicated", *SPREAD):
            ep_size, name = (1, "auto") if exchange == "replicated" else (2, exchange)
            layout = Layout(zero=zero, ep_size=ep_size, exchange=name)
            values, tensors, dtypes = _trained(layout, run, topology)
            replicated = replicated or (values, tensors)
            apart_by = max(abs(a / b - 1) for a, b in zip(values, replicated[0], strict=True))
            tensor = worst(apart(tensors, replicated[1]))[1]
            seen[f"zero{zero} {exchange}"] = {
                "losses": values,
                "apart": [apart_by, tensor],
                "dtypes": dtypes,
            }
    stop_distributed()
    return seen


def _trained(
    layout: Layout, run: str, topology: Any
) -> tuple[list[float], dict[str, Tensor], list[list[str]]]:
    """Values of all steps, parameters after them, dtypes of the base and of what is trained."""
    from moe_medical.distributed.state import gather_parameters

    trainer = start(layout, run, topology, ["model.dtype=bfloat16"])
    values = [value for number in range(STEPS) for value in step(trainer, number).values()]
    trained = {str(p.dtype) for p in trainer.engine.named.values()}
    base = {str(p.dtype) for p in trainer.engine.module.parameters() if not p.requires_grad}
    return values, gather_parameters(trainer.engine), [sorted(base), sorted(trained)]


@pytest.fixture(scope="module")
def in_bfloat16(run_file: Path) -> list[dict[str, Any]]:
    write_zero_settings(run_file.parent)
    return on_ranks(2, _train_bfloat16, run_file.parent, str(run_file))


def test_a_bfloat16_base_trains_alike_at_every_stage(
    in_bfloat16: list[dict[str, Any]], expected: list[float]
) -> None:
    """See docs/one_batch.md on how ZeRO-3 comes to round alike."""
    losses = {name: seen["losses"] for name, seen in in_bfloat16[0].items()}
    zero0 = losses["zero0 replicated"]
    assert losses["zero2 replicated"] == pytest.approx(zero0, rel=1e-6)
    assert losses["zero3 replicated"] == pytest.approx(zero0, rel=1e-6)
    assert zero0 == pytest.approx(expected, rel=3e-2)
    assert zero0 != pytest.approx(expected, rel=1e-5)


def test_experts_of_a_bfloat16_base_may_be_spread(in_bfloat16: list[dict[str, Any]]) -> None:
    """Weights are rounded to bfloat16 as without exchange; deltas that travel are rounded on the way."""
    for of_rank in in_bfloat16:
        for zero in (0, 2, 3):
            assert of_rank[f"zero{zero} weights"]["apart"] == pytest.approx([0.0, 0.0], abs=1e-6)
            assert 0 < of_rank[f"zero{zero} tokens"]["apart"][0] < 1e-2


def test_adapters_and_routers_of_a_bfloat16_base_stay_float32(in_bfloat16: list[dict[str, Any]]) -> None:
    for of_rank in in_bfloat16:
        assert {str(seen["dtypes"]) for seen in of_rank.values()} == {
            str([["torch.bfloat16"], ["torch.float32"]])
        }
