"""Names that others rely on do not change unannounced."""

from __future__ import annotations

import json

import pytest

from golden.frozen import FROZEN, HOW_TO_ANNOUNCE, current
from golden.run import Record


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["run file keys", "presets", "exit codes", "metrics", "files"])
def test_no_name_changes_unannounced(kind: str, golden_record: Record) -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(current(golden_record)))
    assert found.keys() == frozen.keys()
    apart = [
        f"{name}: {frozen[kind].get(name, 'new')} -> {found[kind].get(name, 'gone')}"
        for name in sorted(frozen[kind].keys() | found[kind].keys())
        if name not in frozen[kind] or name not in found[kind] or frozen[kind][name] != found[kind][name]
    ]
    assert not apart, "\n".join([f"{kind} changed:", *apart, HOW_TO_ANNOUNCE])
