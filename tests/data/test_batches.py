"""Batches: masks token by token, a rank's share of the plan whatever the world size, steps made ahead."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.tiny import write_tiny_model, write_tiny_tasks

from moe_medical.config.schema import Batching, DataSection, MixSection
from moe_medical.data.batches import (
    IGNORE,
    Batch,
    BatchShape,
    Loader,
    TrainingBatches,
    collate,
    collate_packed,
)
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.mixture import MixPlan, SampleRef
from moe_medical.data.tasks import TaskData, build_plan, load_tasks
from moe_medical.errors import DataError

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
    assert batch.target_columns_C.tolist() == [3, 4]
    assert batch.sample_targets_BS.tolist() == [[2] * 5, [0, 0, 2, 2, 2], [0, 0, 0, 1, 1]]
    assert not batch.packed
    assert batch.num_tokens == 10  # a target token that equals the pad token counts
    assert batch.targets_per_task(4).tolist() == [2, 0, 3, 0]
    assert batch.samples_per_task(4).tolist() == [1, 0, 2, 0]
    assert {t.dtype for t in (batch.input_ids_BS, batch.labels_BS, batch.task_ids_BS)} == {torch.int64}


def test_collate_packed_token_by_token() -> None:
    a, b, c = Encoded([1, 2, 3, 4, 5], 3, 0), Encoded([6, 9, 8], 1, 2), Encoded([7, 7], 1, 0)
    batch = collate_packed([[(a, 0), (c, 2)], [(b, 1)]], PAD)
    x = IGNORE
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5, 7, 7], [6, 9, 8, PAD, PAD, PAD, PAD]]
    assert batch.token_mask_BS.int().tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.labels_BS.tolist() == [[x, x, x, 4, 5, x, 7], [x, 9, 8, x, x, x, x]]
    assert batch.task_ids_BS.tolist() == [[0] * 5 + [2] * 2, [1] * 7]
    assert batch.sample_targets_BS.tolist() == [[2] * 5 + [1] * 2, [2] * 3 + [0] * 4]
    assert batch.target_columns_C.tolist() == [1, 2, 3, 4, 6]
    assert (batch.num_tokens, batch.num_truncated, batch.packed) == (10, 1, True)
    assert batch.targets_per_task(3).tolist() == [2, 2, 1]
    assert batch.samples_per_task(3).tolist() == [1, 1, 1]


class Material:
    """Two tiny tasks and their plan."""

    def __init__(self, folder: Path, max_length: int = 96) -> None:
        self.chat = ChatFormat.from_folder(write_tiny_model(folder / "model"), None, max_length)
        recipe = str(write_tiny_tasks(folder / "tasks"))
        section = DataSection(recipe, max_length=max_length, mix=MixSection(block=16, max_repeats=None))
        self.tasks: list[TaskData] = load_tasks(section, "test", self.chat)
        self.plan: MixPlan = build_plan(self.tasks, section, 3, 64)

    def batches(
        self, global_batch: int, micro_batch: int, rank: int, world: int, batching: Batching = "grouped"
    ) -> TrainingBatches:
        shape = BatchShape(global_batch, micro_batch, rank, world, batching, pack_length=96)
        return TrainingBatches(self.plan, self.tasks, self.chat, shape)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("batches"))


Sample = tuple[int, tuple[int, ...], tuple[int, ...]]


def _samples(batch: Batch) -> list[Sample]:
    """(task, tokens, target tokens) of each sample, padding removed."""
    samples = []
    for row in range(len(batch.input_ids_BS)):
        mask = batch.token_mask_BS[row]
        ids, labels = batch.input_ids_BS[row][mask], batch.labels_BS[row][mask]
        starts = (batch.position_ids_BS[row][mask] == 0).nonzero().flatten().tolist()
        for start, end in pairwise([*starts, len(ids)]):
            targets = labels[start:end][labels[start:end] != IGNORE]
            task = batch.task_ids_BS[row][mask][start]
            samples.append((int(task), tuple(ids[start:end].tolist()), tuple(targets.tolist())))
    return samples


def _planned(material: Material, first: int, count: int) -> list[Sample]:
    samples = []
    for ref in map(material.plan.at, range(first, first + count)):
        example = material.tasks[ref.task].train[ref.row]
        encoded = material.chat.encode(example.prompt, example.target)
        ids = tuple(encoded.input_ids)
        samples.append((ref.task, ids, ids[encoded.num_prompt_tokens :]))
    return samples


@pytest.mark.parametrize("batching", ["packed", "grouped", "padded"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_train_on_the_plans_samples(
    material: Material, world: int, batching: Batching
) -> None:
    """Whatever the layout, each sample once, and every rank as many forward passes."""
    for step in (0, 3):
        steps = [material.batches(16, 2, rank, world, batching).step(step) for rank in range(world)]
        assert len({len(batches) for batches in steps}) == 1
        everything = [sample for batches in steps for batch in batches for sample in _samples(batch)]
        assert Counter(everything) == Counter(_planned(material, step * 16, 16))
        assert all(len(b.input_ids_BS) <= 2 for batches in steps for b in batches)


def test_packed_rows_are_full_and_grouped_rows_alike(material: Material) -> None:
    useful = {}
    for batching in ("packed", "grouped", "padded"):
        batches = [b for step in range(4) for b in material.batches(16, 2, 0, 1, batching).step(step)]
        useful[batching] = sum(b.num_tokens for b in batches) / sum(b.input_ids_BS.numel() for b in batches)
        assert max(b.input_ids_BS.shape[1] for b in batches) <= 96
    assert useful["packed"] > 0.95
    assert useful["grouped"] > useful["padded"]


def test_padded_rows_keep_the_order_of_the_mixture(material: Material) -> None:
    batches = material.batches(16, 4, 0, 1, "padded").step(1)
    assert [sample for batch in batches for sample in _samples(batch)] == _planned(material, 16, 16)


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


# The loader


class Steps:
    """Stands in for TrainingBatches: step s has one batch that holds the number s."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken
        self.asked: list[int] = []
        self.made: list[int] = []
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def samples(self, step: int) -> list[SampleRef]:
        self.asked.append(step)
        return [SampleRef(0, 0, step)]

    def lay_out(self, samples: Sequence[SampleRef]) -> list[Batch]:
        number = samples[0].row
        with self._lock:
            self.made.append(number)
            self.threads.add(threading.current_thread().name)
        if number == self.broken:
            raise DataError("row 3 cannot be read")
        return [collate([Encoded([1, number + 2], 1, 0)], [0], pad_id=0)]


def _numbers(loader: Loader, steps: range) -> list[int]:
    return [int(loader.take(step, steps.stop)[0].input_ids_BS[0, 1]) - 2 for step in steps]


@pytest.mark.parametrize(("workers", "ahead"), [(0, 4), (1, 1), (1, 8), (3, 4), (8, 2)])
def test_steps_come_in_order_and_none_twice(workers: int, ahead: int) -> None:
    steps = Steps()
    with Loader(steps, workers, ahead) as loader:  # type: ignore[arg-type]
        assert _numbers(loader, range(5, 30)) == list(range(5, 30))
    assert steps.asked == list(range(5, 30))
    assert sorted(steps.made) == list(range(5, 30))


def test_no_more_than_asked_is_made_ahead() -> None:
    steps = Steps()
    with Loader(steps, workers=2, ahead=3) as loader:  # type: ignore[arg-type]
        for step in range(10):
            loader.take(step, 10)
            assert max(steps.asked) == min(step + 3, 9)


def test_the_work_is_done_by_other_threads() -> None:
    steps = Steps()
    with Loader(steps, workers=2, ahead=3) as loader:  # type: ignore[arg-type]
        _numbers(loader, range(12))
    assert steps.threads
    assert threading.current_thread().name not in steps.threads


def test_an_error_is_raised_at_its_step() -> None:
    with Loader(Steps(broken=4), workers=1, ahead=8) as loader:  # type: ignore[arg-type]
        assert _numbers(loader, range(4)) == [0, 1, 2, 3]
        with pytest.raises(DataError, match="row 3 cannot be read"):
            loader.take(4, 12)


def test_a_jump_starts_anew_there() -> None:
    with Loader(Steps(), workers=1, ahead=4) as loader:  # type: ignore[arg-type]
        _numbers(loader, range(3))
        assert int(loader.take(20, 24)[0].input_ids_BS[0, 1]) == 22


def test_leaving_ends_the_threads() -> None:
    before = set(threading.enumerate())
    with Loader(Steps(), workers=3, ahead=6) as loader:  # type: ignore[arg-type]
        loader.take(0, 100)
    assert set(threading.enumerate()) == before


def test_waiting_is_counted_once() -> None:
    with Loader(Steps(), workers=1, ahead=2) as loader:  # type: ignore[arg-type]
        loader.take(0, 4)
        assert loader.waited() > 0
        assert loader.waited() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: memory cannot be pinned")
def test_pinned_batches_are_pinned() -> None:
    with Loader(Steps(), workers=1, ahead=2, pin=True) as loader:  # type: ignore[arg-type]
        assert loader.take(0, 4)[0].input_ids_BS.is_pinned()
