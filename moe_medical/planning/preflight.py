"""Everything that can be wrong is found once, before any rank is started. Torch-free.

Derived files (the embedded model and tasks, rows, tokens) are made here too, by one process instead of all
ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

from moe_medical.adapters.loss_weights import kinds_of_tasks
from moe_medical.adapters.placement import match_modules
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.shapes import linear_shapes
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.config.adapter_rules import refuse_unknown_task
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import build_plan, cache_tokens, load_tasks
from moe_medical.errors import ConfigError, Problem


def preflight(config: RunConfig) -> None:
    """Read what the run will read.

    Raises:
        MoeMedicalError: whatever a rank would have met.
    """
    _check_writable(Path(config.run.dir))
    base = locate_base(config.model)
    check_context(config, base)
    adapters = config.adapters
    match_modules(linear_shapes(base), adapters)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    # The folders are the truth: a kill may have come between one of them and the pointer to it.
    began = any((Path(config.run.dir) / "checkpoints").glob(f"step-{'[0-9]' * 8}"))
    _refuse_missing_sources(adapters.lasting() if began else adapters)
    refuse_unknown_task(adapters, [task.name for task in tasks])
    if adapters.localized_coefficient:
        kinds_of_tasks(adapters, [task.name for task in tasks])
    samples = config.training.steps * config.training.global_batch
    counts = build_plan(tasks, config.data, config.run.seed, samples).counts(samples)
    cache_tokens(tasks, counts.tolist(), config.data.cache, config.parallel.ranks)


def check_context(config: RunConfig, base: BaseModel) -> None:
    """The longest sample, and the longest prompt with its answer, must fit the model's positions.

    Raises:
        ConfigError: they do not; some models would only fail at the first long row.
    """
    limits = [base.config.get(key) for key in ("max_position_embeddings", "n_positions")]
    limit = next((n for n in limits if isinstance(n, int)), None)
    answer = config.evaluation.max_new_tokens if config.evaluation.score_rows else 0
    if limit is not None and config.data.max_length + answer > limit:
        rule = f"plus evaluation.max_new_tokens ({answer}) must be at most the model's {limit} positions"
        problem = Problem("data.max_length", rule, config.data.max_length, f"Try {limit - answer}.")
        raise ConfigError("the run file", [problem])


def _check_writable(folder: Path) -> None:
    existing = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        rule = "must be a folder that can be written"
        raise ConfigError("the run file", [Problem("run.dir", rule, str(folder))])


def _refuse_missing_sources(adapters: MoloraConfig) -> None:
    router = [adapters.router_from] if adapters.router_from else []
    named = {"adapters.router_from": router, "adapters.experts_from": list(adapters.experts_from)}
    rule = "must name an existing folder, relative to the run file"
    missing = [
        Problem(key, rule, f) for key, folders in named.items() for f in folders if not Path(f).is_dir()
    ]
    if missing:
        raise ConfigError("the run file", missing)
