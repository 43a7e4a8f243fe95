"""Where numbers go: `metrics.jsonl`, the record of truth, and W&B, a convenience that may fail at any time.

Decisions: a row of `metrics.jsonl` that could not be written whole leaves no trace and raises `StorageError`.
W&B never stops or fails a run: online falls back to offline, offline to nothing, with one warning. Nothing
passes `step=` to W&B, which drops a step that goes backwards after a resume; `global_step` and `tokens` are
logged as values. Only numbers are logged, never text. This is the only module that imports wandb.
It does not queue: `run.log` hands over to W&B's own process. Sinks live on rank 0.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from moe_medical.errors import DataError, StorageError
from moe_medical.tracking.privacy import redact

logger = logging.getLogger(__name__)

NAMESPACES = {
    "train_loss": "last",
    "eval_loss": "min",
    "eval_score": "max",
    "eval": "last",
    "mix": "last",
    "mix_next": "last",
    "repeats": "last",
    "loss_weight": "last",
    "health": "last",
    "router": "last",
    "router_loss": "last",
}
"""First part of a metric's name -> what the W&B summary keeps of it."""

WANDB_SETTINGS: Mapping[str, Any] = {
    "silent": True,
    "console": "off",  # captured output would carry text and messages
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,  # arguments, host and paths
    "x_disable_stats": True,
    "init_timeout": 15,
    "finish_timeout": 60,
}


class Sink(Protocol):
    """Takes rows of numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the numbers of one step."""

    def close(self, exit_code: int) -> None:
        """Ends the sink; `exit_code` is the process's."""


class Sinks(list[Sink]):
    """Fan-out: every sink gets every row; then a `StorageError` of one is raised, and nothing else."""

    failures = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one row to every sink."""
        self._each(lambda sink: sink.log(values, step))

    def close(self, exit_code: int) -> None:
        """Closes every sink."""
        self._each(lambda sink: sink.close(exit_code))

    def _each(self, action: Callable[[Sink], None]) -> None:
        storage_error = None
        for sink in self:
            try:
                action(sink)
            except StorageError as error:
                storage_error = error
            except Exception as error:
                self._count(sink, error)
        if storage_error is not None:
            raise storage_error

    def _count(self, sink: Sink, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.warning("%s failed (%s); training goes on", type(sink).__name__, type(error).__name__)


# --- metrics.jsonl ---


class JsonlSink:
    """Append-only file of one JSON object per line, each with its "step".

    JSON has no NaN, so a number that is not finite is written as "NaN", "Infinity" or "-Infinity";
    `read_metrics` gives it back as a float. A torn last line of an earlier, killed process is removed.

    Args:
        path: The file; its folder is made.

    Raises:
        StorageError: The file cannot be opened, here, or written, in `log` and `truncate_after`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._last_step: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open_append(path)
            _drop_torn_line(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be opened ({error.strerror}). Check its rights.") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Appends one line; it is with the operating system when this returns."""
        row = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        try:
            _append(self._descriptor, json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise self._refused(step, error) from None
        self._last_step = step

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, atomically; a resumed run calls this with its checkpoint's step."""
        try:
            rows = [row for row in _rows(self.path) if row["step"] <= step]
            _replace(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            os.close(self._descriptor)
            self._descriptor = _open_append(self.path)
        except OSError as error:
            raise self._refused(step, error) from None
        self._last_step = rows[-1]["step"] if rows else None

    def close(self, exit_code: int = 0) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _refused(self, step: int, error: OSError) -> StorageError:
        last = "none" if self._last_step is None else self._last_step
        return StorageError(
            f"{self.path} cannot be written at step {step} ({error.strerror}); last step written: {last}. "
            "Free space or mend the disk, then resume."
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl` as numbers, without a torn last line as a running process may show.

    Raises:
        DataError: A line before the last is damaged.
    """
    return [{name: _number(value) for name, value in row.items()} for row in _rows(path)]


def _number(value: int | float | str) -> float:
    return value if isinstance(value, int) else float(value)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f'{path}:{number} is no object with a "step". Remove the line.') from None
            yield row


def _json_number(value: float) -> int | float | str:
    number = value if type(value) is int else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _open_append(path: Path) -> int:
    return os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)


def _append(descriptor: int, line: bytes) -> None:
    """Writes the whole line or, with the error raised, none of it."""
    start, rest = os.fstat(descriptor).st_size, memoryview(line)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, start)
        raise


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".tmp")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():  # a device has no lines
        return
    with path.open("rb") as file:
        torn = b""
        for line in file:
            torn = b"" if line.endswith(b"\n") else line
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))


# --- W&B ---


def import_wandb() -> Any:
    """The wandb package, imported when first needed: it takes about a second."""
    import wandb

    return wandb


def has_api_key(environ: Mapping[str, str] | None = None) -> bool:
    """Whether WANDB_API_KEY or a netrc entry for the server would let W&B go online."""
    environ = os.environ if environ is None else environ
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


class WandbSink:
    """Follows the run in W&B, and never raises.

    Args:
        run_dir: The run's folder: takes W&B's own files, and `wandb_run_id`, which a resumed run reads again.
        config: The run's config, unresolved; secrets are taken out here.
        project: W&B project.
        entity: W&B team or user.
        mode: "auto" is online, or what WANDB_MODE says; online without an API key is offline.
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
        settings: Mapping[str, Any] | None = None,
        wandb_module: Any = None,
    ):
        self.failures = 0
        """Exceptions swallowed so far."""
        self._run: Any = None
        self._wandb = wandb_module
        self._arguments: dict[str, Any] = {"project": project, "entity": entity, "dir": str(run_dir)}
        self._arguments |= {"config": redact(config), "resume": "allow", "reinit": "create_new"}
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

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table, such as task x expert shares."""
        cells = [list(row) for row in rows]
        self._do(lambda run: run.log({name: self._wandb.Table(columns=list(columns), data=cells)}))

    def close(self, exit_code: int) -> None:
        """Finishes the run and waits until its file is complete."""
        self._modes = []
        self._do(lambda run: (run.finish(exit_code=exit_code), self._wandb.teardown()))
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

    def _init(self, mode: str) -> Any:
        settings = self._wandb.Settings(**self._settings)
        run = self._wandb.init(mode=mode, settings=settings, **self._arguments)
        run.define_metric("tokens")
        for namespace, summary in NAMESPACES.items():
            run.define_metric(f"{namespace}/*", step_metric="tokens", summary=summary)
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
    """Modes to try, best first."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "online"
    if mode == "online":
        return ["online", "offline"] if has_api_key() else ["offline"]
    return [mode]


def _summable(values: Mapping[str, float]) -> dict[str, float]:
    """Plain floats, without a NaN under a "min" or "max": W&B would keep it as the best for ever."""
    return {name: float(v) for name, v in values.items() if math.isfinite(v) or _summary(name) == "last"}


def _summary(name: str) -> str:
    return NAMESPACES.get(name.partition("/")[0], "last")


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
