"""Duplicates, near-duplicates and overlaps: found where they are, not found where only the form is shared."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_medical
from moe_medical.data.hygiene import (
    Comparison,
    compare,
    find_duplicates,
    find_overlaps,
    hygiene_key,
    needs_comparison,
    rows_to_drop,
)
from moe_medical.data.hygiene.drop import CODE
from moe_medical.data.hygiene.minhash import Bands, candidate_pairs, choose_bands
from moe_medical.data.hygiene.own_text import OwnText, normalise, shingle_hashes
from moe_medical.data.recipe import BuilderSource, HygieneSettings, TaskSpec
from moe_medical.data.sources import Example

RNG = random.Random(5)
VOCABULARY = [
    "".join(RNG.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(RNG.randint(3, 8))) for _ in range(900)
]
INSTRUCTION = "Read the note of the clinic with care and say which of the diseases below it is about, if any."
DROP_ALL = HygieneSettings("drop", "drop", "drop")
Texts = Sequence[str | tuple[str, str]]
"""Prompts, or prompts with targets."""


def _words(count: int, rng: random.Random = RNG) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(count))


def _edited(text: str, edits: int = 1, word: str = "edit") -> str:
    words = text.split()
    for i in range(edits):
        words[(i + 1) * len(words) // (edits + 2)] = f"{word}{i}"
    return " ".join(words)


def _spec(name: str, prompt: str = "{input}", **keys: object) -> TaskSpec:
    source = BuilderSource("made/up")
    return replace(TaskSpec(name, "qa", "rouge_l", Path("x.yaml"), source, prompt, "{output}"), **keys)


def _rows(task: str, texts: Texts) -> list[Example]:
    pairs = [(text, "same") if isinstance(text, str) else text for text in texts]
    return [Example(task, str(i), prompt, target) for i, (prompt, target) in enumerate(pairs)]


def _splits(**tasks: Mapping[str, Texts]) -> dict[str, dict[str, list[Example]]]:
    return {
        task: {split: _rows(task, texts) for split, texts in splits.items()} for task, splits in tasks.items()
    }


def _compare(threshold: float = 0.8, **tasks: Mapping[str, Texts]) -> Comparison:
    return compare(_splits(**tasks), [_spec(task) for task in tasks], threshold)


def _train(texts: Texts) -> tuple[list[int], list[int], list[int]]:
    """Places of exact, conflicting and near duplicates in one task's training rows."""
    found = _compare(t={"train": texts})
    duplicates = find_duplicates(found, found.rows_of("t", "train"))
    masks = (duplicates.exact, duplicates.conflicting, duplicates.near)
    exact, conflicting, near = (np.flatnonzero(mask).tolist() for mask in masks)
    return exact, conflicting, near


def _drops(settings: HygieneSettings = DROP_ALL, **tasks: Mapping[str, Texts]) -> dict[str, list[int]]:
    dropped = rows_to_drop(_splits(**tasks), [_spec(task) for task in tasks], settings)
    return {task: rows.tolist() for task, rows in dropped.items()}


def test_duplicates_are_equal_after_unicode_case_and_white_space() -> None:
    assert _train(["Fever  and\ncough", "no", "ＦＥＶＥＲ and cough ", "fever and coughs"]) == ([2], [], [])


def test_a_row_with_another_target_conflicts_and_is_kept() -> None:
    text = _words(40)
    rows = [(text, "yes"), (text, "no"), (text, "Yes"), (_edited(text), "no"), (_edited(text), "maybe")]
    assert _train(rows) == ([2], [1, 4], [3])
    assert _drops(t={"train": rows}) == {"t": [2, 3]}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_pairs_are_those_of_brute_force(threshold: float) -> None:
    rng = random.Random(11)
    texts = [_words(rng.randint(25, 120), rng) for _ in range(60)]
    texts += [_edited(text, rng.randint(1, 6), word) for text in texts for word in ("one", "two")]
    shingles = [set(shingle_hashes(normalise(text)).tolist()) for text in texts]
    pairs = {
        (a, b): len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
        for a, b in combinations(range(len(texts)), 2)
    }
    expected = {pair: similarity for pair, similarity in pairs.items() if threshold <= similarity}
    found = _compare(threshold, t={"train": texts})
    reported = dict(zip(map(tuple, found.near.tolist()), found.similarity.tolist(), strict=True))
    assert len(expected) > 10
    assert reported == expected


def test_what_all_rows_of_a_task_say_makes_none_alike() -> None:
    options = "Options: asthma; measles; migraine; anaemia; gastritis; psoriasis; none of those named here"
    texts = [f"{INSTRUCTION}\nNote: {_words(12)}\n{options}" for _ in range(60)]
    assert _train(texts) == ([], [], [])


def test_instructions_in_many_wordings_make_no_rows_alike() -> None:
    wordings = [f"{_words(150)}: " for _ in range(10)]
    texts = [f"{wordings[i % 10]}{_words(12)}" for i in range(400)]
    assert _train(texts) == ([], [], [])


def test_short_inputs_are_compared_for_equality_only() -> None:
    texts = [f"Concept A: breast lump\nConcept B: lump of the breast {i % 30}" for i in range(31)]
    assert _train(texts) == ([30], [], [])
    short = _words(11)
    assert _train([short, f"{short} too"]) == ([], [], [])
    assert _train([f"{short} {short} now", f"{short} {short} now too"]) == ([], [], [1])


def test_a_marked_part_tells_two_rows_of_one_sentence_apart() -> None:
    sentence = "we show that << aspirin >> and [[ cox1 ]] bind while cox2 and cox3 do not bind at all here"
    other = sentence.replace("[[ cox1 ]]", "cox1").replace("cox3", "[[ cox3 ]]")
    assert _train([sentence, other]) == ([], [], [])


def test_chinese_is_compared_by_characters_whatever_the_task_says() -> None:
    text = (
        "患者三天前无明显诱因出现发热咳嗽咳痰最高体温三十九度伴有胸闷气短夜间加重曾自服退烧药物但症状没有缓解"
    )
    other = text.replace("三天", "五天")
    unlike = (
        "高血压患者平时应当注意低盐饮食规律作息按时服药并且定期监测血压如有头晕等不适及时到心内科门诊就诊复查"
    )
    assert _train([text, unlike, other]) == ([], [], [2])


def test_template_labels_and_instruction_do_not_hide_a_text_shared_by_two_tasks() -> None:
    shared = [_words(8) for _ in range(5)]
    first = [f"{INSTRUCTION}\nQuestion: {text}" for text in [*shared, *(_words(8) for _ in range(20))]]
    second = [f"Which kind is it? {text} Reply with one word." for text in [*shared, *(_words(8),) * 3]]
    specs = [
        _spec("a", "{instruction}\n{input}"),
        _spec("b", "Which kind is it? {input} Reply with one word."),
    ]
    found = compare(_splits(a={"train": first}, b={"train": second[:6], "test": second[6:]}), specs, 0.8)
    assert find_overlaps(found, near=False).train.tolist() == [[0, 5], [5, 0]]


def test_overlaps_count_rows_of_either_side() -> None:
    text, other = _words(50), _words(50)
    found = _compare(
        a={"train": [text, _edited(text), _words(50)], "test": [_words(50), other]},
        b={"train": [other, _words(50)], "validation": [text], "test": [text, _words(50)]},
    )
    exact, near = find_overlaps(found, near=False), find_overlaps(found, near=True)
    assert exact.evaluation.tolist() == [[0, 2], [1, 0]]
    assert near.evaluation.tolist() == [[0, 2], [1, 0]]
    assert exact.leaking.tolist() == [[0, 1], [1, 0]]
    assert near.leaking.tolist() == [[0, 2], [1, 0]]


def test_only_training_rows_that_any_task_evaluates_on_are_dropped() -> None:
    text, other = _words(50), _words(50)
    tasks = {
        "a": {"train": [_words(50), text, _edited(text)], "test": [other, other]},
        "b": {"train": [other, _words(50)], "validation": [(text, "another answer")]},
    }
    assert _drops(HygieneSettings(overlap="drop"), **tasks) == {"a": [1, 2], "b": [0]}
    assert _drops(HygieneSettings(duplicates="drop", near_duplicates="drop"), **tasks) == {"a": [2], "b": []}


def test_a_row_does_not_go_for_the_sake_of_one_that_has_gone() -> None:
    head, tail = _words(30), _words(30)
    near, far = f"{_edited(head, 2)} {tail}", f"{_edited(head, 2)} {_edited(tail, 2)}"
    tasks = {"a": {"train": [near, far], "test": [f"{head} {tail}"]}}
    assert _drops(HygieneSettings(near_duplicates="drop"), **tasks) == {"a": [1]}
    assert _drops(DROP_ALL, **tasks) == {"a": [0]}


def test_of_many_near_copies_one_stays_and_all_are_seen_to_leak() -> None:
    text = _words(80)
    copies = [text.replace(text.split()[40], f"copy{i}") for i in range(35)]
    rest = [_words(30) for _ in range(2000)]
    settings = HygieneSettings(near_duplicates="drop")
    assert _drops(settings, a={"train": [*rest, *copies]}) == {"a": list(range(2001, 2035))}
    leaking = _drops(HygieneSettings(overlap="drop"), a={"train": [*rest, *copies], "test": [text]})
    assert leaking == {"a": list(range(2000, 2035))}


def test_copies_that_drift_away_are_followed_to_the_end() -> None:
    words = _words(100).split()
    drifting = [" ".join([*(f"new{i}" for i in range(k)), *words[k:]]) for k in range(0, 60, 2)]
    rest = [_words(30) for _ in range(2000)]
    found = _drops(HygieneSettings(near_duplicates="drop"), a={"train": [*drifting, *rest]})
    assert found == {"a": list(range(1, 30))}


def test_a_row_repeated_through_half_of_a_task_is_still_a_duplicate() -> None:
    text = _words(80)
    rows = [*(_words(30) for _ in range(30)), *[text] * 30, _edited(text)]
    assert _train(rows) == (list(range(31, 60)), [], [60])


def test_each_setting_alone() -> None:
    text, held_out = _words(50), _words(50)
    tasks = {"a": {"train": [text, text, _edited(text), held_out], "validation": [held_out]}}
    assert _drops(HygieneSettings(), **tasks) == {"a": []}
    assert _drops(HygieneSettings(duplicates="drop"), **tasks) == {"a": [1]}
    assert _drops(HygieneSettings(near_duplicates="drop"), **tasks) == {"a": [2]}
    assert _drops(HygieneSettings(overlap="drop"), **tasks) == {"a": [3]}
    assert _drops(**tasks) == {"a": [1, 2, 3]}


def test_the_order_of_tasks_does_not_matter() -> None:
    rng = random.Random(3)
    pool = [_words(40, rng) for _ in range(30)]
    pool += [_edited(text, rng.randint(1, 3)) for text in pool]
    tasks = {
        name: {s: rng.sample(pool, 15) for s in ("train", "validation", "test")} for name in ("a", "b", "c")
    }
    backwards = {name: dict(reversed(tasks[name].items())) for name in reversed(tasks)}
    dropped = _drops(**tasks)
    assert any(dropped.values())
    assert _drops(**backwards) == dropped


def test_rows_of_images_are_left_alone() -> None:
    splits = _splits(a={"train": ["what is shown?"] * 3, "test": ["what is shown?"]})
    for image, kept in ((None, 0), ("file", 3)):
        dropped = rows_to_drop(splits, [_spec("a", image=image)], DROP_ALL)
        assert 3 - len(dropped["a"]) == kept


def test_counts_are_logged_without_text(caplog: pytest.LogCaptureFixture) -> None:
    text = f"canary {_words(50)}"
    with caplog.at_level(logging.INFO, logger="moe_medical"):
        _drops(a={"train": [text, text, _edited(text), _words(50)]}, b={"train": [_words(50)]})
    assert caplog.messages == [
        "a: 2 of 4 training rows dropped: 0 in an evaluation split, 1 duplicates, 1 near-duplicates"
    ]


class _Unread(list[Example]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("read")


def test_nothing_is_read_where_nothing_would_be_dropped() -> None:
    splits = {"a": {"train": _Unread(_rows("a", ["x", "x"]))}}
    dropped = rows_to_drop(splits, [_spec("a")], HygieneSettings())
    assert dropped["a"].tolist() == []
    assert not needs_comparison(HygieneSettings())
    with pytest.raises(AssertionError, match="read"):
        rows_to_drop(splits, [_spec("a")], HygieneSettings(duplicates="drop"))


def test_the_key_follows_content_templates_and_settings() -> None:
    keys, specs = {"a": {"train": "1", "test": "2"}}, [_spec("a")]
    first = hygiene_key(keys, specs, DROP_ALL)
    assert hygiene_key({"a": {"test": "2", "train": "1"}}, [_spec("a", weight=2.0)], DROP_ALL) == first
    others = [
        hygiene_key({"a": {"train": "1", "test": "3"}}, specs, DROP_ALL),
        hygiene_key({"a": {"train": "1"}}, specs, DROP_ALL),
        hygiene_key(keys, [_spec("a", "Say: {input}")], DROP_ALL),
        hygiene_key(keys, [_spec("a", image="file")], DROP_ALL),
        hygiene_key(keys, specs, replace(DROP_ALL, threshold=0.9)),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("edited", ["hygiene/own_text", "hygiene/minhash", "recipe"])
def test_an_edit_of_the_code_changes_the_key(edited: str, tmp_path: Path) -> None:
    package = Path(moe_medical.__file__).parent
    shutil.copytree(package, tmp_path / "moe_medical", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from moe_medical.data.hygiene import hygiene_key\n"
        "from moe_medical.data.recipe import HygieneSettings\n"
        "print(hygiene_key({}, [], HygieneSettings()))"
    )
    with (tmp_path / f"moe_medical/data/{edited}.py").open("a") as stream:
        stream.write("# edited\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert re.fullmatch(rb"[0-9a-f]{32}\n", done.stdout)
    assert done.stdout.decode().strip() != hygiene_key({}, [], HygieneSettings())


def test_the_key_names_all_code_of_hygiene() -> None:
    folder = Path(moe_medical.__file__).parent / "data/hygiene"
    assert set(CODE) == {"recipe"} | {f"hygiene/{path.stem}" for path in folder.glob("[!_]*.py")}


def test_hashes_are_the_same_on_every_machine() -> None:
    assert shingle_hashes("fever and cough").tolist() == [1921438849257735060]
    assert len(shingle_hashes("fever and")) == 0


@given(st.floats(0.2, 1.0))
def test_a_pair_at_the_threshold_is_seldom_missed(threshold: float) -> None:
    bands, width = choose_bands(threshold)
    assert bands * width <= 128
    assert width == 1 or (1 - threshold**width) ** bands <= 0.01


def test_candidates_of_a_bucket_grow_in_proportion_to_its_rows() -> None:
    keys = Bands(0.8).keys([shingle_hashes(normalise(_words(30)))] * 1000)
    pairs = candidate_pairs(keys)
    assert len(pairs) < 17 * 1000
    assert set(pairs[:, 1].tolist()) == set(range(1, 1000))
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_no_rows_at_all() -> None:
    found = _compare(a={"train": []})
    assert len(find_duplicates(found, found.rows_of("a", "train")).exact) == 0
    assert _drops(a={"train": []}) == {"a": []}


def test_the_own_text_is_the_whole_prompt_where_nothing_else_is_left() -> None:
    own = OwnText("{input}", [f"Same line\n{i}" for i in range(5)])
    assert own.text("Same line\n3") == "3"
    assert own.text("Same line") == "same line"
