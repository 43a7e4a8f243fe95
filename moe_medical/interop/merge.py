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

import logging
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_medical.adapters.folder import WEIGHTS_FILE
from moe_medical.adapters.layer import AdaptedLinear
from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.load import ConvertedWeights, load_unread_base
from moe_medical.base_model.shapes import read_header, weight_files
from moe_medical.base_model.stored import StoredTensor
from moe_medical.errors import ConfigError, Problem
from moe_medical.files import new_folder, sha256_file, write_json
from moe_medical.interop.effective import LowRank
from moe_medical.interop.opened import (
    OpenedAdapter,
    check_fixed,
    check_new,
    fixed_loras,
    folder_names,
    open_adapter,
    task_number,
)
from moe_medical.interop.verify import probe_logits, refuse_other_logits

RECORD_FILE = "moe_medical_merge.json"
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("checksums.json", "adapter_config.json")
"""Sums of other weights; and by what transformers would look for an adapter."""
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
    opened = open_adapter(adapter, base, only)
    for name in names:
        check_fixed(opened, name)
    places = weight_places(opened)
    # The adapted model answers now and goes, so that it and a merged one are never in memory together.
    probe = probe_logits(opened, [task_number(opened, name) for name in names]) if verify else None
    with new_folder(out) as draft:
        for index, name in enumerate(names):
            folder = draft if len(names) == 1 else draft / str(name)
            folder.mkdir(exist_ok=True)
            _write_merged(opened, fixed_loras(opened, name), places, folder)
            error = refuse_other_logits(opened, folder, probe, index) if probe else None
            _write_record(opened, name, error, folder)
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
    rows_FD = merged.t() if transposed else merged  # a view: what is done to it is done to `merged`
    rows_FD.addmm_(lora.B, lora.A, alpha=lora.scaling)
    if lora.magnitude is not None:
        # DoRA (arXiv 2402.09353): each row of the sum, which gives one output, is scaled to its magnitude.
        rows_FD.mul_((lora.magnitude.float() / rows_FD.norm(dim=1))[:, None])
    return merged.to(weight.dtype)  # the one rounding


def weight_places(adapter: OpenedAdapter) -> dict[str, StoredTensor]:
    """Adapted linear -> its weight on disk.

    Raises:
        ConfigError: The base is quantised, transformers converts its tensors, a weight serves several layers,
            or is no float.
    """
    base = adapter.base
    if base.config.get("quantization_config"):
        rule = "must not be quantised: the sum would be rounded to its few bits"
        fix = "Merge into the unquantised model, or use `moe-medical export peft`."
        raise ConfigError("merge", [Problem("base", rule, base.name, fix)])
    try:
        unread = load_unread_base(base, "float32")
    except ConvertedWeights:
        rule = (
            "cannot be merged: transformers converts its tensors when it loads them, so no file holds an "
            "adapted weight"
        )
        raise adapter.refused("base", rule, fix="Use `moe-medical export peft`.") from None
    names = {name: f"{name}.weight" for name in adapter.linears}
    _refuse_shared(unread.model, set(names.values()))
    places = {name: unread.stored[weight] for name, weight in names.items()}
    headers = {path: read_header(path) for path in weight_files(base.folder)}
    wrong = [n for n, t in places.items() if headers[t.path][t.name]["dtype"] not in _FLOATS]
    if wrong:
        rule = f"must be stored as one of {', '.join(_FLOATS)}, else nothing can be added to it"
        raise ConfigError(str(base.folder), [Problem(f"{wrong[0]}.weight", rule)])
    return places


def _refuse_shared(model: nn.Module, weights: set[str]) -> None:
    """A weight that two modules share would carry the adapter of one into the other."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for names in users.values():
        if len(names) > 1 and weights & set(names):
            rule = f"must be a layer's own to be merged into, but is shared by {', '.join(names[:3])}"
            raise ConfigError("merge", [Problem(names[0], rule, fix="Use `moe-medical export peft`.")])


def is_transposed(linear: AdaptedLinear) -> bool:
    """Whether the base stores the layer's weight (D, F)."""
    return isinstance(linear.base, Conv1D)


def _write_merged(
    adapter: OpenedAdapter, loras: Mapping[str, LowRank], places: Mapping[str, StoredTensor], folder: Path
) -> None:
    """The base's files, with merged tensors over its own in the copies."""
    verify_checksums(adapter.base.folder)
    copy_beside_weights(adapter.base.folder, folder)
    for path in weight_files(adapter.base.folder):
        copy = Path(shutil.copyfile(path, folder / path.name))
        header = read_header(copy)
        with copy.open("r+b") as file:
            # A safetensors file: the header's length, the header, the tensors. Offsets count from its end.
            (length,) = struct.unpack("<Q", file.read(8))
            for name, place in places.items():
                if place.path == path:
                    weight = place.read().view(place.shape)
                    merged = merge_matrix(weight, loras[name], is_transposed(adapter.linears[name]))
                    file.seek(8 + length + header[place.name]["data_offsets"][0])
                    file.write(merged.view(torch.uint8).numpy().data)  # numpy knows no bfloat16


def copy_beside_weights(base: Path, folder: Path) -> None:
    """What stands beside a base model's weights: config, index, tokenizer, template, licence."""
    chosen = {path for pattern in _BESIDE_WEIGHTS for path in base.glob(pattern) if path.is_file()}
    for path in sorted(chosen):
        if path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)


def _write_record(adapter: OpenedAdapter, task: str | None, error: float | None, folder: Path) -> None:
    """Where the weights came from; the prompts of the training are needed to use them."""
    record = {
        "base_model": adapter.base.name,
        "base_revision": adapter.base.revision,
        "adapter": str(adapter.folder),
        "adapter_sha256": sha256_file(adapter.folder / WEIGHTS_FILE),
        "task": task,
        "merged_modules": len(adapter.linears),
        "system_prompt": adapter.meta.get("system_prompt"),
        "largest_logit_difference": error,
    }
    write_json(folder / RECORD_FILE, record, indent=2)
