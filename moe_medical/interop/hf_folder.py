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
import logging
import os
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from safetensors.torch import save_file

from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.shapes import weight_files
from moe_medical.files import new_folder, write_json
from moe_medical.interop.loader import ADAPTER_FILE, CONFIG_FILE, MODEL_TYPE
from moe_medical.interop.merge import copy_beside_weights
from moe_medical.interop.opened import OpenedAdapter, check_new, open_adapter

LOADER = "load_moe_medical"
RUNTIME = "moe_medical_runtime"
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
    opened = open_adapter(adapter, base, only)
    base_folder = opened.base.folder
    verify_checksums(base_folder)
    with new_folder(out) as draft:
        copy_beside_weights(base_folder, draft)
        for path in weight_files(base_folder):
            # A hub's cache has links in place of its files: what counts is where they lead.
            _link_or_copy(path.resolve(), draft / path.name, link)
        _write_adapter(opened, draft)
        for name, text in runtime_sources().items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text, encoding="utf-8")
        (draft / "README.md").write_text(_readme(opened), encoding="utf-8")
    return out


def runtime_sources() -> dict[str, str]:
    """Path -> text of the loader and of every module of ours that it needs, directly or not."""
    found: dict[str, str] = {}
    wanted = [_LOADER_MODULE]
    while wanted:
        module = wanted.pop()
        # The loader stands on top of the folder, all else in the package beside it.
        within = module.removeprefix(f"{_PACKAGE}.").replace(".", "/")
        path = f"{LOADER}.py" if module == _LOADER_MODULE else f"{RUNTIME}/{within}.py"
        if path not in found:
            text = _file_of(module).read_text(encoding="utf-8")
            found[path] = _IMPORT.sub(rf"\1{RUNTIME}", text)
            wanted += _modules_imported(text)
    # Empty `__init__` files: ours import more than the loader needs.
    packages = {str(Path(path).parent) for path in found} - {"."}
    return found | {f"{package}/__init__.py": "" for package in packages | {RUNTIME}}


def _modules_imported(text: str) -> list[str]:
    """Modules of ours that a source imports anywhere, also inside functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module of it.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith(f"{_PACKAGE}.") and _file_of(name).is_file()]


def _file_of(module: str) -> Traversable:
    _, *folders, leaf = module.split(".")
    return resources.files(_PACKAGE).joinpath(*folders, f"{leaf}.py")


def _write_adapter(adapter: OpenedAdapter, draft: Path) -> None:
    """Under names of its own: transformers takes an `adapter_config.json` beside weights for PEFT's."""
    config = {"model_type": MODEL_TYPE, "base": adapter.base.config}
    write_json(draft / "config.json", config, indent=2)
    write_json(draft / CONFIG_FILE, {"config": adapter.config.saved(), "meta": adapter.meta}, indent=2)
    state = {name: tensor.contiguous() for name, tensor in adapter.state.items()}
    save_file(state, draft / ADAPTER_FILE, metadata={"format": "pt"})
    (draft / ADAPTER_FILE).chmod((draft / CONFIG_FILE).stat().st_mode)  # safetensors makes it private


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:  # another file system, say
            _LOG.warning("%s is copied, for it cannot be linked (%s)", source.name, error.strerror)
    shutil.copyfile(source, target)


def _readme(adapter: OpenedAdapter) -> str:
    config = adapter.config
    gated = config.router_kind.knows_tasks and adapter.routed
    rows = 'with loaded.rows(tasks=["TASK"]):\n    ' if gated else ""
    return (
        f"# {adapter.folder.name}\n\n"
        f"{adapter.base.name} with adapters of moe_medical ({config.preset}, {config.router} router). "
        f"Tasks: {', '.join(adapter.tasks)}.\n\n"
        "torch, transformers and safetensors are all that it needs; run it from this folder:\n\n"
        "```python\n"
        "from load_moe_medical import load\n\n"
        'loaded = load(".")\n'
        'batch = loaded.tokenizer("...", return_tensors="pt")\n'
        f"{rows}print(loaded.tokenizer.decode(loaded.model.generate(**batch)[0]))\n"
        "```\n"
    )
