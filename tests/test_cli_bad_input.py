"""Bad input: the right exit code, one clear line that names file and key, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.tiny import ROOT, write_tiny_run

from moe_medical import cli


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("template")).parent


class Folder:
    """A tiny run of its own that a test may spoil. `run.dir` is `run`."""

    def __init__(self, template: Path, root: Path) -> None:
        self.root, self.run, self.run_file = root, root / "run", root / "run.yaml"
        for path in filter(Path.is_file, template.rglob("*")):
            copy = root / path.relative_to(template)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        self.run_file.write_text(self.run_file.read_text().replace(str(template), str(root)))

    def edit(self, name: str, **keys: object) -> None:
        path = self.root / name
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))

    def edit_rows(self, name: str, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        path = self.root / "tasks" / name
        rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def files(self) -> set[Path]:
        return set(self.root.rglob("*"))


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Folder:
    return Folder(template, tmp_path)


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, on a machine whose GPUs, if any, it cannot see."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "moe_medical", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _no_safetensors(folder: Folder) -> None:
    (folder.root / "model" / "model.safetensors").unlink()


def _pickled(folder: Folder) -> None:
    model = folder.root / "model"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _missing_column(folder: Folder) -> None:
    folder.edit_rows("even.train.jsonl", lambda row: {"id": row["id"], "input": row["input"], "out": "x"})


def _empty_split(folder: Folder) -> None:
    (folder.root / "tasks" / "even.validation.jsonl").write_text("")


def _no_split(folder: Folder) -> None:
    folder.edit("tasks/even.yaml", source={"files": {"train": "even.train.jsonl"}})


def _no_file(folder: Folder) -> None:
    (folder.root / "tasks" / "even.train.jsonl").unlink()


def _folder_for_file(folder: Folder) -> None:
    _no_file(folder)
    (folder.root / "tasks" / "even.train.jsonl").mkdir()


def _binary_file(folder: Folder) -> None:
    (folder.root / "tasks" / "even.train.jsonl").write_bytes(b"\xff\xfe\x00\x01\n" * 20)


def _no_task_file(folder: Folder) -> None:
    folder.edit("tasks/mixture.yaml", tasks=["evn.yaml"])


def _nothing(folder: Folder) -> None:
    pass


CASES = {
    "unknown task": (_nothing, ["data.tasks.evn.weight=2"], 64, "data.tasks.evn is not a task of {mixture}."),
    "misspelt key": (_nothing, ["training.step=2"], 64, "training.step is not a key of training."),
    "ep_size": (
        _nothing,
        ["parallel.ep_size=3"],
        64,
        "parallel.ep_size must divide adapters.num_experts (4), got 3. Try 2.\n"
        "  parallel.ep_size must divide parallel.ranks (2), got 3. Try 2.",
    ),
    "pattern": (
        _nothing,
        ["adapters.lora=['.*qproj']"],
        64,
        "adapters.lora[0] must match a linear layer's full name, got '.*qproj'.",
    ),
    "too long a run": (
        _nothing,
        ["data.mix.max_repeats=0.1"],
        65,
        "the run asks for 48 samples, but max_repeats allows its tasks only 10.",
    ),
    "no weights": (
        _no_safetensors,
        [],
        64,
        "model.name must be a folder with *.safetensors, got '{root}/model'.",
    ),
    "pickle": (_pickled, [], 77, "model.name: {root}/model has only pickled weights (pytorch_model.bin)"),
    "no task file": (_no_task_file, [], 64, "{mixture}: tasks[0] matches no file, got 'evn.yaml'."),
    "column": (
        _missing_column,
        [],
        65,
        "{even}: target: column 'output' is not in {root}/tasks/even.train.jsonl; columns there: id,",
    ),
    "empty split": (
        _empty_split,
        [],
        65,
        "{even}: source.files.validation: {root}/tasks/even.validation.jsonl holds no record.",
    ),
    "no split": (
        _no_split,
        [],
        65,
        "{even}: source.files.validation is not given, but this run needs that split.",
    ),
    "no file": (
        _no_file,
        [],
        65,
        "{even}: source.files.train matches no file: {root}/tasks/even.train.jsonl",
    ),
    "folder": (
        _folder_for_file,
        [],
        65,
        "{even}: source.files.train: cannot read {root}/tasks/even.train.jsonl (Is a directory).",
    ),
    "binary": (
        _binary_file,
        [],
        65,
        "{even}: source.files.train: 20 of 20 records of {root}/tasks/even.train.jsonl cannot be used",
    ),
}


@pytest.mark.parametrize("verb", ["plan", "launch"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_stops_before_any_rank_starts(
    name: str, verb: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, overrides, code, line = CASES[name]
    spoil(folder)
    before = folder.files()
    assert cli.main([verb, str(folder.run_file), *overrides]) == code
    told = capsys.readouterr().err.strip().splitlines()
    tasks = folder.root / "tasks"
    wanted = line.format(root=folder.root, mixture=tasks / "mixture.yaml", even=tasks / "even.yaml")
    head, lines = told[:-1], told[-1:]
    if code == 64:  # a header, and one line per problem
        head, lines = told[:1], told[1:]
        assert head[0].endswith(f"has {len(lines)} problem{'s' * (len(lines) > 1)}:")
    assert len(head) == (code == 64)
    assert "\n".join(lines).strip().startswith(wanted)
    assert len(lines) == 1 + wanted.count("\n")
    assert folder.files() == before


def test_run_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "no.yaml"
    assert cli.main(["launch", str(path)]) == 64
    told = capsys.readouterr().err.strip().splitlines()
    assert told == [
        f"{path} has 1 problem:",
        f"  {path} must be a readable file, got 'No such file or directory'.",
    ]


def test_a_stray_rank_variable_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    assert cli.main(["plan", str(tmp_path / "no.yaml")]) == 64
    assert "must be a readable file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["trian", "run.yaml"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: VERB"),
        (["plan"], "the following arguments are required: RUN.yaml"),
        (["generate", "adapter", "--batch-rows", "0"], "argument --batch-rows: must be at least 1, got 0"),
        (["generate", "adapter", "--batch-rows", "x"], "argument --batch-rows: invalid positive value: 'x'"),
    ],
)
def test_wrong_command_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 64
    usage, *_, last = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: moe-medical")
    assert reason in last


def test_run_folder_that_cannot_be_made(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    override = f"run.dir={folder.run_file}/run"
    assert cli.main(["launch", str(folder.run_file), override]) == 64
    line = f"  run.dir must be a folder that can be written, got '{folder.run_file}/run'.\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_process_ends_with_the_code_and_the_line_alone(folder: Folder) -> None:
    _empty_split(folder)
    done = _process("plan", str(folder.run_file))
    assert (done.returncode, done.stdout) == (65, "")
    even = folder.root / "tasks" / "even"
    assert done.stderr == f"{even}.yaml: source.files.validation: {even}.validation.jsonl holds no record.\n"


def test_an_error_of_all_ranks_is_told_once(folder: Folder) -> None:
    """Two ranks find no GPU; whichever is first tells it."""
    before = folder.files()
    done = _process("launch", str(folder.run_file), "parallel.device=cuda")
    assert done.returncode == 64
    head, line = done.stderr.splitlines()
    assert head == "parallel has 1 problem:"
    assert re.match(r"  parallel\.device asks for GPU [01] of this machine, which has 0, got 'cuda'\.", line)
    assert folder.files() == before


def test_resume_must_without_a_checkpoint(folder: Folder) -> None:
    before = folder.files()
    done = _process("launch", str(folder.run_file), "checkpoint.resume=must", "parallel.ranks=1")
    assert done.returncode == 66
    assert done.stderr == f"checkpoint.resume=must, but {folder.run}/checkpoints has no valid checkpoint\n"
    assert folder.files() == before
