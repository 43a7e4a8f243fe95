"""A step whose gradients are not finite is skipped, alike on all ranks and in every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.launches import LAUNCH, rows, run_to_end
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import write_zero_settings, zero_settings

if TYPE_CHECKING:
    from moe_medical.training.trainer import Trainer

LAYOUTS = {
    "zero0": (0, []),
    "zero2": (2, []),
    "zero3": (3, []),
    "zero0_ep": (0, ["parallel.ep_size=2"]),
    "zero2_ep": (2, ["parallel.ep_size=2"]),
    "zero2_offload": (2, []),
}
POISON = {"nan": math.nan, "inf": math.inf}


def _steps(run: str, layouts: dict[str, Any], poison: str) -> dict[str, Any]:
    """Of each layout: steps 0, 1 (poisoned on rank 1) and 2; the same without step 1; a resume after it."""
    from moe_medical.config import load_config
    from moe_medical.distributed.state import gather_state, load_state
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training.trainer import Trainer

    topology = start_distributed(load_config(run).parallel)
    found: dict[str, Any] = {}
    for name, (stage, overrides) in layouts.items():
        settings = zero_settings(Path(run).parent, stage, offload=name.endswith("offload"))
        config = load_config(run, [*overrides, f"parallel.deepspeed={settings}", f"run.dir={run}-{name}"])

        def step(trainer: Trainer, number: int, factor: float = 1.0) -> float:
            backward = trainer.engine.backward
            if topology.rank == 1:
                trainer.engine.backward = lambda loss, last: backward(loss * factor, last)  # type: ignore
            norm = trainer.train_step(number, trainer.batches.step(number)).grad_norm
            trainer.engine.backward = backward  # type: ignore
            return norm

        whole, other, resumed = (Trainer(config, topology) for _ in range(3))
        norms = [step(whole, 0), step(whole, 1, POISON[poison])]
        state = gather_state(whole.engine, 2)
        norms.append(step(whole, 2))
        step(other, 0)
        before = gather_state(other.engine, 1)
        step(other, 2)
        load_state(resumed.engine, state)
        step(resumed, 2)
        values = [_flat(gather_state(t.engine, 3)) for t in (whole, other, resumed)]
        found[name] = {
            "norms": [norm if math.isfinite(norm) else None for norm in norms],
            "unchanged": _flat(state) == _flat(before),
            "as if it had not been": values[0] == values[1],
            "resumed": values[0] == values[2],
            "applied": [state.applied, whole.engine.applied_steps, resumed.engine.applied_steps],
        }
    stop_distributed()
    return found


def _flat(state: Any) -> list[list[float]]:
    tensors = [*state.parameters.values(), *(t for of in state.moments.values() for t in of.values())]
    return [tensor.flatten().tolist() for tensor in tensors]


@pytest.mark.parametrize("poison", POISON)
def test_a_step_that_is_not_finite_on_one_rank_is_none_on_any(tmp_path: Path, poison: str) -> None:
    run = write_tiny_run(tmp_path, training={"clip_norm": 1.0}, adapters={"dropout": 0.0})
    write_zero_settings(tmp_path)
    layouts = LAYOUTS if poison == "nan" else {name: LAYOUTS[name] for name in ("zero0", "zero2", "zero3")}
    first, second = on_ranks(2, _steps, tmp_path, str(run), layouts, poison, timeout=280)
    assert first == second
    for name, found in first.items():
        assert [norm is None for norm in found["norms"]] == [False, True, False], name
        assert found["unchanged"], name
        assert found["as if it had not been"], name
        assert found["resumed"], name
        assert found["applied"] == [1, 2, 2], name
    assert first["zero0"]["norms"][2] == pytest.approx(first["zero2"]["norms"][2], rel=1e-5)


def test_a_run_that_diverges_ends_with_its_own_code_and_publishes_nothing(tmp_path: Path) -> None:
    """Under an absurd learning rate: the first step is the last whose gradients are finite."""
    run = write_tiny_run(
        tmp_path,
        training={
            "steps": 20,
            "learning_rate": 1e30,
            "clip_norm": 0.0,
            "schedule": "constant",
            "warmup_ratio": 0.0,
        },
        evaluation={"score_rows": 0, "loss_rows": 2, "every_steps": 0},
        checkpoint={"every_steps": 2},
    )
    code, output = run_to_end([*LAUNCH, str(run)], tmp_path / "output")
    assert code == 79, output
    assert output.count("the run has diverged: 10 steps in a row") == 1
    assert "step skipped: step 2: losses of " in output
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "results.json").exists()
    skipped = [row["health/skipped_steps"] for row in rows(tmp_path / "run") if "health/skipped_steps" in row]
    assert skipped[:3] == [1, 2, 3]
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    assert (state["applied_steps"], state["callbacks"]["divergence"]["in_a_row"]) == (1, state["step"] - 1)
