"""Run golden cases and write what came out.

    python -m golden.run OUT.json [--only NAME,...]    the full record, digests included
    python -m golden.run --record                      rewrite golden.json and frozen.json
    python -m golden.run --record-names                frozen.json alone: golden.json is of another processor

with `tests/` on PYTHONPATH. Cases run one after the other on two gloo ranks that stay, as do those for a
single rank on one. A name that this tree does not know is left out: an older tree may lack a new case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.ranks import TESTS, on_ranks
from support.tiny import write_tiny_run, write_tiny_tasks
from support.training import write_zero_settings, zero_settings

from golden.cases import RESUMED, all_names, settings_of, with_needed
from golden.frozen import FROZEN, current

GOLDEN = Path(__file__).with_name("golden.json")
Record = dict[str, dict[str, Any]]


def run_cases(names: list[str], folder: Path, timeout: float = 900) -> Record:
    """Case -> what `program.record` says of it; also of those that the named ones need."""
    run_file = _write_world(folder)
    ordered, found = with_needed(names), {}
    for world in (1, 2):
        mine = [name for name in ordered if settings_of(name).get("parallel.ranks", 2) == world]
        if mine:
            found |= on_ranks(world, _train_cases, folder, str(run_file), mine, timeout=timeout)[0]
    return {name: found[name] for name in ordered}


def _write_world(folder: Path) -> Path:
    """The tiny model, tasks, DeepSpeed JSONs and the run file that every case changes."""
    os.environ["MOE_MEDICAL_CACHE"] = str(folder / "cache")  # nothing is taken over from other runs
    run_file = write_tiny_run(folder)
    write_zero_settings(folder)
    write_tiny_tasks(folder / "wrong")
    for path in (folder / "wrong").glob("even.*.jsonl"):
        answer = "yes" if "train" in path.name else "no"  # what is learnt makes the evaluation worse
        rows = [json.loads(line) | {"output": answer} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_file


def _train_cases(run_file: str, names: list[str]) -> Record:
    """On each rank; the main rank's record counts."""
    from golden.program import record, train
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    root, found = Path(run_file).parent, {}
    topology = start_distributed(load_config(run_file).parallel)
    for name in names:
        first = _rewind(root, name) if topology.is_main and name in RESUMED else 0
        topology.barrier()
        first = RESUMED[name][1] if name in RESUMED else first
        order = train(run_file, _overrides(root, name), topology, first)
        if topology.is_main:
            found[name] = record(root / name, order)
        topology.barrier()
    stop_distributed()
    return found


def _rewind(root: Path, name: str) -> int:
    """Copy the run that is to be resumed, as it would have been left by a kill after that step."""
    origin, step = RESUMED[name]
    shutil.copytree(root / origin, root / name)
    shutil.rmtree(root / name / "adapter")
    for checkpoint in (root / name / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return step


def _overrides(root: Path, name: str) -> list[str]:
    settings = settings_of(name) | {"run.dir": str(root / name)}
    return [f"{key}={json.dumps(_real(root, value))}" for key, value in settings.items()]


def _real(root: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_real(root, one) for one in value]
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    if value.startswith("@zero"):
        stage = int(value.removeprefix("@zero")[0])
        return str(zero_settings(root, stage, offload=value.endswith("_offload")))
    return str(root / "wrong" / "mixture.yaml" if value == "@wrong" else root / value[1:])


def committed(record: Record) -> Record:
    """What of a record is kept in golden.json: all but what another processor rounds differently."""
    kept = ("order", "series", "decisions", "norms")
    return {name: {key: one[key] for key in kept} for name, one in record.items() if name not in RESUMED}


def to_text(value: Any, depth: int) -> str:
    """JSON with a line for each key down to `depth`, compact below."""

    def lines(inner: Any, level: int) -> str:
        if level == depth or not isinstance(inner, dict) or not inner:
            return json.dumps(inner, ensure_ascii=False)
        pad = " " * (level + 1)
        body = ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, level + 1)}" for k, v in inner.items())
        return f"{{\n{body}\n{' ' * level}}}"

    return lines(value, 0) + "\n"


def refuse_other_tree() -> None:
    """An installed package of another tree would be compared with itself."""
    import moe_medical

    found = Path(moe_medical.__file__ or "").parents[1].resolve()
    assert found == TESTS.parent.resolve(), f"moe_medical is that of {found}, not of {TESTS.parent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--record-names", action="store_true")
    given = parser.parse_args()
    refuse_other_tree()
    names = [name for name in given.only.split(",") if name in all_names()] if given.only else all_names()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        record = run_cases(names, Path(folder))
    if given.out:
        given.out.write_text(json.dumps(record), encoding="utf-8")
    if given.record or given.record_names:
        assert names == all_names(), "record all cases or none"
        if given.record:
            GOLDEN.write_text(to_text(committed(record), 3), encoding="utf-8")
        FROZEN.write_text(to_text(current(record), 2), encoding="utf-8")
    sys.stdout.write(f"{len(record)} cases\n")


if __name__ == "__main__":
    main()
