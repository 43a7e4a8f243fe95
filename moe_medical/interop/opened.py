"""What is merged or exported: an adapter folder, checked against its base before anything is written.

Decision: the check builds the adapted model on torch's meta device, by the code that trains it, so that an
adapter of another base, a missing or an unknown tensor is found without memory and without a second rule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.layer import AdaptedLinear
from moe_medical.adapters.model import adaptable_modules, adapter_modules, attach_adapters, load_adapter_state
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.config.presets import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.interop.effective import (
    LowRank,
    effective_lora,
    gates_of_task,
    is_routed,
    tensors_of_modules,
)
from moe_medical.interop.partial import restrict_adapter

_LOG = logging.getLogger(__name__)
_NUM_NAMED = 3


@dataclass(frozen=True)
class Subject:
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

    @property
    def linears(self) -> dict[str, AdaptedLinear]:
        """Adapted linears of the skeleton."""
        return {m.name: m for m in adapter_modules(self.skeleton) if isinstance(m, AdaptedLinear)}

    @property
    def routed(self) -> list[str]:
        """Names of the modules with routed experts."""
        return [name for name, tensors in tensors_of_modules(self.state).items() if is_routed(tensors)]


def open_adapter(folder: Path, base: str | None = None, only: Sequence[str] = ()) -> Subject:
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
    skeleton = empty_model(located)
    if only:
        config, state = restrict_adapter(config, state, only, adaptable_modules(skeleton))
    _check_fits(folder, config, state, located, skeleton)
    return Subject(folder, config, meta, state, located, skeleton)


def empty_model(base: BaseModel) -> nn.Module:
    """The causal LM on the meta device."""
    try:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            model: nn.Module = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(f"{base.folder} is no causal LM: {str(e).splitlines()[0]}") from None
    return model.eval()


def _check_fits(
    folder: Path, config: MoloraConfig, state: Mapping[str, Tensor], base: BaseModel, skeleton: nn.Module
) -> None:
    try:
        attach_adapters(skeleton, config, seed=0)
        load_adapter_state(skeleton, state)
    except ConfigError as error:
        first = error.problems[0]
        count = f"{len(error.problems)} mismatches, the first: {first.path} {first.rule}"
        rule = f"does not fit {base.name}: {count}"
        fix = "Give the base that it was trained on."
        raise ConfigError(str(folder), [Problem("adapter", rule, first.actual, fix)]) from None


def fixed_loras(
    subject: Subject, task: str | None = None, gate: Sequence[float] | None = None
) -> dict[str, LowRank]:
    """The low-rank update of each linear under one fixed gate.

    Args:
        subject: Adapter.
        task: Whose gate a task router uses.
        gate: Weights of the experts instead, the same in every module; even for token routers.

    Raises:
        ConfigError: No single gate stands for the adapter, or it needs a task, or does not know this one.
    """
    check_fixed(subject, task, gate)
    number = task_number(subject, task) if gate is None else None
    gates = {} if number is None else gates_of_task(subject.config, subject.state, number)
    if gate is not None:
        gates = dict.fromkeys(subject.routed, torch.tensor(list(gate), dtype=torch.float32))
    return effective_lora(subject.config, subject.state, gates)


def check_fixed(subject: Subject, task: str | None = None, gate: Sequence[float] | None = None) -> None:
    """Refuse what `fixed_loras` cannot do, before anything is computed."""
    _refuse_blocks(subject)
    if gate is not None:
        _check_gate(subject, gate, task)
    else:
        _refuse_token_routed(subject)
        task_number(subject, task)


def _refuse_token_routed(subject: Subject) -> None:
    """Each token of such a model has weights of its own: no matrix holds them all."""
    if subject.config.router == "task" or not subject.routed:
        return
    names = subject.routed
    named = ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
    rule = (
        f"holds {len(names)} modules whose experts are chosen by token ({subject.config.router} router), "
        f"which no fixed weight can replace: {named}"
    )
    fix = "Use `moe-medical export hf`, or `--only` for the parts without a router."
    raise ConfigError(str(subject.folder), [Problem("adapter", rule, fix=fix)])


def _refuse_blocks(subject: Subject) -> None:
    """Experts of whole FFN blocks have an activation between their matrices."""
    if subject.config.experts == "linear" or not subject.config.molora:
        return
    rule = f"has experts of whole blocks (adapters.experts: {subject.config.experts}), which are no LoRA"
    fix = "Use `moe-medical export hf`, or `--only attention`."
    raise ConfigError(str(subject.folder), [Problem("adapter", rule, fix=fix)])


def task_number(subject: Subject, task: str | None) -> int | None:
    """Of the task whose gate is used; None where there is no task gate.

    Raises:
        ConfigError: A task is needed and not given, or given and not known or of no use.
    """
    known = subject.tasks
    if task is not None and task not in known:
        raise ConfigError(str(subject.folder), [Problem("task", f"must be one of {', '.join(known)}", task)])
    gated = subject.config.router == "task" and bool(subject.routed)
    if gated == (task is not None):
        return None if task is None else known.index(task)
    rule = f"must be given, for the experts are weighed by task: one of {', '.join(known)}"
    if not gated:
        rule = "must not be given: no part of the adapter depends on the task"
    raise ConfigError(str(subject.folder), [Problem("task", rule, task)])


def _check_gate(subject: Subject, gate: Sequence[float], task: str | None) -> None:
    usable = bool(subject.routed) and all(map(math.isfinite, gate)) and any(gate)
    if not usable:
        rule = "must be finite numbers, not all 0, one for each expert of the routed modules"
        raise ConfigError("the gate", [Problem("gate", rule, list(gate))])
    if task is not None:
        raise ConfigError("the gate", [Problem("gate", "must be given alone, without a task", task)])
