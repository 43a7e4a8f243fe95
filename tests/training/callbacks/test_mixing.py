"""Dynamic mixtures in real runs: shares move, checkpoints carry the history, resuming changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.launches import adapter_bytes, rows
from support.ranks import on_ranks
from support.tiny import write_tiny_run

RULES = {"regret": "famo", "odm": "dwa", "doge": "uncertainty"}
"""Each with task weights that follow the losses: their state has to come back as well."""
STEPS, STOP = 44, 21
"""A decision is due every 4 steps; at step 21 one is waiting for its block."""
MIX = {
    "block": 8,
    "max_repeats": None,
    "rule": "uniform",
    "dynamic": {"every_blocks": 4, "smoothing": 0.0, "rate": 2.0},
}


class _StopsAt:
    """Asks to stop when so many steps are done, as a signal would."""

    def __init__(self, step: int) -> None:
        self._left = step

    @contextmanager
    def listening(self) -> Iterator[None]:
        yield

    @property
    def asked(self) -> bool:
        self._left -= 1
        return self._left < 0


def _run_rules(run: str, rules: dict[str, str]) -> dict[str, list[Any]]:
    """Each rule twice: at one go, and stopped and resumed; the changes of weights of each."""
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.errors import PreemptedError
    from moe_medical.training.trainer import Trainer

    topology = start_distributed(load_config(run).parallel)

    def trainer(rule: str, name: str, *more: str) -> Trainer:
        folder = Path(run).parent / f"{rule}-{name}"
        overrides = [f"data.mix.dynamic.rule={rule}", f"training.loss.task_weights={rules[rule]}"]
        overrides += ["training.loss.window=5", f"run.dir={folder}", *more]
        return Trainer(load_config(run, overrides), topology)

    changes: dict[str, list[Any]] = {}
    for rule in rules:
        whole = trainer(rule, "whole")
        whole.run()
        part = trainer(rule, "resumed")
        part.stop = _StopsAt(STOP)  # type: ignore[assignment]
        with pytest.raises(PreemptedError):
            part.run()
        rest = trainer(rule, "resumed", "data.workers=0", "checkpoint.every_steps=7")
        rest.run()
        changes[rule] = [
            [[block, shares.tolist()] for block, shares in t.data.plan.history] for t in (whole, rest)
        ]
    stop_distributed()
    return changes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"max_length": 96, "system_prompt": None, "mix": MIX, "prefetch_steps": 8, "workers": 2}
    return write_tiny_run(
        tmp_path_factory.mktemp("dynamic"),
        data={**data, "recipe": "tasks/mixture.yaml"},
        training={"steps": STEPS, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.02},
        evaluation={"loss_rows": 8, "score_rows": 0, "batch_rows": 8},
        checkpoint={"every_steps": 0},
    )


@pytest.fixture(scope="module")
def changes(run: Path) -> list[dict[str, list[Any]]]:
    """Of each of two ranks: rule -> changes of the undisturbed and of the resumed run."""
    return on_ranks(2, _run_rules, run.parent, str(run), RULES, timeout=280)


@pytest.mark.parametrize("rule", RULES)
def test_shares_move_alike_on_all_ranks_and_after_a_resume(changes: list, rule: str) -> None:
    (whole, resumed), other = changes[0][rule], changes[1][rule]
    assert resumed == whole
    assert other == [whole, resumed]
    blocks = [block for block, _ in whole]
    assert blocks[0] == 0
    assert len(blocks) > 4
    shares = [share for _, (share, _) in whole]
    assert max(shares) - min(shares) > 1e-3, "no decision changed anything"


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_undisturbed_one(run: Path, changes: list, rule: str) -> None:
    whole, resumed = run.parent / f"{rule}-whole", run.parent / f"{rule}-resumed"
    assert changes
    assert rows(resumed) == rows(whole)
    assert adapter_bytes(resumed) == adapter_bytes(whole)


@pytest.mark.parametrize("rule", RULES)
def test_task_weights_move(run: Path, changes: list, rule: str) -> None:
    assert changes
    last = [row for row in rows(run.parent / f"{rule}-whole") if "loss_weight/even" in row][-1]
    assert abs(last["loss_weight/even"] - 1) > 1e-4
    assert last["loss_weight/even"] + last["loss_weight/last_word"] == pytest.approx(2)


def test_decisions_are_told(run: Path, changes: list) -> None:
    assert changes
    lines = [
        json.loads(line) for line in (run.parent / "regret-whole/metrics.jsonl").read_text().splitlines()
    ]
    told = [line for line in lines if "mix_next/even" in line]
    assert [line["step"] for line in told][:2] == [4, 8]
    assert all(abs(line["mix_next/even"] + line["mix_next/last_word"] - 1) < 1e-9 for line in told)
