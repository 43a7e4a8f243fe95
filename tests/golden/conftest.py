"""All golden cases, run once for every test of this folder."""

from __future__ import annotations

import pytest

from golden.cases import all_names
from golden.run import Record, run_cases


@pytest.fixture(scope="session")
def golden_record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Case -> its record on this machine."""
    return run_cases(all_names(), tmp_path_factory.mktemp("golden"))
