"""The order of the run's samples: sample g is a pure function of (sizes, limits, block, seed, weights, g).

Decisions:
- The order does not depend on the world size, on how far a rank prefetched, or on restarts: a rank asks
  for its slice of each global batch, and a checkpoint keeps `state()` and one position.
- Each block holds an exact number of samples per task: largest remainder, with the rounding error carried to
  the next block, so a share below one sample per block is met over several. A count is never below zero.
- Each epoch of each task is a fresh keyed permutation of its rows. A task at its limit leaves the mix and its
  share flows to the others; what is left of a block when all are at theirs is missing.
- Shares and carry are integers (2 ** -30 samples) and permutations are our own arithmetic, so neither a
  platform's rounding nor a numpy release changes the order.
- Weights change only at a named later block: "from the next block" would differ between ranks that
  prefetched differently. The lead rule: that block must lie beyond all that `at` has handed out on any rank;
  `set_weights` refuses the others. `counts` and `report` look ahead without handing out.
- A state of a position holds the counters of its block, so that a resumed run plans no block before it.
Planning keeps two rows of counts per block, about 90 us and 700 bytes each at 28 tasks; reaching a far
position plans all blocks before it once.
Does not choose the weights: see `static_mixing.py` and `dynamic_mixing.py`. Does not look at the rows.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_medical.data.static_mixing import Floats, Ints, row_limits
from moe_medical.errors import DataError

_ONE = 2**30
"""Fixed-point unit of weights, and of a sample in shares and carry."""
_BLOCK_STREAM = 2**32
"""Stream number of the in-block permutation; tasks have the numbers below."""
_KEPT_BLOCKS = 8
_ROUNDS = 4

Words = NDArray[np.uint64]


class Exhausted(DataError):
    """Every task with a share has given all the samples that its repeat cap allows."""


class SampleRef(NamedTuple):
    """Row `row` of task `task`, in the task's own pass number `epoch`."""

    task: int
    epoch: int
    row: int


class TaskShare(NamedTuple):
    """What a task is given in a run."""

    task: int
    rows: int
    share: float
    """Its samples / all samples of the run."""
    samples: int
    repeats: float
    """Its samples / its rows."""


class _Block(NamedTuple):
    """The samples of one block in order, as plain lists, which are quicker to index."""

    tasks: list[int]
    epochs: list[int]
    rows: list[int]


class MixPlan:
    """Which row of which task is sample g of the run.

    Args:
        sizes: rows of each task, all >= 1.
        weights: shares asked for, any scale; >= 0 and at least one > 0.
        block: samples over which shares are exact.
        seed: of all permutations.
        max_repeats: epochs of each task at most; None is no cap.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Ints,
        weights: Sequence[float] | NDArray[np.float64],
        block: int,
        seed: int,
        max_repeats: Sequence[float | None],
    ) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        if self._sizes.size == 0 or self._sizes.min() < 1:
            raise ValueError("every task of a mixture needs at least one row")
        if block < 1:
            raise ValueError(f"block must be >= 1, got {block}")
        self._block = block
        self._seed = seed
        self._max_repeats = list(max_repeats)
        self._limits = row_limits(self._sizes, self._max_repeats)
        self._history: list[tuple[int, Ints]] = []
        self._handed_out = -1
        self._blocks: dict[int, _Block] = {}
        self._start_at(0, np.zeros_like(self._sizes), np.zeros_like(self._sizes))
        self.set_weights(weights, from_block=0)

    def set_weights(self, weights: Sequence[float] | NDArray[np.float64], from_block: int) -> None:
        """Uses `weights` from block `from_block` on; blocks planned beyond it are planned again.

        Caps hold whatever the weights: a task at its limit leaves the mix.

        Raises:
            ValueError: weights that are no shares, or a block that is not after the last change and after all
                that were handed out.
        """
        last = max(self._handed_out, self.last_change if self._history else -1)
        if from_block <= last:
            raise ValueError(f"a weight change must come after block {last}, got {from_block}")
        self._history.append((from_block, _quantise(weights, len(self._sizes))))
        # Entry b of `_used` is what was given before block b, so that of `from_block` itself still holds.
        kept = from_block + 1 - self._first
        del self._used[kept:], self._carry[kept:]
        self._blocks = {b: block for b, block in self._blocks.items() if b < from_block}

    @property
    def fingerprint(self) -> str:
        """sha256 of what must not change between restarts: everything in `state()` but the history."""
        return hashlib.sha256(json.dumps(self._fixed(), sort_keys=True).encode()).hexdigest()

    @property
    def history(self) -> list[tuple[int, Floats]]:
        """(first block, shares) of every change of weights so far, those of later blocks included."""
        return [(block, weights / weights.sum()) for block, weights in self._history]

    @property
    def last_change(self) -> int:
        """Block of the newest change of weights."""
        return self._history[-1][0]

    def block_of(self, sample: int) -> int:
        """Number of the block that holds sample number `sample`."""
        return sample // self._block

    def at(self, g: int) -> SampleRef:
        """Sample number g of the run, counted from 0.

        Raises:
            Exhausted: the repeat caps end the run before g.
        """
        if g < 0:
            raise IndexError(f"samples are counted from 0, got {g}")
        number, offset = divmod(g, self._block)
        block = self._blocks.get(number) or self._lay_out(number)
        # Reading back must not lower the lead rule's bar.
        self._handed_out = max(self._handed_out, number)
        if offset >= len(block.tasks):
            raise self._exhausted(g + 1)
        return SampleRef(block.tasks[offset], block.epochs[offset], block.rows[offset])

    def counts(self, num_samples: int) -> Ints:
        """Samples of each task among the first `num_samples`, shape (tasks,).

        Raises:
            Exhausted: the repeat caps allow fewer samples.
        """
        number, offset = divmod(num_samples, self._block)
        total = self._used_before(number).copy()
        if offset:  # only the begun block needs its order; whole ones are sums that are there
            tasks = (self._blocks.get(number) or self._lay_out(number)).tasks[:offset]
            total += np.bincount(tasks, minlength=len(total))
        if total.sum() < num_samples:
            raise self._exhausted(num_samples)
        return total

    def report(self, num_samples: int) -> list[TaskShare]:
        """What every task is given in a run of `num_samples`; raises Exhausted as `counts` does."""
        counts = self.counts(num_samples)
        return [
            TaskShare(task, rows, samples / max(1, num_samples), samples, samples / rows)
            for task, (rows, samples) in enumerate(zip(self._sizes.tolist(), counts.tolist(), strict=True))
        ]

    def warnings(self, num_samples: int, names: Sequence[str]) -> list[str]:
        """One line for each task that a run of `num_samples` would never see."""
        shares = self.report(num_samples)
        return [
            f"task {names[s.task]!r} gets 0 of {num_samples} samples: raise its weight or the run's length"
            for s in shares
            if s.samples == 0
        ]

    def state(self, sample: int | None = None) -> dict[str, Any]:
        """JSON-able. With the number of the next sample, reading on from there plans nothing before it."""
        history = [[block, weights.tolist()] for block, weights in self._history]
        if sample is None:
            return self._fixed() | {"history": history}
        number = self.block_of(sample)
        used = self._used_before(number)
        carry = self._carry[number - self._first]
        start = {"sample": sample, "used": used.tolist(), "carry": carry.tolist()}
        return self._fixed() | {"history": history, "start": start}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MixPlan:
        """The plan that `state()` described, to the sample."""
        first = state["history"][0][1]
        plan = cls(state["sizes"], first, state["block"], state["seed"], state["max_repeats"])
        plan.restore(state)
        return plan

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the weights of a state of this mixture, and its position where it has one.

        Raises:
            ValueError: the state is of other sizes, caps, block or seed.
        """
        if any(state.get(key) != value for key, value in self._fixed().items()):
            raise ValueError("the state is of another mixture")
        self._history = [(block, np.array(weights, dtype=np.int64)) for block, weights in state["history"]]
        nothing = [0] * len(self._sizes)
        start = state.get("start") or {"sample": 0, "used": nothing, "carry": nothing}
        used, carry = (np.array(start[key], dtype=np.int64) for key in ("used", "carry"))
        self._blocks.clear()
        # Of a start inside a block, that block has been handed out; of one at its edge, the block before.
        self._handed_out = self.block_of(start["sample"] - 1)
        self._start_at(self.block_of(start["sample"]), used, carry)

    def _fixed(self) -> dict[str, Any]:
        return {
            "version": 1,
            "sizes": self._sizes.tolist(),
            "block": self._block,
            "seed": self._seed,
            "max_repeats": self._max_repeats,
        }

    def _start_at(self, first: int, used: Ints, carry: Ints) -> None:
        """Plan from block `first` on: what was given before it, and the rounding error it inherits."""
        # Entry i of both is of block first + i.
        self._first = first
        self._used = [used]
        self._carry = [carry]

    def _lay_out(self, number: int) -> _Block:
        """Order, epochs and rows of one block.

        Sorted by task first: the j-th sample that task i gives to the block is its k-th of the run,
        k = j + used_i, hence row permute(k mod n_i) of epoch k div n_i. Then the whole block is permuted.
        """
        used = self._used_before(number)
        counts = self._used_before(number + 1) - used
        tasks = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(tasks))
        first = np.cumsum(counts) - counts
        k = positions - first[tasks] + used[tasks]
        sizes = self._sizes[tasks]
        epochs, places = np.divmod(k, sizes)
        # One key per (task, epoch): every epoch of every task is a permutation of its own.
        rows = permute(places, sizes, _keys(self._seed, tasks, epochs))
        streams = np.full_like(tasks, _BLOCK_STREAM)
        numbers = np.full_like(tasks, number)
        order = permute(positions, np.full_like(tasks, len(tasks)), _keys(self._seed, streams, numbers))
        block = _Block(tasks[order].tolist(), epochs[order].tolist(), rows[order].tolist())
        # A run reads forward, so the oldest block is the one that is not asked for again.
        while len(self._blocks) >= _KEPT_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[number] = block
        return block

    def _used_before(self, number: int) -> Ints:
        """Samples that each task gives before block `number`; plans what is not planned yet."""
        if number < self._first:
            # Only a restored plan is asked for its past, which it has to plan from the beginning.
            self._start_at(0, np.zeros_like(self._sizes), np.zeros_like(self._sizes))
        while len(self._used) <= number - self._first:
            block = self._first + len(self._used) - 1
            # Of the last change at or before the block.
            change = bisect.bisect_right(self._history, block, key=lambda change: change[0]) - 1
            weights = self._history[change][1]
            counts, carry = self._share_out(weights, self._used[-1], self._carry[-1])
            self._used.append(self._used[-1] + counts)
            self._carry.append(carry)
        return self._used[number - self._first]

    def _share_out(self, weights: Ints, used: Ints, carry: Ints) -> tuple[Ints, Ints]:
        """Samples of each task in one block, and the rounding error that the next block inherits.

        Largest remainder with carry: want_i = share_i * B + carry_i, count_i an integer near it with
        sum_i count_i = B, and carry'_i = want_i - count_i. So rounding never adds up over blocks.
        """
        active = (weights > 0) & (used < self._limits)
        counts = np.zeros_like(used)
        left = self._block
        # Each turn either ends or takes a task at its limit out, so there are at most as many as tasks.
        while left and active.any():
            want = _shares(weights, active) * left + carry
            trial = _apportion(want, active, left)
            over = active & (used + trial > self._limits)
            if not over.any():
                return counts + trial, np.where(active, want - trial * _ONE, 0)
            # Fill the tasks that reach their limit, share out the rest of the block among the others.
            counts[over] = (self._limits - used)[over]
            left = self._block - int(counts.sum())
            active &= ~over
        # All tasks are at their limits, or the block was filled on the way: nothing is owed to anyone.
        return counts, np.zeros_like(carry)

    def _exhausted(self, num_samples: int) -> Exhausted:
        weights = self._history[-1][1]
        available = int(self._limits[weights > 0].sum())
        return Exhausted(
            f"the run asks for {num_samples} samples, but max_repeats allows its tasks only {available}. "
            "Lower training.steps or training.global_batch, or raise data.mix.max_repeats (null: no cap)."
        )


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Position of each `index` under a keyed permutation of [0, size); all arrays of one shape.

    An alternating Feistel network on the smallest near-square grid with at least `size` cells: each half
    round adds a hash of one coordinate to the other, which can be undone. An index that lands outside
    [0, size) is sent through again (cycle walking), which keeps it a permutation.
    """
    result = index.astype(np.uint64)
    bound = size.astype(np.uint64)
    width = np.ceil(np.sqrt(size)).astype(np.uint64)
    height = (bound + width - np.uint64(1)) // width
    pending = np.arange(len(result))
    # width * height < size + width, so nearly all land inside at once and few turns are needed.
    while len(pending):
        w = width[pending]
        h = height[pending]
        x, y = _rounds(result[pending] // h, result[pending] % h, w, h, key[pending])
        result[pending] = x * h + y
        pending = pending[result[pending] >= bound[pending]]
    return result.astype(np.int64)


def _rounds(x: Words, y: Words, width: Words, height: Words, key: Words) -> tuple[Words, Words]:
    """x <- (x + h(y)) mod width, y <- (y + h(x)) mod height, so often that both depend on both."""
    for number in range(_ROUNDS):
        x = (x + _hash(y + _hash(key + np.uint64(2 * number))) % width) % width
        y = (y + _hash(x + _hash(key + np.uint64(2 * number + 1))) % height) % height
    return x, y


def _hash(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele 2014), element by element, modulo 2 ** 64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(seed: int, stream: Ints, number: Ints) -> Words:
    """One key per element for (seed, stream, number): h(h(h(seed) ^ stream) ^ number)."""
    start = np.full(stream.shape, seed % 2**64, dtype=np.uint64)
    return _hash(_hash(_hash(start) ^ stream.astype(np.uint64)) ^ number.astype(np.uint64))


def _quantise(weights: Sequence[float] | NDArray[np.float64], num_tasks: int) -> Ints:
    """Integers with the largest at 2 ** 30; a positive weight stays positive. Integers map to themselves."""
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (num_tasks,) or not np.isfinite(w).all() or w.min() < 0 or w.max() <= 0:
        raise ValueError(f"weights must be {num_tasks} finite numbers >= 0, at least one of them > 0")
    scaled = np.rint(w / w.max() * _ONE).astype(np.int64)
    return np.where(w > 0, np.maximum(scaled, 1), 0)


def _shares(weights: Ints, active: NDArray[np.bool_]) -> Ints:
    """Fixed-point shares of the active tasks; they sum to 2 ** 30 exactly."""
    w = np.where(active, weights, 0)
    shares = w * _ONE // w.sum()
    # What rounding down has lost goes to the largest, which it changes least.
    shares[np.argmax(shares)] += _ONE - shares.sum()
    return shares


def _apportion(want: Ints, active: NDArray[np.bool_], total: int) -> Ints:
    """Non-negative integers near `want` (fixed point) that sum to `total`; 0 for inactive tasks."""
    counts = np.where(active, np.maximum(want // _ONE, 0), 0)
    # Largest remainder (Hamilton): what rounding down has left goes one by one to who misses most.
    for _ in range(total - int(counts.sum())):
        missing = np.where(active, want - counts * _ONE, np.iinfo(np.int64).min)
        counts[np.argmax(missing)] += 1
    # A negative want was lifted to zero: take the surplus back where it hurts least.
    for _ in range(int(counts.sum()) - total):
        missing = np.where(counts > 0, want - counts * _ONE, np.iinfo(np.int64).max)
        counts[np.argmin(missing)] -= 1
    return counts
