"""Settings of every test, and how tests are shared out between two workers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from support.ranks import start_servers

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
    "tests/golden/test_golden.py",
)
"""Files that take a minute and more."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """A worker of a whole run will need the servers of ranks, which take a while to import."""
    if hasattr(session.config, "workerinput"):
        start_servers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    rank = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
