"""Batches: masks token by token, and a rank's share of the plan whatever the world size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.tiny import write_tiny_model, write_tiny_tasks

from moe_medical.config.schema import DataSection, MixSection
from moe_medical.data.batches import IGNORE, Batch, TrainingBatches, collate
from moe_medical.data.formats import ChatFormat, Encoded
from moe_medical.data.mixture import MixPlan
from moe_medical.data.tasks import TaskData, build_plan, load_tasks

PAD = 9


def test_collate_token_by_token() -> None:
    rows = [Encoded([1, 2, 3, 4, 5], 3, 0), Encoded([6, 9, 8], 1, 0), Encoded([7, 7], 1, 0)]
    batch = collate(rows, [0, 2, 2], PAD)
    x = IGNORE
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5], [PAD, PAD, 6, 9, 8], [PAD, PAD, PAD, 7, 7]]
    assert batch.token_mask_BS.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 0, 1]]
    assert batch.labels_BS.tolist() == [[x, x, x, 4, 5], [x, x, x, 9, 8], [x, x, x, x, 7]]
    assert batch.task_ids_BS.tolist() == [[0] * 5, [2] * 5, [2] * 5]
    assert batch.num_target_columns == 2
    assert batch.num_tokens == 10  # a target token that equals the pad token counts
    assert batch.targets_per_task(4).tolist() == [2, 0, 3, 0]
    assert batch.rows_per_task(4).tolist() == [1, 0, 2, 0]
    assert {t.dtype for t in (batch.input_ids_BS, batch.labels_BS, batch.task_ids_BS)} == {torch.int64}


class Material:
    """Two tiny tasks and their plan."""

    def __init__(self, folder: Path, max_length: int = 96) -> None:
        self.chat = ChatFormat.from_folder(write_tiny_model(folder / "model"), None, max_length)
        recipe = str(write_tiny_tasks(folder / "tasks"))
        section = DataSection(recipe, max_length=max_length, mix=MixSection(block=16, max_repeats=None))
        self.tasks: list[TaskData] = load_tasks(section, "test", self.chat)
        self.plan: MixPlan = build_plan(self.tasks, section, 3, 64)

    def batches(self, global_batch: int, micro_batch: int, rank: int, world: int) -> TrainingBatches:
        return TrainingBatches(self.plan, self.tasks, self.chat, global_batch, micro_batch, rank, world)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("batches"))


Sample = tuple[int, tuple[int, ...], tuple[int, ...]]


def _samples(batch: Batch) -> list[Sample]:
    """(task, tokens, target tokens) of each row, padding removed."""
    rows = zip(batch.task_ids_BS, batch.input_ids_BS, batch.token_mask_BS, batch.labels_BS, strict=True)
    return [
        (int(task[0]), tuple(ids[mask].tolist()), tuple(labels[labels != IGNORE].tolist()))
        for task, ids, mask, labels in rows
    ]


def _planned(material: Material, first: int, count: int) -> list[Sample]:
    samples = []
    for ref in map(material.plan.at, range(first, first + count)):
        example = material.tasks[ref.task].train[ref.row]
        encoded = material.chat.encode(example.prompt, example.target)
        ids = tuple(encoded.input_ids)
        samples.append((ref.task, ids, ids[encoded.num_prompt_tokens :]))
    return samples


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_train_on_the_plans_slice(material: Material, world: int) -> None:
    """Each rank has its contiguous part of it, in micro-batches sorted by length."""
    share = 16 // world
    for step in (0, 3):
        for rank in range(world):
            batches = material.batches(16, 4, rank, world).step(step)
            assert [len(b.input_ids_BS) for b in batches] == [4] * (share // 4)
            mine = [sample for batch in batches for sample in _samples(batch)]
            assert Counter(mine) == Counter(_planned(material, step * 16 + rank * share, share))
            lengths = [len(ids) for _, ids, _ in mine]
            assert lengths == sorted(lengths)
            assert len(set(lengths)) > 1


def test_a_step_does_not_depend_on_the_steps_before(material: Material) -> None:
    late, fresh = material.batches(8, 4, 0, 1), material.batches(8, 4, 0, 1)
    for step in range(5):
        late.step(step)
    assert [_samples(b) for b in late.step(5)] == [_samples(b) for b in fresh.step(5)]


def test_truncated_rows_are_counted(tmp_path: Path) -> None:
    material = Material(tmp_path, max_length=24)
    batches = material.batches(16, 4, 0, 1)
    examples = [material.tasks[ref.task].train[ref.row] for ref in map(material.plan.at, range(16))]
    cut = sum(material.chat.encode(e.prompt, e.target).num_truncated > 0 for e in examples)
    assert 0 < cut < 16
    assert sum(b.num_truncated for b in batches.step(0)) == cut
