"""Losses and scores are those of plain PyTorch, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_model, write_tiny_run
from torch import nn
from torch.nn import functional as F

from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import load_config
from moe_medical.config.schema import EvaluationSection, ModelSection, Normalise
from moe_medical.data.batches import Batch, collate, collate_packed
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.tasks import TaskData, load_tasks
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.evaluate import Evaluation, Evaluator, deal
from moe_medical.evaluation.loss import TokenLosses, TokenWeights, task_sums, token_losses

WRONG = {("last_word", 1), ("even", 0), ("even", 3)}
"""Rows that the answering model of these tests gets wrong: scores 3/4 and 2/4."""
LAYOUTS = ((3, 4), (6, 4), (50, 0))
"""(batch_rows, score_rows): 16 loss rows and 8 score rows in batches that do not divide, or no scores."""


class Answering(nn.Module):
    """The tiny model, but with known answers to known prompts."""

    def __init__(self, model: nn.Module, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.model, self.answers = model, answers

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        rows = [
            self.answers[tuple(ids[mask.bool()].tolist())]
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        made = torch.full((len(rows), settings["max_new_tokens"]), settings["eos_token_id"])
        for line, answer in zip(made, rows, strict=True):
            line[: len(answer)] = torch.tensor(answer)
        return torch.cat([input_ids, made], dim=1)


def _material(run: str) -> tuple[Answering, list[TaskData], ChatFormat]:
    config = load_config(run)
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, None, config.data.max_length)
    tasks = load_tasks(config.data, "test", chat)
    answers = {}
    for task in tasks:
        for i, example in enumerate(task.evaluation):
            answer = "w0 w0" if (task.name, i) in WRONG else example.target
            encoded = chat.encode(example.prompt, answer)
            answers[tuple(chat.encode_prompt(example.prompt))] = encoded.input_ids[
                encoded.num_prompt_tokens :
            ]
    return Answering(load_base(base, "float32"), answers), tasks, chat


def _evaluate(run: str) -> list[dict[str, Any]]:
    """One evaluation per layout, and whether the model was put back into training."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    topology = Topology(rank, world, torch.device("cpu"), "the test")
    model, tasks, chat = _material(run)
    found = []
    for batch_rows, score_rows in LAYOUTS:
        section = EvaluationSection(
            "test", loss_rows=8, score_rows=score_rows, max_new_tokens=8, batch_rows=batch_rows
        )
        evaluator = Evaluator(tasks, chat, section, topology, needs_equal_forwards=False)
        turns: list[int] = []
        evaluation = evaluator.run(model.train(), 5, lambda turns=turns: turns.append(1))
        turned = len(turns) == evaluator.num_batches()
        found.append({"evaluation": evaluation.to_json(), "turned": turned, "training": model.training})
    torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_run(tmp_path_factory.mktemp("evaluate")))


def _plain_losses(run: str) -> dict[str, tuple[float, int]]:
    """Mean loss and number of target tokens of each task, one row at a time, without padding."""
    model, tasks, chat = _material(run)
    found = {}
    for task in tasks:
        losses = []
        for example in task.evaluation[:8]:
            encoded = chat.encode(example.prompt, example.target)
            losses += _row_losses(model.eval(), encoded).tolist()
        found[task.name] = (float(np.mean(losses)), len(losses))
    return found


@torch.no_grad()
def _row_losses(model: nn.Module, row: Encoded) -> torch.Tensor:
    ids = torch.tensor([row.input_ids])
    losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[row.num_prompt_tokens - 1 :]


def test_evaluation_is_the_same_on_one_rank_and_on_two(run_file: str, tmp_path: Path) -> None:
    expected = _plain_losses(run_file)
    (alone,) = on_ranks(1, _evaluate, tmp_path, run_file)
    first, second = on_ranks(2, _evaluate, tmp_path, run_file)
    assert first == second
    for found, (_, score_rows) in zip([*alone, *first], [*LAYOUTS, *LAYOUTS], strict=True):
        assert found["training"]
        assert found["turned"]
        evaluation = Evaluation.from_json(found["evaluation"])
        assert evaluation.step == 5
        scores = {"last_word": 0.75, "even": 0.5} if score_rows else {"last_word": None, "even": None}
        for name, (loss, tokens) in expected.items():
            result = evaluation.tasks[name]
            assert result.loss == pytest.approx(loss, rel=1e-5)
            assert (result.tokens, result.rows) == (tokens, 8)
            assert (result.score, result.score_rows) == (scores[name], score_rows)
        assert evaluation.macro_loss == pytest.approx(np.mean([loss for loss, _ in expected.values()]))
        assert evaluation.macro_score == (0.625 if score_rows else None)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8])
def test_every_row_is_dealt_once_and_every_rank_has_as_many_turns(world: int, num_rows: int) -> None:
    rows = list(range(num_rows))
    by_rank = [list(deal(rows, 2, Topology(r, world, torch.device("cpu"), ""))) for r in range(world)]
    assert len({len(turns) for turns in by_rank}) == 1
    counted = [
        (t, r, batch) for r, turns in enumerate(by_rank) for t, (batch, real) in enumerate(turns) if real
    ]
    assert [row for _, _, batch in sorted(counted) for row in batch] == rows
    assert all(len(batch) > 0 for turns in by_rank for batch, _ in turns)


@pytest.fixture(scope="module")
def batch_and_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Batch, list[Encoded]]:
    base = locate_base(ModelSection(str(write_tiny_model(tmp_path_factory.mktemp("model") / "m"))))
    rows = [Encoded([5, 6, 7, 8, 9, 10], 3, 0), Encoded([11, 12, 13], 2, 0), Encoded([1, 2, 3, 4], 1, 0)]
    return load_base(base, "float32").eval(), collate(rows, [2, 0, 2], pad_id=2), rows


def test_token_losses_are_plain_cross_entropy(
    batch_and_rows: tuple[nn.Module, Batch, list[Encoded]],
) -> None:
    model, batch, rows = batch_and_rows
    with torch.no_grad():
        tokens = token_losses(model, batch)
    expected = torch.cat([_row_losses(model, row) for row in rows])
    torch.testing.assert_close(tokens.losses, expected)
    assert tokens.task_ids.tolist() == [2] * 3 + [0] + [2] * 3
    assert tokens.sample_targets.tolist() == [3] * 3 + [1] + [3] * 3
    one = float(expected[3])
    sums = task_sums(tokens, batch, num_tasks=4).numpy()
    assert sums[0] == pytest.approx([one, 0, float(expected.sum()) - one, 0])
    assert sums[1:].tolist() == [[1, 0, 6, 0], [1, 0, 2, 0]]


def test_packed_rows_have_the_losses_of_separate_ones(
    batch_and_rows: tuple[nn.Module, Batch, list[Encoded]],
) -> None:
    model, _, (a, b, c) = batch_and_rows
    with torch.no_grad():
        packed = token_losses(model, collate_packed([[(a, 2), (b, 0)], [(c, 1)]], pad_id=2))
    expected = torch.cat([_row_losses(model, row) for row in (a, b, c)])
    torch.testing.assert_close(packed.losses, expected)
    assert packed.task_ids.tolist() == [2, 2, 2, 0, 1, 1, 1]


def test_token_weights_of_the_three_normalisations() -> None:
    """Two samples with 40 target tokens in task 0, six with 3 in task 2; none of task 1."""
    tokens_T, samples_T = np.array([40.0, 0.0, 3.0]), np.array([2.0, 0.0, 6.0])
    tokens = TokenLosses(torch.zeros(2), torch.tensor([0, 2]), torch.tensor([20, 1]), torch.tensor([0, 1]))

    def seen(normalise: Normalise) -> list[float]:
        plain = TokenWeights.of(normalise, tokens_T, samples_T, torch.device("cpu"))
        assert plain.task_T[1] == 0
        doubled = plain.times(np.array([2.0, 9.0, 0.5]))(tokens)
        assert doubled.tolist() == pytest.approx((plain(tokens) * torch.tensor([2.0, 0.5])).tolist())
        return plain(tokens).tolist()

    assert seen("task_token_mean") == pytest.approx([2 / 8 / 40, 6 / 8 / 3])
    assert seen("token_mean") == pytest.approx([1 / 43, 1 / 43])
    assert seen("example_mean") == pytest.approx([1 / 8 / 20, 1 / 8 / 1])
