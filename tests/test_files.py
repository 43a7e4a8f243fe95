"""A published folder is whole or absent, and the first publisher wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_medical.errors import StorageError
from moe_medical.files import default_cache, new_folder, publish_folder, write_json


def _write(text: str):
    return lambda folder: (folder / "file").write_text(text)


def test_default_cache_prefers_its_own_variable_then_xdg_then_home(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_MEDICAL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "moe_medical"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "moe_medical"
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


def test_publishes_once(tmp_path):
    target = tmp_path / "deep" / "folder"
    assert publish_folder(_write("first"), target) == target
    publish_folder(_write("second"), target)
    assert (target / "file").read_text() == "first"


def test_a_build_that_dies_leaves_nothing(tmp_path):
    def die(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_folder(die, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_discards_its_own(tmp_path):
    target = tmp_path / "folder"

    def overtaken(folder: Path) -> None:
        _write("loser")(folder)
        publish_folder(_write("winner"), target)

    publish_folder(overtaken, target)
    assert (target / "file").read_text() == "winner"
    assert list(tmp_path.iterdir()) == [target]


def test_a_refusing_disk_is_a_storage_error_that_names_the_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/folder .*MOE_MEDICAL_CACHE"):
        publish_folder(_write("x"), tmp_path / "file" / "folder")


def test_weights_that_cannot_be_written_are_a_storage_error(tmp_path):
    def write(folder: Path) -> None:
        save_file({"a": np.zeros(2)}, folder / "no such folder" / "model.safetensors")

    with pytest.raises(StorageError, match="No such file or directory"):
        publish_folder(write, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_folder_that_cannot_be_written_is_named_once(tmp_path):
    def write() -> None:
        with new_folder(tmp_path / "folder") as draft:
            (draft / "taken").mkdir()
            write_json(draft / "taken", {})

    with pytest.raises(StorageError) as caught:
        write()
    assert str(caught.value).count("cannot be written") == 1
    assert list(tmp_path.iterdir()) == []
