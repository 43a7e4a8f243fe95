"""Tensors of safetensors files that are read in parts, and stand-ins that have their shape but no memory.

Decision: `pread`, not `mmap`. A mapped file counts as memory of every rank that maps it, and its pages stay
as long as the kernel likes; here a rank has what it has asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_medical.base_model.shapes import weight_files
from moe_medical.errors import DataError

_COMPARED_AT_ONCE = 1 << 22
"""Elements."""


class StoredTensor:
    """One tensor on disk.

    `from_pretrained(state_dict=...)` of transformers takes it for a tensor that it has still to read: it
    indexes it, calls `to`, and gets a stand-in, by whose `pointer` its parameter can be told later.

    Args:
        part: What `safe_open(...).get_slice(name)` returns.
        path: The file.
        name: Of the tensor in it.
    """

    def __init__(self, part: Any, path: Path, name: str) -> None:
        self._part = part
        self.path = path
        self.name = name
        self._stand_in: Tensor | None = None
        self.shape = torch.Size(part.get_shape())

    def __getitem__(self, index: object) -> StoredTensor:
        return self

    def to(self, device: object, dtype: torch.dtype) -> Tensor:
        """A CPU tensor of this shape and a single element: NaN, so that no two stand-ins look equal."""
        self._stand_in = torch.full((1,), float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        return self._stand_in.expand(self.shape)

    @property
    def pointer(self) -> int | None:
        """Address of the stand-in's element, None if nobody asked for a stand-in."""
        return None if self._stand_in is None else self._stand_in.data_ptr()

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor in the file's dtype; only their rows are read."""
        stop = self.shape.numel() if stop is None else stop
        if not self.shape:
            return self._part[...].view(1)[start:stop]
        row = math.prod(self.shape[1:])
        first = min(start // row, self.shape[0] - 1)
        rows: Tensor = self._part[first : math.ceil(stop / row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same numbers."""
        if self.shape != other.shape:
            return False
        starts = range(0, self.shape.numel(), _COMPARED_AT_ONCE)
        ends = [min(start + _COMPARED_AT_ONCE, self.shape.numel()) for start in starts]
        pairs = ((self.read(*span), other.read(*span)) for span in zip(starts, ends, strict=True))
        return all(torch.equal(a, b) for a, b in pairs)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name there.

    Raises:
        DataError: A file is no readable safetensors file.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt", backend="pread")
            names = list(file.keys())
            found |= {name: StoredTensor(file.get_slice(name), path, name) for name in names}
        except (OSError, SafetensorError) as e:
            raise DataError(f"{path} is not a readable safetensors file: {e}") from None
    return found
