"""Where a run writes what."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import yaml

from moe_medical.config import RunConfig
from moe_medical.data.sources import BadRecord
from moe_medical.errors import StorageError
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.tracking.privacy import redact
from moe_medical.tracking.run_paths import RunPaths

_LOG = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class RunFolder(RunPaths):
    """A run's folder, as the run itself uses it."""

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs out of the folder inside the block; a folder that is still empty then goes again.

        The kernel frees the lock when its owner ends, in whatever way.

        Raises:
            StorageError: another run has the folder.
        """
        lock = self.root / ".lock"
        with _writing(lock):
            self.root.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")
        with file:
            _lock(file, self.root)
            with _writing(lock):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            try:
                yield
            finally:
                if list(self.root.iterdir()) == [lock]:
                    lock.unlink()
                    self.root.rmdir()

    def create(self, config: RunConfig) -> None:
        """Make the folder and put the resolved config into it, without secrets.

        Raises:
            StorageError: the file system refused; so do all writers here.
        """
        with _writing(self.config):
            self.root.mkdir(parents=True, exist_ok=True)
            self.config.write_text(
                yaml.safe_dump(redact(asdict(config)), sort_keys=False, allow_unicode=True)
            )

    def write_set_aside(self, records: Iterable[BadRecord]) -> None:
        """List the records that could not be used: place, reason and hash, never their text."""
        lines = [f"{record}\n" for record in records]
        if lines:
            _LOG.warning("%d records could not be used: %s", len(lines), self.set_aside)
            with _writing(self.set_aside):
                self.set_aside.write_text("".join(lines))

    @property
    def set_aside(self) -> Path:
        return self.root / "set_aside.txt"

    def read_evaluation(self, step: int) -> Evaluation | None:
        """The evaluation after `step` steps, or None where there is no readable one."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return Evaluation.from_json(json.loads(self.evaluation(step).read_text()))
        return None

    def evaluations_until(self, step: int) -> Iterator[Evaluation]:
        """The readable ones, that of `step` included, in order."""
        for path in self.of_each_step(self.evaluation(0)):
            found = self.read_evaluation(int(path.stem.removeprefix("step-")))
            if found is not None and found.step <= step:
                yield found

    def add_decision(self, decision: Mapping[str, Any]) -> bool:
        """Add a line to `decisions.jsonl`; False if it is there, as a resumed run may decide it again."""
        known = self._decisions()
        if decision in known:
            return False
        self._write_decisions([*known, decision])
        return True

    def _decisions(self) -> list[Mapping[str, Any]]:
        """Those that can be read."""
        found = []
        for line in self.decisions.read_text().splitlines() if self.decisions.is_file() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _write_decisions(self, decisions: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(decision, ensure_ascii=False) + "\n" for decision in decisions]
        _write_whole(self.decisions, "".join(lines))

    def forget_after(self, step: int) -> None:
        """Steps later than `step` will be done again, so what was seen at them will be too."""
        if self.decisions.is_file():
            self._write_decisions(d for d in self._decisions() if d["step"] <= step)
        for of_step in (self.evaluation, self.conflict, self.routing):
            for path in self.of_each_step(of_step(0)):
                if path.name > of_step(step).name:
                    path.unlink()

    def write_evaluation(self, evaluation: Evaluation) -> None:
        write_json(self.evaluation(evaluation.step), evaluation.to_json())


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        raise StorageError(f"{folder} is in use by another run ({owner}). Use a new run.name.") from None
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise StorageError(f"{folder} cannot be locked ({e.strerror})") from None
        _LOG.warning("%s: no locks on this file system, so nothing keeps a second run out", folder)
    if os.fstat(file.fileno()).st_nlink == 0:  # its owner has just removed it
        raise StorageError(f"{folder} was in use by another run. Try again.")


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """Write a JSON file in one rename."""
    _write_whole(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StorageError(f"{path} cannot be written ({e.strerror})") from None
