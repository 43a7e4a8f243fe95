"""Answers, scores and intervals are the same on any number of ranks and for any batch size.

A real model with routed adapters and sharp answers, prompts of 1 to 60 words, generated answers of one task
and chosen options of another.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.ranks import on_ranks
from support.tiny import WORDS, write_tiny_run
from torch import nn
from torch.nn import functional as F

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.routing import RoutingContext
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import RunConfig, load_config
from moe_medical.config.schema import EvaluationSection
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData, load_tasks
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.evaluate import Answered, Evaluation, Evaluator, TaskResult

ROWS = 11
NEW_TOKENS = 12
BATCHES = (1, 3, 16)
OPTIONS = ("w1", "w2", "w3", "w4 w5", "w2")
"""The last is the second again: equally likely, so the second is taken."""


def _write_tasks(folder: Path) -> None:
    """Prompts of very different lengths, and a task with options."""
    rng = random.Random(1)
    for name, outputs in (("last_word", WORDS), ("even", list(OPTIONS))):
        rows = []
        for i in range(ROWS):
            words = [rng.choice(WORDS) for _ in range(1 + i * 6)]
            rows.append(
                {"id": str(i), "input": " ".join(words), "output": rng.choice(outputs), "options": OPTIONS}
            )
        (folder / f"{name}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = yaml.safe_load((folder / "even.yaml").read_text())
    spec |= {"kind": "classification", "metric": "macro_f1", "choices": "options"}
    (folder / "even.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("layouts")
    run = write_tiny_run(folder)
    _write_tasks(folder / "tasks")
    return str(run)


def _subject(run: str, router: str = "token") -> tuple[nn.Module, RoutingContext, ChatFormat, list[TaskData]]:
    config: RunConfig = load_config(run, [f"adapters.router={router}", "adapters.balance_coefficient=0"])
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, None, config.data.max_length)
    model = load_base(base, "float32")
    context = attach_adapters(model, config.adapters.for_tasks(3), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "router" not in name:
                parameter.normal_(std=0.5)
        for parameter in model.get_input_embeddings().parameters():
            parameter.mul_(20)  # logits far apart
    return model.eval(), context, chat, load_tasks(config.data, "test", chat)


def _section(batch_rows: int, choices: str = "likelihood") -> EvaluationSection:
    rows = {"loss_rows": 5, "score_rows": ROWS, "batch_rows": batch_rows}
    return EvaluationSection("test", **rows, max_new_tokens=NEW_TOKENS, choices=choices, resamples=200)


def _alone() -> Topology:
    return Topology(0, 1, torch.device("cpu"), "the test")


def _evaluate(run: str) -> list[dict[str, Any]]:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    topology = Topology(rank, world, torch.device("cpu"), "the test")
    model, context, chat, tasks = _subject(run)
    found = []
    for batch_rows in BATCHES:
        answers: list[Answered] = []
        turns: list[int] = []
        evaluator = Evaluator(tasks, chat, _section(batch_rows), topology, False, context)
        evaluation = evaluator.run(model, 0, lambda turns=turns: turns.append(1), tell=answers.append)
        assert len(turns) == evaluator.num_batches()
        said = [(a.task, a.row, a.example.target, a.prediction) for a in answers]
        found.append({"tasks": evaluation.to_json()["tasks"], "answers": said})
    torch.distributed.destroy_process_group()
    return found


def test_answers_and_scores_depend_on_neither_ranks_nor_batch_size(run_file: str, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, _evaluate, tmp_path, run_file)
    first, second = on_ranks(2, _evaluate, tmp_path, run_file)
    assert first == second
    expected = alone[0]
    generated = [text for task, _, _, text in expected["answers"] if task == "last_word"]
    assert len(set(generated)) == ROWS
    assert len({text for task, _, _, text in expected["answers"] if task == "even"}) > 1
    for found in (*alone[1:], *first):
        assert found["answers"] == expected["answers"]
        for name, result in found["tasks"].items():
            wanted = expected["tasks"][name]
            assert {k: v for k, v in result.items() if "loss" not in k} == {
                k: v for k, v in wanted.items() if "loss" not in k
            }
            assert result["row_losses"] == pytest.approx(wanted["row_losses"], rel=1e-4)


def test_a_row_is_answered_as_it_is_alone(run_file: str) -> None:
    """Token by token with plain forwards, without cache, padding or mask."""
    model, context, chat, tasks = _subject(run_file)
    answers: list[Answered] = []
    Evaluator(tasks, chat, _section(4), _alone(), False, context).run(model, 0, tell=answers.append)
    prompts = [chat.encode_prompt(example.prompt) for example in tasks[0].evaluation]
    assert len(prompts[0]) * 3 < len(prompts[-1])
    for prompt, answered in zip(prompts, answers[:ROWS], strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW_TOKENS and ids[-1:] != [chat.end_id]:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answered.prediction == chat.decode([i for i in ids[len(prompt) :] if i != chat.end_id])


@torch.no_grad()
def test_the_chosen_option_is_that_of_a_plain_loop(run_file: str) -> None:
    model, context, chat, tasks = _subject(run_file)
    answers: list[Answered] = []
    evaluator = Evaluator(tasks, chat, _section(16), _alone(), False, context)
    result = evaluator.run(model, 0, tell=answers.append).tasks["even"]
    assert result.by_likelihood
    chosen = [a for a in answers if a.task == "even"]
    for answered in chosen:
        losses = []
        for option in OPTIONS[:4]:
            row = chat.encode(answered.example.prompt, option)
            assert row.num_truncated == 0 or len(row.input_ids) == chat.max_length
            ids = torch.tensor([row.input_ids])
            each = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
            losses.append(float(each[row.num_prompt_tokens - 1 :].sum()))
        if row.num_truncated == 0:  # else the prompt is cut alike for all options
            assert answered.prediction == OPTIONS[losses.index(min(losses))]
    hits = [a.prediction == a.example.target for a in chosen]
    assert result.scores["micro_f1"] == pytest.approx(sum(hits) / len(hits))


def test_without_likelihood_every_answer_is_generated(run_file: str) -> None:
    model, context, chat, tasks = _subject(run_file)
    evaluator = Evaluator(tasks, chat, _section(16, "generated"), _alone(), False, context)
    assert not evaluator.run(model, 0).tasks["even"].by_likelihood


def test_a_task_gate_is_told_the_rows_tasks(run_file: str) -> None:
    """The same task under another number is answered by other experts; numbers follow the rows."""
    model, context, chat, tasks = _subject(run_file, "task")

    def losses(*numbers: int) -> dict[str, tuple[float, ...]]:
        evaluator = Evaluator(tasks, chat, _section(16), _alone(), False, context, numbers or None)
        return {k: t.row_losses for k, t in evaluator.run(model, 0).tasks.items()}

    def answers(*numbers: int) -> list[str]:
        evaluator = Evaluator(tasks, chat, _section(4), _alone(), False, context, numbers or None)
        said: list[str] = []
        evaluator.run(model, 0, tell=lambda a: said.append(a.prediction))
        return said

    assert losses() == losses(0, 1)
    other = losses(2, 1)
    assert other["even"] == losses()["even"]
    assert other["last_word"] != losses()["last_word"]
    assert answers() == answers(0, 1) != answers(2, 1)
    assert answers()[ROWS:] == answers(2, 1)[ROWS:]
    assert context.inputs.task_ids_BS is None


def test_evaluations_of_earlier_versions_are_read() -> None:
    old = {"loss": 1.0, "tokens": 2, "rows": 1, "metric": "accuracy", "score": 0.5, "score_rows": 1}
    read = Evaluation.from_json({"step": 3, "tasks": {"t": old}})
    assert read.tasks["t"] == TaskResult(1.0, 2, 1, "accuracy", 0.5, 1)
    assert (read.tasks["t"].score_low, read.tasks["t"].scores) == (None, {})
    assert Evaluation.from_json(json.loads(json.dumps(read.to_json()))) == read
