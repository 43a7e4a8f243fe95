"""Shapes of a model's linear layers, read from the safetensors headers: nothing is loaded, no torch.

A linear layer is a 2-D `<module>.weight`; embeddings look the same and are told apart by the
adapters' name patterns only. Which files count is settled as transformers does it, since some repositories
carry a second copy of the weights (`consolidated.safetensors`).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.base_model.locate import BaseModel
from moe_medical.errors import DataError

_INPUT_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linears are transformers' Conv1D, stored (in, out)."""
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class LinearShape:
    in_features: int
    out_features: int


def linear_shapes(base: BaseModel) -> dict[str, LinearShape]:
    """Module name -> shape of every 2-D weight of the model."""
    shapes = {}
    for name, shape in _tensor_shapes(base.folder).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(shape) == 2:
            out_features, in_features = reversed(shape) if base.model_type in _INPUT_FIRST else shape
            shapes[module] = LinearShape(in_features, out_features)
    return shapes


def num_parameters(base: BaseModel) -> int:
    """Stored parameters; tied tensors are stored once."""
    return sum(math.prod(shape) for shape in _tensor_shapes(base.folder).values())


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files: `model.safetensors`, else those of the index, else all.

    Raises:
        DataError: The index cannot be read.
    """
    index = folder / f"{_SINGLE}.index.json"
    single = folder / _SINGLE
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{index} is not a readable safetensors index") from None


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        shapes |= {k: v["shape"] for k, v in read_header(path).items() if k != "__metadata__"}
    return shapes


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> `dtype`, `shape` and `data_offsets`, which count from the end of the header.

    Raises:
        DataError: It is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error):
        raise DataError(f"{path} is not a readable safetensors file") from None
    return dict(header)
