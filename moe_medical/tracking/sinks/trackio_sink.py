"""trackio: scalars and alerts into an SQLite file in the run's folder.

Decision: trackio runs in a child process. It reads its folder from the environment at import, keeps its run
in globals, prints, and would send to a server that the environment names: none of it belongs into a rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_medical.tracking.sinks.sink import Sink

LAST_WAIT_SECONDS = 45


class TrackioSink(Sink):
    """Hands rows to the child.

    Args:
        folder: Takes the database.
        run: Project and run name. A resumed run is another run of the project.

    Raises:
        OSError: The child cannot be started, or has ended.
    """

    def __init__(self, folder: Path, run: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "moe_medical.tracking.sinks.trackio_child", run],
            env=_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run; the child ends with its input
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hands over one row."""
        self._tell({"values": {name: float(value) for name, value in values.items()}, "step": step})

    def alert(self, title: str, text: str) -> None:
        """Hands over an alert."""
        self._tell({"title": title, "text": text})

    def close(self, exit_code: int) -> None:
        """Waits until everything is in the database.

        Raises:
            OSError: The child has failed.
            TimeoutExpired: It takes too long.
        """
        self._child.communicate(timeout=LAST_WAIT_SECONDS)
        if self._child.returncode:
            raise ChildProcessError(f"trackio ended with {self._child.returncode}")

    def _tell(self, message: dict[str, Any]) -> None:
        pipe = self._child.stdin
        assert pipe is not None
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()


def _environment(folder: Path) -> dict[str, str]:
    """Without what would make trackio send something."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKIO_", "HF_TOKEN"))}
    return kept | {"TRACKIO_DIR": str(folder.resolve()), "HF_HUB_OFFLINE": "1"}
