"""Run files that are wrong, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

from moe_medical.config import load_config
from moe_medical.errors import ConfigError


def config_problems(folder: Path, *overrides: str, stage: int = 2) -> list[str]:
    """What a run file of two ranks and this ZeRO stage, with these overrides, is refused for."""
    (folder / "mixture.yaml").write_text("name: any\n")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = folder / "run.yaml"
    run.write_text("data: {recipe: mixture.yaml}\nparallel: {deepspeed: zero.json, ranks: 2}\n")
    try:
        load_config(run, overrides)
    except ConfigError as e:
        return [str(problem) for problem in e.problems]
    return []
