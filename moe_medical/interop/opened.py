"""What is merged or exported, and where to: all that can be checked before anything is written.

Decision: whether an adapter fits its base is found by building the adapted model on torch's meta device, by
the code that trains it: so an adapter of another base, a missing or an unknown tensor is found without memory
and without a second rule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.layer import AdaptedLinear
from moe_medical.adapters.model import adaptable_modules, adapter_modules, attach_adapters, load_adapter_state
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import empty_base
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.effective import (
    LowRank,
    effective_lora,
    gates_of_task,
    is_routed,
    tensors_of_modules,
)
from moe_medical.interop.partial import restrict_adapter

_LOG = logging.getLogger(__name__)
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that fits its base."""

    folder: Path
    config: MoloraConfig
    meta: dict[str, Any]
    state: dict[str, Tensor]
    base: BaseModel
    skeleton: nn.Module
    """The adapted model on the meta device: names, sizes and who shares a router, but no number."""

    @property
    def tasks(self) -> list[str]:
        """Their position is the number by which a task gate knows them."""
        return list(self.meta["tasks"])

    @cached_property
    def linears(self) -> dict[str, AdaptedLinear]:
        """Adapted linears of the skeleton."""
        return {m.name: m for m in adapter_modules(self.skeleton) if isinstance(m, AdaptedLinear)}

    @cached_property
    def routed(self) -> list[str]:
        """Names of the modules with routed experts."""
        return [name for name, tensors in tensors_of_modules(self.state).items() if is_routed(tensors)]

    def refused(self, path: str, rule: str, actual: object = None, fix: str = "") -> ConfigError:
        """The error that names this adapter."""
        return ConfigError(str(self.folder), [Problem(path, rule, actual, fix)])


def check_new(out: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        ConfigError: It is a file, or a folder that is not empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError("--out", [Problem(str(out), "must be a folder that is not there yet")])
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError("--out", [Problem(str(out), "must be empty, so that nothing is overwritten")])


def folder_names(tasks: Sequence[str]) -> list[str]:
    """The tasks, each usable as the name of one folder.

    Raises:
        ConfigError: One is not, or is given twice.
    """
    wrong = [task for task in tasks if Path(task).name != task or task == ".." or tasks.count(task) > 1]
    if wrong:
        rule = "must be names that a folder can have, each given once"
        raise ConfigError("--task", [Problem("task", rule, wrong)])
    return list(tasks)


def open_adapter(folder: Path, base: str | None = None, only: Sequence[str] = ()) -> OpenedAdapter:
    """Read an adapter and check it against its base.

    Args:
        folder: Adapter folder.
        base: Base model, where it is not the one the adapter names.
        only: Parts to keep, see `partial.restrict_adapter`; all where empty.

    Raises:
        ConfigError: The adapter does not fit the base, or `only` selects nothing.
        DataError: A file is unreadable.
        SecurityRefusal: Weights exist only as pickle.
    """
    config, meta, state = load_adapter(folder)
    config = replace(config, path="auto")  # how it was computed is no part of what it is
    name = base or meta["base_model"]
    located = locate_base(ModelSection(name, meta["base_revision"] if name == meta["base_model"] else None))
    if located.name != meta["base_model"]:
        _LOG.warning("the adapter was trained on %s, this is %s", meta["base_model"], located.name)
    skeleton = empty_base(located).eval()
    if only:
        config, state = restrict_adapter(config, state, only, adaptable_modules(skeleton))
    try:
        attach_adapters(skeleton, config, seed=0)
        load_adapter_state(skeleton, state)
    except ConfigError as error:
        # Of another base every tensor is wrong: the first and their number say all.
        first = error.problems[0]
        mismatches = f"{len(error.problems)} mismatches, the first: {first.path} {first.rule}"
        rule = f"does not fit {located.name}: {mismatches}"
        fix = "Give the base that it was trained on."
        raise ConfigError(str(folder), [Problem("adapter", rule, first.actual, fix)]) from None
    return OpenedAdapter(folder, config, meta, state, located, skeleton)


def fixed_loras(
    adapter: OpenedAdapter, task: str | None = None, gate: Sequence[float] | None = None
) -> dict[str, LowRank]:
    """The low-rank update of each linear under one fixed gate.

    Args:
        adapter: What is merged or exported.
        task: Whose gate a task router uses.
        gate: Weights of the experts instead, the same in every module; even for token routers.

    Raises:
        ConfigError: No single gate stands for the adapter, or it needs a task, or does not know this one.
    """
    check_fixed(adapter, task, gate)
    gates: dict[str, Tensor] = {}
    if gate is not None:
        gates = dict.fromkeys(adapter.routed, torch.tensor(list(gate), dtype=torch.float32))
    elif (number := task_number(adapter, task)) is not None:
        gates = gates_of_task(adapter.config, adapter.state, number)
    return effective_lora(adapter.config, adapter.state, gates)


def check_fixed(adapter: OpenedAdapter, task: str | None = None, gate: Sequence[float] | None = None) -> None:
    """Refuse what `fixed_loras` cannot do, before anything is computed."""
    config = adapter.config
    if config.experts != "linear" and config.molora:
        # Experts of whole FFN blocks have an activation between their matrices.
        rule = f"has experts of whole blocks (adapters.experts: {config.experts}), which are no LoRA"
        fix = "Use `moe-medical export hf`, or `--only attention`."
        raise adapter.refused("adapter", rule, fix=fix)
    if gate is not None:
        if not (adapter.routed and all(map(math.isfinite, gate)) and any(gate)):
            rule = "must be finite numbers, not all 0, one for each expert of the routed modules"
            raise ConfigError("the gate", [Problem("gate", rule, list(gate))])
        if task is not None:
            raise ConfigError("the gate", [Problem("gate", "must be given alone, without a task", task)])
        return
    if adapter.routed and config.router_kind.decides_per != "task":
        # Each token of such a model has weights of its own: no matrix holds them all.
        names = adapter.routed
        examples = ", ".join(names[:_NUM_EXAMPLES]) + (", ..." if len(names) > _NUM_EXAMPLES else "")
        rule = (
            f"holds {len(names)} modules whose experts are chosen by token ({config.router} router), "
            f"which no fixed weight can replace: {examples}"
        )
        fix = "Use `moe-medical export hf`, or `--only` for the parts without a router."
        raise adapter.refused("adapter", rule, fix=fix)
    task_number(adapter, task)


def task_number(adapter: OpenedAdapter, task: str | None) -> int | None:
    """Of the task whose gate is used; None where there is no task gate.

    Raises:
        ConfigError: A task is needed and not given, or given and not known or of no use.
    """
    known = adapter.tasks
    if task is not None and task not in known:
        raise adapter.refused("task", f"must be one of {', '.join(known)}", task)
    gated = adapter.config.router_kind.decides_per == "task" and bool(adapter.routed)
    if gated and task is None:
        rule = f"must be given, for the experts are weighed by task: one of {', '.join(known)}"
        raise adapter.refused("task", rule)
    if task is not None and not gated:
        raise adapter.refused("task", "must not be given: no part of the adapter depends on the task", task)
    return None if task is None else known.index(task)
