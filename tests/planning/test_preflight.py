"""What is checked before there are ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import write_tiny_run

from moe_medical.config import RunConfig, load_config
from moe_medical.errors import ConfigError
from moe_medical.planning.preflight import preflight


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that starts from an adapter which is not there any more."""
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    adapters = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "experts_from": ["gone"]}
    return load_config(write_tiny_run(tmp_path, adapters=adapters))


def test_a_source_that_is_gone_is_told(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.experts_from must name an existing folder"):
        preflight(config)


def test_a_resumed_run_needs_its_source_no_more_whatever_the_pointer_says(config: RunConfig) -> None:
    """A kill between a checkpoint and `latest.json` leaves the folder alone."""
    checkpoints = Path(config.run.dir) / "checkpoints"
    (checkpoints / "step-00000004").mkdir(parents=True)
    preflight(config)
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000004.corrupt-1234")
    (checkpoints / "latest.json").write_text('{"step": 4}')
    with pytest.raises(ConfigError, match="experts_from"):
        preflight(config)
