"""Run files: every mistake is told at once with key, rule and value; what loads can be written and read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny import ROOT

from moe_medical.config import load_config, save_config
from moe_medical.config.adapters import FFN, PRESETS
from moe_medical.config.deepspeed import ZERO_KEYS
from moe_medical.errors import ConfigError

RUN_FILE = """
data: {recipe: mixture.yaml}
parallel: {deepspeed: zero.json}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mixture.yaml").write_text("name: any\n")
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    return tmp_path


def _problems(folder: Path, text: str = "", overrides: Sequence[str] = ()) -> list[str]:
    """The lines of the error that a run file with these extra sections gives."""
    run = folder / "run.yaml"
    run.write_text(RUN_FILE + text)
    with pytest.raises(ConfigError) as caught:
        load_config(run, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{run} has {len(lines)} problem")
    return [line.strip() for line in lines]


def test_every_problem_of_file_and_overrides_at_once(folder: Path) -> None:
    (folder / "zero.json").write_text('{"fp16": {}, "gradient_clipping": 1.0}')
    text = """
trainning: {steps: 3, seed: 1}
training: {stepz: 3, global_batch: 30, micro_batch: 8, learning_rate: 0, betas: [0.9]}
model: {dtype: float16}
adapters: {num_experts: 4, top_k: 6, molora: ['(']}
evaluation: {loss_rows: none}
checkpoint: {resume: maybe}
"""
    overrides = ["parallel.ranks=2", "parallel.ep_size=3", "data.max_length=8", "data.tasks.x.weight=-1"]
    assert _problems(folder, text, overrides) == [
        "trainning is not a key of the top level. Did you mean 'training'?",
        "training.stepz is not a key of training. Did you mean 'steps'?",
        "model.dtype has the wrong type (Invalid value 'float16', expected one of ['float32', 'bfloat16']), "
        "got 'float16'.",
        "evaluation.loss_rows has the wrong type (Value 'none' of type 'str' could not be converted to "
        "Integer), got 'none'.",
        "checkpoint.resume has the wrong type (Invalid value 'maybe', expected one of ['auto', 'must', "
        "'never']), got 'maybe'.",
        "data.tasks.x.weight must be finite and not negative, got -1.0.",
        "data.max_length must be at least 32, got 8.",
        "training.learning_rate must be finite and > 0, got 0.0.",
        "training.betas must be two numbers in [0, 1), got [0.9].",
        "training.global_batch must be a multiple of micro_batch x ranks (8 x 2), got 30. Try 32.",
        f"{folder}/zero.json: gradient_clipping is owned by the run file's training.clip_norm. "
        "Remove it there.",
        f"{folder}/zero.json: fp16 is owned by the run file's model.dtype. Remove it there.",
        "adapters.top_k must be at most num_experts (4), or 0 for all, got 6.",
        "adapters.molora[0] must be a regular expression (missing ), unterminated subpattern at position 0), "
        "got '('.",
        "parallel.ep_size must divide adapters.num_experts (4), got 3. Try 2.",
        "parallel.ep_size must divide parallel.ranks (2), got 3. Try 2.",
    ]


def test_missing_files_are_told_with_their_keys(folder: Path) -> None:
    overrides = ["data.recipe=no.yaml", "parallel.deepspeed=no.json"]
    assert _problems(folder, overrides=overrides) == [
        f"data.recipe must name a mixture YAML, relative to the run file, got '{folder}/no.yaml'.",
        "parallel.deepspeed must name a DeepSpeed JSON, relative to the run file, "
        f"got '{folder}/no.json (No such file or directory)'.",
    ]


def test_values_that_must_be_given_or_cannot_be_resolved(folder: Path) -> None:
    text = """
data: {recipe: '???'}
training: {steps: '???', epsilon: '${oc.env:MOE_MEDICAL_NO_SUCH}'}
run: {name: 'x${run.nmae}'}
adapters: {lora: ['${oc.env:MOE_MEDICAL_NO_SUCH}']}
"""
    (folder / "run.yaml").write_text("parallel: {deepspeed: zero.json}\n" + text)
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "run.yaml")
    assert [(p.path, p.rule.split(" (")[0]) for p in caught.value.problems] == [
        ("run.name", "cannot be resolved"),
        ("adapters.lora", "cannot be resolved"),
        ("data.recipe", "must be given"),
        ("training.steps", "must be given"),
        ("training.epsilon", "cannot be resolved"),
    ]
    assert "MOE_MEDICAL_NO_SUCH" in str(caught.value)
    assert "run.nmae" in str(caught.value)


def test_environment_variables_are_filled_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_STEPS", "7")
    (folder / "run.yaml").write_text(RUN_FILE + "training: {steps: '${oc.env:MOE_MEDICAL_STEPS}'}\n")
    config = load_config(folder / "run.yaml")
    assert config.training.steps == 7
    assert config.run.dir == "runs/run"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"run:\n  name: a\n seed: [\n", ":3 must be valid YAML, got"),
        (b"run:\n\tname: a\n", ":2 must be valid YAML, got"),
        (b"\xff\xfe\x00", " must be valid YAML, got 'not text'."),
        (b"- run\n", " must hold sections, got 'list'."),
        (b"", " must hold sections, got 'NoneType'."),
        (None, " must be a readable file, got 'No such file or directory'."),
    ],
)
def test_file_that_is_no_run_file(tmp_path: Path, content: bytes | None, line: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"  {path}{line}" in str(caught.value)


def test_folder_in_place_of_a_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file, got 'Is a directory'"):
        load_config(tmp_path)


def test_overrides_win_and_keep_their_types(folder: Path) -> None:
    (folder / "run.yaml").write_text(RUN_FILE + "training: {steps: 5, betas: [0.5, 0.5]}\n")
    overrides = [
        "training.steps=9",
        "training.learning_rate=1e-3",
        "training.betas=[0.8,0.95]",
        "adapters.lora=[]",
        "data.system_prompt=null",
        "data.mix.max_repeats=null",
        "data.tasks.icd.weight=2",
        "data.tasks.icd.max_repeats=1.5",
        "data.tasks.hpo={weight: 0}",
        "run.name=a=b [c",
    ]
    config = load_config(folder / "run.yaml", overrides)
    assert (config.training.steps, config.training.learning_rate) == (9, 1e-3)
    assert config.training.betas == [0.8, 0.95]
    assert (config.adapters.lora, config.adapters.molora) == ((), (FFN,))
    assert (config.data.system_prompt, config.data.mix.max_repeats) == (None, None)
    assert (config.data.tasks["icd"].weight, config.data.tasks["icd"].max_repeats) == (2.0, 1.5)
    assert (config.data.tasks["hpo"].weight, config.data.tasks["hpo"].max_repeats) == (0.0, None)
    assert (config.run.name, config.run.dir) == ("a=b [c", "runs/a=b [c")


def test_overrides_of_a_wrong_form(folder: Path) -> None:
    form = "must have the form key=value. Example: training.steps=100"
    overrides = ["training.steps", "=3", "a..b=1", "training=5", "data.tasks.x.wait=1", "run.name=null"]
    assert _problems(folder, overrides=overrides) == [
        f"training.steps {form}",
        f"=3 {form}",
        f"a..b=1 {form}",
        "training has the wrong type (Invalid type assigned: int is not a subclass of TrainingSection. "
        "value: 5), got 5. From 'training=5'.",
        "data.tasks.x.wait is not a key of data.tasks.x. Did you mean 'weight'?",
        "run.name has the wrong type (field 'run.name' is not Optional). From 'run.name=null'.",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.learning_rate=.inf", "training.learning_rate must be finite and > 0, got inf."),
        ("training.clip_norm=.nan", "training.clip_norm must not be negative, got nan."),
        ("data.tasks.x.weight=.inf", "data.tasks.x.weight must be finite and not negative, got inf."),
        ("data.tasks.x.max_repeats=0", "data.tasks.x.max_repeats must be > 0 or null, got 0.0."),
        ("data.mix.max_repeats=-1", "data.mix.max_repeats must be > 0 or null, got -1.0."),
        ("training.warmup_ratio=1", "training.warmup_ratio must be in [0, 1), got 1.0."),
        ("training.steps=true", "training.steps has the wrong type"),
        ("parallel.ranks=0", "parallel.ranks must be at least 1, got 0."),
        ("evaluation.score_rows=-1", "evaluation.score_rows must not be negative, got -1."),
        ("adapters.dropout=1", "adapters.dropout must be in [0, 1), got 1.0."),
        ("adapters.rank=0", "adapters.rank must be finite and > 0, got 0."),
        (
            "adapters.preset=mingmoe",
            "adapters.preset must be one of adamole, hydralora, lora, lora_moe, med_moe, ming_moe, mixlora, "
            "moelora, mola, xlora, got 'mingmoe'.",
        ),
    ],
)
def test_ranges(folder: Path, override: str, line: str) -> None:
    (found,) = _problems(folder, overrides=[override])
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "parallel.deepspeed must name valid JSON (Expecting"),
        ("[]", "parallel.deepspeed must name a JSON object, got '{path}'."),
        ("3", "parallel.deepspeed must name a JSON object, got '{path}'."),
        (
            '{"zero_optimization": {"stage": 4}}',
            "{path}: zero_optimization.stage must be 0, 1, 2 or 3, got 4.",
        ),
        ('{"zero_optimization": 2}', "{path}: zero_optimization must be an object, got 2."),
        (
            '{"zero_optimisation": {"stage": 3}}',
            "{path}: zero_optimisation is not a DeepSpeed key for use beside a run file. "
            "Did you mean 'zero_optimization'?",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimiser": {}}}',
            "{path}: zero_optimization.offload_optimiser is not a key of zero_optimization. "
            "Did you mean 'offload_optimizer'?",
        ),
        ('{"optimizer": {}}', "{path}: optimizer is owned by the run file's training.learning_rate."),
    ],
)
def test_unusable_deepspeed_json(folder: Path, text: str, line: str) -> None:
    (folder / "zero.json").write_text(text)
    (found,) = _problems(folder)
    assert found.startswith(line.format(path=folder / "zero.json"))


def test_the_known_zero_keys_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert fields.keys() | {field.alias for field in fields.values() if field.alias} == ZERO_KEYS


def test_a_saved_config_loads_as_the_same(folder: Path) -> None:
    (folder / "model").mkdir()
    text = "model: {name: ./model}\ndata: {tasks: {icd: {weight: 0.5}}}\ntraining: {global_batch: 64}\n"
    (folder / "run.yaml").write_text(text + "adapters: {lora: ['.*q_proj']}\n")
    overrides = ["data.recipe=mixture.yaml", "parallel.deepspeed=zero.json", "data.system_prompt=null"]
    config = load_config(folder / "run.yaml", overrides)
    assert config.model.name == str(folder / "model")
    elsewhere = folder / "run" / "config.yaml"
    elsewhere.parent.mkdir()
    save_config(config, elsewhere)
    assert load_config(elsewhere) == config


SHIPPED_RUNS = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
SHIPPED_JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("run", SHIPPED_RUNS, ids=lambda p: p.stem)
def test_shipped_run_files_load(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_DATA", str(tmp_path))
    assert Path(load_config(run).data.recipe).is_file()


@pytest.mark.parametrize("path", SHIPPED_JSONS, ids=lambda p: p.stem)
def test_shipped_deepspeed_configs_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "launch" / "runs" / "quickstart.yaml", [f"parallel.deepspeed={path}"])
    assert config.parallel.deepspeed == str(path)
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    assert path.stem.startswith(f"zero{stage}")


def test_config_and_plan_start_without_heavy_imports() -> None:
    heavy = ["torch", "deepspeed", "transformers", "wandb", "datasets"]
    code = (
        "import sys, moe_medical.cli, moe_medical.config, moe_medical.planning.plan\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_adapters_are_the_preset_then_the_file_then_the_command_line(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        RUN_FILE + "adapters: {preset: mola, rank: 3, alpha: 5, router_bias: true}\n"
    )
    adapters = load_config(folder / "run.yaml", ["adapters.rank=7", "adapters.alpha=null"]).adapters
    assert (adapters.rank, adapters.alpha, adapters.router_bias) == (7, PRESETS["mola"].alpha, True)
    assert adapters.experts_per_layer == (2, 4, 6, 8)
    even = load_config(folder / "run.yaml", ["adapters.num_experts=4"]).adapters
    assert (even.num_experts, even.experts_per_layer) == (4, ())
    other = load_config(folder / "run.yaml", ["adapters.preset=lora_moe"]).adapters
    assert (other.preset, other.rank, other.top_k) == ("lora_moe", 3, 0)


@pytest.mark.parametrize("key", ["num_tasks", "labels"])
def test_what_follows_from_the_data_is_no_key(folder: Path, key: str) -> None:
    assert _problems(folder, RUN_FILE, [f"adapters.{key}=[]"])[0].startswith(
        f"adapters.{key} is not a key of adapters."
    )
    save_config(load_config(folder / "run.yaml"), folder / "saved.yaml")
    assert key not in (folder / "saved.yaml").read_text()


def test_an_unknown_router_is_told_with_the_known_ones(folder: Path) -> None:
    (problem,) = _problems(folder, RUN_FILE, ["adapters.router=tokens"])
    assert problem.startswith("adapters.router must be one of token, task, joint, sequence, ")
