"""Fan-out, the queue before sinks that may hang or fail, and what a config opens."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_medical.config import RunConfig
from moe_medical.errors import StorageError
from moe_medical.tracking.sinks import Background, Cell, Sink, Sinks, open_sinks, read_metrics, summary_of


class Recorder(Sink):
    """Remembers what it is given; raises an error each time if it has one."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._take("log", dict(values), step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._take("table", name, list(columns), [list(row) for row in rows], step)

    def heat_map(self, name: str, cells: Sequence[Cell], step: int) -> None:
        self._take("heat_map", name, list(cells), step)

    def alert(self, title: str, text: str) -> None:
        self._take("alert", title, text)

    def close(self, exit_code: int) -> None:
        self._take("close", exit_code)

    def _take(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error:
            raise self.error


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def tell_everything(sink: Sink) -> list[tuple[Any, ...]]:
    """One call of each kind; what a `Recorder` makes of them."""
    sink.log({"loss": 1.0}, 1)
    sink.table("seesaw/tasks", ["task", "regret"], [["ner", 0.5]], 2)
    sink.heat_map("conflict/cosine", [("ner", "qa", -0.5)], 3)
    sink.alert("task regressed", "ner: 3 %")
    return [
        ("log", {"loss": 1.0}, 1),
        ("table", "seesaw/tasks", ["task", "regret"], [["ner", 0.5]], 2),
        ("heat_map", "conflict/cosine", [("ner", "qa", -0.5)], 3),
        ("alert", "task regressed", "ner: 3 %"),
    ]


@pytest.mark.parametrize(
    ("series", "kept"),
    [
        ("eval_loss/ner", "min"),
        ("eval_score/ner", "max"),
        ("eval/macro_loss", "min"),
        ("eval/macro_score", "max"),
        ("eval/other", "last"),
        ("seesaw/index", "last"),
        ("tokens", "last"),
    ],
)
def test_summaries(series: str, kept: str) -> None:
    assert summary_of(series) == kept


# Fan-out


def test_every_sink_gets_everything_and_only_storage_errors_pass(caplog: pytest.LogCaptureFixture) -> None:
    disk, careless, last = Recorder(StorageError("full")), Recorder(KeyError("x")), Recorder()
    sinks = Sinks([disk, careless, last])
    for call in (lambda: sinks.log({}, 1), lambda: sinks.alert("a", "b"), lambda: sinks.close(70)):
        with pytest.raises(StorageError, match="full"):
            call()
    assert disk.calls == careless.calls == last.calls == [("log", {}, 1), ("alert", "a", "b"), ("close", 70)]
    assert sinks.failures == 3
    assert warnings_in(caplog) == ["Recorder failed (KeyError); training goes on"]


def test_calls_of_each_kind_pass_through() -> None:
    recorder = Recorder()
    assert tell_everything(Sinks([recorder])) == recorder.calls


# Behind a queue


def test_a_background_sink_gets_everything_in_order() -> None:
    recorder = Recorder()
    sink = Background("test", lambda: recorder)
    told = tell_everything(sink)
    sink.close(3)
    assert recorder.calls == [*told, ("close", 3)]
    sink.close(3)
    sink.log({}, 9)
    assert len(recorder.calls) == len(told) + 1


def test_rows_are_those_of_the_call_even_if_the_caller_goes_on_writing() -> None:
    opened, recorder = threading.Event(), Recorder()
    sink = Background("test", lambda: opened.wait() and recorder)
    row = {"loss": 1.0}
    sink.log(row, 1)
    row["loss"] = 2.0
    opened.set()
    sink.close(0)
    assert recorder.calls[0] == ("log", {"loss": 1.0}, 1)


def test_a_sink_that_hangs_delays_nobody_and_the_oldest_rows_go(caplog: pytest.LogCaptureFixture) -> None:
    release, recorder = threading.Event(), Recorder()
    sink = Background("test", lambda: release.wait() and recorder, capacity=10)
    for step in range(100):
        sink.log({}, step)  # would never come back if it waited
    assert sink.dropped == 90
    release.set()
    sink.close(0)
    assert [call[2] for call in recorder.calls[:-1]] == list(range(90, 100))
    assert warnings_in(caplog) == ["test: 90 rows lost. metrics.jsonl is complete."]


def test_a_sink_that_hangs_for_ever_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    never = threading.Event()
    sink = Background("test", lambda: never.wait() and Recorder(), last_wait_seconds=0.01)
    sink.log({}, 1)
    sink.close(0)
    assert warnings_in(caplog) == [
        "test does not answer and is left behind",
        "test: 1 rows lost. metrics.jsonl is complete.",
    ]


def test_every_failure_is_counted_and_the_first_is_told(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(OSError("a message with 37.2 C and a name"))
    sink = Background("test", lambda: recorder)
    told = tell_everything(sink)
    sink.close(0)
    assert [call[0] for call in recorder.calls] == [call[0] for call in told] + ["close"]
    assert sink.failures == 5
    assert warnings_in(caplog) == ["test failed (OSError); training goes on"]


def test_a_sink_that_cannot_be_opened_only_loses_its_rows(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Sink:
        raise ImportError("no such package")

    sink = Background("test", fail)
    sink.log({}, 1)
    sink.close(0)
    assert (sink.failures, sink.dropped) == (1, 1)
    assert warnings_in(caplog) == [
        "test failed (ImportError); training goes on",
        "test: 1 rows lost. metrics.jsonl is complete.",
    ]


# What a config opens


def config_with(folder: Path, *names: str) -> RunConfig:
    config = RunConfig()
    config.run.name, config.run.dir = "tiny", str(folder)
    config.tracking.wandb.enabled = False
    config.tracking.sinks = list(names)
    return config


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (3, [0, 3])])
def test_a_resumed_run_keeps_the_rows_before_its_checkpoint(
    tmp_path: Path, first_step: int, kept: list[int]
) -> None:
    earlier = open_sinks(config_with(tmp_path), tmp_path, 0)
    for step in (0, 3, 5):
        earlier.log({"loss": 1.0}, step)
    earlier.close(0)
    sinks = open_sinks(config_with(tmp_path), tmp_path, first_step)
    sinks.log({"loss": math.nan}, 4)
    sinks.close(0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*kept, 4]


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    assert len(open_sinks(config_with(tmp_path), tmp_path, 0)) == 1
    named = open_sinks(config_with(tmp_path, "tensorboard"), tmp_path, 0)
    named.close(0)
    assert [sink.name for sink in named if isinstance(sink, Background)] == ["TensorBoard"]
