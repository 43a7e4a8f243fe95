"""The examples run as they stand, and say what their text promises."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no comment, docstring or blank line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = tree.body[1:] if isinstance(getattr(tree.body[0], "value", None), ast.Constant) else tree.body
    nodes = [node for top in body for node in ast.walk(top) if isinstance(node, ast.stmt | ast.expr)]
    return len({line for node in nodes for line in (node.lineno, node.end_lineno)})


def test_molora_in_20_lines(capsys: pytest.CaptureFixture[str]):
    path = EXAMPLES / "molora_in_20_lines.py"
    assert lines_of_code(path) <= 20
    runpy.run_path(str(path), run_name="__main__")
    *routings, losses = capsys.readouterr().out.splitlines()
    assert [line.partition(" [")[0] for line in routings] == [
        f"model.layers.{i}.mlp.gate_proj" for i in range(2)
    ]
    for line in routings:
        counts = json.loads(line[line.index("[") :])
        assert len(counts) == 4
        assert sum(counts) == 2 * 2 * 8  # two experts for each token of two rows of eight
    before, after = map(float, re.findall(r"\d+\.\d+", losses))
    assert after < before
