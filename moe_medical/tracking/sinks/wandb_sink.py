"""W&B. Online falls back to offline, offline to a second file, that to nothing: one warning, no exception.

Nothing passes `step=`, which drops a step that goes backwards after a resume; `global_step` and `tokens` are
logged as values. A resumed run keeps its id. Offline it begins another file, and rows between the checkpoint
and the end of the earlier file are in both; online they are logged twice with the same `tokens`.

Measured with wandb 0.31 and rows of 200 series: `log` takes 1 to 3 ms, and blocks for ever, after 33 rows,
when W&B's own process hangs; `init` takes 19 s, and `finish` is not bounded by `finish_timeout`, when the
server accepts and never answers. Hence `Background`. A full disk or a killed process costs rows and at most
one exception.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from moe_medical.tracking.privacy import redact
from moe_medical.tracking.sinks.series import EXACT, NAMESPACES, summary_of
from moe_medical.tracking.sinks.sink import Cell, Sink

logger = logging.getLogger(__name__)

WANDB_SETTINGS: Mapping[str, Any] = {
    "silent": True,
    "console": "off",  # captured output would carry text and messages
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,  # arguments, host and paths
    "x_disable_stats": True,
    "init_timeout": 15,
    "finish_timeout": 60,
    "x_transaction_log_flush_interval": 1,  # seconds of rows that a killed process loses at most; else 15
}
HEAT_MAP = "wandb/confusion_matrix/v1"
"""A chart that every server has; an own one would have to be made there first."""
HEAT_MAP_FIELDS = {"Actual": "down", "Predicted": "across", "nPredictions": "value"}
PUBLIC_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
"""Of the public server, new and old name: a netrc may have either."""
ALERT_WAIT_SECONDS = 1800
"""Between two alerts of one title."""


def import_wandb() -> Any:
    """The wandb package, imported when first needed: it takes about a second.

    It would report its own errors, with tracebacks, to the server; here it does so only where the user has
    asked for it.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def has_api_key(environ: Mapping[str, str] | None = None) -> bool:
    """Whether WANDB_API_KEY or a netrc entry for the server would let W&B go online."""
    environ = os.environ if environ is None else environ
    if environ.get("WANDB_API_KEY"):
        return True
    own = urlsplit(environ.get("WANDB_BASE_URL") or "").hostname
    try:
        known = netrc.netrc(environ.get("NETRC"))
        return any(known.authenticators(host) for host in ([own] if own else PUBLIC_HOSTS))
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


class WandbSink(Sink):
    """Follows the run in W&B, and never raises.

    Args:
        run_dir: The run's folder: takes W&B's own files, and `wandb_run_id`, which a resumed run reads again.
        config: The run's config, unresolved; secrets are taken out here.
        project: W&B project.
        entity: W&B team or user.
        mode: "auto" is online, or what WANDB_MODE says; online without an API key is offline.
        name: Shown for the run; None lets W&B choose.
        group: Runs of one group are shown together.
        tags: To filter runs by.
        alerts: Whether `alert` does anything.
        settings: Overrides of `WANDB_SETTINGS`.
        wandb_module: Stands in for the wandb package.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        project: str = "moe-medical",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        alerts: bool = True,
        settings: Mapping[str, Any] | None = None,
        wandb_module: Any = None,
    ):
        self.failures = 0
        """Exceptions swallowed so far."""
        self._run: Any = None
        self._closing = False
        self._wandb = wandb_module
        told = {"project": project, "entity": entity, "name": name, "group": group, "tags": list(tags)}
        self._arguments: dict[str, Any] = redact(told) | {"config": redact(config), "job_type": "train"}
        self._arguments |= {"dir": str(run_dir), "resume": "allow", "reinit": "create_new"}
        self._alerts = alerts
        self._settings = {**WANDB_SETTINGS, **(settings or {})}
        self._modes = _modes(mode)
        self._open(run_dir)

    @property
    def active(self) -> bool:
        """Whether W&B still takes numbers."""
        return self._run is not None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs one row, with `step` as "global_step"; give "tokens" among the values."""
        self._do(lambda run: run.log({**_summable(values), "global_step": step}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table, such as the tasks and their regrets."""
        cells = [list(row) for row in rows]
        self._do(lambda run: run.log({name: self._table(columns, cells), "table_step": step}))

    def heat_map(self, name: str, cells: Sequence[Cell], step: int) -> None:
        """Logs a matrix as a table and a chart of it; a cell without a finite number stays empty."""
        known = [list(cell) for cell in cells if cell[2] is not None and math.isfinite(cell[2])]
        self._do(lambda run: run.log({name: self._chart(name, known), "table_step": step}))

    def alert(self, title: str, text: str) -> None:
        """Alerts the run's owner; again under the same title only after `ALERT_WAIT_SECONDS`."""
        if self._alerts:
            level = self._wandb.AlertLevel.WARN
            self._do(lambda run: run.alert(title, text, level=level, wait_duration=ALERT_WAIT_SECONDS))

    def _table(self, columns: Sequence[str], rows: list[list[Any]]) -> Any:
        return self._wandb.Table(columns=list(columns), data=rows)

    def _chart(self, name: str, cells: list[list[Any]]) -> Any:
        table = self._table(list(HEAT_MAP_FIELDS.values()), cells)
        return self._wandb.plot_table(HEAT_MAP, table, HEAT_MAP_FIELDS, {"title": name})

    def close(self, exit_code: int) -> None:
        """Finishes the run and waits until its file is complete."""
        self._modes = []
        self._closing = True
        before = self.failures
        self._do(lambda run: (run.finish(exit_code=exit_code), self._wandb.teardown()))
        if self.failures > before:
            logger.warning("W&B did not finish: its file may lack the last rows. metrics.jsonl is complete.")
        self._run = None

    def _do(self, action: Callable[[Any], object]) -> None:
        """Does it with the run; after a failure with the next mode's run; and so on until no mode is left."""
        while self._run is not None:
            try:
                action(self._run)
                return
            except Exception as error:
                self._count(error)
                self._open_next()

    def _open(self, run_dir: Path) -> None:
        try:
            self._wandb = self._wandb or import_wandb()
            self._arguments["id"] = _run_id(run_dir)
        except Exception as error:
            self._count(error)
        else:
            self._open_next()

    def _open_next(self) -> None:
        self._run = None
        while self._modes and self._run is None:
            try:
                self._run = self._init(self._modes.pop(0))
            except Exception as error:
                self._count(error)
        if self._run is None and not self._closing:
            logger.warning("W&B is off after %d failures", self.failures)

    def _init(self, mode: str) -> Any:
        settings = self._wandb.Settings(**self._settings)
        run = self._wandb.init(mode=mode, settings=settings, **self._arguments)
        run.define_metric("tokens")
        globs = {f"{namespace}/*": summary for namespace, summary in NAMESPACES.items()}
        for series, summary in {**globs, **EXACT}.items():
            run.define_metric(series, step_metric="tokens", summary=summary)
        return run

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            name = type(error).__name__
            logger.warning("W&B failed (%s); it goes on offline if it can. metrics.jsonl is complete.", name)
        if self._wandb is not None:
            with suppress(Exception):
                self._wandb.teardown()  # its process would hold the run id: "run ID is in use"


def _modes(mode: str) -> list[str]:
    """Modes to try, best first; the last one also takes over when W&B's own process dies."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "online"
    if mode == "online" and has_api_key():
        return ["online", "offline", "offline"]
    return ["offline", "offline"] if mode in ("online", "offline") else [mode]


def _summable(values: Mapping[str, float]) -> dict[str, float]:
    """Plain floats, without a NaN under a "min" or "max": W&B would keep it as the best for ever."""
    return {name: float(v) for name, v in values.items() if math.isfinite(v) or summary_of(name) == "last"}


def _run_id(run_dir: Path) -> str:
    """The id in the run's folder, made on the first start: it moves with the folder and ends with it."""
    file = run_dir / "wandb_run_id"
    if file.is_file() and (known := file.read_text(encoding="ascii").strip()):
        return known
    name = re.sub(r"[^A-Za-z0-9_-]", "-", run_dir.resolve().name)[:40]
    file.parent.mkdir(parents=True, exist_ok=True)
    new = f"{name}-{secrets.token_hex(4)}"
    file.write_text(new + "\n", encoding="ascii")
    return new
