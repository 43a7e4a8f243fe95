"""Task and mixture YAMLs: what is read, and that every mistake is told at once with file and key."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from moe_medical.data.recipe import (
    BuilderSource,
    FilesSource,
    HubSource,
    HygieneSettings,
    load_mixture,
    load_task,
    parse_template,
)
from moe_medical.errors import ConfigError

TASK = """\
name: {name}
kind: classification
metric: accuracy
source: {{files: {{train: train.jsonl, test: [a.csv, 'b*.parquet']}}}}
prompt: "{{question}}"
target: "{{answer}}"
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def problems(error: ConfigError) -> dict[str, str]:
    """`file name: key` -> rule and fix."""
    return {p.path.rpartition("/")[2]: f"{p.rule} {p.fix}" for p in error.problems}


def test_reads_a_task_with_its_defaults(tmp_path: Path) -> None:
    spec = load_task(write(tmp_path / "qa.yaml", TASK.format(name="qa")))
    assert (spec.name, spec.kind, spec.metric, spec.language) == ("qa", "classification", "accuracy", "en")
    assert (spec.weight, spec.max_repeats, spec.choices, spec.id, spec.phi) == (1.0, None, None, None, False)
    assert isinstance(spec.source, FilesSource)
    folder = tmp_path.absolute()
    expected = {"train": (f"{folder}/train.jsonl",), "test": (f"{folder}/a.csv", f"{folder}/b*.parquet")}
    assert dict(spec.source.patterns) == expected


def test_reads_builder_and_hub_sources(tmp_path: Path) -> None:
    head = "name: x\nkind: set\nmetric: set_f1\nprompt: '{a}'\ntarget: '{b}'\n"
    builder = load_task(write(tmp_path / "b.yaml", head + "source: {builder: hpo/is_a}\n"))
    assert builder.source == BuilderSource("hpo/is_a")
    hub = load_task(write(tmp_path / "h.yaml", head + "source: {hub: {name: o/d, splits: {test: null}}}\n"))
    assert hub.source == HubSource("o/d", None, None, {"train": "train", "validation": "validation"})


def test_reads_what_published_files_need(tmp_path: Path) -> None:
    files = "{train: a.csv, header: [q, a], test: b.json, join: {by: key, test: c.json}}"
    head = (
        f"name: x\nkind: qa\nformat: llava\nimage: picture\nimages: ../pictures\nsource: {{files: {files}}}\n"
    )
    spec = load_task(write(tmp_path / "t/x.yaml", head + "where: {set: [a, b], part: 1}\n"))
    assert (spec.format, spec.image, spec.where) == ("llava", "picture", {"set": ["a", "b"], "part": 1})
    assert spec.images == tmp_path / "t/../pictures"
    assert isinstance(spec.source, FilesSource)
    assert (spec.source.header, spec.source.join_by) == (("q", "a"), "key")
    assert dict(spec.source.join) == {"test": (f"{tmp_path}/t/c.json",)}


@pytest.mark.parametrize(
    ("text", "key", "rule"),
    [
        ("format: medqqa", "format", "Did you mean 'medqa'"),
        ("images: folder", "images", "needs image"),
        ("where: 3", "where", "wrong type"),
        ("source: {files: {train: a.csv, header: [a, a]}}", "source.files.header", "different names"),
        ("source: {files: {train: a.csv, header: []}}", "source.files.header", "different names"),
        ("source: {files: {train: a.csv, join: {by: x}}}", "source.files.join", "a split that has files"),
        (
            "source: {files: {train: a.csv, join: {test: b.csv}}}",
            "source.files.join",
            "a split that has files",
        ),
        ("source: {files: {train: a.csv, join: {train: b}}}", "source.files.join.train", "must end in"),
    ],
)
def test_mistakes_in_what_published_files_need(tmp_path: Path, text: str, key: str, rule: str) -> None:
    source = "" if text.startswith("source") else "source: {files: {train: a.csv}}\n"
    with pytest.raises(ConfigError) as caught:
        load_task(write(tmp_path / "t.yaml", f"name: x\nkind: qa\n{source}{text}\n"))
    found = problems(caught.value)
    assert set(found) == {f"t.yaml: {key}"}
    assert rule in found[f"t.yaml: {key}"]


def test_a_mixture_says_what_becomes_of_repeated_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", TASK.format(name="a"))
    plain = load_mixture(write(tmp_path / "m.yaml", "name: m\ntasks: [a]\n"))
    assert (plain.name, plain.hygiene) == ("m", HygieneSettings("keep", "keep", "keep", 0.8))
    assert plain.tasks == load_mixture(tmp_path / "m.yaml").tasks
    text = "name: m\ntasks: [a]\nhygiene: {duplicates: drop, overlap: drop, threshold: 0.7}\n"
    strict = load_mixture(write(tmp_path / "m.yaml", text))
    assert strict.hygiene == HygieneSettings("drop", "keep", "drop", 0.7)


def test_mistakes_of_hygiene(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", TASK.format(name="a"))
    text = "name: m\ntasks: [a]\nhygiene: {duplicates: drp, overlaps: keep, threshold: 0}\n"
    with pytest.raises(ConfigError) as caught:
        load_mixture(write(tmp_path / "m.yaml", text))
    keys = ("hygiene.duplicates", "hygiene.overlaps", "hygiene.threshold")
    assert set(problems(caught.value)) == {f"m.yaml: {key}" for key in keys}


def test_mixture_takes_names_paths_and_globs_once_each(tmp_path: Path) -> None:
    for name in ("a", "b1", "b2"):
        write(tmp_path / f"tasks/{name}.yaml", TASK.format(name=name))
    mixture = "name: m\ntasks: [tasks/b2, 'tasks/b*.yaml', tasks/a.yaml]\n"
    specs = load_mixture(write(tmp_path / "m.yaml", mixture)).tasks
    assert [s.name for s in specs] == ["b2", "b1", "a"]


def test_every_mistake_of_every_file_at_once(tmp_path: Path) -> None:
    bad = """\
        name: a b
        kind: clasification
        metrc: accuracy
        source: {files: {trian: x.jsonl, test: 3, validation: x.txt}, hub: {name: x, splits: {dev: x}}}
        prompt: "{a.b}"
        target: "{"
        tags: 3
        weight: -1
        max_repeats: often
        language: english
        """
    write(tmp_path / "bad.yaml", bad)
    write(tmp_path / "good.yaml", TASK.format(name="good"))
    write(tmp_path / "worse.yaml", "name: [")
    mixture = "name: m\ntasks: [bad, good, worse, goood, 'none/*.yaml']\n"
    with pytest.raises(ConfigError) as caught:
        load_mixture(write(tmp_path / "m.yaml", mixture))
    found = problems(caught.value)
    assert set(found) == {
        "m.yaml: tasks[3]",
        "m.yaml: tasks[4]",
        "worse.yaml:1",
        *(f"bad.yaml: {key}" for key in ("name", "kind", "metric", "metrc", "prompt", "target", "tags")),
        *(f"bad.yaml: {key}" for key in ("weight", "max_repeats", "language", "source")),
        *(f"bad.yaml: source.files.{key}" for key in ("trian", "train", "validation", "test")),
        "bad.yaml: source.hub.splits.dev",
    }
    assert "Did you mean 'metric'?" in found["bad.yaml: metrc"]
    assert "Did you mean 'classification'?" in found["bad.yaml: kind"]
    assert "Did you mean 'train'?" in found["bad.yaml: source.files.trian"]
    assert "Did you mean 'good.yaml'?" in found["m.yaml: tasks[3]"]


def test_missing_environment_variable_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("H2_FOLDER", raising=False)
    for name in ("a", "b"):
        text = TASK.format(name=name).replace("train.jsonl", "'${oc.env:H2_FOLDER}/train.jsonl'")
        write(tmp_path / f"{name}.yaml", text)
    path = write(tmp_path / "m.yaml", "name: m\ntasks: [a, b]\n")
    with pytest.raises(ConfigError) as caught:
        load_mixture(path)
    [problem] = caught.value.problems
    assert problem.path.endswith("a.yaml: source.files.train")
    assert "H2_FOLDER" in problem.rule
    assert "export H2_FOLDER=" in problem.fix
    monkeypatch.setenv("H2_FOLDER", "/data")
    source = load_mixture(path).tasks[0].source
    assert isinstance(source, FilesSource)
    assert source.patterns["train"] == ("/data/train.jsonl",)


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", TASK.format(name="same"))
    write(tmp_path / "b.yaml", TASK.format(name="same"))
    with pytest.raises(ConfigError, match="must be unique"):
        load_mixture(write(tmp_path / "m.yaml", "name: m\ntasks: ['[ab].yaml']\n"))


@pytest.mark.parametrize("text", ["", "- a\n", "name: m\n", "name: m\ntasks: []\n"])
def test_a_mixture_without_tasks(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        load_mixture(write(tmp_path / "m.yaml", text))


def test_a_mixture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file"):
        load_mixture(tmp_path / "none.yaml")


@pytest.mark.parametrize("source", ["{}", "{builder: a/b, hub: {name: c}}", "{builder: ab}", "{hub: {}}"])
def test_bad_sources(tmp_path: Path, source: str) -> None:
    text = TASK.format(name="x").splitlines()
    text[3] = f"source: {source}"
    with pytest.raises(ConfigError, match="source"):
        load_task(write(tmp_path / "t.yaml", "\n".join(text)))


def test_templates() -> None:
    assert parse_template("Q: {q} {{x}}\n{a}") == [("Q: ", "q"), (" {", None), ("x}", None), ("\n", "a")]


@pytest.mark.parametrize("text", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{", "}", "{a.__class__}"])
def test_templates_reach_nothing_but_columns(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_template(text)
