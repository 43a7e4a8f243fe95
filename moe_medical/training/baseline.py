"""The control arms of a run: each task by itself, and all tasks with one plain LoRA, at equal tokens.

    run file -> a config for each control run -> the same launcher as the run's -> one reference file

Decisions:
- A control run differs from its run in what is compared and in nothing else. Both arms use one plain LoRA on
  the layers that the run adapts, of the rank whose parameters come nearest to the run's, with its scaling.
- `single` trains on one task alone, with as many samples as the run's static shares give that task; `multi`
  on the run's mixture for the run's steps. All are evaluated on the run's probe rows, before and after.
- A run is a folder and a YAML beside it, `<name>-baseline/<task>` and `<task>.yaml`, that anyone may launch
  again. Finished ones are left alone, stopped ones go on; other settings than those there are refused.
- The reference file holds all control runs that are finished, of either arm, whichever was asked for.

Torch-free: the ranks are started as processes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_medical.config import MoloraConfig, RunConfig, load_config, save_config
from moe_medical.config.adapters import PRESETS
from moe_medical.config.schema import GuardSection, LossSection, MixSection, TaskOverride
from moe_medical.console import show, show_table
from moe_medical.errors import ConfigError, DataError, MoeMedicalError, Problem
from moe_medical.files import write_file
from moe_medical.planning.plan import RunPlan, make_plan
from moe_medical.planning.preflight import preflight
from moe_medical.tracking.reference import Reference, TaskReference
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.training.fingerprint import compared_settings
from moe_medical.training.supervisor import run_ranks

_LOG = logging.getLogger(__name__)
Arm = Literal["single", "multi"]
_MULTI = "all-tasks"
"""Folder of the multi-task arm."""
_UNCAPPED = 1e9
"""Epochs; null would be the recipe's own cap."""


class ControlRunError(MoeMedicalError):
    """A control run has failed or was stopped; the process ends with its exit code."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(f"control run {name} ended with exit code {exit_code}; the same command goes on")
        self.exit_code = exit_code


@dataclass(frozen=True)
class ControlRun:
    """One run of an arm."""

    arm: Arm
    name: str
    """The task, or `all-tasks`."""
    config: RunConfig
    rank: int
    """Of its LoRA."""
    parameters: int
    paths: RunPaths = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", RunPaths(Path(self.config.run.dir)))

    @property
    def file(self) -> Path:
        """The run file that it is launched with."""
        return self.paths.root.with_suffix(".yaml")

    @property
    def is_finished(self) -> bool:
        """Whether this very run is there, to its end."""
        return self.paths.results.exists() and self.is_known

    @property
    def is_known(self) -> bool:
        """Whether the run file there is this run's."""
        return self.file.exists() and _settings(load_config(self.file)) == _settings(self.config)

    def write_file(self) -> None:
        """Write the run file.

        Raises:
            ConfigError: a run of other settings has the folder.
        """
        if self.paths.root.exists() and not self.is_known:
            rule = "has a control run of other settings"
            fix = "Remove the folder, or use a new run.name."
            raise ConfigError("the control runs", [Problem(str(self.paths.root), rule, fix=fix)])
        # It is launched from, so that secrets in it are not taken out: for nobody else to read.
        save_config(self.config, self.file, mode=0o600)

    def results(self) -> dict[str, TaskReference]:
        """What each of its tasks has reached.

        Raises:
            DataError: the evaluation at its end is missing or damaged.
        """
        try:
            last = json.loads(self.paths.of_each_step(self.paths.evaluation(0))[-1].read_text())
            tokens = _tokens_of(self.paths)
            return {
                name: TaskReference(of["loss"], of["score"], of["metric"], tokens, last["step"])
                for name, of in last["tasks"].items()
            }
        except (OSError, ValueError, LookupError, TypeError):
            fix = "Remove it and run the same command"
            raise DataError(f"{self.paths.root} has lost files of its run. {fix}.") from None


def train_baselines(
    run: Path, overrides: Sequence[str], arm: str, steps: int | None = None, out: Path | None = None
) -> None:
    """Train the control arms of a run, one control run after the other, and write their reference file.

    Args:
        run: The run file.
        overrides: `key=value` on top of it.
        arm: `single`, `multi` or `all`.
        steps: Of each single-task run; None gives it the task's share of the run's samples.
        out: The reference file; None takes `reference.json` beside the control runs.

    Raises:
        ConfigError: the run file is wrong, or the run is a plain LoRA, which is its own multi-task control.
        ControlRunError: a control run has failed or was stopped.
    """
    config = load_config(run, [*overrides, "tracking.seesaw.reference=null"])  # it may be what is made here
    plan = make_plan(config)
    known = control_runs(config, plan, steps)
    wanted = [control for control in known if arm in ("all", control.arm)]
    if arm == "multi" and not wanted:
        rule = "must name a layer: a plain LoRA is its own multi-task control"
        raise ConfigError(str(run), [Problem("adapters.molora", rule, [], "Use --arm single.")])
    for number, control in enumerate(wanted, start=1):
        _train(control, f"control run {number} of {len(wanted)}")
    finished = [control for control in known if control.is_finished]
    reference = _reference(config, plan, finished)
    out = out or _folder(config) / "reference.json"
    _write(out, reference)
    _show_reference(reference)
    show(f"{'reference':<12} {out}")


def control_runs(config: RunConfig, plan: RunPlan, steps: int | None = None) -> list[ControlRun]:
    """Every control run: each task that gets samples, then all tasks, unless the run is a plain LoRA itself.

    Args:
        config: The run.
        plan: Its plan.
        steps: See `train_baselines`.
    """
    rank, parameters = matching_rank(plan)
    batch = config.training.global_batch
    runs = []
    for task in plan.tasks:
        if task.samples:
            of_task = steps or max(1, round(task.samples / batch))
            made = _single(_control(config, task.name, rank), task.name, of_task)
            runs.append(ControlRun("single", task.name, made, rank, parameters))
    if any(layer.kind == "molora" for layer in plan.layers):
        runs.append(ControlRun("multi", _MULTI, _control(config, _MULTI, rank), rank, parameters))
    return runs


def matching_rank(plan: RunPlan) -> tuple[int, int]:
    """(rank, parameters) of the plain LoRA on the run's layers that is nearest in trainable parameters."""
    of_rank = sum(layer.shape.in_features + layer.shape.out_features for layer in plan.layers)
    rank = max(1, round(plan.trainable / of_rank))
    return rank, rank * of_rank


def _folder(config: RunConfig) -> Path:
    return Path(config.run.dir).parent / f"{config.run.name}-baseline"


def _control(config: RunConfig, name: str, rank: int) -> RunConfig:
    """The run with a plain LoRA in a folder of its own."""
    control = deepcopy(config)
    group = f"{config.run.name}-baseline"
    control.run.name = f"{group}-{name}"
    control.run.dir = str(_folder(config) / name)
    control.adapters = _plain_lora(config, rank)
    control.parallel.ep_size = 1
    control.checkpoint.resume = "auto"
    control.tracking.wandb.group = config.tracking.wandb.group or group
    control.tracking.wandb.alerts = False
    return control


def _plain_lora(config: RunConfig, rank: int) -> MoloraConfig:
    mine = config.adapters
    return replace(
        PRESETS["lora"],
        rank=rank,
        alpha=mine.scaling * rank,
        dropout=mine.dropout,
        molora=(),
        lora=(*mine.molora, *mine.lora),
    )


def _single(control: RunConfig, task: str, steps: int) -> RunConfig:
    """One task alone, however often it repeats; what balances tasks has nothing to do."""
    control.data.only = [task]
    control.data.mix = MixSection(rule="proportional", block=control.data.mix.block, max_repeats=None)
    control.data.tasks = {task: TaskOverride(max_repeats=_UNCAPPED)}
    control.training.loss = LossSection(normalise=control.training.loss.normalise)
    control.training.guard = GuardSection()
    control.training.steps = steps
    control.evaluation.every_steps = 0
    control.tracking.conflict_every_steps = 0
    return control


def _settings(config: RunConfig) -> dict[str, Any]:
    """What must not differ between two control runs of one folder."""
    own = {"steps": config.training.steps, "adapters": config.adapters.saved()}
    return compared_settings(config) | own


def _train(control: ControlRun, title: str) -> None:
    if control.is_finished:
        _LOG.info("%s, %s: finished before", title, control.name)
        return
    _LOG.info("%s, %s: %d steps", title, control.name, control.config.training.steps)
    control.write_file()
    preflight(control.config)
    code = run_ranks(control.config.parallel.ranks, ["train", str(control.file)])
    if code:
        raise ControlRunError(control.name, code)


def _tokens_of(paths: RunPaths) -> int:
    """Tokens that a run was trained on."""
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return int(max(row["tokens"] for row in rows if "tokens" in row))


def _reference(config: RunConfig, plan: RunPlan, finished: Sequence[ControlRun]) -> Reference:
    single = {run.name: run.results()[run.name] for run in finished if run.arm == "single"}
    multi = next((run.results() for run in finished if run.arm == "multi"), None)
    rank, parameters = matching_rank(plan)
    return Reference(
        run=config.run.name,
        tokens=sum(task.tokens for task in plan.tasks),
        single=single,
        multi=multi,
        trainable_parameters={
            "run": plan.trainable,
            "single": parameters,
            "multi": parameters if multi else None,
        },
        settings={
            "rank": rank,
            "learning_rate": config.training.learning_rate,
            "global_batch": config.training.global_batch,
            "seed": config.run.seed,
            "probe_split": config.evaluation.split,
            "probe_rows": config.evaluation.loss_rows,
        },
    )


def _write(path: Path, reference: Reference) -> None:
    text = json.dumps(reference.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_file(path, text + "\n")


def _show_reference(reference: Reference) -> None:
    """Print what each task reaches alone and with the others."""
    names = dict.fromkeys([*reference.single, *(reference.multi or {})])
    rows = [_row(name, reference) for name in names]
    footer = ("macro average", "", *_averages(reference.single), *_averages(reference.multi or {}))
    columns = ("task", "steps alone", "loss alone", "score alone", "loss together", "score together")
    show_table(columns, rows, footer)
    counts = reference.trainable_parameters
    ours = counts["run"]
    theirs = counts["single"]
    show(f"trainable parameters: {ours:,} of the run, {theirs:,} of each control\n")


def _row(task: str, reference: Reference) -> tuple[str, ...]:
    alone = reference.single.get(task)
    together = (reference.multi or {}).get(task)
    return (task, str(alone.steps) if alone else "-", *_cells(alone), *_cells(together))


def _cells(of: TaskReference | None) -> Iterator[str]:
    yield "-" if of is None else f"{of.loss:.3f}"
    yield "-" if of is None or of.score is None else f"{of.score:.3f}"


def _averages(tasks: dict[str, TaskReference]) -> Iterator[str]:
    scores = [task.score for task in tasks.values() if task.score is not None]
    for values in ([task.loss for task in tasks.values()], scores):
        yield f"{np.mean(values):.3f}" if values else "-"
