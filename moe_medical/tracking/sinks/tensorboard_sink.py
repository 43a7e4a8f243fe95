"""TensorBoard: scalars only, by its own writer, without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from moe_medical.tracking.sinks.sink import Sink

FLUSH_SECONDS = 10


class TensorBoardSink(Sink):
    """Writes one event per row.

    Args:
        folder: Takes the event files.
        last_step: What earlier event files say of later steps is hidden: it will be done again.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=last_step + 1, session_log=start))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one event."""
        numbers = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=numbers))
        self._writer.add_event(event)

    def close(self, exit_code: int) -> None:
        """Completes the file."""
        self._writer.close()
