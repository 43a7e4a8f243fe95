"""One run that nobody disturbs; the others must write what it wrote."""

from __future__ import annotations

import pytest
from support.launches import LAUNCH, UndisturbedRun, run_to_end
from support.tiny import write_tiny_run

STEPS = 40


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> UndisturbedRun:
    base = tmp_path_factory.mktemp("undisturbed")
    run_file = write_tiny_run(
        base,
        adapters={"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.1},
        training={"steps": STEPS},
        checkpoint={"every_steps": 4},
        evaluation={"every_steps": 10, "score_rows": 2, "max_new_tokens": 2},
        tracking={"wandb": {"enabled": False}, "log_every_steps": 3},
    )
    code, output = run_to_end([*LAUNCH, str(run_file)], base / "output")
    assert code == 0, output
    return UndisturbedRun(run_file, base / "run", base / "tasks", output)
