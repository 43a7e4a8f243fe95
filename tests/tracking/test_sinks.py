"""`metrics.jsonl` survives kills, full disks and resumes; W&B may do what it likes."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_medical.errors import DataError, StorageError
from moe_medical.tracking.sinks import JsonlSink, Sinks, WandbSink, has_api_key, read_metrics

KEY = "0" * 40


# --- metrics.jsonl ---


def written(path: Path, *steps: int) -> JsonlSink:
    sink = JsonlSink(path)
    for step in steps:
        sink.log({"tokens": 10 * step, "loss": 1 / (step + 1)}, step)
    return sink


def steps_in(path: Path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


def test_each_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    written(path, 1)
    assert path.read_text() == '{"step": 1, "tokens": 10, "loss": 0.5}\n'


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, 1)
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1
    }  # fmt: skip
    (row,) = read_metrics(path)
    assert math.isnan(row.pop("a"))
    assert row == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}


def test_a_second_process_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 1, 2).close(0)
    written(path, 3)
    assert steps_in(path) == [1, 2, 3]


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2, 2, 3, 4)
    sink.truncate_after(2)
    assert steps_in(path) == [1, 2, 2]
    sink.log({}, 3)
    assert steps_in(path) == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_torn_tail_is_dropped_on_reopening(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    written(whole, 1, 2).close(0)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path = tmp_path / f"cut_{size}.jsonl"
        path.write_bytes(content[:size])
        num_whole = content[:size].count(b"\n")
        assert steps_in(path) == [1, 2][:num_whole]
        written(path, 7)
        assert steps_in(path) == [*[1, 2][:num_whole], 7]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2)
    size = path.stat().st_size
    with (
        largest_file(size + 5),
        pytest.raises(StorageError, match=r"step 3 .* last step written: 2") as error,
    ):
        sink.log({"loss": 1.0}, 3)
    assert error.value.exit_code == 74
    assert path.stat().st_size == size
    sink.log({"loss": 1.0}, 4)
    assert steps_in(path) == [1, 2, 4]


def test_a_truncation_that_does_not_fit_keeps_every_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2)
    with largest_file(5), pytest.raises(StorageError):
        sink.truncate_after(1)
    assert steps_in(path) == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        written(path, 1)


def test_a_path_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        JsonlSink(tmp_path)


def test_writing_after_close_is_a_storage_error(tmp_path: Path) -> None:
    sink = written(tmp_path / "metrics.jsonl", 1)
    sink.close(0)
    sink.close(0)
    with pytest.raises(StorageError):
        sink.log({}, 2)


# --- W&B, a fake ---


class FakeRun:
    def __init__(self, wandb: FakeWandb, mode: str):
        self.wandb, self.mode = wandb, mode
        self.rows: list[dict[str, Any]] = []
        self.definitions: dict[str, dict[str, Any]] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.definitions[name] = options

    def log(self, row: dict[str, Any]) -> None:
        self.wandb.maybe_fail("log", self.mode)
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.wandb.maybe_fail("finish", self.mode)
        self.exit_code = exit_code


class FakeWandb:
    """Records what is asked of it, and fails at the (call, mode) pairs that it is told."""

    def __init__(self, *failing: tuple[str, str]):
        self.failing = set(failing)
        self.runs: list[FakeRun] = []
        self.arguments: list[dict[str, Any]] = []
        self.torn_down = 0

    def maybe_fail(self, call: str, mode: str) -> None:
        if (call, mode) in self.failing:
            raise ConnectionError("a message with 37.2 C and a name")

    def Settings(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def init(self, mode: str, **arguments: Any) -> FakeRun:
        self.maybe_fail("init", mode)
        self.arguments.append({"mode": mode, **arguments})
        self.runs.append(FakeRun(self, mode))
        return self.runs[-1]

    def teardown(self) -> None:
        self.torn_down += 1


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own key must not reach a test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def sink_on(wandb: FakeWandb, run_dir: Path, **options: Any) -> WandbSink:
    return WandbSink(run_dir, {"lr": 1e-4, "hub": {"token": "abc"}}, wandb_module=wandb, **options)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
def test_without_a_key_the_run_is_offline(tmp_path: Path, mode: Any) -> None:
    sink_on(wandb := FakeWandb(), tmp_path, mode=mode)
    assert [run.mode for run in wandb.runs] == ["offline"]


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize(("mode", "used"), [("auto", "online"), ("online", "online"), ("offline", "offline")])
def test_with_a_key_the_mode_decides(tmp_path: Path, mode: Any, used: str) -> None:
    sink_on(wandb := FakeWandb(), tmp_path, mode=mode)
    assert [run.mode for run in wandb.runs] == [used]


@pytest.mark.usefixtures("_key")
def test_auto_heeds_wandb_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink_on(wandb := FakeWandb(), tmp_path)
    assert wandb.runs[0].mode == "offline"


def test_a_key_may_be_in_netrc(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    environ = {"NETRC": str(netrc)}
    assert not has_api_key(environ)
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert has_api_key(environ)
    assert not has_api_key(environ | {"WANDB_BASE_URL": "https://wandb.hospital.example"})


def test_what_wandb_is_told(tmp_path: Path) -> None:
    sink_on(wandb := FakeWandb(), tmp_path, project="p", settings={"init_timeout": 3})
    arguments = wandb.arguments[0]
    settings = vars(arguments.pop("settings"))
    assert arguments.pop("id").startswith(tmp_path.name[:20])
    assert arguments == {
        "mode": "offline", "project": "p", "entity": None, "dir": str(tmp_path), "resume": "allow",
        "reinit": "create_new", "config": {"lr": 1e-4, "hub": {"token": "<redacted>"}},
    }  # fmt: skip
    assert settings["console"] == "off"
    assert all(settings[name] for name in ("disable_code", "disable_git", "x_disable_stats"))
    assert settings["init_timeout"] == 3


def test_metric_definitions(tmp_path: Path) -> None:
    sink_on(wandb := FakeWandb(), tmp_path)
    definitions = wandb.runs[0].definitions
    assert definitions["tokens"] == {}
    assert definitions["eval_loss/*"] == {"step_metric": "tokens", "summary": "min"}
    assert definitions["eval_score/*"] == {"step_metric": "tokens", "summary": "max"}
    assert {"train_loss/*", "mix/*", "repeats/*", "health/*", "router/*"} < definitions.keys()


def test_the_run_id_is_kept_for_a_resume_and_new_for_another_folder(tmp_path: Path) -> None:
    wandb = FakeWandb()
    for folder in ("a", "a", "b"):
        sink_on(wandb, tmp_path / folder)
    first, resumed, other = (arguments["id"] for arguments in wandb.arguments)
    assert first == resumed != other


def test_rows_and_tables(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(), tmp_path)
    sink.log({"tokens": 5, "train_loss/ner": 0.5}, 2)
    sink.table("router/usage", ["task", "share"], [("ner", 0.3)])
    assert wandb.runs[0].rows == [
        {"tokens": 5.0, "train_loss/ner": 0.5, "global_step": 2},
        {"router/usage": (["task", "share"], [["ner", 0.3]])},
    ]


def test_nan_is_logged_except_where_it_would_stay_the_best(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(), tmp_path)
    sink.log({"train_loss/ner": math.nan, "eval_loss/ner": math.nan, "eval_score/ner": 0.5}, 1)
    (row,) = wandb.runs[0].rows
    assert math.isnan(row["train_loss/ner"])
    assert row.keys() == {"train_loss/ner", "eval_score/ner", "global_step"}


def test_close_finishes_and_tears_down(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(), tmp_path)
    sink.close(75)
    sink.close(0)
    assert (wandb.runs[0].exit_code, wandb.torn_down, sink.active) == (75, 1, False)


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("call", ["init", "log"])
def test_online_falls_back_to_offline_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    sink = sink_on(wandb := FakeWandb((call, "online")), tmp_path)
    for step in range(3):
        sink.log({"tokens": step}, step)
    assert wandb.runs[-1].mode == "offline"
    assert [row["global_step"] for row in wandb.runs[-1].rows] == [0, 1, 2]
    assert sink.failures == wandb.torn_down == 1
    assert len(warnings_in(caplog)) == 1


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("call", ["init", "log"])
def test_when_offline_fails_too_the_sink_goes_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    sink = sink_on(FakeWandb((call, "online"), (call, "offline")), tmp_path)
    for step in range(3):
        sink.log({"tokens": step}, step)
    sink.table("t", ["a"], [[1]])
    sink.close(0)
    assert (sink.active, sink.failures) == (False, 2)
    (warning,) = warnings_in(caplog)
    assert "ConnectionError" in warning
    assert "37.2" not in warning


@pytest.mark.usefixtures("_key")
def test_a_failing_finish_opens_no_new_run(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(("finish", "online")), tmp_path)
    sink.close(0)
    assert (len(wandb.runs), sink.failures) == (1, 1)


def test_a_run_folder_that_cannot_be_written_only_disables_wandb(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = sink_on(FakeWandb(), tmp_path / "file" / "run")
    assert (sink.active, sink.failures) == (False, 1)


# --- W&B, the real one, without a server ---

CLOSED_PORT = """
import logging, sys
from pathlib import Path
from moe_medical.tracking.sinks import WandbSink
logging.basicConfig(format="WARNED %(name)s %(message)s")
sink = WandbSink(Path(sys.argv[1]), {}, mode="online", settings={"init_timeout": 0.5})
sink.log({"tokens": 1, "train_loss/ner": 2.5}, 1)
sink.close(0)
sys.exit(sink.failures)
"""


@pytest.mark.timeout(120)
def test_a_closed_port_ends_in_an_offline_file(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    environ = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "NO_PROXY": "*"}
    command = [sys.executable, "-c", CLOSED_PORT, str(tmp_path)]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert child.returncode == 1, child.stderr
    assert child.stderr.count("WARNED moe_medical.tracking.sinks W&B failed") == 1
    (offline,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train_loss/ner" in offline.read_bytes()


# --- fan-out ---


class Recorder:
    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(step)
        if self.error:
            raise self.error

    def close(self, exit_code: int) -> None:
        self.log({}, -exit_code)


def test_every_sink_gets_every_row_and_only_storage_errors_pass(caplog: pytest.LogCaptureFixture) -> None:
    disk, careless, last = Recorder(StorageError("full")), Recorder(KeyError("x")), Recorder()
    sinks = Sinks([disk, careless, last])
    with pytest.raises(StorageError, match="full"):
        sinks.log({"loss": 1.0}, 1)
    with pytest.raises(StorageError, match="full"):
        sinks.close(70)
    assert disk.calls == careless.calls == last.calls == [1, -70]
    assert sinks.failures == 2
    assert warnings_in(caplog) == ["Recorder failed (KeyError); training goes on"]
