"""One result, whatever the layout: ten steps of each cell against one process of plain PyTorch, in fp32.

The matrix is world x ZeRO x ep_size x exchange x keep_gathered x overlap x offload x accumulation x
activation checkpointing x tied embeddings. It has 1368 possible cells and is thinned by this rule: each
possible combination of the first four settings is one cell, and the other settings are dealt out so that
every possible pair of two settings occurs. The first test asserts both. Cells of one world share one process
group.

Compared are the loss, the balance loss, the z-loss and the gradient norm of each step, and every trainable
tensor at the end. Clipping binds in some steps and not in others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_model, write_tiny_run
from support.training import Layout, apart, reference, start, step, worst, write_zero_settings

if TYPE_CHECKING:
    from moe_medical.training.trainer import Trainer

TOLERANCE = 1e-5
STEPS, EXPERTS = 10, 4
ADAPTERS = {"num_experts": EXPERTS, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}
LOSSES = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
TRAINING = {
    "steps": STEPS,
    "global_batch": 8,
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "clip_norm": 0.85,
    "epsilon": 1e-4,
}

SETTINGS: dict[str, tuple[str, ...]] = {
    "world": ("1", "2", "4"),
    "zero": ("0", "1", "2", "3"),
    "ep": ("1", "2", "4"),
    "exchange": ("-", "tokens", "weights"),
    "keep": ("-", "no", "yes"),
    "overlap": ("-", "no", "yes"),
    "offload": ("none", "cpu"),
    "accumulation": ("1", "2"),
    "checkpointing": ("none", "non_reentrant", "reentrant"),
    "embeddings": ("tied", "untied"),
}
TABLE = """
world  zero  ep  exchange  keep  overlap  offload  accumulation  checkpointing  embeddings
1      0     1   -         -     -        none     2             non_reentrant  tied
1      1     1   -         -     -        none     1             reentrant      untied
1      2     1   -         -     -        cpu      1             none           untied
1      3     1   -         -     -        cpu      2             none           tied

2      0     1   -         -     -        none     1             reentrant      untied
2      0     2   tokens    -     -        none     2             non_reentrant  tied
2      0     2   weights   no    yes      none     1             none           untied
2      1     1   -         -     -        cpu      2             non_reentrant  tied
2      1     2   tokens    -     -        cpu      2             none           tied
2      1     2   weights   yes   yes      cpu      2             reentrant      untied
2      2     1   -         -     -        cpu      2             reentrant      tied
2      2     2   tokens    -     -        none     1             none           tied
2      2     2   weights   no    no       cpu      2             non_reentrant  untied
2      3     1   -         -     -        none     2             none           untied
2      3     2   tokens    -     -        cpu      1             non_reentrant  tied
2      3     2   weights   yes   -        none     2             none           tied

4      0     1   -         -     -        none     2             non_reentrant  untied
4      0     2   tokens    -     -        none     1             none           tied
4      0     2   weights   yes   yes      none     2             non_reentrant  tied
4      0     4   tokens    -     -        none     2             none           untied
4      0     4   weights   no    no       none     1             non_reentrant  tied
4      1     1   -         -     -        none     1             non_reentrant  tied
4      1     2   tokens    -     -        cpu      1             non_reentrant  untied
4      1     2   weights   no    no       none     2             reentrant      untied
4      1     4   tokens    -     -        none     2             reentrant      tied
4      1     4   weights   yes   no       cpu      1             none           tied
4      2     1   -         -     -        none     1             non_reentrant  untied
4      2     2   tokens    -     -        none     2             non_reentrant  tied
4      2     2   weights   yes   yes      none     1             reentrant      untied
4      2     4   tokens    -     -        cpu      1             reentrant      untied
4      2     4   weights   no    yes      cpu      2             none           tied
4      3     1   -         -     -        cpu      1             none           untied
4      3     2   tokens    -     -        cpu      2             reentrant      untied
4      3     2   weights   no    -        none     1             reentrant      tied
4      3     4   tokens    -     -        none     2             non_reentrant  untied
4      3     4   weights   yes   -        cpu      1             non_reentrant  untied
"""


@dataclass(frozen=True)
class Cell:
    """A row of the table; `-` where a setting means nothing."""

    world: str
    zero: str
    ep: str
    exchange: str
    keep: str
    overlap: str
    offload: str
    accumulation: str
    checkpointing: str
    embeddings: str

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items() if value != "-")

    @property
    def is_possible(self) -> bool:
        """Whether it is a layout, with `-` just where a setting means nothing."""
        spread, weights = self.ep != "1", self.exchange == "weights"
        return (
            int(self.ep) <= int(self.world)
            and (self.exchange != "-") == spread
            and (self.keep != "-") == weights
            and (self.overlap != "-") == (weights and self.zero != "3")
            and not (self.offload == "cpu" and self.zero == "0")
        )

    @property
    def layout(self) -> Layout:
        return Layout(
            zero=int(self.zero),
            ep_size=int(self.ep),
            exchange="auto" if self.exchange == "-" else self.exchange,
            offload=self.offload == "cpu",
            accumulation=int(self.accumulation),
            checkpointing=self.checkpointing,
            keep_gathered=self.keep == "yes",
            overlap=self.overlap != "no",
        )

    def combinations(self, keys: int) -> Iterator[tuple[tuple[str, str], ...]]:
        return itertools.combinations(asdict(self).items(), keys)


CELLS = [Cell(*line.split()) for line in TABLE.strip().splitlines()[1:] if line]


def test_the_table_has_every_pair_of_settings() -> None:
    possible = [c for c in itertools.starmap(Cell, itertools.product(*SETTINGS.values())) if c.is_possible]
    assert set(CELLS) <= set(possible)

    def first_four(cells: list[Cell]) -> set[tuple[str, ...]]:
        return {(cell.world, cell.zero, cell.ep, cell.exchange) for cell in cells}

    def pairs(cells: list[Cell]) -> set[tuple[tuple[str, str], ...]]:
        return {pair for cell in cells for pair in cell.combinations(2)}

    assert first_four(CELLS) == first_four(possible)
    assert pairs(CELLS) == pairs(possible)


def _train_cells(folder: str, cells: list[dict[str, str]]) -> list[dict[str, Any]]:
    """How far each cell is from the reference, on this rank. One process group for all."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    seen = []
    for cell in (Cell(**given) for given in cells):
        run = Path(folder) / cell.embeddings / "run.yaml"
        topology = start_distributed(cell.layout.configured(str(run), int(cell.world)).parallel)
        trainer = start(cell.layout, str(run), topology)
        _check_layout(trainer, cell)
        seen.append(_distance(trainer, cell, torch.load(run.with_name("reference.pt"))))
    stop_distributed()
    return seen


def _check_layout(trainer: Trainer, cell: Cell) -> None:
    """The engine is what the cell says, so that no two cells are one."""
    from moe_medical.adapters.model import routed_layers

    engine, ep_size = trainer.engine, int(cell.ep)
    assert engine.stage == int(cell.zero)
    assert len(trainer.batches.step(0)) == int(cell.accumulation)
    assert engine.deepspeed.zero_cpu_offload() == (cell.offload == "cpu")
    assert (engine.group.size if engine.group else 1) == ep_size
    for layer in routed_layers(engine.module).values():
        assert getattr(layer.lora_A, "ds_shape", layer.lora_A.shape)[0] == EXPERTS // ep_size
        assert (layer.token_exchange is not None) == (cell.exchange == "tokens")
        assert (layer.weight_exchange is not None) == (cell.exchange == "weights")
        assert layer.weight_exchange is None or layer.weight_exchange.keep == (cell.keep == "yes")


def _distance(trainer: Trainer, cell: Cell, expected: dict[str, Any]) -> dict[str, Any]:
    """Largest relative difference of each value, and the name and distance of the worst tensor."""
    from moe_medical.distributed.state import gather_parameters

    with _counted_forwards(trainer) as forwards:
        values = [step(trainer, number) for number in range(STEPS)]
    counts_first, recomputes = cell.accumulation != "1", cell.checkpointing != "none"
    assert forwards.total() == STEPS * int(cell.accumulation) * (1 + counts_first + recomputes)
    distance: dict[str, Any] = {
        key: max(abs(v[key] / r - 1) for v, r in zip(values, expected[key], strict=True))
        for key in ("loss", "balance", "z", "norm")
    }
    return distance | {"tensor": worst(apart(gather_parameters(trainer.engine), expected["tensors"]))}


@contextmanager
def _counted_forwards(trainer: Trainer) -> Iterator[Counter[str]]:
    """How often the first adapted layer runs."""
    from moe_medical.adapters.layer import AdaptedLinear

    forwards: Counter[str] = Counter()
    first = next(m for m in trainer.engine.module.modules() if isinstance(m, AdaptedLinear))
    hook = first.register_forward_pre_hook(lambda *_: forwards.update([first.name]))
    yield forwards
    hook.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `tied` and `untied`, each with its reference."""
    root = tmp_path_factory.mktemp("matrix")
    for embeddings in SETTINGS["embeddings"]:
        run = write_tiny_run(root / embeddings, adapters=ADAPTERS | LOSSES, training=TRAINING)
        write_tiny_model(run.with_name("model"), seed=3, tied=embeddings == "tied")
        write_zero_settings(run.parent)
        torch.save(asdict(reference(str(run), STEPS)), run.with_name("reference.pt"))
    return root


@pytest.fixture(scope="module")
def measured(folder: Path) -> Callable[[str], dict[Cell, list[dict[str, Any]]]]:
    """World -> cell -> distance from the reference on each rank."""

    @cache
    def of_world(world: str) -> dict[Cell, list[dict[str, Any]]]:
        cells = [cell for cell in CELLS if cell.world == world]
        by_rank = on_ranks(
            int(world), _train_cells, folder, str(folder), [asdict(c) for c in cells], timeout=500
        )
        return dict(zip(cells, map(list, zip(*by_rank, strict=True)), strict=True))

    return of_world


def test_clipping_binds_in_some_steps_only(folder: Path) -> None:
    for embeddings in SETTINGS["embeddings"]:
        norms = torch.load(folder / embeddings / "reference.pt")["norm"]
        binds = [norm > TRAINING["clip_norm"] for norm in norms]
        assert 2 <= sum(binds) <= STEPS - 2
        assert all(abs(norm / TRAINING["clip_norm"] - 1) > 1e-3 for norm in norms)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_ten_steps_equal_plain_pytorch(cell: Cell, measured: Callable) -> None:
    for distance in measured(cell.world)[cell]:
        name, of_worst = distance.pop("tensor")
        assert distance | {name: of_worst} == {
            key: pytest.approx(0.0, abs=TOLERANCE) for key in [*distance, name]
        }
