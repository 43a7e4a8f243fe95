"""Layouts that cannot be right are refused with the reason; those that were seen to be right are not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny import ROOT

from moe_medical.config import load_config
from moe_medical.config.deepspeed import OFFLOAD_KEYS, ZERO_COUNTS, ZERO_FLAGS
from moe_medical.errors import ConfigError

CPU = {"device": "cpu"}
TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}


def _problems(folder: Path, settings: dict[str, Any], *overrides: str) -> list[str]:
    """What is wrong with a run of 4 ranks and 8 experts that uses this JSON, without the JSON's path."""
    (folder / "mixture.yaml").write_text("name: any\n")
    path = folder / "zero.json"
    path.write_text(json.dumps(settings))
    run = folder / "run.yaml"
    run.write_text("data: {recipe: mixture.yaml}\nparallel: {deepspeed: zero.json, ranks: 4}\n")
    try:
        load_config(run, overrides)
    except ConfigError as e:
        return [str(problem).removeprefix(f"{path}: ") for problem in e.problems]
    return []


def _zero(stage: int, **keys: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["parallel.ep_size=2"], []),
        (["parallel.ep_size=4"], []),
        (
            ["parallel.ep_size=8"],
            ["parallel.ep_size must divide parallel.ranks (4), got 8. Try 4."],
        ),
        (
            ["parallel.ep_size=3"],
            [
                "parallel.ep_size must divide adapters.num_experts (8), got 3. Try 4.",
                "parallel.ep_size must divide parallel.ranks (4), got 3. Try 4.",
            ],
        ),
        (
            ["parallel.ep_size=4", "adapters.num_experts=6"],
            ["parallel.ep_size must divide adapters.num_experts (6), got 4. Try 2."],
        ),
        (
            ["parallel.ep_size=2", "adapters.num_experts=3"],
            ["parallel.ep_size must divide adapters.num_experts (3), got 2. Try 1."],
        ),
        (
            ["parallel.ep_size=2", "adapters.molora=[]"],
            ["parallel.ep_size must be 1: no layer has several experts, got 2."],
        ),
        (
            ["parallel.ep_size=2", "adapters.preset=lora"],
            ["parallel.ep_size must be 1: no layer has several experts, got 2."],
        ),
        (["parallel.ep_size=0"], ["parallel.ep_size must be at least 1, got 0."]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_experts_that_can_be_spread(overrides: Sequence[str], wanted: list[str], tmp_path: Path) -> None:
    assert _problems(tmp_path, _zero(2), *overrides) == wanted


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    # settings, ep_size, the problem
    (_zero(1, contiguous_gradients=False), 2, "contiguous_gradients must be true at ZeRO-1 and 2 beside"),
    (_zero(2, contiguous_gradients=False), 2, "contiguous_gradients must be true at ZeRO-1 and 2 beside"),
    (_zero(1, reduce_scatter=False), 2, "reduce_scatter must be true at ZeRO-1 and 2 beside ep_size > 1"),
    (_zero(2, reduce_scatter=False), 4, "reduce_scatter must be true at ZeRO-1 and 2 beside ep_size > 1"),
    (_zero(1, round_robin_gradients=True), 1, "round_robin_gradients must be false at ZeRO-1 and 2: tensors"),
    (_zero(2, round_robin_gradients=True), 2, "round_robin_gradients must be false at ZeRO-1 and 2: tensors"),
    (_zero(2) | {"prescale_gradients": True}, 1, "prescale_gradients must be false: ZeRO-2 and 3 refuse it"),
    (_zero(3) | {"gradient_predivide_factor": 2}, 1, "gradient_predivide_factor must be 1: ZeRO-2 and 3"),
    (_zero(0) | {"gradient_predivide_factor": 0}, 1, "gradient_predivide_factor must be a number > 0, got 0"),
    (_zero(1) | {"communication_data_type": "bf16"}, 1, "communication_data_type is owned by the run file's"),
    (_zero(1) | {"data_types": {"grad_accum_dtype": "bf16"}}, 1, "data_types is owned by the run file's mod"),
    (
        _zero(1) | {"compile": {"deepcompile": True}},
        1,
        "compile is owned by the run file's training.compile.",
    ),
    (
        _zero(2) | {"activation_checkpointing": {}},
        1,
        "activation_checkpointing is owned by the run file's tr",
    ),
    (_zero(3) | {"aio": {}}, 1, "aio is not a DeepSpeed key for use beside a run file"),
    (
        _zero(0, offload_optimizer=CPU) | TORCH_ADAM,
        1,
        "offload_optimizer is ignored at ZeRO-0. Use stage 1 or",
    ),
    (_zero(2, offload_param=CPU), 1, "offload_param is ignored at ZeRO-2. Use stage 3 or remove it."),
    (
        _zero(2, offload_optimizer=CPU),
        1,
        "zero_force_ds_cpu_optimizer must be false beside offload_optimizer",
    ),
    (_zero(3, offload_param={"device": "nvme"}), 1, "offload_param.device must be cpu or none: NVMe is not"),
    (_zero(3, offload_param={"pin": True}), 1, "offload_param.pin is not a key of offload_param"),
    (
        _zero(3, offload_optimizer={**CPU, "ratio": 0.5}) | TORCH_ADAM,
        1,
        "offload_optimizer.ratio must be 1: less needs DeepSpeed's own CPU Adam, got 0.5.",
    ),
    (
        _zero(3, offload_optimizer={**CPU, "super_offload": True}) | TORCH_ADAM,
        1,
        "offload_optimizer.super_offload must be false: it needs DeepSpeed's own CPU Adam, got True.",
    ),
    (_zero(2, cpu_offload=True), 1, "cpu_offload is outdated, got True. Use offload_optimizer."),
    (_zero(1, legacy_stage1=True), 1, "legacy_stage1 must be false: DeepSpeed has dropped it"),
    (_zero(2, zenflow={}), 1, "zenflow is not supported"),
    (_zero(3, leaf_module={"names": ["mlp"]}), 1, "leaf_module is not supported: ZeRO-3 then fails in backw"),
    (_zero(3, stage3_module_granularity_threshold=9), 1, "stage3_module_granularity_threshold must be 0: Ze"),
    (_zero(2, compute_grad_norm=False), 1, "compute_grad_norm must be true: every step logs the norm"),
    (_zero(3, zero_hpz_partition_size=2), 2, "zero_hpz_partition_size must be 1 beside ep_size > 1: the exp"),
    (_zero(2, zero_hpz_partition_size=2), 1, "zero_hpz_partition_size needs ZeRO-3 and is ignored without"),
    (
        _zero(3, zero_hpz_partition_size=3),
        1,
        "zero_hpz_partition_size must divide the number of ranks, got 3",
    ),
    (
        _zero(3, zero_quantized_weights=True),
        1,
        "zero_quantized_weights must be false: it rounds what travels",
    ),
    (
        _zero(3, zero_quantized_gradients=True),
        2,
        "zero_quantized_gradients must be false: it rounds what tra",
    ),
    (_zero(2, allgather_bucket_size=1001), 1, "allgather_bucket_size must be even, got 1001."),
    (_zero(2, reduce_bucket_size=0), 1, "reduce_bucket_size must be at least 1, got 0."),
    (
        _zero(2, reduce_bucket_size=1.5),
        1,
        "reduce_bucket_size must be a whole number, not negative, got 1.5.",
    ),
    (
        _zero(2, reduce_bucket_size="auto"),
        1,
        "reduce_bucket_size must be a whole number, not negative, got '",
    ),
    (_zero(2, overlap_comm="true"), 1, "overlap_comm must be true or false, got 'true'."),
    (_zero(True), 1, "stage must be 0, 1, 2 or 3, got True."),
]


@pytest.mark.parametrize(("settings", "ep_size", "wanted"), REFUSED)
def test_a_json_that_cannot_be_right_is_refused(
    settings: dict[str, Any], ep_size: int, wanted: str, tmp_path: Path
) -> None:
    (found,) = _problems(tmp_path, settings, f"parallel.ep_size={ep_size}")
    assert found.removeprefix("zero_optimization.").startswith(wanted)


ACCEPTED: list[tuple[dict[str, Any], int]] = [
    # Each was seen to give the numbers of the single-process reference.
    *((_zero(stage), ep_size) for stage in (0, 1, 2, 3) for ep_size in (1, 2)),
    (_zero(1, contiguous_gradients=False, reduce_scatter=False), 1),
    (_zero(2, contiguous_gradients=False, reduce_scatter=False), 1),
    (_zero(3, contiguous_gradients=False, reduce_scatter=False, round_robin_gradients=True), 2),
    (_zero(0) | {"prescale_gradients": True, "gradient_predivide_factor": 2.0}, 2),
    (_zero(1) | {"prescale_gradients": True, "gradient_predivide_factor": 2.0}, 2),
    (_zero(2, overlap_comm=True, reduce_bucket_size=5e8, allgather_bucket_size=1000), 2),
    (
        _zero(2, allgather_partitions=False, use_multi_rank_bucket_allreduce=False, parameter_alignment=True),
        2,
    ),
    (_zero(2, offload_optimizer=CPU, overlap_comm=True) | TORCH_ADAM, 2),
    (_zero(3, offload_optimizer=CPU, offload_param=CPU, sub_group_size=1000) | TORCH_ADAM, 2),
    (_zero(2, offload_optimizer={"device": "none"}), 1),
    (_zero(3, zero_hpz_partition_size=2), 1),
    (_zero(3, stage3_param_persistence_threshold=0, max_live_parameters=0, prefetch_bucket_size=0), 2),
    (_zero(3, use_all_reduce_for_fetch_params=True, allgather_sequential=True), 2),
    (_zero(2) | {"comms_logger": {"enabled": True}, "disable_python_gc": True}, 1),
]


@pytest.mark.parametrize(("settings", "ep_size"), ACCEPTED)
def test_what_was_seen_to_be_right_is_accepted(
    settings: dict[str, Any], ep_size: int, tmp_path: Path
) -> None:
    assert _problems(tmp_path, settings, f"parallel.ep_size={ep_size}") == []


def test_every_problem_of_the_layout_is_told_at_once(tmp_path: Path) -> None:
    settings = _zero(2, reduce_scatter=False, offload_param=CPU, offload_optimizer=CPU, zenflow={})
    found = _problems(tmp_path, settings | {"prescale_gradients": True}, "parallel.ep_size=8")
    assert [re.split(r"[ :]", line.removeprefix("zero_optimization."))[0] for line in found] == [
        "prescale_gradients",
        "zenflow",
        "reduce_scatter",
        "offload_param",
        "zero_force_ds_cpu_optimizer",
        "parallel.ep_size",
    ]


def test_the_kinds_of_zero_keys_are_those_of_deepspeed() -> None:
    from typing import get_args

    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = DeepSpeedZeroConfig.model_fields.items()
    for kind, wanted in ((bool, ZERO_FLAGS), (int, ZERO_COUNTS)):
        of_kind = {(n, f.alias) for n, f in fields if kind in (f.annotation, *get_args(f.annotation))}
        assert {name for names in of_kind for name in names if name} == wanted
    assert DeepSpeedZeroOffloadOptimizerConfig.model_fields.keys() == OFFLOAD_KEYS["offload_optimizer"]
    assert DeepSpeedZeroOffloadParamConfig.model_fields.keys() == OFFLOAD_KEYS["offload_param"]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_json_goes_with_expert_parallelism(path: Path) -> None:
    run = ROOT / "launch" / "runs" / "quickstart_expert_parallel.yaml"
    config = load_config(run, [f"parallel.deepspeed={path}"])
    assert config.parallel.ep_size == config.parallel.ranks == 2


def test_the_readme_explains_every_key_of_the_shipped_jsons() -> None:
    folder = ROOT / "ds_configs"
    text = (folder / "README.md").read_text()
    for path in folder.glob("*.json"):
        assert f"`{path.name}`" in text
        for key in _keys(json.loads(path.read_text())):
            assert f"`{key}`" in text, f"{path.name}: {key}"


def _keys(tree: dict[str, Any]) -> set[str]:
    inner = [_keys(value) for value in tree.values() if isinstance(value, dict)]
    return set(tree).union(*inner)
