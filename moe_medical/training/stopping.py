"""Being told to stop: signals become a flag, and all ranks act on it at the same step.

A launcher may deliver one request as several signals (the terminal's SIGINT and its own SIGTERM), and to
some ranks later than to others. So a repeat counts as impatience only after a pause, and the flag is summed
over the ranks before anyone acts.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_REPEAT_SECONDS = 3.0
_LOG = logging.getLogger(__name__)


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def ask(self, signum: int, _frame: FrameType | None = None) -> None:
        """Signal handler: remember the first request, leave at once on a later repeat."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            _LOG.info("%s: stopping after this step", signal.Signals(signum).name)
        elif now - self._asked_at > _REPEAT_SECONDS:
            os._exit(128 + signum)

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the stop signals inside the block, restore the old handlers after it."""
        old = {s: signal.signal(s, self.ask) for s in STOP_SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)
