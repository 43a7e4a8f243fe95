"""Loads the model of a folder written by `moe-medical export hf`: a base LLM with routed low-rank experts.

    from load_moe_medical import load

    loaded = load("this/folder")
    batch = loaded.tokenizer("...", return_tensors="pt")
    loaded.model.generate(**batch)

Needs torch, transformers and safetensors, and the package beside this file; no code of another origin is run
and nothing is unpickled. The model is transformers' own class: `generate`, KV cache and `to` work as ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_medical.adapters.model import attach_adapters, load_adapter_state
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.config.adapters import MoloraConfig

CONFIG_FILE = "moe_medical_adapter.json"
ADAPTER_FILE = "moe_medical_adapter.safetensors"
MODEL_TYPE = "moe_medical"
"""In config.json, so that transformers refuses the folder rather than loads the base without its experts."""


class Loaded(NamedTuple):
    """A model ready to generate."""

    model: nn.Module
    tokenizer: Any
    """None where the folder has none."""
    context: RoutingContext
    meta: dict[str, Any]
    """Of the training: `tasks`, `system_prompt` and more."""

    @contextmanager
    def rows(self, tasks: Sequence[str] | None = None, prompt_mask: Tensor | None = None) -> Iterator[None]:
        """Tell what the rows of the batches in this block are; token routers need nothing.

        Args:
            tasks: Task of each row, for a task gate; a single one is that of all rows.
            prompt_mask: True on the tokens of each prompt (rows, positions), for a sequence router.

        Raises:
            ValueError: The model does not know a task.
        """
        known = list(self.meta["tasks"])
        if unknown := [task for task in tasks or () if task not in known]:
            raise ValueError(f"unknown tasks {unknown}; the model knows {known}")
        device = next(self.model.parameters()).device
        numbers = None if tasks is None else torch.tensor([known.index(t) for t in tasks], device=device)
        with self.context.bind(BatchInputs.of_rows(numbers, prompt_mask)):
            yield


def load(folder: str | Path, device: str = "cpu", dtype: str | None = None) -> Loaded:
    """Base model, experts and tokenizer of a folder.

    Args:
        folder: Written by `moe-medical export hf`.
        device: Where the model goes.
        dtype: Of the base, `float32` or `bfloat16`; as in the training where not given.

    Raises:
        ValueError: The folder lacks weights of the base, or a tensor of the adapter.
    """
    folder = Path(folder)
    document = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    model = _load_base(folder, dtype or document["meta"].get("dtype", "float32"))
    # JSON has no tuples.
    values: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in document["config"].items()
    }
    context = attach_adapters(model, MoloraConfig(**values), seed=0)
    load_adapter_state(model, load_file(folder / ADAPTER_FILE), str(folder / ADAPTER_FILE))
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Loaded(model.to(device).eval(), tokenizer, context, document["meta"])


def _load_base(folder: Path, dtype: str) -> nn.Module:
    """By the base's own class: config.json has a type of ours, which transformers does not know."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["base"]
    model: nn.Module
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=CONFIG_MAPPING[settings["model_type"]].from_dict(settings),
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if info["missing_keys"]:  # transformers would make them up, and only warn
        raise ValueError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model
