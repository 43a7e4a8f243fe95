"""A base model in memory once, and any number of adapters on it.

Decision: each adapter gets a module tree of its own, whose linear layers, other parameters and buffers are
the base's very own objects; only the modules between them are copied. So adapters share the base's memory,
differ in what is wrapped where, come and go while others answer, and need no patched forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.layer import linear_sizes
from moe_medical.adapters.model import attach_adapters, lay_out_for_answers, load_adapter_state
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.data.chat import ChatFormat
from moe_medical.data.chat_template import Message
from moe_medical.errors import ConfigError, Problem
from moe_medical.evaluation.generate import Row, continue_rows

_MAX_LENGTH = 2048
"""Tokens of a prompt where the adapter says nothing, and of a text where the model says nothing."""


@dataclass(frozen=True)
class SharedBase:
    """A frozen base model on its device. It must not be run itself: adapters are put on copies of it."""

    located: BaseModel
    model: nn.Module
    named: bool
    """Whether the user named it, rather than the adapter: then other adapters are not asked for theirs."""

    def adapt(self, folder: Path) -> Adapted:
        """The base with an adapter on it.

        Raises:
            ConfigError: a folder without a readable adapter, one of another base, or one that does not fit.
        """
        config, meta, state = load_adapter(folder)
        fits = (meta["base_model"], meta["base_revision"]) == (self.located.name, self.located.revision)
        if not (self.named or fits):
            rule = f"must be {self.located.name}, the base model in use"
            raise ConfigError(str(folder), [Problem("meta.base_model", rule, meta["base_model"])])
        model = _share(self.model)
        context = attach_adapters(model, config, seed=0)  # the weights come from the adapter
        load_adapter_state(model, state, str(folder))
        lay_out_for_answers(model)
        system_prompt = meta.get("system_prompt")
        return Adapted(
            model=model.eval(),
            context=context,
            config=config,
            chat=ChatFormat.from_folder(
                self.located.folder, system_prompt, meta.get("max_length", _MAX_LENGTH)
            ),
            tasks=tuple(meta["tasks"]),
            system_prompt=system_prompt,
        )


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapter on its base, ready to answer; one batch at a time."""

    model: nn.Module
    context: RoutingContext
    config: MoloraConfig
    chat: ChatFormat
    tasks: tuple[str, ...]
    system_prompt: str | None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return int(getattr(self.model.config, "max_position_embeddings", _MAX_LENGTH))

    @property
    def needs_rows(self) -> bool:
        """Whether the router asks for more than the tokens: their task, or where their prompt ends."""
        return self.config.router_kind.knows_tasks or self.config.router_kind.decides_per == "prompt"

    def task_numbers(self, task: str | None, setting: str) -> tuple[int, ...]:
        """Numbers of the tasks of one prompt, none where the router knows no tasks.

        The mean that a gate takes without a task is that of all tasks; they are named, for other rows of a
        batch may have some.

        Args:
            task: A name, several with commas between them, or None.
            setting: What an error names as wrong.

        Raises:
            ConfigError: an unknown task, or none where the adapter needs one.
        """
        known = ", ".join(self.tasks)
        if task is not None:
            given = [name.strip() for name in task.split(",")]
        elif self.config.router_kind.knows_tasks and self.config.unknown_task not in ("mean", "refuse"):
            given = [self.config.unknown_task]  # a task that stands in for any other
        else:
            given = []
        if unknown := [name for name in given if name not in self.tasks]:
            raise ConfigError("adapter", [Problem(setting, f"must be one of {known}", unknown[0])])
        if not self.config.router_kind.knows_tasks:
            return ()
        if not given and self.config.unknown_task == "refuse":
            rule = f"must be given, for experts are chosen by task: one of {known}"
            raise ConfigError("adapter", [Problem(setting, rule)])
        return tuple(self.tasks.index(name) for name in given or self.tasks)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat up to its next answer, with the adapter's system prompt unless it has its own."""
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return self.chat.encode_chat(messages)

    def continue_rows(self, rows: Sequence[Row], tasks: Sequence[tuple[int, ...]]) -> None:
        """Continue rows, each under its own tasks, in one batch.

        Args:
            rows: Their tokens go to `Row.take` as they come.
            tasks: Of each row, from `task_numbers`.
        """
        cache = (
            self.config.router_kind.decides_per != "text"
        )  # which reads the whole text again for each token
        continue_rows(self.model, rows, self.chat, lambda mask_BS: self._bound(tasks, mask_BS), cache)

    def _bound(
        self, tasks: Sequence[tuple[int, ...]], prompt_mask_BS: Tensor
    ) -> AbstractContextManager[object]:
        """What the router is told beside the tokens, while one batch is continued."""
        if not self.needs_rows:
            return nullcontext()
        if not self.config.router_kind.knows_tasks:
            return self.context.bind(BatchInputs.of_rows(None, prompt_mask_BS))
        width = max(map(len, tasks))  # M, as many tasks as any row has; -1 fills the others up
        padded = [[*numbers, *[-1] * (width - len(numbers))] for numbers in tasks]
        task_ids_BM = torch.tensor(padded, device=prompt_mask_BS.device)
        return self.context.bind(BatchInputs.of_rows(task_ids_BM, prompt_mask_BS))


def load_shared_base(adapter: Path, base: str | None = None, quantization: str | None = None) -> SharedBase:
    """The base model that an adapter was trained on, or the one that the user names.

    Args:
        adapter: Folder; it tells the base's dtype and, where not given, its name and quantisation.
        base: Name of another base model.
        quantization: As `model.quantization`.
    """
    meta = load_adapter(adapter)[1]
    section = ModelSection(base) if base else ModelSection(meta["base_model"], meta["base_revision"])
    located = locate_base(section)
    kind: Any = quantization or meta.get("quantization", "none")
    model = load_base(located, meta.get("dtype", "float32"), kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SharedBase(located, model.to(device).eval(), named=base is not None)


def load_adapted(adapter: Path, base: str | None = None, quantization: str | None = None) -> Adapted:
    """One adapter on its base."""
    return load_shared_base(adapter, base, quantization).adapt(adapter)


def _share(model: nn.Module) -> nn.Module:
    """A module tree with the same tensors, in the same linear layers."""
    kept = [*model.parameters(), *model.buffers(), *(m for m in model.modules() if linear_sizes(m))]
    # `deepcopy` takes what its memo already holds for the copy of itself.
    shared: nn.Module = deepcopy(model, {id(part): part for part in kept})
    return shared
