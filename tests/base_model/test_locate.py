"""A model name becomes a folder that is safe to load, or one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from support.tiny import ROOT, write_tiny_model

from moe_medical.base_model import locate, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError, DataError, SecurityRefusal


def _folder(path: Path, config: str = '{"model_type": "llama"}', *files: str) -> str:
    path.mkdir()
    (path / "config.json").write_text(config)
    for name in files:
        (path / name).write_bytes(b"")
    return str(path)


def _refusal(error: type[Exception], name: str) -> str:
    with pytest.raises(error) as caught:
        locate_base(ModelSection(name))
    return str(caught.value)


def test_a_folder_is_located_with_its_config(tmp_path: Path) -> None:
    name = _folder(tmp_path / "model", '{"model_type": "llama"}', "model.safetensors", "model.bin")
    base = locate_base(ModelSection(name, revision="main"))
    assert (base.folder, base.name, base.revision, base.model_type) == (Path(name), name, "main", "llama")


@pytest.mark.parametrize(
    ("config", "reason"), [("{", "not a JSON object"), ("[1]", "not a JSON object"), (None, "No such file")]
)
def test_folder_without_a_usable_config(tmp_path: Path, config: str | None, reason: str) -> None:
    name = _folder(tmp_path / "model", config or "", "model.safetensors")
    if config is None:
        (tmp_path / "model" / "config.json").unlink()
    text = _refusal(ConfigError, name)
    assert f"model.name must be a model folder with a readable config.json, got '{name}/config.json" in text
    assert reason in text


def test_folder_without_weights(tmp_path: Path) -> None:
    name = _folder(tmp_path / "model")
    assert f"model.name must be a folder with *.safetensors, got '{name}'." in _refusal(ConfigError, name)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    name = _folder(tmp_path / "model", "{}", "pytorch_model-2.bin", "pytorch_model-1.bin", "notes.txt")
    text = _refusal(SecurityRefusal, name)
    assert f"{name} has only pickled weights (pytorch_model-1.bin, pytorch_model-2.bin)" in text
    assert SecurityRefusal.exit_code == 77


@pytest.mark.parametrize("model_type", ["homemade", None])
def test_a_config_that_wants_to_run_code_is_refused(tmp_path: Path, model_type: str | None) -> None:
    config = json.dumps({"model_type": model_type, "auto_map": {"AutoModel": "modeling.Model"}})
    text = _refusal(SecurityRefusal, _folder(tmp_path / "model", config, "model.safetensors"))
    assert f"model/config.json has an auto_map and a model_type ({str(model_type)!r})" in text


def test_an_auto_map_of_a_known_type_is_not_asked_and_costs_no_torch(tmp_path: Path) -> None:
    config = json.dumps({"model_type": "phi3", "auto_map": {"AutoModel": "modeling.Model"}})
    name = _folder(tmp_path / "model", config, "model.safetensors")
    code = (
        "import sys\nfrom moe_medical.base_model import locate_base\n"
        "from moe_medical.config.schema import ModelSection\n"
        "print(locate_base(ModelSection(sys.argv[1])).model_type, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["phi3", "False"], done.stderr


@pytest.mark.parametrize("name", ["smollm2-1350m", "/no/such/folder", "a/b/c"])
def test_unknown_name(name: str) -> None:
    rule = "model.name must be 'smollm2-135m', a local folder or a hub id such as 'org/name'"
    assert f"{rule}, got '{name}'." in _refusal(ConfigError, name)


def test_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's client reads HF_HUB_OFFLINE when it is imported, which may be long ago.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    head, line = _refusal(ConfigError, "nobody/nothing").splitlines()
    assert head == "the base model has 1 problem:"
    assert line.startswith("  model.name could not be fetched from the hub (")
    assert "got 'nobody/nothing'. Check name and revision; without a network give a local folder." in line


def test_the_hub_is_asked_for_one_copy_of_the_weights() -> None:
    wanted = ["config.json", "model-1-of-2.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    copies = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "modeling.py"]
    chosen = filter_repo_objects(
        wanted + copies, allow_patterns=locate._HUB_FILES, ignore_patterns=locate._NOT_HUB_FILES
    )
    assert list(chosen) == wanted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


def _edit(tiny: Path, folder: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_loads_frozen_in_the_dtype_asked_for(tiny: Path) -> None:
    model = load_base(locate_base(ModelSection(str(tiny))), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_damaged_models_are_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    cut = _edit(tiny, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    gap = _edit(tiny, tmp_path / "gap")
    tensors = load_file(gap / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, gap / "model.safetensors", metadata={"format": "pt"})
    unknown = _edit(tiny, tmp_path / "unknown")
    (unknown / "config.json").write_text('{"model_type": "no-such-model"}')
    misfit = _edit(tiny, tmp_path / "misfit")
    config = json.loads((misfit / "config.json").read_text())
    (misfit / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    lacks = "lacks weights of a llama model: model.layers.1.mlp.up_proj.weight"
    for folder, reason in ((cut, "cannot be"), (gap, lacks), (unknown, "cannot be"), (misfit, "cannot be")):
        with pytest.raises(DataError, match=f"^{folder} {reason}[^\n]*$"):
            load_base(locate_base(ModelSection(str(folder))), "float32")
