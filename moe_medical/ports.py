"""Free TCP ports."""

from __future__ import annotations

import os
import random
import socket

_FIRST, _BLOCKS, _BLOCK = 16_384, 800, 16


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now.

    Between this answer and the listening, seconds may pass in which others look for a port too. So it lies
    below those that systems give to outgoing connections (from 32768 on), and in a block that is chosen by
    the number of this process: one that runs beside it looks elsewhere.
    """
    first = _FIRST + os.getpid() % _BLOCKS * _BLOCK
    # The random numbers of a run must not depend on how many ports were looked for: no seeded generator.
    block = random.SystemRandom().sample(range(first, first + _BLOCK), _BLOCK)
    return next(filter(None, map(_bound, [*block, 0])))


def _bound(port: int) -> int:
    """The port, or any if it is 0; 0 if it is taken."""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return 0
        return int(s.getsockname()[1])
