"""`merge`: an adapter becomes part of its base's weights, W = W0 + scaling * sum_i g_i B_i A_i, per task.

Decisions:
- A merged file is a copy of the base's file in which the bytes of the adapted weights are written anew:
  names, order, shards and index stay the base's, and no more than one tensor is in memory at a time.
- Accumulated in float32 and rounded once to the tensor's own dtype; DoRA's rows are scaled before that.
- What was written is loaded again, and its logits compared with those of the adapted model, in float32; that
  takes the memory of one whole model, unless it is left out.
- Token-routed experts cannot be merged, nor a quantised base or one that transformers converts on loading.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.folder import WEIGHTS_FILE
from moe_medical.adapters.layer import AdaptedLinear
from moe_medical.base_model import BaseModel
from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.load import load_unread_base
from moe_medical.base_model.shapes import read_header, weight_files
from moe_medical.base_model.stored import StoredTensor
from moe_medical.digest import sha256_file
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.interop.effective import LowRank
from moe_medical.interop.new_folder import check_new, copy_beside_weights, folder_names, new_folder
from moe_medical.interop.opened import Subject, check_fixed, fixed_loras, open_adapter, task_number
from moe_medical.interop.verify import probe_logits, refuse_other_logits

RECORD_FILE = "moe_medical_merge.json"
_FLOATS = ("F32", "F16", "BF16")
_LOG = logging.getLogger(__name__)


def merge_adapter(
    adapter: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    base: str | None = None,
    only: Sequence[str] = (),
    verify: bool = True,
) -> list[Path]:
    """Write the base model with an adapter merged into it, for each task that is named.

    Args:
        adapter: Adapter folder.
        out: The merged model; with several tasks it holds one folder for each.
        tasks: Whose gates are merged; none where the adapter has no task gate.
        base: Base model, where it is not the one the adapter names.
        only: Parts of the adapter to merge, see `partial.restrict_adapter`; all where empty.
        verify: Whether the result is loaded and compared.

    Returns:
        The folders of the merged models.

    Raises:
        ConfigError: The adapter cannot be merged, does not fit, or the task is missing or unknown.
        DataError: The merged model does not answer as the adapted one; nothing is left of it.
        StorageError: The disk refused.
    """
    names: list[str | None] = [*folder_names(tasks)] if tasks else [None]
    check_new(out)
    subject = open_adapter(adapter, base, only)
    for name in names:
        check_fixed(subject, name)
    places = weight_places(subject)
    expected = probe_logits(subject, [task_number(subject, name) for name in names]) if verify else None
    with new_folder(out) as draft:
        for index, name in enumerate(names):
            folder = draft if len(names) == 1 else draft / str(name)
            _write(subject, fixed_loras(subject, name), places, folder)
            error = refuse_other_logits(subject, folder, expected, index) if expected else None
            _write_record(subject, name, error, folder)
            _LOG.info("merged %d modules into %s", len(places), out / folder.relative_to(draft))
    return [out] if len(names) == 1 else [out / str(name) for name in names]


def merge_matrix(weight: Tensor, lora: LowRank, transposed: bool = False) -> Tensor:
    """W0 + scaling * B A, accumulated in float32, rounded once to the dtype of W0.

    Args:
        weight: (F, D), or (D, F) where transposed; float.
        lora: Its update, with DoRA's magnitudes if it has them.
        transposed: As in transformers' Conv1D.
    """
    merged = weight.to(torch.float32, copy=True)
    rows_FD = merged.t() if transposed else merged
    rows_FD.addmm_(lora.B, lora.A, alpha=lora.scaling)
    if lora.magnitude is not None:
        rows_FD.mul_((lora.magnitude.float() / rows_FD.norm(dim=1))[:, None])
    return merged.to(weight.dtype)


def weight_places(subject: Subject) -> dict[str, StoredTensor]:
    """Adapted linear -> its weight on disk.

    Raises:
        ConfigError: The base is quantised, or one of its weights serves several layers.
        DataError: Transformers converts the base's tensors.
    """
    _refuse_quantised(subject.base)
    try:
        unread = load_unread_base(subject.base, "float32")
    except DataError as error:
        if "ZeRO-3" not in str(error):
            raise
        why = "transformers converts its tensors when it loads them, so no file holds an adapted weight"
        fix = "Use `moe-medical export peft`."
        raise ConfigError(
            str(subject.folder), [Problem("base", f"cannot be merged: {why}", fix=fix)]
        ) from None
    names = {name: f"{name}.weight" for name in subject.linears}
    _refuse_shared(unread.model, set(names.values()))
    places = {name: unread.stored[weight] for name, weight in names.items()}
    headers = {path: read_header(path) for path in weight_files(subject.base.folder)}
    wrong = [n for n, t in places.items() if headers[t.path][t.name]["dtype"] not in _FLOATS]
    if wrong:
        rule = f"must be stored as one of {', '.join(_FLOATS)}, else nothing can be added to it"
        raise ConfigError(str(subject.base.folder), [Problem(f"{wrong[0]}.weight", rule)])
    return places


def _refuse_quantised(base: BaseModel) -> None:
    if base.config.get("quantization_config"):
        rule = "must not be quantised: the sum would be rounded to its few bits"
        fix = "Merge into the unquantised model, or use `moe-medical export peft`."
        raise ConfigError("merge", [Problem("base", rule, base.name, fix)])


def _refuse_shared(model: torch.nn.Module, weights: set[str]) -> None:
    """A weight that two modules share would carry the adapter of one into the other."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for names in users.values():
        if len(names) > 1 and weights & set(names):
            rule = f"must be a layer's own to be merged into, but is shared by {', '.join(names[:3])}"
            raise ConfigError("merge", [Problem(names[0], rule, fix="Use `moe-medical export peft`.")])


def _write(
    subject: Subject, loras: Mapping[str, LowRank], places: Mapping[str, StoredTensor], folder: Path
) -> None:
    folder.mkdir(exist_ok=True)
    verify_checksums(subject.base.folder)
    copy_beside_weights(subject.base.folder, folder)
    linears = subject.linears
    for path in weight_files(subject.base.folder):
        shutil.copyfile(path, folder / path.name)
        here = [name for name, place in places.items() if place.path == path]
        _patch(folder / path.name, {n: (places[n], loras[n], is_transposed(linears[n])) for n in here})


def is_transposed(linear: AdaptedLinear) -> bool:
    """Whether the base stores the layer's weight (D, F)."""
    return isinstance(linear.base, Conv1D)


def _patch(path: Path, merges: Mapping[str, tuple[StoredTensor, LowRank, bool]]) -> None:
    """Write merged tensors over the base's in a copied file."""
    header = read_header(path)
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for place, lora, transposed in merges.values():
            merged = merge_matrix(place.read().view(place.shape), lora, transposed)
            file.seek(8 + length + header[place.name]["data_offsets"][0])
            file.write(merged.view(torch.uint8).numpy().data)


def _write_record(subject: Subject, task: str | None, error: float | None, folder: Path) -> None:
    """Where the weights came from; the prompts of the training are needed to use them."""
    record = {
        "base_model": subject.base.name,
        "base_revision": subject.base.revision,
        "adapter": str(subject.folder),
        "adapter_sha256": sha256_file(subject.folder / WEIGHTS_FILE),
        "task": task,
        "merged_modules": len(subject.linears),
        "system_prompt": subject.meta.get("system_prompt"),
        "largest_logit_difference": error,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")
