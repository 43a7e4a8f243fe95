"""`export hf`: a folder that holds base, experts, tokenizer and the code to run them; for any adapter.

Decisions:
- The code is ours, copied: the loader and the modules that it needs, under another package name. A second,
  shorter implementation of every router would have to be kept equal to the first; a copy is equal.
- Nothing but torch, transformers and safetensors is imported by it; no remote code, no pickle.
- `model_type` in config.json is our own: a plain `from_pretrained` fails there, where it would otherwise load
  the base without its experts and say nothing. The base's own config is inside.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from safetensors.torch import save_file

from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.shapes import weight_files
from moe_medical.interop.loader import ADAPTER_FILE, CONFIG_FILE, MODEL_TYPE
from moe_medical.interop.new_folder import check_new, copy_beside_weights, new_folder
from moe_medical.interop.opened import Subject, open_adapter

LOADER, RUNTIME = "load_moe_medical", "moe_medical_runtime"
_PACKAGE = "moe_medical"
_LOADER_MODULE = f"{_PACKAGE}.interop.loader"
_IMPORT = re.compile(rf"^(\s*(?:from|import)\s+){_PACKAGE}(?=[.\s])", re.MULTILINE)
_LOG = logging.getLogger(__name__)


def export_hf_folder(
    adapter: Path, out: Path, base: str | None = None, only: Sequence[str] = (), link: bool = False
) -> Path:
    """Write a folder that runs an adapter without this package: `from load_moe_medical import load`.

    Args:
        adapter: Adapter folder.
        out: The new folder.
        base: Base model, where it is not the one the adapter names.
        only: Parts of the adapter, see `partial.restrict_adapter`; all where empty.
        link: Whether the base's weights are hard links rather than copies, where the file system can.

    Returns:
        `out`.

    Raises:
        ConfigError: The adapter does not fit its base, or `out` is taken.
        StorageError: The disk refused.
    """
    check_new(out)
    subject = open_adapter(adapter, base, only)
    verify_checksums(subject.base.folder)
    with new_folder(out) as draft:
        copy_beside_weights(subject.base.folder, draft)
        for path in weight_files(subject.base.folder):
            _take(path.resolve(), draft / path.name, link)
        _write_adapter(subject, draft)
        for name, text in runtime_sources().items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text, encoding="utf-8")
        (draft / "README.md").write_text(_readme(subject), encoding="utf-8")
    return out


def runtime_sources() -> dict[str, str]:
    """Path -> text of the loader and of every module of ours that it needs, directly or not."""
    found: dict[str, str] = {}
    wanted = [_LOADER_MODULE]
    while wanted:
        module = wanted.pop()
        path = _path_of(module)
        if path in found:
            continue
        text = _file_of(module).read_text(encoding="utf-8")
        found[path] = _IMPORT.sub(rf"\1{RUNTIME}", text)
        wanted += _modules_imported(text)
    packages = {str(Path(path).parent) for path in found} - {"."}
    return found | {f"{package}/__init__.py": "" for package in packages | {RUNTIME}}


def _modules_imported(text: str) -> list[str]:
    """Modules of ours that a source imports anywhere, also inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith(f"{_PACKAGE}.") and _file_of(name).is_file()]


def _file_of(module: str) -> Traversable:
    return resources.files(_PACKAGE).joinpath(*module.split(".")[1:-1], f"{module.rpartition('.')[2]}.py")


def _path_of(module: str) -> str:
    """Where a module stands in the folder: the loader on top, all else in the package beside it."""
    return f"{LOADER}.py" if module == _LOADER_MODULE else f"{RUNTIME}/{'/'.join(module.split('.')[1:])}.py"


def _write_adapter(subject: Subject, draft: Path) -> None:
    config = {"model_type": MODEL_TYPE, "base": subject.base.config}
    document = {"config": asdict(subject.config), "meta": subject.meta}
    for name, value in (("config.json", config), (CONFIG_FILE, document)):
        (draft / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in subject.state.items()}
    save_file(state, draft / ADAPTER_FILE, metadata={"format": "pt"})
    (draft / ADAPTER_FILE).chmod((draft / CONFIG_FILE).stat().st_mode)  # safetensors makes it private


def _take(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:
            _LOG.warning("%s is copied, for it cannot be linked (%s)", source.name, error.strerror)
    shutil.copyfile(source, target)


def _readme(subject: Subject) -> str:
    config, tasks = subject.config, ", ".join(subject.tasks)
    gated = config.router in ("task", "joint") and subject.routed
    rows = 'with loaded.rows(tasks=["TASK"]):\n    ' if gated else ""
    return (
        f"# {subject.folder.name}\n\n"
        f"{subject.base.name} with adapters of moe_medical ({config.preset}, {config.router} router). "
        f"Tasks: {tasks}.\n\n"
        "torch, transformers and safetensors are all that it needs; run it from this folder:\n\n"
        "```python\n"
        "from load_moe_medical import load\n\n"
        'loaded = load(".")\n'
        'batch = loaded.tokenizer("...", return_tensors="pt")\n'
        f"{rows}print(loaded.tokenizer.decode(loaded.model.generate(**batch)[0]))\n"
        "```\n"
    )
