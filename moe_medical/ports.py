"""Free TCP ports."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _BLOCKS, _BLOCK = 16_384, 800, 16
_TURNS = itertools.count()
"""Of this process: who asks for two ports at once gets two."""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now.

    Between this answer and the listening, seconds may pass in which others look for a port too. So it lies
    below those that systems give to outgoing connections (from 32768 on), and in a block that is chosen by
    the number of this process: one that runs beside it looks elsewhere.
    """
    first = _FIRST + os.getpid() % _BLOCKS * _BLOCK
    block = (first + next(_TURNS) % _BLOCK for _ in range(_BLOCK))
    return next(filter(None, map(_bound, itertools.chain(block, [0]))))


def _bound(port: int) -> int:
    """The port, or any if it is 0; 0 if it is taken."""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return 0
        return int(s.getsockname()[1])
