"""A signal becomes a flag; only a repeat after a pause ends the process at once."""

from __future__ import annotations

import os
import signal

import pytest

from moe_medical.training import stopping
from moe_medical.training.stopping import StopFlag


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_the_old_handler_comes_back(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    flag = StopFlag()
    with flag.listening():
        assert not flag.asked
        os.kill(os.getpid(), signum)
        assert flag.asked
        os.kill(os.getpid(), signum)  # the launcher's copy of the same request
    assert flag.asked
    assert signal.getsignal(signum) == before


def test_a_repeat_after_a_pause_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    now = [100.0]
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    flag = StopFlag()
    for now[0] in (100.0, 102.9):
        flag.ask(signal.SIGTERM)
    assert codes == []
    now[0] = 103.1
    flag.ask(signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
