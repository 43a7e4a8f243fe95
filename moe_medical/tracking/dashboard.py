"""The W&B workspace of a run's series: built without a network, saved on the server on request.

Decisions: a panel is there if the run has a series for it, so that none is empty. A panel of one line per
task selects its series by a pattern of the namespace, and so shows the tasks of later runs too. The x axis is
tokens everywhere, by which runs of unlike batch sizes compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moe_medical.errors import DataError, MoeMedicalError
from moe_medical.files import write_file
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.sinks import HEAT_MAP, HEAT_MAP_FIELDS, has_api_key, import_wandb, read_metrics

COLUMNS = 3

_SECTIONS: dict[str, tuple[str, ...]] = {
    "Seesaw": (
        "seesaw/index|paid|window_index|window_paid",
        "seesaw/gain|regress",
        "seesaw/window_gain|window_regress",
        "seesaw/regret_mean|regret_max",
        "seesaw/regressed_tasks|regret_tasks",
        "seesaw/worst_loss",
        "seesaw/delta_m|negative_transfer|mtl_gain_variation",
        "regret/",
        "mtl_gain/",
    ),
    "Losses": ("loss", "eval/macro_loss", "train_loss/", "eval_loss/", "train_loss|eval_loss/*"),
    "Scores": ("eval/macro_score", "eval_score/"),
    "Mixture": ("mix/", "mix_next/", "repeats/", "loss_weight/"),
    "Conflict": (
        "conflict/rate|mass",
        "conflict/mean_cosine|worst_cosine",
        "conflict/strong_pairs",
        "heat map conflict/cosine",
    ),
    "Routing": (
        "router/task_information|balance|conflict_overlap",
        "router/effective_experts",
        "router/dead_experts|collapsed_layers",
        "router_loss/",
        "heat map router/task_expert",
    ),
    "Health": ("tokens_per_second", "step_seconds", "learning_rate", "grad_norm", "health/*"),
}
"""Panels by section: a namespace (a line per task), "namespace/name|name", a series, "namespace/*" or
"one|other/*" for a panel per name, or a heat map, which is there with its namespace."""


def dump_dashboard(run: Path, out: Path | None = None) -> str:
    """The workspace as JSON, which is also written to `out`.

    Raises:
        DataError: `run` is no folder of a run, or has no numbers yet.
        StorageError: `out` cannot be written.
    """
    settings = _wandb_settings(run)
    text: str = (
        _workspace(run, settings.get("entity") or "", settings["project"])
        ._to_model()
        .model_dump_json(by_alias=True, exclude_none=True, indent=1)
    )
    if out is not None:
        write_file(out, text + "\n")
    return text


def push_dashboard(run: Path, entity: str | None = None, project: str | None = None) -> str:
    """Saves the workspace as a new view on the W&B server; its address.

    Args:
        run: Folder of the run.
        entity: Team or user; None takes the run's, else the account's own.
        project: None takes the run's.

    Raises:
        DataError: As for `dump_dashboard`.
        MoeMedicalError: There is no API key, or the server cannot be reached or refuses.
    """
    settings = _wandb_settings(run)
    if not has_api_key():
        raise MoeMedicalError("No W&B API key. Set WANDB_API_KEY, or use `moe-medical dashboard dump`.")
    try:
        entity = entity or settings.get("entity") or import_wandb().Api().default_entity
        workspace = _workspace(run, entity, project or settings["project"])
        return str(workspace.save_as_new_view().url)
    except MoeMedicalError:
        raise
    except Exception as error:
        name = type(error).__name__
        raise MoeMedicalError(
            f"The W&B server did not take the workspace ({name}). Check the network and the key."
        ) from None


def _wandb_settings(run: Path) -> dict[str, Any]:
    """Section `tracking.wandb` of the run's config, with its `project`."""
    path = RunPaths(run).config
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = config["tracking"]["wandb"]
        return {**settings, "project": settings["project"], "name": config["run"]["name"]}
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Name the folder of a run.") from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise DataError(f"{path} is not the config of a run.") from None


def _workspace(run: Path, entity: str, project: str) -> Any:
    import_wandb()
    import wandb_workspaces.workspaces as ws

    series = _series(RunPaths(run).metrics)
    sections = [
        ws.Section(name=name, panels=_laid_out(panels), is_open=True)
        for name, kinds in _SECTIONS.items()
        if (panels := [panel for kind in kinds for panel in _panels(kind, series)])
    ]
    name = f"Seesaw of {_wandb_settings(run)['name']}"
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens"),
    )


def _series(metrics: Path) -> list[str]:
    """Names of the run's series, sorted."""
    names = {name for row in read_metrics(metrics) for name in row} if metrics.is_file() else set()
    if not names:
        raise DataError(f"{metrics} has no numbers yet.")
    return sorted(names - {"step", "tokens"})


def _panels(kind: str, series: list[str]) -> Iterator[Any]:
    namespace, slash, rest = kind.partition("/")
    if kind.startswith("heat map "):
        name = kind.removeprefix("heat map ")
        if _starting_with(name.partition("/")[0] + "/", series):
            yield _heat_map(name)
    elif rest == "*":
        yield from _panel_of_each_name(namespace.split("|"), series)
    elif slash and not rest:
        if _starting_with(kind, series):
            yield _line_plot(f"{namespace} of each task", metric_regex=f"^{re.escape(kind)}")
    else:
        names = [namespace + slash + name for name in rest.split("|")]
        if known := [name for name in names if name in series]:
            yield _line_plot(", ".join(known), y=known)


def _panel_of_each_name(namespaces: list[str], series: list[str]) -> Iterator[Any]:
    found = [name.partition("/") for name in series]
    for rest in sorted({rest for namespace, _, rest in found if namespace in namespaces}):
        known = [name for n in namespaces if (name := f"{n}/{rest}") in series]
        yield _line_plot(rest if len(namespaces) > 1 else known[0], y=known)


def _starting_with(prefix: str, series: Iterable[str]) -> list[str]:
    return [name for name in series if name.startswith(prefix)]


def _line_plot(title: str, **options: Any) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x="tokens", **options)


def _heat_map(name: str) -> Any:
    """The latest one of each run."""
    import wandb_workspaces.reports.v2 as wr

    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{name}_table"}},
        chart_name=HEAT_MAP,
        chart_fields=dict(HEAT_MAP_FIELDS),
        chart_strings={"title": name},
    )


def _laid_out(panels: list[Any]) -> list[Any]:
    """The panels, side by side in rows of `COLUMNS`."""
    import wandb_workspaces.reports.v2 as wr

    width = 24 // COLUMNS
    height = 6
    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=i % COLUMNS * width, y=i // COLUMNS * height, w=width, h=height)
    return panels
