"""The documents tell the truth: commands run, tables come from measured results, paths exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from golden.cases import all_names
from support import served
from support.exporting import write_adapter
from support.foreign import write_theirs
from support.tiny import ROOT, write_tiny_model, write_tiny_run

import moe_medical
from moe_medical import cli
from moe_medical.config import MoloraConfig, load_config
from moe_medical.ports import free_port

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.timeout(600)
def test_the_commands_of_own_data_run(tmp_path: Path) -> None:
    script = "\n".join(
        re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
    )
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "MOE_MEDICAL_HOME": str(ROOT),
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "runs/triage/results.json").read_text())
    assert results["macro_loss_after"] < results["macro_loss_before"]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["prompt"].startswith("Which ward")
    assert answer["answer"]


@pytest.mark.timeout(600)
def test_the_commands_of_seesaw_run(tmp_path: Path) -> None:
    run = write_tiny_run(
        tmp_path,
        run={"name": "tiny", "dir": "runs/A"},
        training={"steps": 4},
        evaluation={"every_steps": 2, "score_rows": 2, "max_new_tokens": 2},
        parallel={"ranks": 1},
    )
    moe_medical = f"{sys.executable} -m moe_medical"
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "seesaw.md").read_text(), re.DOTALL)
    script = f"moe-medical launch {run}\n" + "\n".join(blocks)
    names = {
        "RUN.yaml tracking": f"{run} run.dir=runs/B tracking",
        "RUN.yaml": str(run),
        "REFERENCE.json": str(tmp_path / "runs/tiny-baseline/reference.json"),
        "runs/NAME": "runs/A",
        "moe-medical ": f"{moe_medical} ",
    }
    for name, value in names.items():
        script = script.replace(name, value)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/A/report.html").stat().st_size > 500_000
    assert set(json.loads((tmp_path / "scores.json").read_text())["tasks"]) == {"last_word", "even"}
    assert "mtl_gain/even" in (tmp_path / "runs/B/metrics.jsonl").read_text()


@pytest.mark.timeout(600)
def test_the_way_to_a_wrong_loss_runs(tmp_path: Path) -> None:
    run = write_tiny_run(
        tmp_path,
        evaluation={"score_rows": 0, "loss_rows": 2},
        adapters={"num_experts": 4, "top_k": 2, "rank": 4},
    )
    run.rename(tmp_path / "RUN.yaml")
    page = (ROOT / "docs" / "wrong_loss.md").read_text(encoding="utf-8")
    step, routing, compare = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (launch,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

    def printed(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shown = printed([sys.executable, "-c", step + routing])
    assert len(re.findall(r"^\w+ row \d+ epoch 0$", shown, re.MULTILINE)) == 3
    assert re.search(r"^target: (yes|no|w\d+)", shown, re.MULTILINE)
    assert "gradient norm " in shown
    assert re.search(r"^mean token loss \d+\.\d{4}$", shown, re.MULTILINE)
    printed(["bash", "-euc", launch.replace("moe-medical", f"{sys.executable} -m moe_medical")])
    rows = [line.split() for line in printed([sys.executable, "-c", compare]).splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for _, _, loss_a, loss_b, _, norm_a, norm_b in rows:
        assert float(loss_a) == pytest.approx(float(loss_b), rel=1e-4)
        assert float(norm_a) == pytest.approx(float(norm_b), rel=1e-3)


def test_the_cases_of_the_page_on_wrong_losses_are_all_golden_cases() -> None:
    page = (ROOT / "docs" / "wrong_loss.md").read_text(encoding="utf-8")
    table = page[page.index("| what you doubt") : page.index("## 2.")]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == set(all_names())


def test_a_notebook_imports_everything_by_name_and_nothing_before() -> None:
    look = "import sys, moe_medical as mm; assert 'torch' not in sys.modules; print(*mm.__all__)"
    names = subprocess.check_output([sys.executable, "-c", look], text=True).split()
    assert [name for name in names if not hasattr(moe_medical, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Trainor'"):
        moe_medical.Trainor  # noqa: B018


def test_the_commands_of_export_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_model(tmp_path / "base")
    gated = MoloraConfig(router="task", num_tasks=3, num_experts=4, top_k=0, rank=4)
    write_adapter(tmp_path / "runs" / "gated" / "adapter", base, gated)
    write_adapter(tmp_path / "runs" / "routed" / "adapter", base, MoloraConfig(num_experts=4, rank=4))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "folder")
    page, names = (ROOT / "docs" / "export.md").read_text(), {}
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            exec(block, names)
        for command in block.splitlines() if language == "bash" else ():
            assert cli.main(shlex.split(command)[1:]) == 0, command
    assert names["answer"].shape[1] > names["batch"]["input_ids"].shape[1]
    assert (tmp_path / "lora" / "all" / "vllm_lora_modules.txt").is_file()


def test_the_commands_of_import_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_model(tmp_path / "base")
    write_theirs(tmp_path / "theirs", base)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "import.md").read_text()
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines()
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    made = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert made == ["lora", "ming", "mixlora", "moelora"]


def test_the_commands_of_adapters_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"training": {"steps": 1}, "parallel": {"ranks": 1}, "evaluation": {"score_rows": 0}}
    run = write_tiny_run(tmp_path, run={"name": "tiny", "dir": "runs/A"}, **settings)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "adapters.md").read_text()
    for command in "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines():
        assert cli.main([str(run) if word == "RUN.yaml" else word for word in shlex.split(command)[1:]]) == 0
    made = json.loads((tmp_path / "runs/A/adapter/adapter_config.json").read_text())["config"]
    assert (made["experts"], made["labels"]) == ("ffn", ["last_word", "even"])
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)):
        other = tmp_path / f"{number}.yaml"
        other.write_text(yaml.safe_dump({**yaml.safe_load(run.read_text()), **yaml.safe_load(block)}))
        load_config(other)


@pytest.mark.timeout(600)
def test_the_commands_of_serving_run(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    served.write_adapter(tmp_path / "ADAPTER", model, served.gate_config())
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    script = "\n".join(blocks).replace("8000", str(free_port()))
    script = script.replace("moe-medical ", f"{sys.executable} -m moe_medical ")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer.get("task") for answer in answers] == [None, "size"]
    reply = json.loads((tmp_path / "reply.json").read_text())
    assert reply["choices"][0]["message"]["content"] == answers[1]["answer"]
    assert "data: [DONE]" in done.stdout


def test_pages_show_what_was_measured() -> None:
    check = subprocess.run(
        [sys.executable, "benchmarks/render_pages.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_path_on_a_page_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:moe_medical|tests|docs|benchmarks|launch|examples|data_recipes|ds_configs)/[\w./-]*\w)`",
        page.read_text(),
    )
    linked = re.findall(r"\]\(([\w./-]+\.\w+)\)", page.read_text())
    missing = [p for p in named if "NAME" not in p and not (ROOT / p).exists()]
    missing += [p for p in linked if not (page.parent / p).exists() and not (ROOT / p).exists()]
    assert not missing


def test_make_knows_the_commands_of_the_readme() -> None:
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
