"""The chat as a process with piped input: it remembers, obeys, and respects the model's template."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.served import write_family
from support.tiny import ROOT

from moe_medical.errors import ConfigError
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted
from moe_medical.serving.answers import Generation, answer_all
from moe_medical.serving.chat import Conversation
from moe_medical.serving.detokenizer import Detokenizer

TOKENS = 8


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


def test_a_piped_chat(family: Path) -> None:
    lines = [
        "w1",
        "",
        "w2",
        "/reset",
        "w1",
        "/task size",
        "/reset",
        "w1",
        "/task shape",
        "/what",
        "/quit",
        "w1",
    ]
    command = [sys.executable, "-m", "moe_medical", "chat", str(family / "gated"), "--task", "colour"]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(TOKENS)],
        input="\n".join(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    adapted = load_adapted(family / "gated")
    colour, size = (_answer(adapted, "w1", task) for task in ("colour", "size"))
    assert answers == [colour, answers[1], colour, size]
    assert "/task must be one of colour, size, got 'shape'" in done.stderr
    assert "commands are /task NAME" in done.stderr


def test_what_was_said_is_part_of_the_next_prompt(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = load_adapted(family / "words")
    conversation = Conversation(adapted, TOKENS, Sampling())
    conversation.take("/system w9 w9")
    conversation.take("w1")
    first = capsys.readouterr().out.removesuffix("\n")
    conversation.take("w2")
    turns = [("system", "w9 w9"), ("user", "w1"), ("assistant", first), ("user", "w2")]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    ids = adapted.chat.encode_text(text + "<|im_start|>assistant\n")
    assert adapted.chat.encode_chat([{"role": r, "content": c} for r, c in turns]) == ids
    second = capsys.readouterr().out.removesuffix("\n")
    assert second == _continued(adapted, ids)
    assert first == _continued(
        adapted, adapted.chat.encode_chat([{"role": r, "content": c} for r, c in turns[:2]])
    )


def test_the_oldest_turns_go_when_a_chat_is_too_long(
    family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = load_adapted(family / "words")
    room = len(adapted.chat.encode_chat([{"role": "user", "content": "w1 w2"}])) + TOKENS
    adapted.model.config.max_position_embeddings = room + 4
    conversation = Conversation(adapted, TOKENS, Sampling())
    for _ in range(2):
        conversation.take("w1 w2")
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second
    with pytest.raises(ConfigError, match="message must be at most"):
        conversation.take("w1 " * 30)


def _answer(adapted: Adapted, prompt: str, task: str) -> str:
    return answer_all(adapted, [prompt], [adapted.task_numbers(task, "")], Generation(TOKENS))[0]


def _continued(adapted: Adapted, ids: list[int]) -> str:
    detokenizer = Detokenizer(adapted.chat)
    adapted.continue_rows([Row(ids, TOKENS, Sampling(), detokenizer.take)], [()])
    return detokenizer.finish()
