"""Pieces of an answer join to it; stop strings and white space at its ends are never told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import write_tiny_model
from tokenizers import Tokenizer

from moe_medical.data.chat import ChatFormat
from moe_medical.serving.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_pieces_join_to_the_decoded_text(folder: Path, ids: list[int]) -> None:
    chat = ChatFormat.from_folder(folder, None, 128)
    for strip in (True, False):
        told, whole = _told(chat, ids, strip=strip)
        expected = chat.decode(ids)
        assert "".join(told) == whole == (expected.strip() if strip else expected)
        assert all(told)


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one tw", ["two"], "one tw"),
        ("aab", ["ab"], "a"),
        ("one two", ["one"], ""),
        ("one\n\ntwo", ["\n"], "one"),
    ],
)
def test_the_answer_ends_before_a_stop_string(
    folder: Path, text: str, stops: list[str], expected: str, strip: bool
) -> None:
    chat = ChatFormat.from_folder(folder, None, 128)
    told, whole = _told(chat, _bytes(folder, text), stops, strip)
    assert "".join(told) == whole == (expected.strip() if strip else expected)


def test_a_character_is_told_when_all_its_bytes_are_there(folder: Path) -> None:
    chat = ChatFormat.from_folder(folder, None, 128)
    ids = _bytes(folder, "é 热")
    assert len(ids) == 6
    told, _ = _told(chat, ids)
    assert told == ["é", " 热"]
    assert _told(chat, ids[:-1])[1] == "é \ufffd"


def _told(
    chat: ChatFormat, ids: list[int], stops: list[str] | None = None, strip: bool = True
) -> tuple[list[str], str]:
    emitted: list[str] = []
    detokenizer = Detokenizer(chat, emitted.append, stops or [], strip)
    for token in ids:
        if detokenizer.take(token):
            break
    return emitted, detokenizer.finish()


def _bytes(folder: Path, text: str) -> list[int]:
    """Tokens of single characters, or of single bytes of them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [i for character in text for i in tokenizer.encode(character).ids]
    assert tokenizer.decode(ids) == text
    return ids
