"""A pickle is read on request only, and only if it holds nothing but tensors; nothing of it ever runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_medical.errors import DataError, SecurityRefusal
from moe_medical.interop.foreign.tensors import read_tensors


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_tensors_and_parameters_are_read(tmp_path: Path) -> None:
    values = torch.randn(3, 4)
    torch.save({"a": values, "b": nn.Parameter(values.half()), "c": values.t()}, tmp_path / "w.bin")
    state = read_tensors(tmp_path / "w.bin", allow_pickle=True)
    assert torch.equal(state["a"], values)
    assert torch.equal(state["c"], values.t())
    assert not state["b"].requires_grad


def test_a_pickle_needs_leave(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.bin")
    with pytest.raises(SecurityRefusal, match=r"w\.bin: the weights are a pickle.*--convert-pickle"):
        read_tensors(tmp_path / "w.bin", allow_pickle=False)


@pytest.mark.parametrize("allow", [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, allow: bool) -> None:
    made = tmp_path / "made"
    torch.save({"a": torch.zeros(1), "b": Hostile(made)}, tmp_path / "w.bin")
    with pytest.raises(SecurityRefusal, match=r"(posix|nt)\.mkdir" if allow else "--convert-pickle"):
        read_tensors(tmp_path / "w.bin", allow)
    assert not made.exists()
    torch.load(tmp_path / "w.bin", weights_only=False)
    assert made.exists(), "the file was harmless, so that the test shows nothing"


def test_a_bare_pickle_is_not_read_at_all(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "w.bin").write_bytes(pickle.dumps({"b": Hostile(made)}))
    with pytest.raises(DataError, match="zip format"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)
    assert not made.exists()


def test_a_file_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "w.bin")
    with zipfile.ZipFile(tmp_path / "w.bin") as packed, zipfile.ZipFile(tmp_path / "bomb.bin", "w") as bomb:
        for entry in packed.infolist():
            bomb.writestr(entry.filename, packed.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(SecurityRefusal, match="more than its own size"):
        read_tensors(tmp_path / "bomb.bin", allow_pickle=True)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(4, device="meta"),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, dtype=torch.int64),
        "text",
        {"nested": torch.zeros(1)},
    ],
    ids=["expanded", "meta", "sparse", "integer", "text", "nested"],
)
def test_anything_but_plain_float_tensors_is_refused(tmp_path: Path, value: object) -> None:
    torch.save({"a": torch.zeros(1), "odd": value}, tmp_path / "w.bin")
    with pytest.raises((DataError, SecurityRefusal), match=r"w\.bin"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "w.bin")
    with pytest.raises(DataError, match="must hold a state"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)


def test_a_cut_file_is_told(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:2000])
    with pytest.raises(DataError, match="is not a readable"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)
