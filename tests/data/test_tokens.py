"""Tokens of rows: many at once as one by one, the same from disk as fresh, and which are cached."""

from __future__ import annotations

import json
import logging
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import write_tiny_model, write_tiny_tasks

from moe_medical.config.schema import DataSection, TokenCache
from moe_medical.data.chat import ChatFormat, TargetTooLong
from moe_medical.data.tasks import TaskData, cache_tokens, load_tasks
from moe_medical.data.tokens import FreshTokens, TokenMemo, TokenRows
from moe_medical.errors import StorageError

LENGTH = 48
PARTS = [
    "fever ",
    "w1",
    "发热",
    "咳嗽。",
    "😷",
    "👩‍⚕️",
    "é",
    "\n\n",
    " ",
    "\t",
    "<|im_end|>",
    "<|im_start|>",
    "~!@",
]
PARTS += ["user\n", "assistant\n", "\u200b", "ſ", "ﬁ", "\u0301", "a" * 30, "\ufeff", "{x}", "</s>"]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=40).map("".join)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatFormat:
    return ChatFormat.from_folder(model, None, LENGTH)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tasks(tmp_path: Path, cache: Path, chat: ChatFormat) -> list[TaskData]:
    section = DataSection(str(write_tiny_tasks(tmp_path / "tasks")))
    return load_tasks(section, "validation", chat)


# Many at once


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_many_are_encoded_as_each_alone(chat: ChatFormat, samples: list[tuple[str, str]]) -> None:
    fits = chat.fits_many([target for _, target in samples])
    alone = []
    for (prompt, target), known in zip(samples, fits, strict=True):
        try:
            alone.append(chat.encode(prompt, target))
        except TargetTooLong:
            assert not known
        else:
            assert known
    short = [sample for sample, known in zip(samples, fits, strict=True) if known]
    assert chat.encode_many(short) == alone
    if not all(fits):
        with pytest.raises(TargetTooLong):
            chat.encode_many(samples)


def test_the_property_meets_cut_prompts_and_targets_at_the_limit(chat: ChatFormat) -> None:
    longest = "~" * (chat.max_target_tokens - 1)
    samples = [("发热 " * 60, "yes"), ("x", longest), ("y" * 200, longest)]
    encoded = chat.encode_many(samples)
    assert encoded == [chat.encode(*sample) for sample in samples]
    assert [e.num_truncated > 0 for e in encoded] == [True, False, True]
    assert max(len(e.input_ids) for e in encoded) == LENGTH
    with pytest.raises(TargetTooLong):
        chat.encode_many([*samples, ("x", longest + "~")])


def test_the_fingerprint_follows_template_length_and_tokenizer(model: Path, tmp_path: Path) -> None:
    formats = [ChatFormat.from_folder(model, *of) for of in ((None, 48), (None, 48), (None, 49), ("Hi.", 48))]
    other = ChatFormat.from_folder(write_tiny_model(tmp_path / "model"), None, 48)
    found = [chat.fingerprint for chat in (*formats, other)]
    assert found[0] == found[1] == found[4]
    assert len(set(found)) == 3
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert ChatFormat.from_folder(tmp_path / "model", None, 48).fingerprint != found[0]


# Fresh and cached


def _all(tokens: TokenRows) -> list:
    return tokens.encoded(range(len(tokens)))


def test_cached_tokens_are_the_fresh_ones(tasks: list[TaskData], chat: ChatFormat) -> None:
    for task in tasks:
        cached = task.tokens.cached()
        assert _all(cached) == _all(task.tokens) == [chat.encode(e.prompt, e.target) for e in task.train]
        picks = [5, 0, 19, 5]
        assert cached.encoded(picks) == task.tokens.encoded(picks) == [_all(cached)[i] for i in picks]
        lengths = [len(e.input_ids) for e in _all(cached)]
        assert cached.lengths(picks) == task.tokens.lengths(picks) == [lengths[i] for i in picks]
        assert cached.mean_length == task.tokens.mean_length == np.mean(lengths)
        assert len(cached) == len(task.tokens) == len(task.train)


def test_a_view_of_rows_has_its_own_tokens(tasks: list[TaskData], chat: ChatFormat) -> None:
    whole = tasks[0].tokens.cached()
    rows = tasks[0].train.select(np.array([7, 3]))
    part = FreshTokens(rows, chat, TokenMemo(), "a").cached()
    assert _all(part) == whole.encoded([7, 3])


def test_cached_tokens_are_made_once(tasks: list[TaskData], cache: Path) -> None:
    made: list[int] = []
    tasks[0].tokens.cached(made.append)
    tasks[0].tokens.cached(made.append)
    assert made == [80]
    [folder] = (cache / "tokens").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "lengths.npy").unlink()
    with pytest.raises(StorageError, match=f"{folder} is damaged"):
        tasks[0].tokens.cached()


class _Counting(ChatFormat):
    """Counts what it encodes."""

    samples = 0

    def encode_many(self, samples):  # type: ignore[no-untyped-def]
        self.samples += len(samples)
        return super().encode_many(samples)


def test_lengths_then_tokens_tokenise_once(tasks: list[TaskData], model: Path) -> None:
    counting = cast(_Counting, _Counting.from_folder(model, None, LENGTH))
    fresh = FreshTokens(tasks[0].train, counting, TokenMemo(), "a")
    fresh.lengths(range(40))
    fresh.encoded([3, 1, 39, 1])
    assert counting.samples == 40
    fresh.encoded([40, 40])
    assert counting.samples == 41


def test_the_memo_forgets_the_oldest_and_no_more(tasks: list[TaskData], model: Path) -> None:
    counting = cast(_Counting, _Counting.from_folder(model, None, LENGTH))
    lengths = tasks[0].tokens.lengths(range(80))
    memo = TokenMemo(max_tokens=sum(lengths[:10]))
    fresh = FreshTokens(tasks[0].train, counting, memo, "a")
    other = FreshTokens(tasks[1].train, counting, memo, "b")
    fresh.lengths(range(10))
    fresh.lengths([0])  # now the latest
    other.lengths([0])
    assert counting.samples == 11
    fresh.encoded([0])
    assert counting.samples == 11
    fresh.encoded([1])
    assert counting.samples == 12
    assert fresh.encoded(range(80)) == tasks[0].tokens.encoded(range(80))  # more than there is room for


@pytest.mark.parametrize("cached", [False, True])
def test_threads_get_what_one_thread_gets(tasks: list[TaskData], chat: ChatFormat, cached: bool) -> None:
    expected = _all(tasks[0].tokens)
    tokens: TokenRows = FreshTokens(tasks[0].train, chat, TokenMemo(max_tokens=400), "a")
    tokens = tokens.cached() if cached else tokens
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            picks = rng.integers(80, size=16).tolist()
            right = [expected[i] for i in picks]
            lengths = tokens.lengths(picks)
            if lengths != [len(e.input_ids) for e in right] or tokens.encoded(picks) != right:
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Which are cached


@pytest.mark.parametrize(
    ("policy", "samples", "ranks", "cached"),
    [
        ("never", [1000, 1000], 1, [False, False]),
        ("always", [0, 0], 1, [True, True]),
        ("auto", [80, 19], 1, [True, False]),
        ("auto", [79, 20], 1, [False, True]),
        ("auto", [20, 4], 4, [True, False]),
    ],
)
def test_the_policy(
    tasks: list[TaskData], cache: Path, policy: TokenCache, samples: list[int], ranks: int, cached: list[bool]
) -> None:
    found = cache_tokens(tasks, samples, policy, ranks)
    assert [not isinstance(task.tokens, FreshTokens) for task in found] == cached
    assert [replace(task, tokens=old.tokens) for task, old in zip(found, tasks, strict=True)] == tasks
    assert len(list((cache / "tokens").glob("*"))) == sum(cached)


def test_progress_is_told_of_what_is_made(tasks: list[TaskData], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        cache_tokens(tasks, [80, 0], "auto", ranks=1)
        cache_tokens(tasks, [80, 20], "auto", ranks=1)
        told = [
            record.getMessage().strip() for record in caplog.records if "tokenising" in record.getMessage()
        ]
        cache_tokens(tasks, [80, 20], "auto", ranks=1)
    assert told == ["tokenising 80/80", "tokenising 20/20"]
