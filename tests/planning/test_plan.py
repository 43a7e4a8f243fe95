"""The plan's numbers, checked by hand on the tiny run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.tiny import ROOT, write_tiny_run

from moe_medical import cli
from moe_medical.base_model import locate_base
from moe_medical.config import RunConfig, load_config
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import load_tasks
from moe_medical.errors import ConfigError
from moe_medical.planning.cost import estimate
from moe_medical.planning.layout_plan import Machines, SizedLinear, exchange_chooser, size
from moe_medical.planning.plan import make_plan, show_plan
from moe_medical.planning.sample_sizes import SampleSizes, mixture_sizes

TRAINABLE = 2 * (256 + 192 + 192 + 256) + 2 * (1668 + 1668 + 1796)
"""Two layers. LoRA r=4: q, o 32x32, k, v 32x16. MoLoRA E=4, r=4 with routers: gate, up 32x64, down 64x32."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def config(run_file: Path) -> RunConfig:
    return load_config(run_file)


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
    ("preset", "dtype", "base", "adapters", "states"),
    [
        ("zero0", "float32", 1, 1, 12),
        ("zero1", "float32", 1, 1, 4 + 12 / 2),
        ("zero2", "float32", 1, 1, 16 / 2),
        ("zero2", "bfloat16", 1 / 2, 1, 16 / 2),
    ],
)
def test_bytes_per_rank_on_two_ranks(
    run_file: Path, preset: str, dtype: str, base: float, adapters: float, states: float
) -> None:
    """In fp32: AdamW holds two moments beside each gradient and, under ZeRO, a master copy."""
    path = ROOT / "ds_configs" / f"{preset}.json"
    plan = make_plan(load_config(run_file, [f"parallel.deepspeed={path}", f"model.dtype={dtype}"]))
    memory = plan.layouts.chosen.memory
    assert memory.base == 4 * base * plan.base_parameters
    assert memory.experts + memory.shared == 4 * adapters * TRAINABLE
    assert memory.state == states * TRAINABLE


def test_the_whole_run_file_is_planned(run_file: Path) -> None:
    settings = ["parallel.ep_size=2", "parallel.exchange=tokens", "training.global_batch=16"]
    settings += ["data.batching=grouped"]
    plan = make_plan(load_config(run_file, settings), Machines(2, 2)).layouts
    layout = plan.chosen.layout
    assert (layout.ranks, layout.ranks_per_node, layout.zero.stage, layout.ep_size) == (4, 2, 2, 2)
    assert (plan.workload.accumulation, plan.samples, plan.chosen.exchanges["tokens"]) == (2, 16, 6)
    assert [e.layout for e in plan.others] != []
    assert plan.chosen == estimate(plan.model, layout, plan.workload)


def test_packed_rows_are_planned(run_file: Path) -> None:
    """64 samples of 14 to 30 tokens in rows of 96, in equal numbers on the ranks."""
    config = load_config(run_file, ["training.global_batch=64"])
    plan = make_plan(config)
    tokens = 64 * sum(t.tokens for t in plan.tasks) / sum(t.samples for t in plan.tasks)
    work = plan.layouts.workload
    rows = -(-tokens // (96 * 2)) * 2
    assert work.accumulation == -(-rows // 4)  # 2 ranks x 2 rows at once
    assert work.tokens == pytest.approx(tokens / (2 * work.accumulation), rel=0.01)
    assert (work.positions, plan.layouts.samples) == (2 * 96, 64)
    assert 2 * 9 < work.head_positions <= 2 * 96  # packed rows have targets in many columns


def test_what_is_printed(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(make_plan(config))
    text = capsys.readouterr().out
    assert f"trainable {TRAINABLE:,} parameters" in text
    for line in (("last_word", "80", "0.6667", "32", "0.400"), ("even", "20", "0.3333", "16", "0.800")):
        assert any(all(word in row.split() for word in line) for row in text.splitlines())
    assert "warning" not in text
    assert "asks for" not in text  # 2 ranks x micro-batch 2 x 2 accumulated are the 8 of the run file
    marked = [row.split()[0] for row in text.splitlines() if "run file" in row and "ZeRO" in row]
    assert marked == ["ZeRO-2"]
    assert "recommended for 80 GiB: ZeRO-0: it fits" in text
    assert any(row.split()[:3] == ["expert", "gradients", "all_reduce"] for row in text.splitlines())


def test_another_shape_on_many_ranks(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options and overrides in any order; a batch that these ranks cannot make is told, not refused."""
    zero3 = f"parallel.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
    options = ["--nodes", "8", "--gpus", "8", "--gpu-memory", "40", "--shape", "llama-70b"]
    settings = [zero3, "model.dtype=bfloat16", "data.batching=grouped"]
    assert cli.main(["plan", str(run_file), *options, *settings]) == 0
    text = capsys.readouterr().out
    assert "llama-70b on 8 x 8 ranks; micro-batch 2 x 1 accumulated = 128 samples" in text
    assert "(the run file asks for 8); bfloat16;" in text
    assert any(row.startswith("ZeRO-3 ") and "run file, recommended" in row for row in text.splitlines())
    assert "of the base's 70,553,706,496" in text
    assert "recommended for 40 GiB: ZeRO-3" in text


def test_experts_that_do_not_fit_the_ranks_are_refused(run_file: Path) -> None:
    config = load_config(run_file, ["parallel.ep_size=2"])
    with pytest.raises(
        ConfigError, match=r"must divide --nodes x --gpus \(3\), got 2. Try parallel.ep_size=1"
    ):
        make_plan(config, Machines(1, 3))


def test_it_needs_no_torch(run_file: Path) -> None:
    code = (
        "import sys; from moe_medical import cli\n"
        f"assert cli.main(['plan', {str(run_file)!r}, '--shape', 'llama-1b']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_run_chooses_exchanges_as_the_plan_does(run_file: Path) -> None:
    config = load_config(run_file, ["parallel.ep_size=2", "data.batching=grouped"])
    layer = SimpleLinear(32, 64)
    for mean, expected in ((1.0, "tokens"), (10_000.0, "weights")):
        choose = exchange_chooser(config, config.adapters, SampleSizes(mean, 90, 9, 4.0), 2)
        assert choose({"gate": layer, "up": layer}) == expected


@dataclass
class SimpleLinear(SizedLinear):
    in_features: int
    out_features: int


def test_sizes_of_a_mixture_leave_out_what_it_does_not_take() -> None:
    sizes = [SampleSizes(10, 20, 5, 3), SampleSizes(40, 60, 3, 3), SampleSizes(999, 999, 999, 999)]
    assert mixture_sizes(sizes, [2, 1, 0]) == SampleSizes(20, 60, 5, 3)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 * 2**20, "200 MiB"), (2**50, "1024 TiB")],
)
def test_sizes_for_a_person(number: float, text: str) -> None:
    assert size(number) == text


def test_a_task_that_the_run_never_sees_is_told(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(run_file, ["data.tasks.even.weight=0"])
    show_plan(make_plan(config))
    assert "warning: no sample of even in this run" in capsys.readouterr().out
