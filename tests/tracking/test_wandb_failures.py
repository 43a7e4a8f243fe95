"""The real W&B, with its server away, silent or slow, its disk full, its process killed or hanging.

Every case is a process of its own, which logs through the queue as a run does and times its calls.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.wandb_file import read_run, run_files

from moe_medical.tracking.sinks import read_metrics

KEY = "0" * 40
NUM_ROWS = 300
CHILD = f"""
import json, logging, os, resource, signal, sys, threading, time
from pathlib import Path
import psutil
from moe_medical.tracking.sinks import Background, JsonlSink, Sinks, WandbSink

logging.basicConfig(format="WARNED %(name)s %(message)s")
folder, case, wait = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
jsonl = JsonlSink(folder / "metrics.jsonl")
if case == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
opened = threading.Event()


def open_wandb():
    sink = WandbSink(folder, {{}}, mode="auto", settings={{"init_timeout": 1}})
    opened.set()
    return sink


background = Background("W&B", open_wandb, last_wait_seconds=wait)
sinks = Sinks([jsonl, background])
core = None
for step in range({NUM_ROWS}):
    if step == 100 and case in ("killed", "hanging"):
        opened.wait()
        while max(file.stat().st_size for file in folder.rglob("*.wandb")) < 50_000:
            time.sleep(0.01)
        (core,) = psutil.Process().children()
        core.send_signal(signal.SIGKILL if case == "killed" else signal.SIGSTOP)
    if step == 100 and case == "silent after the start":
        opened.wait()
        print("started", flush=True)
        sys.stdin.readline()
    row = {{f"train_loss/task_{{i}}": 1 / (step + i + 1) for i in range(100)}}
    background.log({{"tokens": 10 * step, **row}}, step)
    if case != "full" or step < 10:
        jsonl.log({{"tokens": 10 * step, **row}}, step)
sinks.close(0)
print(json.dumps({{"core": core.pid if core else 0}}), flush=True)
os._exit(0)  # as a rank does
"""


@dataclass
class Outcome:
    """What a child has printed and written."""

    folder: Path
    errors: str

    def wandb_rows(self) -> int:
        return sum(len(read_run(file, strict=False).rows()) for file in run_files(self.folder))


def environment(folder: Path, server: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    kept |= {"NETRC": str(folder / "netrc"), "NO_PROXY": "*"}
    return kept | ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server} if server else {})


@contextmanager
def child(folder: Path, case: str, server: str | None, wait: float) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), case, str(wait)],
        env=environment(folder, server),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def outcome_of(folder: Path, process: subprocess.Popen[str]) -> Outcome:
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return Outcome(folder, errors)


def run_case(folder: Path, case: str, server: str | None = None, wait: float = 60.0) -> Outcome:
    with child(folder, case, server, wait) as process:
        return outcome_of(folder, process)


def warnings_in(outcome: Outcome) -> list[str]:
    return [line for line in outcome.errors.splitlines() if line.startswith("WARNED")]


def assert_complete(outcome: Outcome, rows: int = NUM_ROWS) -> None:
    assert [row["step"] for row in read_metrics(outcome.folder / "metrics.jsonl")] == list(range(rows))


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class FakeServer(ThreadingHTTPServer):
    """As much of a W&B server as a run needs; after `hang` it accepts and never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hang, self.end = threading.Event(), threading.Event()
        self.rows = 0

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.hang.is_set():
            self.server.end.wait()
            return
        body = gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content
        answer = self._graphql(json.loads(body)) if self.path == "/graphql" else self._stream(body)
        self._reply(answer)

    do_PUT = do_POST

    def do_GET(self) -> None:
        self._reply({})

    def log_message(self, format: str, *_: Any) -> None:
        """Says nothing."""

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, name = request["query"], (request.get("variables") or {}).get("name")
        if "upsertBucket" in query:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def _stream(self, body: bytes) -> dict[str, Any]:
        files = (json.loads(body) if body else {}).get("files") or {}
        self.server.rows += len(files.get("wandb-history.jsonl", {}).get("content", []))
        return {}

    def _reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.timeout(120)
def test_a_server_that_answers_gets_every_row(tmp_path: Path) -> None:
    with FakeServer() as server:
        outcome = run_case(tmp_path, "plain", f"http://127.0.0.1:{server.server_port}")
        assert server.rows == NUM_ROWS
    assert_complete(outcome)
    assert warnings_in(outcome) == []
    assert outcome.wandb_rows() == NUM_ROWS


@pytest.mark.timeout(120)
def test_a_closed_port_ends_in_an_offline_file(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        outcome = run_case(tmp_path, "plain", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert_complete(outcome)
    assert outcome.wandb_rows() == NUM_ROWS
    (warning,) = warnings_in(outcome)
    assert "W&B failed" in warning


@pytest.mark.timeout(120)
def test_a_silent_server_ends_in_an_offline_file(tmp_path: Path) -> None:
    with silent_server() as server:
        outcome = run_case(tmp_path, "plain", server)
    assert_complete(outcome)
    assert outcome.wandb_rows() == NUM_ROWS
    assert len(warnings_in(outcome)) == 1


@pytest.mark.timeout(120)
def test_a_server_that_falls_silent_is_left_behind(tmp_path: Path) -> None:
    """`finish` would wait for it for minutes; the rows are in the file, for `wandb sync`."""
    with (
        FakeServer() as server,
        child(
            tmp_path, "silent after the start", f"http://127.0.0.1:{server.server_port}", wait=2.0
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        server.hang.set()
        process.stdin.write("\n")
        outcome = outcome_of(tmp_path, process)
    assert_complete(outcome)
    assert warnings_in(outcome) == [
        "WARNED moe_medical.tracking.sinks.background W&B does not answer and is left behind"
    ]
    assert outcome.wandb_rows() == NUM_ROWS


@pytest.mark.timeout(120)
def test_a_full_disk_costs_rows_of_wandb_only(tmp_path: Path) -> None:
    outcome = run_case(tmp_path, "full")
    assert_complete(outcome, rows=10)
    assert 0 < outcome.wandb_rows() < NUM_ROWS


@pytest.mark.timeout(120)
def test_a_killed_process_of_wandb_is_replaced(tmp_path: Path) -> None:
    outcome = run_case(tmp_path, "killed")
    assert_complete(outcome)
    killed, replacing = (read_run(file, strict=False) for file in run_files(tmp_path))
    assert killed.id == replacing.id
    assert replacing.exit_code == 0
    assert replacing.rows()[-1]["global_step"] == NUM_ROWS - 1
    assert outcome.wandb_rows() > NUM_ROWS // 2
    assert killed.rows()[0]["global_step"] == 0
    (warning,) = warnings_in(outcome)
    assert "W&B failed" in warning


@pytest.mark.timeout(120)
def test_a_hanging_process_of_wandb_is_left_behind(tmp_path: Path) -> None:
    with child(tmp_path, "hanging", None, wait=1.0) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        process.wait(timeout=60)
        psutil.Process(told["core"]).kill()  # it is stopped, and does not see that its parent is gone
        assert process.stderr is not None
        outcome = Outcome(tmp_path, process.stderr.read())
    assert_complete(outcome)
    left, lost = warnings_in(outcome)
    assert "does not answer and is left behind" in left
    assert "rows lost" in lost
