"""A process that has imported what every rank imports, and forks ranks: a second of them instead of eight.

    stdin:   {"output": FILE, "environment": {...}, "folder": CWD, "argv": [FILE, FUNCTION, FOLDER]}
    stdout:  {"pid": 12}, then once it has ended {"ended": 12, "code": 0}; negative codes are signals

A fork has all that the server has and nothing that it does not: the server never computes, joins a process
group or starts a thread. It ends with its stdin.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any


def main() -> None:
    preload()
    say({"ready": True})
    waiting = b""
    running = 0
    while True:
        if select.select([0], [], [], 0.02 if running else None)[0]:
            received = os.read(0, 1 << 20)
            if not received:
                return
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                say({"pid": fork(json.loads(line))})
                running += 1
        running -= reap()


PRELOADED = (
    "pytest",
    "pandas",  # the tables' library looks for it at the first batch
    "setuptools",
    "transformers",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine does, and has torch's compiler come along
    "torch._inductor.compile_fx",
    "moe_medical.training.trainer",
    "moe_medical.data.hygiene",
    "support.training",
)
"""What each rank would import again, in seconds, and what starts no thread by that."""


def preload() -> None:
    """Import; it must be done before the first fork."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # ranks of tests compute on the CPU, on a machine with a GPU as well
    os.environ["DEEPSPEED_LOG_LEVEL"] = "error"
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lack the other threads"


def fork(rank: dict[str, Any]) -> int:
    """Start a rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(rank["environment"])
        os.chdir(rank["folder"])
        sys.argv[1:] = rank["argv"]
        from support.rank_child import main as run

        run()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        from moe_medical.distributed.topology import end_rank

        end_rank(code)


def reap() -> int:
    """Tell of ranks that have ended; how many they are."""
    ended = 0
    with suppress(ChildProcessError):  # none is left
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            say({"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])})
            ended += 1
    return ended


def say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
