"""Control arms: real runs of a tiny model, their reference file, and what happens to runs that stop."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from support.launches import adapter_bytes, checkpoint_steps, launched, reached, run_to_end
from support.tiny import write_tiny_run

from moe_medical.cli import main
from moe_medical.config import load_config
from moe_medical.config.schema import RunConfig
from moe_medical.errors import ConfigError
from moe_medical.planning.plan import RunPlan, make_plan
from moe_medical.tracking.reference import Reference, load_reference
from moe_medical.training.baseline import (
    ControlRun,
    ControlRunError,
    control_runs,
    matching_rank,
    train_baselines,
)
from moe_medical.training.run_folder import RunFolder

BASELINE = [sys.executable, "-m", "moe_medical", "baseline"]
STEPS = 30
MISSING = "tracking.seesaw.reference=null"


@dataclass(frozen=True)
class Trained:
    """A run file and the control arms that were trained for it."""

    run: Path
    config: RunConfig
    plan: RunPlan
    controls: dict[str, ControlRun]
    reference: Reference
    output: str

    @property
    def folder(self) -> Path:
        return self.run.parent / "tiny-baseline"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All control arms of a run of 30 steps, whose run file names the reference that is yet to be made."""
    base = tmp_path_factory.mktemp("baseline")
    run = write_tiny_run(
        base,
        parallel={"ranks": 1},
        training={"steps": STEPS},
        evaluation={"score_rows": 2, "max_new_tokens": 2},
        checkpoint={"every_steps": 3},
        tracking={"wandb": {"enabled": False}, "seesaw": {"reference": "reference.json"}},
    )
    out = base / "reference.json"
    code, output = run_to_end([*BASELINE, str(run), "--out", str(out)], base / "output")
    assert code == 0, output
    config = load_config(run)
    plan = make_plan(config)
    controls = {control.name: control for control in control_runs(config, plan)}
    return Trained(run, config, plan, controls, load_reference(out, ["last_word", "even"]), output)


def _last_tasks(control: ControlRun) -> dict[str, dict]:
    path = control.paths.evaluation(control.config.training.steps)
    return dict(json.loads(path.read_text())["tasks"])


def test_the_reference_holds_what_the_control_runs_reached(trained: Trained) -> None:
    reference = trained.reference
    assert list(trained.controls) == ["last_word", "even", "all-tasks"]
    assert list(reference.single) == ["last_word", "even"]
    assert reference.multi is not None
    for name, alone in reference.single.items():
        seen = _last_tasks(trained.controls[name])
        assert list(seen) == [name]  # no time is spent on the other tasks
        assert (alone.loss, alone.score) == (seen[name]["loss"], seen[name]["score"])
        together = _last_tasks(trained.controls["all-tasks"])[name]
        assert reference.multi[name].loss == together["loss"]
        assert len(together["row_losses"]) == len(seen[name]["row_losses"]) == 8
        assert together["tokens"] == seen[name]["tokens"]  # the same probe rows
    assert reference.run == "tiny"
    assert reference.tokens == sum(task.tokens for task in trained.plan.tasks)


def test_the_arms_get_equal_tokens_and_equal_parameters(trained: Trained) -> None:
    reference, batch = trained.reference, trained.config.training.global_batch
    for task in trained.plan.tasks:
        alone = reference.single[task.name]
        assert abs(alone.steps * batch - task.samples) <= batch / 2
    assert reference.multi is not None
    assert {of.steps for of in reference.multi.values()} == {STEPS}
    multi = reference.multi["even"].tokens
    assert sum(of.tokens for of in reference.single.values()) == pytest.approx(multi, rel=0.1)

    rank, parameters = matching_rank(trained.plan)
    assert abs(parameters - trained.plan.trainable) <= parameters / rank / 2
    assert reference.trainable_parameters == {
        "run": trained.plan.trainable,
        "single": parameters,
        "multi": parameters,
    }
    for control in trained.controls.values():
        assert _stored_parameters(control.paths.root) == parameters


def _stored_parameters(run: Path) -> int:
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_the_table_shows_both_arms(trained: Trained) -> None:
    lines = trained.output.splitlines()
    header = next(i for i, line in enumerate(lines) if "loss alone" in line)
    alone, together = trained.reference.single["even"], (trained.reference.multi or {})["even"]
    row = next(line for line in lines[header:] if line.startswith("even"))
    assert row.split() == [
        "even",
        str(alone.steps),
        f"{alone.loss:.3f}",
        f"{alone.score:.3f}",
        f"{together.loss:.3f}",
        f"{together.score:.3f}",
    ]
    assert "Traceback" not in trained.output


def test_finished_runs_are_kept_and_a_later_arm_adds_to_the_file(trained: Trained, tmp_path: Path) -> None:
    adapters = list(trained.folder.glob("*/adapter/adapter_model.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in adapters}
    assert len(before) == 3
    for arm in ("single", "multi", "all"):
        train_baselines(trained.run, [], arm, None, tmp_path / f"{arm}.json")
        assert load_reference(tmp_path / f"{arm}.json", ["even"]) == trained.reference
    assert {path: path.stat().st_mtime_ns for path in adapters} == before


def test_other_settings_in_the_same_folder_are_refused(trained: Trained, tmp_path: Path) -> None:
    for overrides, steps in ((["training.learning_rate=0.5"], None), (["adapters.rank=8"], None), ([], 1)):
        with pytest.raises(ConfigError, match=r"last_word has a control run of other settings\. Remove the"):
            train_baselines(trained.run, overrides, "single", steps, tmp_path / "reference.json")
    assert not (tmp_path / "reference.json").exists()


def test_what_shapes_no_number_may_change(trained: Trained, tmp_path: Path) -> None:
    overrides = ["checkpoint.keep=5", "training.micro_batch=4", "tracking.log_every_steps=7"]
    train_baselines(trained.run, overrides, "all", None, tmp_path / "reference.json")
    assert load_reference(tmp_path / "reference.json", ["even"]) == trained.reference


def test_a_killed_control_run_goes_on_to_the_same_adapter(trained: Trained, tmp_path: Path) -> None:
    command = [*BASELINE, str(trained.run), f"run.dir={tmp_path / 'run'}", "--arm", "multi"]
    folder = tmp_path / "tiny-baseline" / "all-tasks"
    with launched(command, tmp_path / "first") as run:
        run.wait_until(lambda: len(checkpoint_steps(folder)) > 0)
        run.process.kill()
        run.process.wait()
    assert 0 < reached(folder) < STEPS
    code, output = run_to_end(command, tmp_path / "second")
    assert code == 0, output
    assert "resumed at step" in output
    assert adapter_bytes(folder) == adapter_bytes(trained.folder / "all-tasks")
    reference = json.loads((tmp_path / "tiny-baseline" / "reference.json").read_text())
    assert reference["multi"] == trained.reference.to_json()["multi"]
    assert reference["single"] == {}  # none was trained here


def test_a_failed_control_run_gives_its_exit_code_and_its_name(trained: Trained, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}"]
    control = control_runs(load_config(trained.run, [*overrides, MISSING]), trained.plan)[0]
    control.write_file()
    with (
        RunFolder(control.paths.root).claimed(),
        pytest.raises(ControlRunError, match="control run last_word ended with exit code 74") as caught,
    ):
        train_baselines(trained.run, overrides, "single")
    assert caught.value.exit_code == 74


# Plans alone


def _controls(run: Path, overrides: list[str], steps: int | None = None) -> list[ControlRun]:
    config = load_config(run, [MISSING, *overrides])
    return control_runs(config, make_plan(config), steps)


def test_a_plain_lora_is_its_own_multi_task_control(trained: Trained, tmp_path: Path) -> None:
    plain = [f"run.dir={tmp_path / 'run'}", "adapters.preset=lora", "adapters.rank=3"]
    plain += ["adapters.num_experts=null", "adapters.top_k=null"]
    runs = _controls(trained.run, plain)
    assert [(run.arm, run.name, run.rank) for run in runs] == [
        ("single", "last_word", 3),
        ("single", "even", 3),
    ]
    with pytest.raises(ConfigError, match=r"adapters\.molora must name a layer: a plain LoRA is its own"):
        train_baselines(trained.run, plain, "multi")
    assert not (tmp_path / "tiny-baseline").exists()


def test_tasks_without_samples_have_no_control(trained: Trained) -> None:
    runs = _controls(trained.run, ["data.tasks.even.weight=0"])
    assert [run.name for run in runs] == ["last_word", "all-tasks"]


def test_single_runs_are_free_of_what_balances_tasks(trained: Trained) -> None:
    balanced = [
        "data.mix.rule=explicit",
        "data.mix.shares.last_word=0.1",
        "data.mix.shares.even=0.9",
        "data.mix.dynamic.rule=regret",
        "data.mix.max_repeats=0.5",
        "data.tasks.even.max_repeats=0.5",
        "training.loss.task_weights=famo",
        "training.steps=4",
        "training.guard.action=reweight",
        "evaluation.every_steps=2",
    ]
    even, multi = _controls(trained.run, balanced, steps=9)[1:]
    assert (even.config.training.steps, multi.config.training.steps) == (9, 4)
    assert make_plan(even.config).tasks[0].samples == 9 * 8 > 20  # beyond every cap
    assert even.config.data.mix.dynamic.rule == "none"
    assert even.config.training.loss.task_weights == "none"
    assert even.config.training.guard.action == "none"
    assert multi.config.data.mix.dynamic.rule == "regret"
    assert multi.config.training.loss.task_weights == "famo"
    assert multi.config.training.guard.action == "reweight"


def test_controls_keep_the_ranks_but_have_no_experts_to_spread(trained: Trained) -> None:
    spread = ["parallel.ranks=2", "parallel.ep_size=2", "tracking.wandb.enabled=true"]
    for control in _controls(trained.run, spread):
        assert (control.config.parallel.ranks, control.config.parallel.ep_size) == (2, 1)
        assert control.config.tracking.wandb.group == "tiny-baseline"
        assert control.paths.root.parent == trained.folder


@pytest.mark.parametrize("router", ["token", "task"])
def test_parameters_match_within_one_rank_for_both_routers(trained: Trained, router: str) -> None:
    overrides = [f"adapters.router={router}", "adapters.alpha=12"]
    config = load_config(trained.run, [MISSING, *overrides])
    plan = make_plan(config)
    multi = control_runs(config, plan)[-1]
    made = make_plan(multi.config)
    assert made.trainable == multi.parameters
    assert abs(made.trainable - plan.trainable) <= multi.parameters / multi.rank / 2
    assert [layer.name for layer in made.layers] == [layer.name for layer in plan.layers]
    assert multi.config.adapters.alpha == multi.rank * 3.0  # alpha / rank as in the run


def test_an_unknown_arm_is_a_wrong_command_line(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["baseline", str(trained.run), "--arm", "both"])
    assert caught.value.code == 64
    assert "invalid choice: 'both'" in capsys.readouterr().err
