"""The report of a run: complete, self-contained, and with the run's own numbers."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launches import run_to_end
from support.report_runs import LongRun
from support.tiny import write_tiny_run

from moe_medical.errors import ConfigError, DataError
from moe_medical.tracking.report import MOST_RUNS, write_report
from moe_medical.tracking.run_paths import RunPaths

OF_ONE_RUN = [
    *("seesaw", "macro_loss", "task_losses", "last_scores", "task_scores", "mixture_over_time", "mixture"),
    *("conflicts", "conflict_series", "task_experts", "expert_load", "shared_experts", "router_series"),
    "health",
]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LongRun().write(tmp_path_factory.mktemp("runs") / "default")


@pytest.fixture(scope="module")
def page(long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report([long_run], tmp_path_factory.mktemp("page") / "page.html", None).read_text()


def charts(page: str) -> dict[str, dict]:
    """Name -> Vega-Lite specification."""
    found = re.findall(r'<script type="application/json" data-chart="([^"]+)">(.*?)</script>', page, re.S)
    return {name: json.loads(text) for name, text in found}


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def tables(page: str) -> list[list[list[str]]]:
    """Cells of the rows, headings included, of every table."""
    found = re.findall(r"<table>(.*?)</table>", without_scripts(page), re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.S) for table in found]
    return [
        [[_text(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", r, re.S)] for r in rs] for rs in rows
    ]


def _text(cell: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", cell))


def table_with(page: str, heading: str) -> list[dict[str, str]]:
    table = next(t for t in tables(page) if heading in t[0])
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def sentences(page: str) -> str:
    return "\n".join(_text(item) for item in re.findall(r"<li>(.*?)</li>", without_scripts(page), re.S))


def test_every_chart_is_there_once(page: str) -> None:
    assert sorted(charts(page)) == sorted(OF_ONE_RUN)
    assert len(re.findall(r'id="chart-', page)) == len(OF_ONE_RUN)


def test_the_page_needs_nothing_else(page: str) -> None:
    body = without_scripts(page)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", body)
    assert not re.search(r"<(?:img|iframe|link|object|embed|video|audio)\b", body)
    tags = re.findall(r"<script[^>]*>", re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.S))
    assert all("src" not in tag for tag in tags)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', body))
    assert "default-src 'none'" in body
    assert "url" not in json.dumps([spec.get("data", {}) for spec in charts(page).values()])


def test_the_libraries_are_in_the_page_once_and_it_stays_small(page: str) -> None:
    assert page.count("window.vegaEmbed") == 1
    assert len(page.encode()) < 2_000_000


def test_the_table_has_the_numbers_of_the_files(page: str, long_run: Path) -> None:
    paths = RunPaths(long_run)
    evaluations = [json.loads(p.read_text()) for p in paths.of_each_step(paths.evaluation(0))]
    last_row = json.loads(paths.metrics.read_text().splitlines()[-1])
    rows = {row["task"]: row for row in table_with(page, "MTL gain")}
    assert set(rows) == set(evaluations[0]["tasks"])
    for task, row in rows.items():
        seen = [e["tasks"][task] for e in evaluations]
        losses = [t["loss"] for t in seen]
        assert [row[k] for k in ("first", "best", "last")] == [
            f"{loss:.3f}" for loss in (losses[0], min(losses), losses[-1])
        ]
        assert row["regret"] == f"{losses[-1] / min(losses) - 1:.1%}"
        assert row["score"] == f"{seen[-1]['score']:.3f}"
        assert row["95 % interval"] == f"{seen[-1]['score_low']:.3f} – {seen[-1]['score_high']:.3f}"
        assert row["share"] == f"{last_row[f'mix/{task}']:.1%}"
        gain = last_row.get(f"mtl_gain/{task}")
        assert row["MTL gain"] == ("" if gain is None else f"{gain:+.1%}")


def test_the_tasks_that_pay_are_named_and_stand_first(page: str, long_run: Path) -> None:
    payers = set(LongRun().names[-3:])
    assert "24 of 24 tasks improved" in sentences(page)
    told = next(line for line in sentences(page).splitlines() if "ended above their own best" in line)
    assert told.startswith("3 of 24")
    assert all(task in told for task in payers)
    order = re.search(r"task,step,beyond,change\\n(.*?)\"", json.dumps(charts(page)["seesaw"]))
    assert order is not None
    seen = list(dict.fromkeys(line.split(",")[0] for line in order[1].split("\\n") if line))
    assert set(seen[:3]) == payers


def test_decisions_and_shared_experts_are_told(page: str) -> None:
    decisions = table_with(page, "decision")
    assert [d["decision"] for d in decisions].count("mixture") == 5
    assert {"reweight", "freeze"} <= {d["decision"] for d in decisions}
    assert re.search(r"conflict \(cosine -0\.\d\d\) and share expert \d", sentences(page))


def test_nothing_of_the_machine_gets_in(page: str, long_run: Path) -> None:
    assert str(long_run.parent) not in page
    assert "/tmp" not in page
    assert {row["setting"]: row["default"] for row in table_with(page, "setting")}["model.name"] == "model"


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [
        LongRun(tasks=5, evaluations=4).write(tmp_path / "first"),
        LongRun(tasks=5, evaluations=4, learns=1.5, overrides={"data.mix.rule": "uniform"}).write(
            tmp_path / "second"
        ),
        LongRun(tasks=5, evaluations=4, looks=False).write(tmp_path / "again" / "first"),
    ]
    page = write_report(runs, tmp_path / "page.html", None).read_text()
    assert table_with(page, "first (2)")[0]["setting"] == "data.mix.rule"
    assert "second against first: of 5 tasks 5 end better by more than noise" in sentences(page)
    assert "first (2) against first: of 5 tasks 0 end better by more than noise, 0 worse." in sentences(page)
    names = set(charts(page))
    assert {"last_losses", "macro_loss", "first.seesaw", "second.conflicts", "first-2.seesaw"} <= names
    assert "first-2-.conflicts" not in names


def test_a_run_against_itself_with_other_probe_rows_is_not_judged(tmp_path: Path) -> None:
    runs = [LongRun(tasks=3, evaluations=2).write(tmp_path / name) for name in ("a", "b")]
    for path in (runs[1] / "evaluations").iterdir():
        told = json.loads(path.read_text())
        for task in told["tasks"].values():
            task["row_losses"] = task["row_losses"][:-1]
        path.write_text(json.dumps(told))
    page = write_report(runs, tmp_path / "page.html", None).read_text()
    assert "no probe rows in common" in sentences(page)


def keep_only(*names: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(folder).parts[0] not in names:
                path.unlink()

    return drop


def damage(folder: Path) -> None:
    paths = RunPaths(folder)
    paths.of_each_step(paths.evaluation(0))[1].write_text("{")
    paths.of_each_step(paths.conflict(0))[-1].write_text('{"step": 1}')
    with paths.metrics.open("a") as file:
        file.write('{"step": 99999, "loss')
    with paths.decisions.open("a") as file:
        file.write('{"step": 1')


def not_finite(folder: Path) -> None:
    paths = RunPaths(folder)
    lines = paths.metrics.read_text().splitlines()
    row = json.loads(lines[-1]) | {"eval/macro_loss": "NaN", "grad_norm": "Infinity", "step": 99999}
    paths.metrics.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    last = paths.of_each_step(paths.evaluation(0))[-1]
    told = json.loads(last.read_text())
    first = next(iter(told["tasks"].values()))
    first["loss"], first["row_losses"] = float("nan"), [float("nan")] * len(first["row_losses"])
    last.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (keep_only("config.yaml"), "not evaluated yet"),
        (keep_only("metrics.jsonl"), "4 of 4 tasks improved"),
        (keep_only("metrics.jsonl", "evaluations"), "4 of 4 tasks improved"),
        (damage, "2 damaged files of the run were left out: evaluations/step-"),
        (not_finite, "not a finite number for 1: "),
    ],
)
def test_a_run_that_lacks_something_has_a_report(
    change: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    run = LongRun(tasks=4, evaluations=8, payers=0).write(tmp_path / "run")
    change(run)
    page = write_report([run]).read_text()
    assert expected in sentences(page)
    for spec in charts(page).values():
        assert not re.search("NaN|Infinity", json.dumps(spec))


@pytest.mark.parametrize("tasks", [1, 2, 40])
def test_any_number_of_tasks(tasks: int, tmp_path: Path) -> None:
    run = LongRun(tasks=tasks, evaluations=6).write(tmp_path / "run")
    page = write_report([run], None, None).read_text()
    assert len(table_with(page, "first to last")) == tasks
    assert len(page.encode()) < 3_000_000


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    run = LongRun(tasks=3, evaluations=3, looks=False).write(tmp_path / "run")
    for path in [run / "metrics.jsonl", *(run / "evaluations").iterdir()]:
        path.write_text(path.read_text().replace('cmeie"', f'{name}"'))
    page = write_report([run], None, None).read_text()
    assert name not in page
    assert "alert(1)" in page
    assert name in json.dumps(charts(page)["task_losses"])


def test_pictures_have_the_names_of_the_charts(tmp_path: Path) -> None:
    runs = [LongRun(tasks=2, evaluations=3, looks=False).write(tmp_path / name) for name in ("a", "b c")]
    page = write_report(runs, tmp_path / "page.html", tmp_path / "png").read_text()
    pictures = {path.name.removesuffix(".png"): path for path in (tmp_path / "png").iterdir()}
    assert set(pictures) == set(charts(page))
    assert "b-c.seesaw" in pictures
    for path in pictures.values():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 3000
        assert str(tmp_path).encode() not in content


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no run folder: it has neither config\.yaml nor metrics\.jsonl"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match=rf"must be 1 to {MOST_RUNS} folders"):
        write_report([tmp_path] * (MOST_RUNS + 1))


@pytest.mark.timeout(240)
def test_the_report_of_a_real_run(tmp_path: Path) -> None:
    run_file = write_tiny_run(tmp_path, training={"steps": 4, "global_batch": 8, "micro_batch": 2})
    module = [sys.executable, "-m", "moe_medical"]
    code, output = run_to_end([*module, "launch", str(run_file), "parallel.ranks=1"], tmp_path / "launch.txt")
    assert code == 0, output
    code, output = run_to_end([*module, "report", str(tmp_path / "run")], tmp_path / "report.txt")
    assert code == 0, output
    assert output.strip().endswith("report.html")
    page = (tmp_path / "run" / "report.html").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["task"]: row for row in table_with(page, "first to last")}
    for task in results["tasks"]:
        assert rows[task["task"]]["rows"] == str(task["rows"])
        assert rows[task["task"]]["last"] == f"{task['loss_after']:.3f}"
    assert str(tmp_path) not in page
