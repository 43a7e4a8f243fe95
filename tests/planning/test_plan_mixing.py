"""What `plan` tells about mixing: all rules side by side, warnings, and a chart that loads nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny import write_tiny_run

from moe_medical import cli
from moe_medical.config import load_config
from moe_medical.config.schema import MixSection
from moe_medical.data.static_mixing import MIX_RULES, TaskSize
from moe_medical.errors import ConfigError
from moe_medical.planning.mix_report import MixReport, compare_rules, mix_chart, show_comparison
from moe_medical.planning.plan import make_plan, show_plan


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("plan"))


def report(**mix: object) -> MixReport:
    tasks = [TaskSize("small", 10, 50.0, 1.0, 2.0), TaskSize("large", 90, 5.0, 1.0, 2.0)]
    return compare_rules(MixSection(**mix), tasks, 100, 8)  # type: ignore[arg-type]


def test_every_rule_is_compared_on_the_runs_own_settings() -> None:
    found = {r.rule: r for r in report().rules}
    assert set(found) == set(MIX_RULES) - {"explicit"}
    assert report().chosen.rule == "temperature"
    # Tasks from the largest on: 90 and 10 rows, 100 samples; the small task has 20 to give.
    assert found["proportional"].shares == pytest.approx([0.9, 0.1])
    assert found["proportional"].repeats == pytest.approx([1, 1])
    assert found["temperature"].shares == pytest.approx([0.8, 0.2])
    assert found["temperature"].free_repeats == pytest.approx([75 / 90, 2.5])
    assert found["uniform"].repeats == pytest.approx([80 / 90, 2])
    assert found["uniform"].free_repeats == pytest.approx([50 / 90, 5])
    assert found["proportional"].effective_tasks == pytest.approx(
        np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    )


def test_explicit_shares_join_where_the_run_has_them() -> None:
    found = report(rule="explicit", shares={"small": 0.1, "large": 0.3}).chosen
    assert (found.rule, found.shares.tolist()) == ("explicit", pytest.approx([0.8, 0.2]))


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(report())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["task", "rows", "temperature*", *(r.rule for r in report().rules[1:])] in lines
    [shares, epochs] = [line for line in lines if line[:2] == ["small", "10"]]
    assert shares[2:5] == ["20.00", "10.00", "20.00"]
    assert epochs[2:5] == ["2.00", "1.00", "2.00"]
    # Head and tail share, epochs with and without caps, effective tasks, P(no tail in 8 samples).
    entropy = f"{np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)):.1f}"
    assert ["uniform", "0.800", "0.2000", "2.0", "5.0", entropy, f"{0.8**8:.2f}"] in lines


def test_the_plan_tells_the_rule_and_what_its_caps_do(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.mix.max_repeats=0.7", "data.mix.temperature_from=1", "data.mix.by=tokens"]
    show_plan(make_plan(load_config(run_file, settings)))
    text = capsys.readouterr().out
    assert re.search(
        r"rule temperature T=2 by tokens, T=1 at first, over 16 blocks, at most 0\.7 epochs", text
    )
    assert re.search(r"warning: capped, .*: even \(\d\.\d epochs\)", text)
    settings = ["data.mix.dynamic.rule=regret", "training.steps=100"]
    show_plan(make_plan(load_config(run_file, settings)))
    # 800 samples less a lead of 64, in blocks of 16
    assert "regret moves these shares up to 45 times" in capsys.readouterr().out


def test_shares_of_other_tasks_are_refused(run_file: Path) -> None:
    settings = ["data.mix.rule=explicit", "data.mix.shares.even=1", "data.mix.shares.evn=1"]
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(run_file, settings))
    assert [p.path for p in caught.value.problems] == ["data.mix.shares.evn", "data.mix.shares"]


def test_the_chart_is_one_file_that_loads_nothing(run_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "mix.html"
    assert cli.main(["plan", str(run_file), "--compare", "--html", str(page)]) == 0
    html = page.read_text()
    assert "last_word" in html
    assert not re.search(r"<(script|link)[^>]+(src|href)=", html)


def test_the_chart_shows_each_task_under_each_rule() -> None:
    found = report()
    rows = mix_chart(found).to_dict()["vconcat"]
    assert [len(row["hconcat"]) for row in rows] == [len(found.rules)] * 2
    for row, field in zip(rows, ("share", "repeats"), strict=True):
        for panel, rule in zip(row["hconcat"], found.rules, strict=True):
            bars = panel["layer"][0]
            values = bars.get("data", panel.get("data"))["values"]  # a single layer's data moves up
            expected = 100 * rule.shares if field == "share" else rule.repeats
            assert [v["task"] for v in values] == ["large", "small"]
            assert [v[field] for v in values] == pytest.approx(expected, rel=1e-3)


def test_lengths_that_differ_much_get_a_log_axis() -> None:
    def kinds(rows: int) -> list[str]:
        tasks = [TaskSize("large", rows), TaskSize("small", 10)]
        chart = mix_chart(compare_rules(MixSection(rule="proportional"), tasks, 100, 8)).to_dict()
        first = [row["hconcat"][0]["layer"][0]["encoding"]["x"]["scale"] for row in chart["vconcat"]]
        return [scale["type"] for scale in first]

    assert kinds(100) == ["linear", "linear"]
    assert kinds(10_000) == ["log", "log"]


def test_without_a_chart_nothing_is_drawn(run_file: Path) -> None:
    code = (
        "import sys; from moe_medical import cli\n"
        f"assert cli.main(['plan', {str(run_file)!r}, '--compare']) == 0\n"
        "assert not {'torch', 'altair', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
