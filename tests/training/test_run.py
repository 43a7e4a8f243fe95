"""A whole run on a tiny model: what it writes, that W&B holds the same numbers, that the adapter answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny import ROOT, write_tiny_run
from support.wandb_file import read_run

from moe_medical.tracking.sinks import read_metrics

PUBLIC = os.environ.get("MOE_MEDICAL_DATA")


def moe_medical(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "moe_medical", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a finished two-rank run with W&B, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, tracking={"wandb": {"enabled": True}}, evaluation={"every_steps": 3})
    done = moe_medical("launch", "run.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_table_shows_every_task_and_every_path(finished: tuple[Path, str]) -> None:
    folder, stdout = finished
    results = json.loads((folder / "run" / "results.json").read_text())
    assert [t["task"] for t in results["tasks"]] == ["last_word", "even"]
    assert sum(t["weight"] for t in results["tasks"]) == pytest.approx(1)
    for task in results["tasks"]:
        line = next(x for x in stdout.splitlines() if task["task"] in x)
        assert f"{task['loss_before']:.3f} → {task['loss_after']:.3f}" in line
        assert f"{task['score_before']:.3f} → {task['score_after']:.3f}" in line
    assert results["macro_loss_after"] < results["macro_loss_before"]
    for written in ("adapter", "results.json", "metrics.jsonl", "checkpoints", "wandb"):
        assert str(folder / "run" / written) in stdout
        assert (folder / "run" / written).exists()


def test_wandb_holds_what_metrics_jsonl_holds(finished: tuple[Path, str]) -> None:
    run = finished[0] / "run"
    ours = read_metrics(run / "metrics.jsonl")
    theirs = [row for row in read_run(run / "wandb").history if "global_step" in row]
    assert [r["step"] for r in ours] == [0, 1, 2, 3, 3, 4, 5, 6, 6]  # a row a step, and one an evaluation
    assert len(theirs) == len(ours)
    for mine, its in zip(ours, theirs, strict=True):
        assert its["global_step"] == mine.pop("step")
        assert {k: its[k] for k in mine} == mine
    step = ours[2]
    named = {"loss", "tokens", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second"}
    assert named <= set(step)
    assert {"train_loss/last_word", "mix/even", "repeats/even"} <= set(step)
    assert {"eval_loss/even", "eval_score/last_word"} <= set(ours[0])


def test_the_adapter_is_the_last_checkpoint(finished: tuple[Path, str]) -> None:
    run = finished[0] / "run"
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    checkpoint = load_file(run / "checkpoints" / "step-00000006" / "adapters.safetensors")
    assert adapter.keys() == checkpoint.keys()
    assert all(torch.equal(adapter[name], checkpoint[name]) for name in adapter)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest.json",
        "step-00000004",
        "step-00000006",
    ]


def test_generate_answers_in_order_whatever_the_batch(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    prompts = [
        "Is it even?\nw3 w4".replace("\n", " "),
        "Repeat the last word. w1 w2 w3 w4 w5",
        "Is it even? w9",
    ]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    settings = ("--max-new-tokens", "5")
    batched = moe_medical("generate", "run/adapter", "--prompts", "prompts.txt", *settings, cwd=folder)
    single = moe_medical(
        "generate", "run/adapter", "--batch-rows", "1", *settings, cwd=folder, stdin="\n".join(prompts)
    )
    assert batched.returncode == 0, batched.stderr
    rows = [json.loads(line) for line in batched.stdout.splitlines()]
    assert [r["prompt"] for r in rows] == prompts
    assert rows == [json.loads(line) for line in single.stdout.splitlines()]


def test_generate_refuses_a_folder_that_is_no_adapter(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    refused = moe_medical("generate", "model", cwd=folder, stdin="hello")
    assert refused.returncode in (64, 65)
    assert "adapter_config.json" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(PUBLIC is None, reason="MOE_MEDICAL_DATA is not set: the public task sets are not here")
def test_a_run_over_public_sets(tmp_path: Path) -> None:
    names = ["pubmedqa", "ner_ncbi_disease", "zh_cmedqq", "mediqa_mas"]
    mixture = {"name": "some", "tasks": [str(ROOT / "data_recipes" / "tasks" / f"{n}.yaml") for n in names]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    data = {"recipe": "mixture.yaml", "max_length": 160}
    evaluation = {"loss_rows": 4, "score_rows": 2, "split": "test"}
    write_tiny_run(tmp_path, data=data, evaluation=evaluation, training={"steps": 2})
    done = moe_medical("launch", "run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {t["task"]: t["metric"] for t in results["tasks"]} == {
        "pubmedqa": "accuracy",
        "ner_ncbi_disease": "entity_f1",
        "zh_cmedqq": "f1_yes",
        "mediqa_mas": "rouge_l",
    }
    assert all(t["loss_before"] > 0 for t in results["tasks"])
