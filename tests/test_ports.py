"""Ports that neighbours do not take from each other."""

from __future__ import annotations

import os
import socket

import pytest

from moe_medical.ports import free_port


def test_a_port_can_be_listened_on_and_is_then_not_given_again() -> None:
    sockets = []
    try:
        for _ in range(20):  # more than the block of this process has
            sockets.append(socket.create_server(("127.0.0.1", free_port())))
        assert len({s.getsockname()[1] for s in sockets}) == 20
    finally:
        for s in sockets:
            s.close()


def test_who_asks_for_several_ports_at_once_gets_several() -> None:
    assert len({free_port() for _ in range(10)}) == 10


def test_processes_side_by_side_look_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pid in (4_000_001, 4_000_002, 4_000_799):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        found.append({free_port() for _ in range(50)})
    assert not set.intersection(*found[:2]) | set.intersection(*found[1:])
    assert all(1024 < port < 32_768 for ports in found for port in ports)
