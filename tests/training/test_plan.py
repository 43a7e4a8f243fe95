"""The plan's numbers, checked by hand on the tiny run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import ROOT, write_tiny_run

from moe_medical.base_model import locate_base
from moe_medical.base_model.shapes import LinearShape
from moe_medical.config import RunConfig, load_config, resolve_adapters
from moe_medical.config.schema import AdaptersSection
from moe_medical.data.formats import ChatFormat
from moe_medical.data.tasks import load_tasks
from moe_medical.training.plan import MemoryPlan, layer_parameters, make_plan, plan_memory, show_plan

TRAINABLE = 2 * (256 + 192 + 192 + 256) + 2 * (1668 + 1668 + 1796)
"""Two layers. LoRA r=4: q, o 32x32, k, v 32x16. MoLoRA E=4, r=4 with routers: gate, up 32x64, down 64x32."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def config(run_file: Path) -> RunConfig:
    return load_config(run_file)


def test_parameters_of_one_layer() -> None:
    adapters = resolve_adapters(AdaptersSection(num_experts=4, rank=4))
    shape = LinearShape(32, 64)
    assert layer_parameters(shape, "lora", adapters) == 4 * 32 + 4 * 64
    assert layer_parameters(shape, "molora", adapters) == 4 * (4 * 32 + 4 * 64) + 4 * 32 + 4


def test_tasks_layers_and_parameters(config: RunConfig) -> None:
    plan = make_plan(config)
    last_word, even = plan.tasks
    # 6 steps of 8 samples; shares go by the square root of the rows, 80 : 20, so 2 : 1
    assert (last_word.name, last_word.rows, last_word.samples, last_word.repeats) == (
        "last_word",
        80,
        32,
        0.4,
    )
    assert (even.name, even.rows, even.samples, even.repeats) == ("even", 20, 16, 0.8)
    assert (last_word.weight, even.weight) == pytest.approx((2 / 3, 1 / 3))
    assert (last_word.kind, even.kind) == ("generation", "yes_no")
    assert plan.trainable == TRAINABLE
    assert [layer.kind for layer in plan.layers].count("molora") == 6
    assert len(plan.layers) == 14
    vocabulary = locate_base(config.model).config["vocab_size"]
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert plan.base_parameters == 32 * vocabulary + 2 * per_layer + 32


def test_tokens_are_samples_times_the_mean_length(config: RunConfig) -> None:
    chat = ChatFormat.from_folder(locate_base(config.model).folder, None, config.data.max_length)
    for task, planned in zip(load_tasks(config.data, "test", chat), make_plan(config).tasks, strict=True):
        lengths = [len(chat.encode(e.prompt, e.target).input_ids) for e in task.train]
        assert planned.tokens == round(planned.samples * sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    ("preset", "dtype", "expected"),
    [
        ("zero0", "float32", MemoryPlan(base=4000, adapters=400, gradients=400, optimizer=800)),
        ("zero1", "float32", MemoryPlan(base=4000, adapters=400, gradients=400, optimizer=600)),
        ("zero2", "float32", MemoryPlan(base=4000, adapters=400, gradients=200, optimizer=600)),
        ("zero3", "float32", MemoryPlan(base=2000, adapters=200, gradients=200, optimizer=600)),
        ("zero2", "bfloat16", MemoryPlan(base=2000, adapters=400, gradients=200, optimizer=600)),
        ("zero3", "bfloat16", MemoryPlan(base=1000, adapters=200, gradients=200, optimizer=600)),
    ],
)
def test_bytes_per_rank_on_two_ranks(run_file: Path, preset: str, dtype: str, expected: MemoryPlan) -> None:
    """1000 frozen and 100 trainable parameters; AdamW holds two moments, and under ZeRO a master copy."""
    path = ROOT / "ds_configs" / f"{preset}.json"
    config = load_config(run_file, [f"parallel.deepspeed={path}", f"model.dtype={dtype}"])
    memory = plan_memory(config, base_parameters=1000, trainable=100)
    assert memory == expected
    assert memory.total == expected.base + expected.adapters + expected.gradients + expected.optimizer


def test_what_is_printed(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(make_plan(config), config)
    text = capsys.readouterr().out
    assert f"trainable {TRAINABLE:,} parameters" in text
    assert "ZeRO-2, 2 ranks" in text
    for line in (("last_word", "80", "0.6667", "32", "0.400"), ("even", "20", "0.3333", "16", "0.800")):
        assert any(all(word in row.split() for word in line) for row in text.splitlines())
    assert "warning" not in text


def test_a_task_that_the_run_never_sees_is_told(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(run_file, ["data.tasks.even.weight=0"])
    show_plan(make_plan(config), config)
    assert "warning: no sample of even in this run" in capsys.readouterr().out
