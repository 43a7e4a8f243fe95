"""Tiny adapters of one tiny base, and a real server of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_medical.adapters.folder import save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import MoloraConfig
from moe_medical.config.schema import ModelSection
from support.launches import Launched, launched
from support.tiny import write_tiny_model

TASKS = ["colour", "size"]
SIZES: dict[str, Any] = {"num_experts": 4, "rank": 4, "alpha": 8.0, "dropout": 0.0}
PROMPTS = ["w1 w2", "w3 w4 w5 w6 w7 w8", "w9", "Repeat w11 w12 w13"]
CONTEXT = 60_000


def write_long_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model with a context that no test fills: an answer that nobody stops does not end soon."""
    config = write_tiny_model(folder, seed) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}))
    return folder


def write_adapter(
    folder: Path,
    model_folder: Path,
    config: MoloraConfig,
    seed: int = 2,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter with weights far enough from zero that it changes every answer."""
    model = load_base(locate_base(ModelSection(str(model_folder))), "float32")
    attach_adapters(model, config, seed=1)
    torch.manual_seed(seed)
    state = {name: torch.randn_like(p) * 0.3 for name, p in adapter_parameters(model).items()}
    known = {"base_model": str(model_folder), "base_revision": None, "tasks": TASKS, "label_sets": {}}
    save_adapter(folder, state, config, known | {"system_prompt": None} | dict(meta or {}))
    return folder


def write_family(folder: Path) -> Path:
    """Adapters `words` and `other`, routed by token, and `gated`, by task, of the base `model`."""
    model = write_long_model(folder / "model")
    token = MoloraConfig(top_k=2, **SIZES)
    write_adapter(folder / "words", model, token)
    write_adapter(folder / "other", model, token, seed=3)
    write_adapter(folder / "gated", model, gate_config())
    return folder


def gate_config(**settings: Any) -> MoloraConfig:
    """A dense task gate of two tasks."""
    return MoloraConfig(router="task", num_tasks=2, top_k=4, **(SIZES | settings))


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    process: Launched
    url: str


@contextmanager
def server(output_file: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """`moe-medical serve` on a free port; ended at the end of the block."""
    command = [sys.executable, "-m", "moe_medical", "serve", "--port", "0", *arguments]
    with launched(command, output_file, **environment) as process:
        process.wait_until(lambda: "http://" in process.output)
        found = re.search(r"http://\S+", process.output)
        assert found
        yield Server(process, found[0])
