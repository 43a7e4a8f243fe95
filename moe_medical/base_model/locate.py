"""A model name -> a local folder that is safe to load.

A name is the embedded model, a local folder or a hub id. Refused: pickled weights, and models that only
code of their own can run. A config that names such code (`auto_map`) passes if transformers has a class of
its own for the model type: the code is then never run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.base_model.embedded import EMBEDDED_NAME, embedded_folder
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError, Problem, SecurityRefusal

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]
"""Second copies of the weights in another layout."""


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    name: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    """The folder's config.json."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))


def locate_base(section: ModelSection) -> BaseModel:
    """Find (or fetch, or convert once) the base model and check that it is safe to load.

    Raises:
        ConfigError: no such model, or a folder without config or safetensors.
        SecurityRefusal: only pickled weights, or a model that needs code from the folder.
    """
    folder = _folder_of(section)
    config = _read_config(folder)
    _refuse_remote_code(folder, config)
    _require_safetensors(folder)
    return BaseModel(section.name, section.revision, folder, config)


def _folder_of(section: ModelSection) -> Path:
    if section.name == EMBEDDED_NAME:
        return embedded_folder()
    local = Path(section.name)
    if local.is_dir():
        return local
    if local.is_absolute() or section.name.count("/") != 1:
        rule = f"must be {EMBEDDED_NAME!r}, a local folder or a hub id such as 'org/name'"
        raise ConfigError("the base model", [Problem("model.name", rule, section.name)])
    return _download(section)


def _download(section: ModelSection) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    chosen = {"allow_patterns": _HUB_FILES, "ignore_patterns": _NOT_HUB_FILES}
    try:
        return Path(snapshot_download(section.name, revision=section.revision, **chosen))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        fix = "Check name and revision; without a network give a local folder."
        problem = Problem("model.name", f"could not be fetched from the hub ({reason})", section.name, fix)
        raise ConfigError("the base model", [problem]) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a JSON object"
        problem = Problem(
            "model.name", "must be a model folder with a readable config.json", f"{path}: {reason}"
        )
        raise ConfigError("the base model", [problem]) from None
    return config


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    if "auto_map" not in config:
        return
    # This module imports no torch, unlike the one that re-exports the name.
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    if (model_type := str(config.get("model_type"))) not in CONFIG_MAPPING_NAMES:
        raise SecurityRefusal(
            f"model.name: {folder}/config.json has an auto_map and a model_type ({model_type!r}) that "
            "transformers does not know: it wants code of the model folder to run. Remote code is never "
            "run; use a model that transformers itself knows."
        )


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise SecurityRefusal(
            f"model.name: {folder} has only pickled weights ({', '.join(pickled[:3])}), which can run code "
            "when loaded. Convert them to safetensors on a machine that you can afford to lose."
        )
    problem = Problem("model.name", "must be a folder with *.safetensors", str(folder))
    raise ConfigError("the base model", [problem])
