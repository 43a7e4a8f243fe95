"""Which rows have options, and that the likeliest is the one that a plain loop over the model finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import write_tiny_model
from torch.nn import functional as F

from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.schema import ModelSection
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.rows import Example
from moe_medical.evaluation.choices import answer_options, encode_options, likeliest


def _example(target: str, choices: tuple[str, ...], prompt: str = "Which?") -> Example:
    return Example("t", "1", prompt, target, choices)


@pytest.mark.parametrize(
    ("metric", "rows", "options"),
    [
        ("accuracy", [_example("yes", ("yes", "no"))], [("yes", "no")]),
        ("accuracy", [_example("B", ("x", "y", "z"))], [("A", "B", "C")]),
        ("macro_f1", [_example(" x ", ("x", "y")), _example("z", ("z",))], [("x", "y"), ("z",)]),
        # an option was left out of the record, and the others kept their letters
        ("accuracy", [_example("D", ("x", "y"), "Which?\nB. x\nD. y")], [("B", "D")]),
        ("accuracy", [_example("D", ("x", "y"), "Which?\n(B) x\n(D) y")], [("B", "D")]),
        ("accuracy", [_example("maybe", ("yes", "no"))], None),
        ("accuracy", [_example("yes", ("yes", "no")), _example("maybe", ("yes", "no"))], None),
        ("accuracy", [_example("yes", ("yes", "no")), _example("yes", ())], None),
        ("accuracy", [_example("E", ("x", "y"))], None),
        ("letter_accuracy", [_example("AB", ("x", "y"))], None),
        # PromptCBLUE's choices of entity types are no answers
        ("promptcblue_f1", [_example("药物", ("药物", "疾病"))], None),
    ],
)  # fmt: skip
def test_options_of_a_task(metric: str, rows: list[Example], options: list[tuple[str, ...]] | None) -> None:
    assert answer_options(metric, rows) == options


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([2.0, 1.0, 3.0], 1),
        ([1.00005, 1.0, 3.0], 0),  # a tie is decided by the order, whatever the last digits are
        ([1.0, 1.00005, 3.0], 0),
        ([1.001, 1.0, 3.0], 1),
        ([np.inf, 5.0], 1),
        ([np.nan, np.nan], 0),
    ],
)
def test_the_first_of_the_likeliest(losses: list[float], first: int) -> None:
    assert likeliest(np.array(losses)) == first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m")


def test_options_are_coded_behind_one_prompt_that_is_cut_alike(folder: Path) -> None:
    chat = ChatFormat.from_folder(folder, None, 40)
    prompt, options = "Which one? " + "w1 w2 w3 " * 30, ("w4", "w5 w6 w7 w8", "w9")
    coded = encode_options(chat, prompt, options)
    assert list(coded) == [0, 1, 2]
    assert len({tuple(c.input_ids[: c.num_prompt_tokens]) for c in coded.values()}) == 1
    assert max(len(c.input_ids) for c in coded.values()) == 40
    assert [chat.decode(c.input_ids[c.num_prompt_tokens :]).strip() for c in coded.values()] == list(options)


def test_an_option_that_no_answer_has_room_for_is_left_out(folder: Path) -> None:
    chat = ChatFormat.from_folder(folder, None, 40)
    assert list(encode_options(chat, "Which?", ("w1", "w2 " * 60))) == [0]


@torch.no_grad()
def test_an_options_loss_is_the_log_probability_of_that_answer(folder: Path) -> None:
    """Over all continuations of one token and the end of turn, the probabilities of answers sum below 1."""
    chat = ChatFormat.from_folder(folder, None, 96)
    model = load_base(locate_base(ModelSection(str(folder))), "float32").eval()
    coded = encode_options(chat, "Is it even?\nw3", ("yes", "no", "w1"))

    def loss(row: Encoded) -> float:
        ids = torch.tensor([row.input_ids])
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return float(losses[row.num_prompt_tokens - 1 :].sum())

    assert all(row.input_ids[-1] == chat.end_id for row in coded.values())
    assert sum(np.exp(-loss(row)) for row in coded.values()) < 1
