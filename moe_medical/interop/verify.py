"""Whether a merged model answers as the adapted one: logits on a few real sentences, in float32.

Decisions: both models compute in float32, so that they differ by the one rounding of the merged weights only.
The largest difference of a logit must be small beside the largest logit, by the dtype of the files; and, what
a coarse dtype would hide, below half of what the adapter changes at all: base weights never pass as merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from moe_medical.adapters.model import attach_adapters, load_adapter_state
from moe_medical.adapters.routing import BatchInputs
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.base_model.shapes import read_header, weight_files
from moe_medical.config.schema import ModelSection
from moe_medical.errors import DataError
from moe_medical.interop.opened import OpenedAdapter

_SENTENCES = (
    "A 54-year-old man has had chest pain for two hours. Which test should be done first?",
    "Metformin lowers blood glucose; it is stopped before contrast media are given.",
    "患者反复咳嗽三周，夜间加重，无发热。请给出可能的诊断。",
)
_MAX_TOKENS = 48
_TOLERANCE = {"F32": 2e-4, "F16": 1e-2, "BF16": 5e-2}
"""Largest difference over the largest logit; on SmolLM2's 30 layers it is 3e-6, 2e-3 and 8e-3."""
_SHARE_OF_EFFECT = 0.5


@dataclass(frozen=True)
class Probe:
    """What the adapted model says."""

    ids: list[Tensor]
    base: list[Tensor]
    """Logits of the base alone, one tensor (1, S, vocabulary) per sentence."""
    adapted: list[list[Tensor]]
    """The same for each task."""


@torch.no_grad()
def probe_logits(adapter: OpenedAdapter, task_numbers: Sequence[int | None]) -> Probe:
    """Run the base, and the adapted model for each task; the model is gone afterwards."""
    ids = _sentences(adapter.base, adapter.skeleton)
    model = load_base(adapter.base, "float32").eval()
    base = _logits(model, ids)
    context = attach_adapters(model, adapter.config, seed=0)
    load_adapter_state(model, adapter.state)
    model.eval()
    adapted = []
    for number in task_numbers:
        task_ids_B = None if number is None else torch.tensor([number])
        with context.bind(BatchInputs.of_rows(task_ids_B)):
            adapted.append(_logits(model, ids))
    return Probe(ids, base, adapted)


@torch.no_grad()
def refuse_other_logits(adapter: OpenedAdapter, merged: Path, probe: Probe, index: int) -> float:
    """Load a merged folder and compare it with the adapted model of one task.

    Args:
        adapter: What was merged.
        merged: The folder.
        probe: From `probe_logits`.
        index: Of the task among those that were probed.

    Returns:
        The largest difference of a logit.

    Raises:
        DataError: It is too large.
    """
    located = locate_base(ModelSection(str(merged)))
    found = _logits(load_base(located, "float32").eval(), probe.ids)
    adapted = probe.adapted[index]
    error = _largest_difference(found, adapted)
    effect = _largest_difference(probe.base, adapted)
    scale = max(float(logits.abs().max()) for logits in adapted)
    # Every comparison asks for `<=`, which a NaN does not pass.
    is_small = error <= _tolerance(located) * scale
    is_of_adapter = error <= max(_SHARE_OF_EFFECT * effect, _TOLERANCE["F32"] * scale)
    if is_small and is_of_adapter:
        return error
    raise DataError(
        f"{adapter.folder}: the merged model's logits differ by up to {error:.3g} from the adapted one's, "
        f"which the adapter changes by up to {effect:.3g}. Nothing was written. Merge into a base of a finer "
        "dtype, or use `moe-medical export peft`."
    )


def _sentences(base: BaseModel, skeleton: nn.Module) -> list[Tensor]:
    """(1, S) token ids each; bytes as ids where the folder has no tokenizer."""
    rows = [list(text.encode()) for text in _SENTENCES]
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in _SENTENCES]
        if all(encoded):  # some classes make an empty tokenizer of no files
            rows = encoded
    except (OSError, ValueError, KeyError):
        pass  # what transformers raises where a folder has no tokenizer that it knows
    size = skeleton.get_input_embeddings().num_embeddings  # type: ignore[operator]
    longest = min(_MAX_TOKENS, int(base.config.get("max_position_embeddings") or _MAX_TOKENS))
    return [torch.tensor([[number % size for number in row[:longest]]]) for row in rows]


def _logits(model: nn.Module, ids: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=row, use_cache=False).logits for row in ids]


def _largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """NaN where a logit is none: `torch.max`, unlike Python's, lets no NaN get lost."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def _tolerance(base: BaseModel) -> float:
    """That of the coarsest dtype in the files, for its rounding is the largest."""
    tolerances = [_TOLERANCE["F32"]]
    for path in weight_files(base.folder):
        entries = (entry for name, entry in read_header(path).items() if name != "__metadata__")
        tolerances += [_TOLERANCE[entry["dtype"]] for entry in entries if entry["dtype"] in _TOLERANCE]
    return max(tolerances)
