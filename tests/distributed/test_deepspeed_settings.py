"""Settings of a DeepSpeed JSON beyond the shipped ones: those that pass the rules give the numbers of plain
PyTorch, and those that are refused as silently wrong still are. tests/config/test_parallel.py has the rules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, reference, step, worst, write_zero_settings

from moe_medical.config import load_config
from moe_medical.errors import ConfigError

STEPS = 4
CPU = {"device": "cpu", "pin_memory": False}
ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}
SMALL = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}

RIGHT: dict[str, tuple[int, dict[str, Any]]] = {
    # ep_size, settings; what is not about ZeRO stands in `top`
    "0": (2, {"stage": 0, "top": {"prescale_gradients": True, "gradient_predivide_factor": 2.0}}),
    "1": (1, {"stage": 1, "contiguous_gradients": False, "reduce_scatter": False}),
    "1 spread": (
        2,
        {"stage": 1, "top": {"prescale_gradients": True, "gradient_predivide_factor": 2.0}, **SMALL},
    ),
    "2": (1, {"stage": 2, "contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": True}),
    "2 spread": (
        2,
        {
            "stage": 2,
            "overlap_comm": True,
            "use_multi_rank_bucket_allreduce": False,
            "allgather_partitions": False,
            "parameter_alignment": True,
            "ignore_unused_parameters": False,
            **SMALL,
        },
    ),
    "3": (1, {"stage": 3, "zero_hpz_partition_size": 2, "use_all_reduce_for_fetch_params": True}),
    "3 spread": (
        2,
        {
            "stage": 3,
            "contiguous_gradients": False,
            "reduce_scatter": False,
            "round_robin_gradients": True,
            "allgather_sequential": True,
            "sub_group_size": 1000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "offload_param": CPU,
            "offload_optimizer": CPU,
            "top": {"zero_force_ds_cpu_optimizer": False},
        },
    ),
}
WRONG: dict[str, tuple[int, dict[str, Any]]] = {
    "read back permuted": (1, {"stage": 2, "round_robin_gradients": True}),
    "experts not summed": (2, {"stage": 1, "contiguous_gradients": False}),
    "halved": (
        1,
        {"stage": 3, "reduce_scatter": False, "top": {"gradient_predivide_factor": 2.0}},
    ),
    "rounded": (1, {"stage": 2, "top": {"communication_data_type": "bf16"}}),
}


def _train_all(run: str, cases: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, list[float]]:
    """How far loss, gradient norm and tensors of each case are from the reference. One process group."""
    from moe_medical.distributed.state import gather_parameters
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    expected = torch.load(Path(run).with_name("reference.pt"))
    topology = start_distributed(Layout().configured(run, 2).parallel)
    seen = {}
    for name, (ep_size, settings) in cases.items():
        path = _write_json(Path(run).with_name(f"{name}-{topology.rank}.json"), settings)
        trainer = _start_unchecked(run, ep_size, path, topology)
        values = [step(trainer, number) for number in range(STEPS)]
        distance = [_largest([v[key] for v in values], expected[key]) for key in ("loss", "norm")]
        tensors = apart(gather_parameters(trainer.engine), expected["tensors"])
        seen[name] = [*distance, worst(tensors)[1]]
    stop_distributed()
    return seen


def _write_json(path: Path, settings: dict[str, Any]) -> Path:
    zero = {key: value for key, value in settings.items() if key != "top"}
    path.write_text(json.dumps({"zero_optimization": zero} | settings.get("top", {})))
    return path


def _start_unchecked(run: str, ep_size: int, path: Path, topology: Any) -> Any:
    """A trainer with a JSON that `validate` has not seen."""
    from moe_medical.training.trainer import Trainer

    config = Layout(ep_size=ep_size, accumulation=2).configured(run, topology.world_size)
    config.parallel.deepspeed = str(path)
    return Trainer(config, topology)


def _largest(values: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(values, expected, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    return write_tiny_run(
        folder, adapters=ADAPTERS, training={"steps": 6, "global_batch": 8, "micro_batch": 2, "epsilon": 1e-4}
    )


@pytest.fixture(scope="module")
def distances(run: Path) -> dict[str, list[float]]:
    write_zero_settings(run.parent)
    plain = reference(str(run), STEPS)
    expected = {"loss": plain.loss, "norm": plain.norm, "tensors": plain.tensors}
    torch.save(expected, run.with_name("reference.pt"))
    return on_ranks(2, _train_all, run.parent, str(run), RIGHT | WRONG)[0]


@pytest.mark.parametrize("name", RIGHT)
def test_what_passes_is_right(name: str, distances: dict[str, list[float]]) -> None:
    assert max(distances[name]) < 1e-5


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_as_wrong_is_wrong(name: str, distances: dict[str, list[float]]) -> None:
    """One that fails here has been mended in DeepSpeed: drop its rule."""
    assert max(distances[name]) > 1e-4


@pytest.mark.parametrize("name", RIGHT | WRONG)
def test_the_rules_know(name: str, run: Path, tmp_path: Path) -> None:
    ep_size, settings = (RIGHT | WRONG)[name]
    path = _write_json(tmp_path / "zero.json", settings)
    overrides = [f"parallel.ep_size={ep_size}", f"parallel.deepspeed={path}"]
    if name in RIGHT:
        load_config(run, overrides)
    else:
        with pytest.raises(ConfigError):
            load_config(run, overrides)
