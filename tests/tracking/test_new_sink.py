"""A sink of somebody else's: what CONTRIBUTING.md says suffices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from support.tiny import write_tiny_run

from moe_medical.config import load_config, rules
from moe_medical.errors import ConfigError
from moe_medical.tracking.sinks import Sink, open_sinks
from moe_medical.tracking.sinks.opening import OPTIONAL, OptionalSink


class CsvSink(Sink):
    """Writes the loss of each step as `step,loss`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = ["step,loss"]

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._lines.append(f"{step},{values['loss']}")

    def close(self, exit_code: int) -> None:
        self._path.write_text("\n".join(self._lines), encoding="utf-8")


def test_a_new_sink_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        OPTIONAL, "csv", OptionalSink("CSV", lambda config, root, _: CsvSink(root / "loss.csv"))
    )
    monkeypatch.setattr(rules, "SINKS", (*rules.SINKS, "csv"))
    config = load_config(write_tiny_run(tmp_path), ["tracking.sinks=[csv]"])
    sinks = open_sinks(config, tmp_path, 0)
    sinks.log({"loss": 2.5}, 1)
    sinks.log({"loss": 2.25}, 2)
    sinks.close(0)
    assert (tmp_path / "loss.csv").read_text() == "step,loss\n1,2.5\n2,2.25"


def test_without_its_name_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.sinks\[0\] must be one of tensorboard, trackio"):
        load_config(write_tiny_run(tmp_path), ["tracking.sinks=[csv]"])
