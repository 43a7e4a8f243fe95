"""`generate`: prompts in, answers out, with a trained adapter on one device and no process group."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.model import attach_adapters, load_adapter_state
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.presets import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.console import progress_line, show
from moe_medical.data.formats import ChatFormat
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.evaluation.generate import generate_texts

_MAX_LENGTH = 2048
"""Tokens of a prompt where the adapter says nothing."""


def answer_prompts(
    adapter: Path,
    prompts: Path | None,
    base: str | None,
    max_new_tokens: int,
    batch_rows: int,
    task: str | None = None,
) -> None:
    """Answer each prompt of a file or of standard input; one JSON object per line on standard output.

    A prompt is a line, or the `prompt` of a line that is a JSON object: those may hold line breaks.

    Raises:
        ConfigError: the adapter needs a task, or does not know this one.
        DataError: no readable prompts.
    """
    lines = _read_prompts(prompts)
    model, chat, bound = load_answering_model(adapter, base, task)
    with bound, progress_line("generating", len(lines), visible=True) as progress:
        answers = generate_texts(model, lines, chat, max_new_tokens, batch_rows, progress.advance)
    for prompt, answer in zip(lines, answers, strict=True):
        show(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))


def load_answering_model(
    adapter: Path, base: str | None = None, task: str | None = None
) -> tuple[nn.Module, ChatFormat, AbstractContextManager[object]]:
    """The base model with the adapter on it, the format it was trained with, and a context to generate in."""
    config, meta, state = load_adapter(adapter)
    number = _task_number(config, meta, task)
    section = ModelSection(base) if base else ModelSection(meta["base_model"], meta["base_revision"])
    located = locate_base(section)
    chat = ChatFormat.from_folder(
        located.folder, meta.get("system_prompt"), meta.get("max_length", _MAX_LENGTH)
    )
    model = load_base(located, meta.get("dtype", "float32"))
    context = attach_adapters(model, config, seed=0)  # the weights come from the adapter
    load_adapter_state(model, state)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bound = nullcontext() if number is None else context.bind_tasks(torch.tensor([number], device=device))
    return model.to(device).eval(), chat, bound


def _task_number(config: MoloraConfig, meta: Mapping[str, Any], task: str | None) -> int | None:
    """Of the task whose gate is used; None where tokens choose for themselves."""
    known = list(meta["tasks"])
    if task is not None and task not in known:
        raise ConfigError("generate", [Problem("--task", f"must be one of {', '.join(known)}", task)])
    if config.router != "task":
        return None
    if task is None:
        rule = f"must be given, for the adapter's experts are chosen by task: one of {', '.join(known)}"
        raise ConfigError("generate", [Problem("--task", rule)])
    return known.index(task)


def _read_prompts(path: Path | None) -> list[str]:
    try:
        text = sys.stdin.read() if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"--prompts {path} cannot be read: {getattr(e, 'strerror', None) or 'not UTF-8'}"
        ) from None
    prompts = [_prompt(line.strip()) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{path or 'standard input'} holds no prompt; one per line is expected")
    return prompts


def _prompt(line: str) -> str:
    if line.startswith("{"):
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value.get("prompt"), str):
                return str(value["prompt"])
    return line
