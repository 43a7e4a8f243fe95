"""Where a run writes what."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from moe_medical.config import RunConfig
from moe_medical.config.load import run_file_tree
from moe_medical.data.sources import RejectedRecord
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.files import claimed, write_file, write_json
from moe_medical.tracking.privacy import redact
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.sinks import read_metrics

_LOG = logging.getLogger(__name__)


class RunFolder(RunPaths):
    """A run's folder, as the run itself uses it."""

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    def claimed(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder inside the block; a folder that is still empty then goes again.

        Raises:
            StorageError: another run has the folder.
        """
        return claimed(self.root, f"process {os.getpid()} on {socket.gethostname()}")

    def create(self, config: RunConfig) -> None:
        """Make the folder and put the resolved config into it, without secrets.

        Raises:
            StorageError: the file system refused; so do all writers here.
        """
        write_file(
            self.config, yaml.safe_dump(redact(run_file_tree(config)), sort_keys=False, allow_unicode=True)
        )

    def write_rejected(self, records: Iterable[RejectedRecord]) -> None:
        """List the records that could not be used: place, reason and hash, never their text."""
        lines = [f"{record}\n" for record in records]
        if lines:
            _LOG.warning("%d records could not be used: %s", len(lines), self.rejected)
            write_file(self.rejected, "".join(lines))

    @property
    def rejected(self) -> Path:
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
        write_file(self.decisions, "".join(lines))

    def last_logged_step(self) -> int:
        """Of an earlier part of the run; 0 where nothing was logged."""
        rows = read_metrics(self.metrics) if self.metrics.is_file() else []
        return max((int(row["step"]) for row in rows), default=0)

    def put_earlier_away(self) -> None:
        """Move what an earlier start has written, that came to no checkpoint, out of the way of a new one."""
        names = ("metrics.jsonl", "decisions.jsonl", "evaluations", "conflicts", "routing")
        written = [self.root / name for name in names if (self.root / name).exists()]
        if not written:
            return
        number = next(n for n in count(1) if not (self.root / f"earlier-{n}").exists())
        target = self.root / f"earlier-{number}"
        target.mkdir()
        for path in written:
            path.rename(target / path.name)
        _LOG.warning("an earlier start came to no checkpoint; what it wrote is in %s", target)

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
