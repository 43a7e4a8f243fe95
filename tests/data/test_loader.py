"""The loader: the same batches whatever the threads, a bounded number ahead, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from moe_medical.data.batches import Batch, collate
from moe_medical.data.chat import Encoded
from moe_medical.data.loader import Loader
from moe_medical.data.mixture import SampleRef
from moe_medical.errors import DataError


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
