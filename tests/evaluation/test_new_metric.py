"""A metric of somebody else's: what CONTRIBUTING.md says suffices, from the task file to the interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.tiny import write_tiny_tasks

from moe_medical.data import recipe
from moe_medical.data.kinds import KINDS
from moe_medical.data.recipe import load_mixture
from moe_medical.errors import ConfigError
from moe_medical.evaluation.metric import Answers, Metric, mean_of, ratio
from moe_medical.evaluation.metrics import METRICS, all_scores

SAME_LENGTH = Metric(
    lambda answers: mean_of([float(len(p) == len(t)) for p, t in zip(*answers[:2], strict=True)]), ratio
)
"""Share of the answers that are as long as the target."""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """The tiny tasks, of which one is scored by it."""
    path = write_tiny_tasks(tmp_path)
    task = yaml.safe_load((tmp_path / "last_word.yaml").read_text())
    (tmp_path / "last_word.yaml").write_text(yaml.safe_dump(task | {"metric": "same_length"}))
    return path


def test_a_new_metric_scores_a_task(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "same_length", SAME_LENGTH)
    kind = KINDS["generation"]
    monkeypatch.setitem(KINDS, "generation", replace(kind, metrics=(*kind.metrics, "same_length")))
    monkeypatch.setattr(recipe, "KNOWN_METRICS", (*recipe.KNOWN_METRICS, "same_length"))  # follows from KINDS
    spec = next(task for task in load_mixture(mixture).tasks if task.name == "last_word")
    assert spec.metric == "same_length"
    found = all_scores(spec.metric, Answers(["ab", "c", "de", "f"], ["xy", "zz", "de", "g"]), resamples=200)
    assert found.score == found.all["same_length"] == 0.75
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.75 < found.high <= 1


def test_without_these_places_it_is_refused(mixture: Path) -> None:
    with pytest.raises(ConfigError, match="same_length"):
        load_mixture(mixture)
