"""One table of names: models that call their layers otherwise are planned like their twins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny import write_tiny_run

from moe_medical.base_model.known_shapes import known_shape
from moe_medical.config import MoloraConfig, load_config
from moe_medical.config.layer_names import CLOSING, RUN_ORDER, SHARED_INPUT
from moe_medical.errors import ConfigError
from moe_medical.planning.adapted_model import AdaptedModel, Workload
from moe_medical.planning.cost import estimate
from moe_medical.planning.layouts import Layout
from moe_medical.planning.plan import make_plan

WORK = Workload("bfloat16", micro_batch=2, tokens=100, positions=128)
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "o_proj": "wo"}


def test_activations_do_not_depend_on_what_layers_are_called() -> None:
    """`w2` and `wo` close FFN and attention as `down_proj` and `o_proj` do."""
    llama = known_shape("tiny")
    renamed = {
        f"{n.rpartition('.')[0]}.{NAMES.get(n.rpartition('.')[2], n.rpartition('.')[2])}": s
        for n, s in llama.linears.items()
    }
    adapters = MoloraConfig(molora=(r".*\.(gate_proj|w1)",), lora=())
    found = [
        estimate(AdaptedModel.of(replace(llama, linears=linears), adapters), Layout(1, 1), WORK).memory
        for linears in (llama.linears, renamed)
    ]
    assert found[0] == found[1]


def test_what_closes_runs_after_what_opens_whatever_its_name() -> None:
    for siblings in SHARED_INPUT[2:]:  # those of an FFN
        for last in ("down_proj", "w2", "wo"):
            assert all(RUN_ORDER.index(name) < RUN_ORDER.index(last) for name in siblings)
    assert {name.rpartition(".")[2] for name in RUN_ORDER} >= CLOSING


def test_plan_refuses_what_launch_refuses(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path)
    config = load_config(run, ["data.max_length=4000"])
    with pytest.raises(ConfigError, match=r"data\.max_length plus evaluation\.max_new_tokens"):
        make_plan(config)
