"""Compare this tree with an older commit, bit for bit, on this machine.

    make golden BASE=<commit> [ONLY=NAME,...]    or    python -m golden.compare <commit> [--only NAME,...]

The base runs its own cases with its own package, out of `git archive`. What it found is kept in
$TMPDIR/moe-medical-golden by commit and case, so only the first call pays for it. Exit code 1 where anything
differs, 2 where a name is unknown.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.ranks import TESTS

from golden.cases import all_names
from golden.program import once_a_step
from golden.run import Record, refuse_other_tree, run_cases

COMPARED = ("order", "series", "decisions", "norms", "digests")
ROOT = TESTS.parent


def difference(base: Any, here: Any, path: str = "") -> str:
    """Where two records part first, empty where they are the same bit for bit."""
    if isinstance(base, dict) and isinstance(here, dict):
        for key in [*base, *(k for k in here if k not in base)]:
            inner = f"{path}{'/' if path else ''}{key}"
            if key not in base or key not in here:
                return f"{inner} only {'at the base' if key in base else 'here'}"
            if found := difference(base[key], here[key], inner):
                return found
        return ""
    if isinstance(base, list) and isinstance(here, list) and len(base) == len(here):
        parted = (difference(b, h, f"{path}[{i}]") for i, (b, h) in enumerate(zip(base, here, strict=True)))
        return next(filter(None, parted), "")
    same = type(base) is type(here) and repr(base) == repr(here)
    return "" if same else f"{path}: {_short(base)} -> {_short(here)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def compared(one: dict[str, Any]) -> dict[str, Any]:
    """The parts of a record that must not change between commits, in the order of reading."""
    return {key: one[key] for key in COMPARED} | {"series": once_a_step(one["series"])}


def record_of(commit: str, names: list[str]) -> Record:
    """What the cases gave at a commit; cases that it does not have are missing."""
    folder = _cache_of(commit)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        files = {name: folder / f"{name}.json" for name in names}
        missing = [name for name in names if not files[name].is_file()]
        if missing:
            for name, one in _run_at(commit, missing).items():
                draft = folder / f"{name}.draft"
                draft.write_text(json.dumps(one), encoding="utf-8")
                draft.replace(folder / f"{name}.json")
        return {n: json.loads(f.read_text(encoding="utf-8")) for n, f in files.items() if f.is_file()}


def _cache_of(commit: str) -> Path:
    """What else decides the last bit is in the name: the libraries and the processor."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers", "numpy")]
    surroundings = json.dumps([*versions, platform.node(), platform.machine(), sys.version])
    return (
        Path(tempfile.gettempdir())
        / "moe-medical-golden"
        / f"{commit}-{hashlib.sha256(surroundings.encode()).hexdigest()[:8]}"
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Others who want the same base wait for it instead of running it too."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_at(commit: str, names: list[str]) -> Record:
    with tempfile.TemporaryDirectory(prefix="golden-base-") as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "record.json"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        if not (tree / "tests" / "golden" / "run.py").is_file():
            sys.exit(f"{commit} has no golden cases: they are younger. Choose a later commit.")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree / "tests"), str(tree)])}
        command = [sys.executable, "-m", "golden.run", str(out), "--only", ",".join(names)]
        subprocess.run(command, cwd=tree, env=environment, check=True)
        record: Record = json.loads(out.read_text(encoding="utf-8"))
        return record


def compare(base: Record, here: Record, names: list[str]) -> list[tuple[str, str]]:
    """Case -> `equal`, `new`, or where it differs first."""
    rows = []
    for name in names:
        if name not in base:
            rows.append((name, "new"))
        else:
            rows.append((name, difference(compared(base[name]), compared(here[name])) or "equal"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("--only", default="", help="names, separated by commas")
    given = parser.parse_args()
    refuse_other_tree()
    names = given.only.split(",") if given.only else all_names()
    if unknown := [name for name in names if name not in all_names()]:
        sys.stderr.write(f"unknown cases {', '.join(unknown)}; there are {', '.join(all_names())}\n")
        return 2
    resolve = ["git", "rev-parse", "--verify", "--quiet", f"{given.base}^{{commit}}"]
    found = subprocess.run(resolve, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.stderr.write(f"{given.base} is no commit of this repository\n")
        return 2
    base = record_of(found.stdout.strip(), names)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        here = run_cases(names, Path(folder))
    rows = compare(base, here, names)
    for name, verdict in rows:
        sys.stdout.write(f"{name:<18} {verdict}\n")
    different = [name for name, verdict in rows if verdict not in ("equal", "new")]
    sys.stdout.write(f"{len(rows)} cases against {found.stdout[:10]}: {len(different)} differ\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
