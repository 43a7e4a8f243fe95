"""What W&B is told, and what happens when it fails, on a stand-in that records and fails as asked."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_medical.tracking.sinks import HEAT_MAP, HEAT_MAP_FIELDS, WandbSink, has_api_key, import_wandb

KEY = "0" * 40


class FakeRun:
    def __init__(self, wandb: FakeWandb, mode: str):
        self.wandb, self.mode = wandb, mode
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[tuple[str, str, dict[str, Any]]] = []
        self.definitions: dict[str, dict[str, Any]] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.definitions[name] = options

    def log(self, row: dict[str, Any]) -> None:
        self.wandb.maybe_fail("log", self.mode)
        self.rows.append(row)

    def alert(self, title: str, text: str, **options: Any) -> None:
        self.wandb.maybe_fail("alert", self.mode)
        self.alerts.append((title, text, options))

    def finish(self, exit_code: int) -> None:
        self.wandb.maybe_fail("finish", self.mode)
        self.exit_code = exit_code


class FakeWandb:
    """Records what is asked of it, and fails at the (call, mode) pairs that it is told."""

    AlertLevel = SimpleNamespace(WARN="WARN")

    def __init__(self, *failing: tuple[str, str]):
        self.failing = set(failing)
        self.times_left = math.inf
        self.runs: list[FakeRun] = []
        self.arguments: list[dict[str, Any]] = []
        self.torn_down = 0

    def heal_after(self, times: int) -> None:
        self.times_left = times

    def maybe_fail(self, call: str, mode: str) -> None:
        if (call, mode) in self.failing and self.times_left:
            self.times_left -= 1
            raise ConnectionError("a message with 37.2 C and a name")

    def Settings(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def plot_table(self, chart: str, table: Any, fields: dict[str, str], strings: dict[str, str]) -> Any:
        return chart, table, fields, strings

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
    netrc.write_text(f"machine api.forge.coreweave.com login user password {KEY}\n")
    assert has_api_key(environ)
    assert not has_api_key(environ | {"WANDB_BASE_URL": "https://wandb.hospital.example"})


def test_what_wandb_is_told(tmp_path: Path) -> None:
    sink_on(
        wandb := FakeWandb(),
        tmp_path,
        project="p",
        name="n",
        group="g",
        tags=["t", "hf_" + "a1" * 12],
        settings={"init_timeout": 3},
    )
    arguments = wandb.arguments[0]
    settings = vars(arguments.pop("settings"))
    assert arguments.pop("id").startswith(tmp_path.name[:20])
    assert arguments == {
        "mode": "offline", "project": "p", "entity": None, "dir": str(tmp_path), "resume": "allow",
        "reinit": "create_new", "config": {"lr": 1e-4, "hub": {"token": "<redacted>"}},
        "name": "n", "group": "g", "tags": ["t", "<redacted>"], "job_type": "train",
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
    assert definitions["eval/macro_loss"] == {"step_metric": "tokens", "summary": "min"}
    assert definitions["eval/macro_score"] == {"step_metric": "tokens", "summary": "max"}
    assert {"seesaw/*", "regret/*", "mtl_gain/*", "conflict/*"} < definitions.keys()
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
    sink.table("seesaw/tasks", ["task", "regret"], [("ner", 0.3)], 2)
    assert wandb.runs[0].rows == [
        {"tokens": 5.0, "train_loss/ner": 0.5, "global_step": 2},
        {"seesaw/tasks": (["task", "regret"], [["ner", 0.3]]), "table_step": 2},
    ]


def test_a_heat_map_has_no_cell_without_a_number(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(), tmp_path)
    sink.heat_map("conflict/cosine", [("a", "b", -0.5), ("a", "c", None), ("b", "c", math.nan)], 4)
    table = (["down", "across", "value"], [["a", "b", -0.5]])
    chart = (HEAT_MAP, table, HEAT_MAP_FIELDS, {"title": "conflict/cosine"})
    assert wandb.runs[0].rows == [{"conflict/cosine": chart, "table_step": 4}]


@pytest.mark.parametrize("alerts", [True, False])
def test_alerts_are_sparse_and_can_be_turned_off(tmp_path: Path, alerts: bool) -> None:
    sink = sink_on(wandb := FakeWandb(), tmp_path, alerts=alerts)
    sink.alert("task regressed", "ner by 3 %")
    told = [("task regressed", "ner by 3 %", {"level": "WARN", "wait_duration": 1800})]
    assert wandb.runs[0].alerts == (told if alerts else [])


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
    sink.table("t", ["a"], [[1]], 3)
    sink.close(0)
    assert (sink.active, sink.failures) == (False, 3)
    first, last = warnings_in(caplog)
    assert "ConnectionError" in first
    assert last == "W&B is off after 3 failures"
    assert "37.2" not in first


@pytest.mark.usefixtures("_key")
def test_a_failing_finish_opens_no_new_run(tmp_path: Path) -> None:
    sink = sink_on(wandb := FakeWandb(("finish", "online")), tmp_path)
    sink.close(0)
    assert (len(wandb.runs), sink.failures) == (1, 1)


def test_a_run_folder_that_cannot_be_written_only_disables_wandb(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = sink_on(FakeWandb(), tmp_path / "file" / "run")
    assert (sink.active, sink.failures) == (False, 1)


@pytest.mark.parametrize("failing", ["log", "alert"])
def test_offline_gets_one_more_file(tmp_path: Path, failing: str) -> None:
    """As when W&B's own process has been killed."""
    wandb = FakeWandb((failing, "offline"))
    sink = sink_on(wandb, tmp_path)
    wandb.heal_after(1)
    sink.log({"tokens": 1}, 1)
    sink.alert("a", "b")
    assert [run.mode for run in wandb.runs] == ["offline", "offline"]
    assert (len(wandb.runs[-1].alerts), sink.failures, sink.active) == (1, 1, True)


@pytest.mark.parametrize(("said", "used"), [(None, "false"), ("true", "true")])
def test_wandb_reports_its_own_errors_only_where_asked(
    monkeypatch: pytest.MonkeyPatch, said: str | None, used: str
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", said or "")
    if said is None:
        monkeypatch.delenv("WANDB_ERROR_REPORTING")
    import_wandb()
    assert os.environ["WANDB_ERROR_REPORTING"] == used
