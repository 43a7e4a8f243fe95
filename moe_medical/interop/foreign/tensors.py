"""Tensors of a foreign weights file: safetensors, or a pickle of nothing but tensors.

A pickle can run any code when it is read. It is read only on request, and then only if torch's own list of
harmless names covers everything that it asks for: the names are looked at before anything is built. The file
must be as large as it says, so that a small one cannot fill the memory: nothing in it is compressed, and no
tensor is larger than its storage.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_medical.errors import DataError, SecurityRefusal

MAX_TENSORS = 500_000
MAX_PROGRAM_BYTES = 256 * 2**20
"""Of the pickle without its tensors' numbers; some 200 bytes for each of them."""


def read_tensors(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Name -> tensor on the CPU.

    Args:
        path: `*.safetensors`; anything else is a pickle that `torch.save` wrote.
        allow_pickle: Whether the user asked for pickles to be read.

    Raises:
        SecurityRefusal: A pickle without leave, or one that asks for more than tensors.
        DataError: Unreadable, or something else than a flat state of float tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return _checked(path, load_file(path))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: is not a readable safetensors file ({error}).") from None
    if not allow_pickle:
        raise SecurityRefusal(
            f"{path}: the weights are a pickle, which can run code. Give --convert-pickle to read it with "
            "the restricted loader, which takes tensors only."
        )
    # In this order: sizes from the archive's index, then names from the opcodes, and only then the objects.
    _refuse_inflated(path)
    _refuse_code(path)
    return _checked(path, _read_pickle(path))


def _refuse_inflated(path: Path) -> None:
    """torch stores its files uncompressed; whatever is not so may be a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        rule = f"is not a readable file of torch.save in its zip format ({error})"
        raise DataError(f"{path}: {rule}.") from None
    total = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or total > path.stat().st_size:
        raise SecurityRefusal(f"{path}: is refused, for it unpacks to more than its own size.")
    # A pickle can also build a lot out of little: its program is bounded, not only its data.
    programs = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if len(entries) > MAX_TENSORS or sum(entry.file_size for entry in programs) > MAX_PROGRAM_BYTES:
        raise SecurityRefusal(f"{path}: is refused, for it holds more than {MAX_TENSORS} tensors.")


def _refuse_code(path: Path) -> None:
    """Name what a pickle asks for, from its opcodes alone."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise DataError(f"{path}: is not a readable pickle ({_first_line(error)}).") from None
    if unsafe:
        names = ", ".join(sorted(unsafe)[:4])
        raise SecurityRefusal(f"{path}: is refused, for it asks for more than tensors: {names}.")


def _read_pickle(path: Path) -> object:
    try:
        # `mmap`: storages that the state does not use are never read.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise SecurityRefusal(
            f"{path}: is refused by the restricted loader ({_first_line(error)})."
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path}: is not a readable pickle ({_first_line(error)}).") from None


def _checked(path: Path, state: object) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DataError(f"{path}: must hold a state, tensors by their names.")
    wrong = [name for name, value in state.items() if not _is_plain(value)]
    if wrong:
        rule = "must hold float tensors on the CPU, each within its storage"
        raise DataError(f"{path}: {rule}; not so: {', '.join(wrong[:4])}.")
    return {name: value.detach() for name, value in state.items()}


def _is_plain(value: object) -> bool:
    """A tensor of another kind, or one that repeats a small storage, could cost any amount of memory."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:  # type: ignore[attr-defined]
        return False
    assert isinstance(value, Tensor)
    fits = value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()
    return fits and value.is_floating_point()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
