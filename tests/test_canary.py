"""No text of a record is in anything that the verbs print or write: planted words are searched in all of it.

Exempt are the caches of rows and tokens, which hold records on purpose, outside the run's folder and closed
to other users. `generate` is exempt too: it prints answers, for which it was asked.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launches import LAUNCH, checkpoint_steps, launched, run_to_end, survivors
from support.searching import files_holding
from support.tiny import write_tiny_run

from moe_medical.cli import main

LATIN, CHINESE, IDENTITY = "Zyxwv", "甲乙丙丁戊", "MRN4711"
CANARIES = (LATIN, CHINESE, IDENTITY)
STEPS = 12


def _record(kind: str, i: int) -> dict[str, Any]:
    """A record with a canary in every free text; labels of a closed set are no text."""
    english, chinese, said = f"w{i} {LATIN} w{i + 1}", f"患者{i}{CHINESE}头痛", f"{LATIN}{i}"
    fields: dict[str, dict[str, Any]] = {
        "multiple_choice": {
            "question": english,
            "choices": [f"{said} {option}" for option in ("w1", "w2", "w3")],
            "answer": "ABC"[i % 3],
        },
        "ner": {"text": chinese, "entities": [{"type": "症状", "mention": f"{CHINESE}{i}"}]},
        "dialogue": {"dialogue": [{"role": "patient", "text": english}], "reply": f"w{i % 7} {said}"},
        "yes_no": {"question": english, "answer": "yes" if i % 2 else "no"},
    }
    return {"id": f"{IDENTITY}-{i}", **fields[kind]}


BAD = ['{"question": "' + LATIN, json.dumps({"id": IDENTITY, "question": LATIN, "text": CHINESE})]
LANGUAGES = {"multiple_choice": "en", "ner": "zh", "dialogue": "en", "yes_no": "en"}


def write_tasks(folder: Path) -> Path:
    """A task of each kind, two bad lines in every training file, and their mixture."""
    folder.mkdir()
    for kind, language in LANGUAGES.items():
        for split, size in {"train": 24, "validation": 4, "test": 4}.items():
            lines = [json.dumps(_record(kind, i), ensure_ascii=False) for i in range(size)]
            lines += BAD if split == "train" else []
            (folder / f"{kind}.{split}.jsonl").write_text("\n".join(lines) + "\n")
        files = {split: f"{kind}.{split}.jsonl" for split in ("train", "validation", "test")}
        spec = {"name": kind, "kind": kind, "language": language, "source": {"files": files}, "id": "id"}
        spec |= {"choices": "choices"} if kind == "multiple_choice" else {}
        spec |= {"licence": "CC0-1.0", "citation": "made for the tests", "tags": [], "phi": False}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True))
    recipe = folder / "mixture.yaml"
    recipe.write_text(yaml.safe_dump({"name": "canaries", "tasks": [f"{kind}.yaml" for kind in LANGUAGES]}))
    return recipe


def write_run(folder: Path) -> Path:
    run = write_tiny_run(
        folder,
        training={"steps": STEPS, "micro_batch": 4},
        parallel={"ranks": 1},
        checkpoint={"every_steps": 2},
        evaluation={"every_steps": 4, "loss_rows": 4, "score_rows": 2, "max_new_tokens": 3},
        tracking={"wandb": {"enabled": True}, "sinks": ["tensorboard", "trackio"]},
    )
    settings = yaml.safe_load(run.read_text())
    settings["data"] |= {
        "recipe": str(write_tasks(folder / "records")),
        "max_bad_fraction": 0.5,
        "cache": "always",
    }
    run.write_text(yaml.safe_dump(settings))
    return run


def environment(folder: Path) -> dict[str, str]:
    """Everything that a process may write goes below `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(folder / "scratch"),
        "MOE_MEDICAL_CACHE": str(folder / "cache"),
        "WANDB_MODE": "offline",
    }


def lose_a_rank(command: list[str], folder: Path, surroundings: dict[str, str]) -> None:
    """Start the run, and kill its ranks with signal 9 once there is a checkpoint."""
    with launched(command, folder / "killed.txt", **surroundings) as run:
        run.wait_until(lambda: bool(checkpoint_steps(folder / "run")))
        family = run.ranks()
        for process in family:
            process.kill()
        run.end()
    survivors(family)


@pytest.mark.timeout(300)
def test_no_record_text_leaves_the_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, surroundings = write_run(tmp_path), environment(tmp_path)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    recipe, folder = tmp_path / "records" / "mixture.yaml", tmp_path / "run"

    check = ["data", "check", str(recipe)]
    check += ["--base", str(tmp_path / "model"), "--json", str(tmp_path / "check.json")]
    assert main([*check, "--html", str(tmp_path / "check.html")]) in (0, 65)
    assert main(["plan", str(run), "--html", str(tmp_path / "plan.html")]) == 0
    assert main(["plan", str(run), "data.max_bad_fraction=0.0"]) == 65  # a run that bad records end

    lose_a_rank([*LAUNCH, str(run)], tmp_path, surroundings)
    code, output = run_to_end([*LAUNCH, str(run)], tmp_path / "resumed.txt", **surroundings)
    assert (code, "resumed at step" in output) == (0, True), output

    evaluate = [sys.executable, "-m", "moe_medical", "eval", str(run), "--adapter", str(folder / "adapter")]
    code, output = run_to_end(
        [*evaluate, "--json", str(tmp_path / "eval.json")], tmp_path / "eval.txt", **surroundings
    )
    assert code == 0, output
    assert main(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["dashboard", "dump", str(folder), "--out", str(tmp_path / "dashboard.json")]) == 0
    printed = capfd.readouterr()
    (tmp_path / "printed.txt").write_text(printed.out + printed.err)

    written = {path.name for path in tmp_path.rglob("*")}
    assert {"metrics.jsonl", "set_aside.txt", "results.json", "adapter_config.json", "wandb"} <= written
    assert {"check.html", "plan.html", "report.html", "eval.json", "tensorboard", "trackio"} <= written
    assert any((folder / "evaluations").iterdir())
    cache = tmp_path / "cache"
    assert files_holding(CANARIES, tmp_path, exempt=[tmp_path / "records", cache]) == []
    cached = files_holding(CANARIES, cache)
    assert cached  # the search finds what is there
    assert all(_closed_to_others(cache / name, cache) for name in cached)


def _closed_to_others(path: Path, top: Path) -> bool:
    """Whether a folder above `path`, up to `top`, lets nobody else in."""
    folders = [parent for parent in path.parents if parent.is_relative_to(top)]
    return any(stat.S_IMODE(os.stat(parent).st_mode) == 0o700 for parent in folders)
