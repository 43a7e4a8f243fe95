"""Settings of every test, and how tests are shared out between two workers."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples each time: a red run must be a change's fault. No deadline: the machine is shared.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")

LONGEST = (
    "tests/training/callbacks/test_guard.py",
    "tests/training/test_quickstart_seesaw.py",
    "tests/test_docs.py",
    "tests/distributed/test_parallel_matrix.py",
    "tests/training/test_launchers.py",
    "tests/distributed/test_compile.py",
    "tests/distributed/test_engine.py",
    "tests/training/callbacks/test_conflict.py",
    "tests/distributed/test_state.py",
    "tests/training/test_baseline.py",
    "tests/planning/test_cost.py",
    "tests/golden",
)
"""Files, and folders with a common fixture, that take a minute and more: they are begun first."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays on one worker, whose fixtures are made once; so do files that share a fixture."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    rank = {group: number for number, group in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(_group(item), len(rank)))


def _group(item: pytest.Item) -> str:
    file = item.nodeid.partition("::")[0]
    if file.startswith("tests/golden/"):
        return "tests/golden"
    return "tests/training/test_launchers.py" if "undisturbed" in getattr(item, "fixturenames", ()) else file
