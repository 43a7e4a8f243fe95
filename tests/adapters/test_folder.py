from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from moe_medical.adapters import folder as folders
from moe_medical.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from moe_medical.config.adapters import MoloraConfig
from moe_medical.errors import ConfigError, DataError, SecurityRefusal, StorageError

CONFIG = MoloraConfig(rank=4, alpha=8.0, molora=(r".*\.mlp\.\w+",), lora=())
META = {
    "base_model": "smollm2-135m",
    "base_revision": None,
    "tasks": ["laterality"],
    "label_sets": {"laterality": ["left", "right"]},
    "step": 7,
}
STATE = {"a.lora_A": torch.arange(6.0).view(2, 3), "a.lora_B": torch.ones(3, 2).t()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", STATE, CONFIG, META)
    return tmp_path / "adapter"


def edit(folder: Path, change) -> None:
    path = folder / CONFIG_FILE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_round_trip(folder: Path):
    config, meta, state = load_adapter(folder)
    assert (config, meta) == (CONFIG, META)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1


def test_an_older_adapter_is_replaced_whole(folder: Path):
    save_adapter(folder, {"b.lora_A": torch.zeros(1)}, MoloraConfig(), META)
    config, _, state = load_adapter(folder)
    assert (config, list(state)) == (MoloraConfig(), ["b.lora_A"])
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_something_else_is_never_overwritten(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ConfigError, match="not an adapter's"):
            save_adapter(tmp_path / name, STATE, CONFIG, META)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_failed_save_leaves_the_old_adapter_and_no_rubbish(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for target, attribute in ((folders, "save_file"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, full)
            with pytest.raises(StorageError, match="No space left"):
                save_adapter(folder, {}, MoloraConfig(), META)
        assert load_adapter(folder)[0] == CONFIG
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_meta_must_say_what_the_adapter_is_for(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"2 problems:\n  meta.tasks is missing.\n  meta.label_sets is missing"
    ):
        save_adapter(tmp_path / "a", STATE, CONFIG, {"base_model": "x", "base_revision": "y"})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_adapter(folder)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_adapter(tmp_path / "nowhere")


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt"])
def test_pickled_weights_are_refused_unread(folder: Path, name: str):
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Hostile(folder / "owned")))
    with pytest.raises(SecurityRefusal, match=name):
        load_adapter(folder)
    assert not (folder / "owned").exists()


def test_damaged_files_are_data_errors(folder: Path):
    weights = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(weights[:-4])
    with pytest.raises(DataError, match=WEIGHTS_FILE):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text('{"format"')
    with pytest.raises(DataError, match=CONFIG_FILE):
        load_adapter(folder)


def test_unknown_version_and_foreign_documents_are_refused(folder: Path):
    edit(folder, lambda d: d.update(format_version=4))
    with pytest.raises(ConfigError, match="format_version must be 3, got 4"):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"format must be 'moe_medical.adapter'"):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(ConfigError, match="format must be"):
        load_adapter(folder)


def test_every_wrong_key_is_reported_at_once(folder: Path):
    def spoil(document: dict) -> None:
        config = document["config"]
        config.update(rank="4", top_k=True, molora="mlp", surprise=1)
        del config["dropout"], document["meta"]["tasks"]

    edit(folder, spoil)
    with pytest.raises(ConfigError) as error:
        load_adapter(folder)
    assert {problem.path for problem in error.value.problems} == {
        "config.rank",
        "config.top_k",
        "config.molora",
        "config.surprise",
        "config.dropout",
        "meta.tasks",
    }


def test_whole_numbers_are_fine_for_alpha(folder: Path):
    edit(folder, lambda d: d["config"].update(alpha=8))
    assert load_adapter(folder)[0].scaling == 2
