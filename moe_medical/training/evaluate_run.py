"""`eval`: the evaluation of a run file by itself, of an adapter or of the base model alone.

Decisions: every rank holds the whole base model and all experts, and the ranks share the rows; ZeRO and
expert parallelism are for training. A single process needs no process group. Tasks, probe rows, format and
base model are those of the run file; where the adapter was made for other ones, that is said.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.model import adaptable_modules, attach_adapters, load_adapter_state
from moe_medical.adapters.routing import RoutingContext
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import RunConfig
from moe_medical.console import progress_line, show, show_table
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData, load_tasks
from moe_medical.distributed.topology import (
    Topology,
    is_launched,
    naming_lost_peers,
    start_alone,
    start_distributed,
    stop_distributed,
)
from moe_medical.errors import ConfigError, Problem
from moe_medical.evaluation.evaluate import Answered, Evaluation, Evaluator, TaskResult
from moe_medical.evaluation.metrics import left_out
from moe_medical.files import write_file, write_json
from moe_medical.interop.partial import restrict_adapter
from moe_medical.planning.preflight import check_context
from moe_medical.training.supervisor import die_with_supervisor, run_ranks, share_cores

_LOG = logging.getLogger(__name__)


def evaluate_run(
    config: RunConfig,
    adapter: Path | None,
    json_file: Path | None,
    predictions: Path | None,
    arguments: Sequence[str],
    only: Sequence[str] = (),
) -> int:
    """Evaluate on a run file's probe sets, show a table, and write what is asked for.

    Args:
        config: The run.
        adapter: Adapter folder; None evaluates the base model.
        json_file: Takes everything, the losses of all rows included.
        predictions: Takes a JSON line for each scored row; holds text of records.
        arguments: Command line that each rank of `parallel.ranks` is started with.
        only: Parts of the adapter to put on, for ablations; all of it where none is named.

    Returns:
        The exit code.

    Raises:
        ConfigError: The user does not allow text, or the adapter does not fit.
    """
    _check_allowed(config, predictions)
    if config.parallel.ranks > 1 and not is_launched():
        _load_data(config)  # derived files are made once, and errors met before there are ranks
        return run_ranks(config.parallel.ranks, arguments)
    topology = _join(config)
    try:
        with naming_lost_peers() if topology.world_size > 1 else nullcontext():
            subject = _load_subject(config, adapter, topology, only)
            evaluation, lines = _evaluate(config, subject, topology)
        if topology.is_main:
            _tell(config, subject, evaluation, json_file)
            if predictions is not None:
                _write_lines(predictions, lines)
    finally:
        stop_distributed()
    return 0


class _Subject(NamedTuple):
    """What is evaluated, and on what."""

    base: BaseModel
    model: nn.Module
    chat: ChatFormat
    tasks: list[TaskData]
    adapter: Path | None
    meta: dict[str, Any]
    """Of the adapter."""
    context: RoutingContext | None
    numbers: list[int]
    """Of the tasks in the adapter; those that it does not know have the numbers after the last."""

    @property
    def unknown(self) -> list[str]:
        """Tasks that the adapter was not trained on."""
        known = self.meta.get("tasks")
        return [] if known is None else [task.name for task in self.tasks if task.name not in known]


def _check_allowed(config: RunConfig, predictions: Path | None) -> None:
    if predictions is not None and not config.privacy.allow_text:
        rule = "must be true where --predictions is given: the file holds prompts and answers of records"
        raise ConfigError("the run file", [Problem("privacy.allow_text", rule, False)])


def _join(config: RunConfig) -> Topology:
    if not is_launched():
        return start_alone(config.parallel)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost peer is 20 lines of C++ frames
    die_with_supervisor()
    share_cores()
    return start_distributed(config.parallel)


def _load_data(config: RunConfig) -> tuple[BaseModel, ChatFormat, list[TaskData]]:
    base = locate_base(config.model)
    check_context(config, base)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    return base, chat, load_tasks(config.data, config.evaluation.split, chat)


def _load_subject(
    config: RunConfig, adapter: Path | None, topology: Topology, only: Sequence[str]
) -> _Subject:
    base, chat, tasks = _load_data(config)
    model = load_base(base, config.model.dtype, config.model.quantization)
    names = [task.name for task in tasks]
    meta: dict[str, Any] = {}
    context = None
    if adapter is not None:
        adapters, meta, state = load_adapter(adapter)
        if adapters.router_kind.knows_tasks:
            _check_known(adapter, names, meta["tasks"])
        if only:
            adapters, state = restrict_adapter(adapters, state, only, adaptable_modules(model))
        context = attach_adapters(model, adapters, seed=0)  # the weights come from the adapter
        load_adapter_state(model, state, str(adapter))
    order = list(dict.fromkeys([*meta.get("tasks", []), *names]))
    numbers = [order.index(name) for name in names]
    return _Subject(base, model.to(topology.device), chat, tasks, adapter, meta, context, numbers)


def _check_known(adapter: Path, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        rule = f"must name tasks that the task gate of {adapter} knows: {', '.join(known)}"
        raise ConfigError("the run file", [Problem("data.only", rule, f"unknown: {', '.join(unknown)}")])


def _evaluate(config: RunConfig, subject: _Subject, topology: Topology) -> tuple[Evaluation, list[str]]:
    """The evaluation, and on the main rank the lines of `--predictions` if text is allowed."""
    context = subject.context
    numbers = subject.numbers
    evaluator = Evaluator(subject.tasks, subject.chat, config.evaluation, topology, False, context, numbers)
    lines: list[str] = []

    def keep(answered: Answered) -> None:
        if topology.is_main and config.privacy.allow_text:
            lines.append(_line(answered))

    with progress_line("evaluating", evaluator.num_batches(), topology.is_main) as progress:
        step = int(subject.meta.get("steps", 0))
        return evaluator.run(subject.model, step, progress.advance, tell=keep), lines


def _line(answered: Answered) -> str:
    row = {
        "task": answered.task,
        "row": answered.row,
        "prompt": answered.example.prompt,
        "target": answered.example.target,
        "prediction": answered.prediction,
    }
    return json.dumps(row, ensure_ascii=False)


def _tell(config: RunConfig, subject: _Subject, evaluation: Evaluation, json_file: Path | None) -> None:
    for remark in _remarks(config, subject):
        _LOG.warning("%s", remark)
    results = evaluation.tasks
    footer = (
        "macro average",
        "",
        "",
        "",
        f"{evaluation.macro_loss:.3f}",
        _number(evaluation.macro_score),
        "",
    )
    columns = ("task", "rows", "scored", "metric", "loss", "score", "beside")
    show_table(columns, [_row(name, result) for name, result in results.items()], footer)
    if json_file is not None:
        about = {
            "run": config.run.name,
            "base_model": subject.base.name,
            "adapter": None if subject.adapter is None else str(subject.adapter),
            "split": config.evaluation.split,
            "unknown_tasks": subject.unknown,
            "macro_loss": evaluation.macro_loss,
            "macro_score": evaluation.macro_score,
        }
        write_json(json_file, about | evaluation.to_json())
        show(f"written {json_file}")


def _remarks(config: RunConfig, subject: _Subject) -> list[str]:
    """What a reader of the scores should know."""
    meta = subject.meta
    found = []
    if subject.unknown:
        found.append(f"tasks that the adapter was not trained on: {', '.join(subject.unknown)}")
    here = {"base_model": subject.base.name, "system_prompt": config.data.system_prompt}
    for key, value in here.items():
        if key in meta and meta[key] != value:
            found.append(f"the adapter was trained with {key} {meta[key]!r}, the run file has {value!r}")
    if missing := left_out(task.spec.metric for task in subject.tasks if task.spec.language == "zh"):
        found.append(f"not told, because jieba is not installed: {', '.join(missing)}")
    return found


def _row(name: str, result: TaskResult) -> tuple[str, ...]:
    beside = [f"{n} {v:.3f}" for n, v in result.scores.items() if n != result.metric]
    how = f"{result.metric}, likeliest" if result.by_likelihood else result.metric
    counts = (f"{result.rows:,}", f"{result.score_rows:,}")
    return (name, *counts, how, f"{result.loss:.3f}", _with_interval(result), "  ".join(beside))


def _with_interval(result: TaskResult) -> str:
    if result.score_low is None or result.score_high is None:
        return _number(result.score)
    return f"{_number(result.score)} [{result.score_low:.3f}, {result.score_high:.3f}]"


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_file(path, "".join(f"{line}\n" for line in lines), mode=0o600)
    show(f"written {path}")
