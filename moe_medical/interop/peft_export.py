"""`export peft`: an adapter with fixed gates as a plain LoRA that PEFT, vLLM and others load.

Decisions:
- Rank E * r: A holds the experts' A, B theirs with the gate folded into their columns, in float32. Folded
  into one factor it is rounded once; as a square root in both, twice.
- Scaling stays alpha / r = ours: a LoRA that has no experts goes out bit for bit, and `lora_alpha` is a whole
  number, which other readers expect. Where ours allows none, it goes into B, and alpha is the rank.
- Ranks that differ are in `rank_pattern`. vLLM wants one rank, and one that it knows: several tasks are
  padded to it with zeros, which adds nothing.
- PEFT's DoRA is for all modules or none: one without a magnitude gets the norm that it has, which changes
  nothing.
- PEFT is not imported: the format is two files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from moe_medical.base_model.embedded import EMBEDDED_NAME
from moe_medical.errors import ConfigError, Problem
from moe_medical.files import new_folder, write_json
from moe_medical.interop.effective import LowRank
from moe_medical.interop.merge import is_transposed, merge_matrix, weight_places
from moe_medical.interop.opened import (
    OpenedAdapter,
    check_fixed,
    check_new,
    fixed_loras,
    folder_names,
    open_adapter,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "moe_medical_export.json"
VLLM_ARGUMENTS = "vllm_lora_modules.txt"
VLLM_INDEX = "vllm_lora_modules.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be from 8 on."""


def export_peft(
    adapter: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    base: str | None = None,
    gate: Sequence[float] | None = None,
    only: Sequence[str] = (),
    for_vllm: bool = False,
) -> list[Path]:
    """Write an adapter as a PEFT LoRA; for several tasks, or for vLLM, as a folder of them with an index.

    Args:
        adapter: Adapter folder.
        out: The LoRA; for several tasks, or for vLLM, it holds one folder for each.
        tasks: Whose gates are folded in; none where the adapter has no task gate.
        base: Base model, where it is not the one the adapter names.
        gate: Weights of the experts instead, the same in all modules: an average that token routers had, say.
        only: Parts of the adapter, see `partial.restrict_adapter`; all where empty.
        for_vllm: One rank that vLLM knows, and an index with its arguments; so with several tasks, too.

    Returns:
        The folders of the LoRAs.

    Raises:
        ConfigError: No fixed gate stands for the adapter, it does not fit, or the task is missing or unknown.
        StorageError: The disk refused.
    """
    names: list[str | None] = [*folder_names(tasks)] if tasks else [None]
    check_new(out)
    for_vllm = for_vllm or len(names) > 1
    opened = open_adapter(adapter, base, only)
    if for_vllm and opened.config.dora:
        fix = "Merge it instead, or export one task without --vllm."
        raise ConfigError(str(adapter), [Problem("adapter", "must not be a DoRA: vLLM has none", fix=fix)])
    for name in names:  # all of them first: of several tasks none is written where one is wrong
        check_fixed(opened, name, gate)
    ranks: dict[str, int] = {}
    with new_folder(out) as draft:
        for name in names:
            lora = _peft_lora(opened, fixed_loras(opened, name, gate), for_vllm)
            folder = name or adapter.resolve().name
            ranks[folder] = lora.rank
            place = draft / folder if for_vllm else draft
            place.mkdir(exist_ok=True)
            _write_lora(opened, lora, place)
            record = {
                "adapter": str(opened.folder),
                "task": name,
                "gate": None if gate is None else list(gate),
                "system_prompt": opened.meta.get("system_prompt"),
            }
            write_json(place / RECORD_FILE, record, indent=2)
        if for_vllm:
            _write_index(opened, ranks, out, draft)
    return [out / folder for folder in ranks] if for_vllm else [out]


@dataclass(frozen=True)
class _PeftLora:
    """One LoRA as PEFT's two files hold it."""

    modules: dict[str, LowRank]
    alphas: dict[str, float]
    """`lora_alpha` of each module."""
    rslora: bool = False

    @property
    def rank(self) -> int:
        """Of most modules, or the largest of those."""
        ranks = [lora.rank for lora in self.modules.values()]
        return max(ranks, key=lambda rank: (ranks.count(rank), rank))


def _peft_lora(adapter: OpenedAdapter, loras: dict[str, LowRank], for_vllm: bool) -> _PeftLora:
    """Ranks, scalings and magnitudes as PEFT, or vLLM, can have them; the same update."""
    config = adapter.config
    if for_vllm:
        rank = _vllm_rank(adapter, max(lora.rank for lora in loras.values()))
        padded = {}
        for name, lora in loras.items():
            added = rank - lora.rank
            # Rows and columns of zeros: the update and its scaling stay.
            padded[name] = replace(lora, A=pad(lora.A, (0, 0, 0, added)), B=pad(lora.B, (0, added)))
        loras = padded
    loras = _with_magnitudes(adapter, loras)
    if not adapter.routed and not for_vllm:
        return _PeftLora(loras, dict.fromkeys(loras, config.alpha), config.rs_lora)
    # PEFT divides alpha by the rank, which has grown: alpha grows with it.
    if any(not (lora.scaling * lora.rank).is_integer() for lora in loras.values()):
        loras = {name: replace(lora, B=lora.B * lora.scaling, scaling=1.0) for name, lora in loras.items()}
    return _PeftLora(loras, {name: lora.scaling * lora.rank for name, lora in loras.items()})


def _vllm_rank(adapter: OpenedAdapter, rank: int) -> int:
    fitting = [known for known in VLLM_RANKS if known >= rank]
    if not fitting:
        rule = f"comes to a LoRA of rank {rank}; vLLM serves up to {VLLM_RANKS[-1]}"
        raise adapter.refused("adapter", rule, fix="Merge it instead: `moe-medical merge`.")
    return fitting[0]


def _with_magnitudes(adapter: OpenedAdapter, loras: dict[str, LowRank]) -> dict[str, LowRank]:
    """Give every module a magnitude if one has it: the norms of W + delta W, which scale by 1."""
    without = [name for name, lora in loras.items() if lora.magnitude is None]
    if not without or len(without) == len(loras):
        return loras
    places = weight_places(adapter)
    found = dict(loras)
    for name in without:
        weight = places[name].read().view(places[name].shape).float()
        transposed = is_transposed(adapter.linears[name])
        merged = merge_matrix(weight, loras[name], transposed)
        found[name] = replace(loras[name], magnitude=merged.norm(dim=0 if transposed else 1))
    return found


def _write_lora(adapter: OpenedAdapter, lora: _PeftLora, folder: Path) -> None:
    write_json(folder / CONFIG_FILE, _peft_config(adapter, lora), indent=2)
    tensors: dict[str, Tensor] = {}
    for name, low_rank in lora.modules.items():
        prefix = f"base_model.model.{name}"
        # Contiguous, and each in memory of its own, else safetensors refuses them.
        tensors[f"{prefix}.lora_A.weight"] = low_rank.A.clone(memory_format=torch.contiguous_format)
        tensors[f"{prefix}.lora_B.weight"] = low_rank.B.clone(memory_format=torch.contiguous_format)
        if low_rank.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = low_rank.magnitude.contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors makes it private


def _peft_config(adapter: OpenedAdapter, lora: _PeftLora) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    usual = next(name for name, low_rank in lora.modules.items() if low_rank.rank == lora.rank)
    ranks = {name: low_rank.rank for name, low_rank in lora.modules.items() if low_rank.rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_for_others(adapter),
        "revision": adapter.base.revision,
        "r": lora.rank,
        "lora_alpha": _whole(lora.alphas[usual]),
        "rank_pattern": ranks,
        "alpha_pattern": {name: _whole(lora.alphas[name]) for name in ranks},
        "use_rslora": lora.rslora,
        "use_dora": any(low_rank.magnitude is not None for low_rank in lora.modules.values()),
        "target_modules": sorted(lora.modules),
        "fan_in_fan_out": any(is_transposed(adapter.linears[name]) for name in lora.modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_index(adapter: OpenedAdapter, ranks: Mapping[str, int], out: Path, draft: Path) -> None:
    """What `vllm serve` is to be told: a line for the shell, and the same as JSON."""
    rank = max(ranks.values())  # of all: one number holds for the server
    modules = {name: str(out / name) for name in ranks}
    arguments = ["--enable-lora", f"--max-loras={len(modules)}", f"--max-lora-rank={rank}", "--lora-modules"]
    arguments += [f"{name}={path}" for name, path in modules.items()]
    (draft / VLLM_ARGUMENTS).write_text(f"{shlex.join(arguments)}\n", encoding="utf-8")
    index = {
        "base_model": _name_for_others(adapter),
        "max_lora_rank": rank,
        "max_loras": len(modules),
        "lora_modules": [{"name": name, "path": path} for name, path in modules.items()],
    }
    write_json(draft / VLLM_INDEX, index, indent=2)


def _name_for_others(adapter: OpenedAdapter) -> str:
    """A hub id or folder; the embedded model has a name of ours, which nobody else knows."""
    # A folder on this machine, which is better than a name that a hub would not find, or find another under.
    embedded = adapter.base.name == EMBEDDED_NAME
    return str(adapter.base.folder) if embedded else adapter.base.name


def _whole(alpha: float) -> float | int:
    """Without a decimal point where it can be: PEFT declares `lora_alpha` an int."""
    return int(alpha) if float(alpha).is_integer() else alpha
