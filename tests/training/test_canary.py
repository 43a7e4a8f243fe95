"""No text of a record is in anything that a run prints or writes, bad records and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny import ROOT, write_tiny_run

from moe_medical.distributed.topology import naming_lost_peers
from moe_medical.errors import PeerLostError

CANARY = "Zyxwv"


def test_no_record_text_leaves_the_run(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path, tracking={"wandb": {"enabled": True}})
    for file in (tmp_path / "tasks").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        marked = [{k: f"{v} {CANARY}" if k != "id" else v for k, v in row.items()} for row in rows]
        bad = [f'{{"input": "{CANARY}"', json.dumps({"id": "x", "input": CANARY, "output": ""})]
        file.write_text("\n".join([*map(json.dumps, marked), *bad]) + "\n")
    settings = yaml.safe_load(run.read_text())
    settings["data"]["max_bad_fraction"] = 0.5
    run.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "moe_medical", "launch", str(run)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"metrics.jsonl", "results.json", "set_aside.txt", "adapter_config.json"} <= {
        p.name for p in written
    }
    assert [p for p in written if CANARY.encode() in p.read_bytes()] == []
    set_aside = (tmp_path / "run" / "set_aside.txt").read_text().splitlines()
    assert len(set_aside) == 8
    assert all(len(line.rsplit(":", 1)[1]) == 12 for line in set_aside)


def test_a_lost_peer_is_named() -> None:
    with pytest.raises(PeerLostError, match="another rank of"), naming_lost_peers():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_lost_peers():
        raise RuntimeError("shapes differ")
