"""The workspace of a run: its sections and panels, and what is said when the server is not there."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_medical.cli import main
from moe_medical.errors import DataError, MoeMedicalError, StorageError
from moe_medical.tracking.dashboard import dump_dashboard, push_dashboard

SERIES = [
    "tokens", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second",
    "health/data_wait_seconds", "train_loss/ner", "train_loss/qa", "eval_loss/ner", "eval_loss/qa",
    "eval_score/ner", "eval/macro_loss", "eval/macro_score", "regret/ner", "mtl_gain/ner", "mix/ner",
    "mix/qa", "repeats/ner",
    *(f"seesaw/{name}" for name in ("index", "paid", "gain", "regress", "regret_mean", "delta_m")),
    *(f"conflict/{name}" for name in ("rate", "mass", "mean_cosine", "worst_cosine", "strong_pairs")),
    "router/task_information", "router/balance", "router/dead_experts",
]  # fmt: skip
GOLDEN = {
    "Seesaw": [
        "seesaw/index seesaw/paid",
        "seesaw/gain seesaw/regress",
        "seesaw/regret_mean",
        "seesaw/delta_m",
        "^regret/",
        "^mtl_gain/",
    ],
    "Losses": [
        "loss",
        "eval/macro_loss",
        "^train_loss/",
        "^eval_loss/",
        "train_loss/ner eval_loss/ner",
        "train_loss/qa eval_loss/qa",
    ],
    "Scores": ["eval/macro_score", "^eval_score/"],
    "Mixture": ["^mix/", "^repeats/"],
    "Conflict": [
        "conflict/rate conflict/mass",
        "conflict/mean_cosine conflict/worst_cosine",
        "conflict/strong_pairs",
        "table conflict/cosine_table",
    ],
    "Routing": [
        "router/task_information router/balance",
        "router/dead_experts",
        "table router/task_expert_table",
    ],
    "Health": [
        "tokens_per_second",
        "step_seconds",
        "learning_rate",
        "grad_norm",
        "health/data_wait_seconds",
    ],
}


def write_run(folder: Path, series: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    wandb = {"project": "hospital", "entity": None}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"run": {"name": "tiny"}, "tracking": {"wandb": wandb}})
    )
    rows = [{"step": step} | dict.fromkeys(series, 0.5) for step in (1, 2)] if series else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(panel: dict[str, Any]) -> str:
    """What a panel draws: series, a pattern of series, or the table of a chart."""
    config = panel["config"]
    if panel["viewType"] == "Vega2":
        (runs,) = config["userQuery"]["queryFields"]
        return "table " + next(f["args"][0]["value"] for f in runs["fields"] if f["name"] == "summaryTable")
    return config.get("metricRegex") or " ".join(config["metrics"])


def sections_of(text: str) -> dict[str, list[dict[str, Any]]]:
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", SERIES)


def test_sections_and_panels(run: Path) -> None:
    text = dump_dashboard(run)
    sections = {name: [shown(panel) for panel in panels] for name, panels in sections_of(text).items()}
    assert sections == GOLDEN
    assert list(sections) == list(GOLDEN)
    view = json.loads(text)
    assert (view["project"], view["displayName"]) == ("hospital", "Seesaw of tiny")
    assert view["spec"]["section"]["settings"]["xAxis"] == "tokens"


def test_every_line_plot_is_over_tokens_and_no_two_panels_overlap(run: Path) -> None:
    for panels in sections_of(dump_dashboard(run)).values():
        assert {panel["config"]["xAxis"] for panel in panels if panel["viewType"] != "Vega2"} == {"tokens"}
        places = [tuple(panel["layout"].values()) for panel in panels]
        assert len(set(places)) == len(places)


def test_heat_maps_name_chart_and_fields_as_the_sink_does(run: Path) -> None:
    chart = sections_of(dump_dashboard(run))["Conflict"][-1]["config"]
    assert chart["panelDefId"] == "wandb/confusion_matrix/v1"
    assert chart["fieldSettings"] == {"Actual": "down", "Predicted": "across", "nPredictions": "value"}


def test_a_run_has_no_panel_without_series(tmp_path: Path) -> None:
    text = dump_dashboard(write_run(tmp_path / "run", ["tokens", "loss", "train_loss/ner"]))
    sections = {name: [shown(panel) for panel in panels] for name, panels in sections_of(text).items()}
    assert sections == {"Losses": ["loss", "^train_loss/", "train_loss/ner"]}


def test_the_dump_is_written_too(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "workspace.json"
    dump_dashboard(run, out)
    assert list(sections_of(out.read_text())) == list(GOLDEN)
    with pytest.raises(StorageError, match="cannot be written"):
        dump_dashboard(run, tmp_path)


def test_the_verb_writes_json_to_standard_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "dump", str(run)]) == 0
    assert list(sections_of(capsys.readouterr().out)) == list(GOLDEN)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml cannot be read"):
        dump_dashboard(tmp_path)
    with pytest.raises(DataError, match="no numbers yet"):
        dump_dashboard(write_run(tmp_path / "new", []))
    (tmp_path / "config.yaml").write_text("tracking: 3")
    with pytest.raises(DataError, match="not the config of a run"):
        dump_dashboard(tmp_path)


def test_without_a_key_nothing_is_pushed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(MoeMedicalError, match=r"^No W&B API key\. Set WANDB_API_KEY"):
        push_dashboard(run)


@pytest.mark.timeout(120)
def test_a_server_that_is_away_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(MoeMedicalError, match=r"^The W&B server did not take the workspace \(\w+\)"):
        push_dashboard(run, entity="clinic")
