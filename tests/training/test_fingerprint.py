"""Which changes a resumed run may make, and which would make it another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import write_tiny_run

from moe_medical.base_model import locate_base
from moe_medical.config import load_config
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData, build_plan, load_tasks
from moe_medical.errors import ConfigError, DataError
from moe_medical.planning.preflight import check_context
from moe_medical.training.fingerprint import RunFingerprint, run_fingerprint
from moe_medical.training.trainer import adapter_meta


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    write_tiny_run(folder)
    return folder


def identity(
    folder: Path,
    *overrides: str,
    tasks: Callable[[list[TaskData]], list[TaskData]] = list,
    samples: int = 48,
) -> RunFingerprint:
    config = load_config(folder / "run.yaml", overrides)
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    loaded = tasks(load_tasks(config.data, config.evaluation.split, chat))
    plan = build_plan(loaded, config.data, config.run.seed, samples)
    return run_fingerprint(config, base, config.adapters, loaded, plan)


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=9",
        "training.micro_batch=1",
        "parallel.ranks=1",
        "checkpoint.every_steps=3",
        "run.dir=x",
    ],
)
def test_what_may_change(override: str, folder: Path) -> None:
    identity(folder, override).check_resumes(identity(folder).to_json())


@pytest.mark.parametrize(
    "override",
    [
        "adapters.alpha=80",
        "adapters.top_k=1",
        "training.learning_rate=0.5",
        "training.global_batch=4",
        "data.max_length=64",
        "data.system_prompt=other",
        "evaluation.split=test",
        "evaluation.loss_rows=2",
        "model.dtype=bfloat16",
        "run.seed=3",
    ],
)
def test_what_may_not_change(override: str, folder: Path) -> None:
    key = override.partition("=")[0]
    with pytest.raises(DataError, match=rf"^({key}|.*jsonl) (was|has changed)"):
        identity(folder, override).check_resumes(identity(folder).to_json())


def test_data_may_move_but_not_change(folder: Path, tmp_path: Path) -> None:
    saved = identity(folder).to_json()
    write_tiny_run(tmp_path)
    moved = tmp_path / "tasks" / "even.train.jsonl"
    here = {"model.name": str(folder / "model")}
    identity(tmp_path, *(f"{k}={v}" for k, v in here.items())).check_resumes(saved)
    moved.write_text(moved.read_text().replace('"yes"', '"no"', 1))
    with pytest.raises(DataError, match=rf"^{moved} has changed since the checkpoint"):
        identity(tmp_path, *(f"{k}={v}" for k, v in here.items())).check_resumes(saved)


def test_tasks_may_not_swap_places(folder: Path) -> None:
    swapped = identity(folder, tasks=lambda tasks: tasks[::-1])
    with pytest.raises(
        DataError, match=r"^the tasks were last_word, even in the checkpoint, are even, last_word"
    ):
        swapped.check_resumes(identity(folder).to_json())


@pytest.mark.parametrize("mix", ["data.mix.rule=unimax data.mix.epochs=1", "data.mix.max_repeats=1"])
def test_a_longer_run_may_be_another_mixture(mix: str, folder: Path) -> None:
    saved = identity(folder, *mix.split()).to_json()
    rows = sum(saved["mixture"]["sizes"])
    with pytest.raises(DataError, match=r"^the mixture is not the checkpoint's: .* unimax .*a cap binds"):
        identity(folder, *mix.split(), samples=rows).check_resumes(saved)


def test_samples_and_answers_must_fit_the_model(folder: Path) -> None:
    fits = load_config(folder / "run.yaml", ["data.max_length=250", "evaluation.max_new_tokens=6"])
    check_context(fits, locate_base(fits.model))
    longer = load_config(folder / "run.yaml", ["data.max_length=251", "evaluation.max_new_tokens=6"])
    with pytest.raises(ConfigError, match=r"at most the model's 256 positions, got 251\. Try 250"):
        check_context(longer, locate_base(longer.model))


def test_an_adapter_names_labels_but_no_options_of_questions(folder: Path) -> None:
    config = load_config(folder / "run.yaml")
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, None, 96)
    mixture = folder / "tasks" / "choices.yaml"
    rows = '{"input": "%s", "output": "A", "choices": ["yes", "the option %s"]}\n'
    spec = (folder / "tasks" / "even.yaml").read_text().replace("even", "kind") + "choices: choices\n"
    for kind in ("classification", "multiple_choice"):
        for split in ("train", "validation", "test"):
            (folder / "tasks" / f"{kind}.{split}.jsonl").write_text(rows % (split, kind))
        (folder / "tasks" / f"{kind}.yaml").write_text(
            spec.replace("kind: yes_no", f"kind: {kind}")
            .replace("kind.", f"{kind}.")
            .replace("name: kind", f"name: {kind}")
        )
    mixture.write_text("name: m\ntasks: [classification.yaml, multiple_choice.yaml]\n")
    config.data.recipe = str(mixture)
    labels = adapter_meta(config, base, load_tasks(config.data, "test", chat), 7)["label_sets"]
    assert labels == {"classification": ["the option classification", "yes"]}
