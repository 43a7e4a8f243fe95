"""What W&B wrote offline is what `metrics.jsonl` says, and damage is noticed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from moe_medical.errors import DataError
from moe_medical.tracking.sinks import HEAT_MAP, HEAT_MAP_FIELDS, import_wandb, read_metrics
from support.wandb_file import (
    BLOCK_BYTES,
    FILE_HEADER,
    FIRST,
    FRAGMENT_HEADER,
    FULL,
    LAST,
    MAGIC,
    MIDDLE,
    Alert,
    MetricDefinition,
    read_run,
    run_files,
)

NUM_STEPS = 40
CANARY = "CANARY-patient-4711"
WRITE = f"""
import sys
from pathlib import Path
from moe_medical.tracking.sinks import JsonlSink, Sinks, WandbSink
folder = Path(sys.argv[1])
config = {{"training": {{"steps": {NUM_STEPS}}}, "hub": {{"token": "{CANARY}"}}}}
wandb = WandbSink(folder, config, mode="offline", name="n", group="g", tags=["x", "y"])
sinks = Sinks([JsonlSink(folder / "metrics.jsonl"), wandb])
for step in range({NUM_STEPS}):
    losses = {{f"train_loss/task_{{i}}": 1 / (step + i + 1) for i in range(24)}}
    evals = {{"eval_loss/ner": abs(step - 20.5), "eval_score/ner": step / 7}}
    evals |= {{"eval/macro_loss": abs(step - 20.5), "eval/macro_score": -abs(step - 20.5)}}
    health = {{"health/grad_norm": float("nan") if step == 3 else 0.5 * step}}
    sinks.log({{"tokens": 1000 * step, **losses, **evals, **health}}, step)
print("{CANARY}")
sinks.table("seesaw/tasks", ["task", "regret"], [["ner", 0.25], ["qa", None]], 4)
sinks.heat_map("conflict/cosine", [("ner", "qa", -0.5), ("qa", "ner", None)], 4)
sinks.alert("task regressed", "ner by 3 %")
sinks.close(75)
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real offline run, written by a process that has ended."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-c", WRITE, str(folder)]
    subprocess.run(command, env=without_account(folder), check=True, timeout=100)
    return folder


def without_account(folder: Path) -> dict[str, str]:
    """The environment, without the developer's own key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return kept | {"NETRC": str(folder / "netrc")}


@pytest.fixture(scope="module")
def run_file(run_dir: Path) -> Path:
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return file


def own_values(row: dict[str, float]) -> dict[str, str]:
    """A row without W&B's own columns, comparable although NaN is not itself."""
    return {name: repr(float(value)) for name, value in row.items() if not name.startswith("_")}


@pytest.mark.timeout(120)
def test_history_equals_metrics_jsonl(run_dir: Path) -> None:
    expected = [{"global_step": row.pop("step"), **row} for row in read_metrics(run_dir / "metrics.jsonl")]
    history = read_run(run_dir).rows()
    assert len(history) == NUM_STEPS
    assert [own_values(row) for row in history] == [own_values(row) for row in expected]
    assert math.isnan(history[3]["health/grad_norm"])


def test_config_definitions_summary_and_exit_code(run_file: Path) -> None:
    run = read_run(run_file)
    assert run.config["training"] == {"steps": NUM_STEPS}
    assert run.config["hub"] == {"token": "<redacted>"}
    assert MetricDefinition("eval_loss/*", "tokens", ("min",)) in run.metrics
    assert MetricDefinition("eval_score/*", "tokens", ("max",)) in run.metrics
    assert run.summary["eval_loss/ner"] == {"min": 0.5}
    assert run.summary["eval/macro_loss"] == {"min": 0.5}  # not {"last"}, as eval/* would have it
    assert run.summary["eval/macro_score"] == {"max": -0.5}
    assert run.summary["global_step"] == NUM_STEPS - 1
    assert run.exit_code == 75


def test_name_group_tags_and_alerts(run_file: Path) -> None:
    run = read_run(run_file)
    assert (run.name, run.group, run.tags) == ("n", "g", ("x", "y"))
    assert run.alerts == [Alert("task regressed", "ner by 3 %")]
    assert run_file.stem == f"run-{run.id}"


def test_tables_and_heat_maps(run_file: Path) -> None:
    run, files = read_run(run_file), run_file.parent / "files"
    (table,) = (row for row in run.history if "seesaw/tasks/path" in row)
    (chart,) = (row for row in run.history if "conflict/cosine_table/path" in row)
    assert table["table_step"] == chart["table_step"] == 4
    shown = json.loads((files / table["seesaw/tasks/path"]).read_text())
    assert (shown["columns"], shown["data"]) == (["task", "regret"], [["ner", 0.25], ["qa", None]])
    shown = json.loads((files / chart["conflict/cosine_table/path"]).read_text())
    assert shown["data"] == [["ner", "qa", -0.5]]
    panel = run.config["_wandb/visualize/conflict/cosine"]["panel_config"]
    assert panel["panelDefId"] == HEAT_MAP
    assert panel["fieldSettings"] == HEAT_MAP_FIELDS


START = """
import os, sys
from pathlib import Path
from moe_medical.config import RunConfig
from moe_medical.tracking.sinks import open_sinks
folder, first, end, exit_code = Path(sys.argv[1]), *map(int, sys.argv[2:])
sinks = open_sinks(RunConfig(), folder, first)
for step in range(first + 1, end + 1):
    sinks.log({"tokens": 100 * step, "train_loss/ner": 1 / step}, step)
sinks.close(exit_code)
"""


@pytest.mark.timeout(120)
def test_a_resumed_run_goes_on_in_another_file_of_the_same_id(tmp_path: Path) -> None:
    """Saved after step 3, stopped after step 5: steps 4 and 5 are in both files, all others in one."""
    for first, end, exit_code in ((0, 5, 75), (3, 8, 0)):
        command = [sys.executable, "-c", START, str(tmp_path), str(first), str(end), str(exit_code)]
        subprocess.run(command, env=without_account(tmp_path), check=True, timeout=60)
    stopped, resumed = (read_run(file) for file in run_files(tmp_path))
    assert (stopped.exit_code, resumed.exit_code) == (75, 0)
    assert stopped.id == resumed.id
    assert [row["global_step"] for row in stopped.rows()] == [1, 2, 3, 4, 5]
    assert [row["global_step"] for row in resumed.rows()] == [4, 5, 6, 7, 8]
    together = {row["global_step"]: row for row in [*stopped.rows(), *resumed.rows()]}
    expected = [{"global_step": row.pop("step"), **row} for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert [own_values(row) for row in together.values()] == [own_values(row) for row in expected]


def test_neither_secrets_nor_printed_text_reach_any_file(run_dir: Path) -> None:
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


def test_every_truncation_is_refused_strictly_and_read_leniently(run_file: Path, tmp_path: Path) -> None:
    content = run_file.read_bytes()
    cut = tmp_path / "cut.wandb"
    lengths = []
    for size in range(FILE_HEADER.size, len(content), max(1, len(content) // 30)):
        cut.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"cut\.wandb"):
            read_run(cut)
        lengths.append(len(read_run(cut, strict=False).history))
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] >= NUM_STEPS // 2


def test_a_flipped_bit_is_refused_strictly_and_ends_a_lenient_reading(run_file: Path, tmp_path: Path) -> None:
    content = bytearray(run_file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "flipped.wandb"
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="wrong checksum at byte"):
        read_run(damaged)
    assert 0 < len(read_run(damaged, strict=False).history) < NUM_STEPS


@pytest.mark.parametrize("content", [b"", b":W&B", b"PK\x03\x04 a zip file"])
def test_another_file_is_refused_even_leniently(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other.wandb"
    other.write_bytes(content)
    with pytest.raises(DataError, match="not a W&B run file"):
        read_run(other, strict=False)


def test_a_folder_must_hold_exactly_one_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"exactly one \.wandb file, got 0"):
        read_run(tmp_path)


# --- files written here, fragment by fragment ---


def fragment(kind: int, data: bytes) -> bytes:
    return FRAGMENT_HEADER.pack(zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def a_file(path: Path, *fragments: bytes) -> Path:
    path.write_bytes(FILE_HEADER.pack(*MAGIC, 0) + b"".join(fragments))
    return path


def exit_payload(code: int) -> bytes:
    record = import_wandb().proto.wandb_internal_pb2.Record()
    record.exit.exit_code = code
    return bytes(record.SerializeToString())


def test_a_record_in_three_fragments_is_joined(tmp_path: Path) -> None:
    payload = exit_payload(70)
    parts = [(FIRST, payload[:1]), (MIDDLE, payload[1:2]), (LAST, payload[2:])]
    file = a_file(tmp_path / "a.wandb", *(fragment(kind, data) for kind, data in parts))
    assert read_run(file).exit_code == 70


def filler(left: int) -> bytes:
    """A record that leaves `left` bytes of the first block."""
    num_bytes = BLOCK_BYTES - FILE_HEADER.size - FRAGMENT_HEADER.size - left
    data = import_wandb().proto.wandb_internal_pb2.Record(uuid="x" * (num_bytes - 5)).SerializeToString()
    assert len(data) == num_bytes
    return fragment(FULL, data)


@pytest.mark.parametrize("left", range(FRAGMENT_HEADER.size))
def test_the_end_of_a_block_is_padding(tmp_path: Path, left: int) -> None:
    file = a_file(tmp_path / "a.wandb", filler(left), bytes(left), fragment(FULL, exit_payload(3)))
    assert read_run(file).exit_code == 3


def test_a_fragment_may_be_a_bare_header_at_the_end_of_a_block(tmp_path: Path) -> None:
    bare, rest = fragment(FIRST, b""), fragment(LAST, exit_payload(3))
    assert read_run(a_file(tmp_path / "a.wandb", filler(len(bare)), bare, rest)).exit_code == 3


@pytest.mark.parametrize(
    "kinds", [[MIDDLE, LAST], [LAST], [FIRST, FULL], [FIRST, FIRST, LAST], [FIRST], [9]], ids=str
)
def test_fragments_out_of_order_are_damage(tmp_path: Path, kinds: list[int]) -> None:
    file = a_file(
        tmp_path / "a.wandb", fragment(FULL, exit_payload(0)), *(fragment(kind, b"") for kind in kinds)
    )
    with pytest.raises(DataError, match="is damaged"):
        read_run(file)
    assert read_run(file, strict=False).exit_code == 0


def test_a_run_without_an_exit_record_is_open(tmp_path: Path) -> None:
    file = a_file(tmp_path / "a.wandb")
    with pytest.raises(DataError, match="no exit record"):
        read_run(file)
    assert read_run(file, strict=False).exit_code is None
