"""What can go wrong, as exceptions, and the exit code that each one ends the process with.

The exit codes are a contract with the orchestrator (SLURM, Kubernetes, a shell script):
64 fail, 65 fail, 66 fail, 70 fail, 74 retry, 75 requeue, 76 requeue, 77 fail, 79 fail.
Messages never contain the text of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MoeMedicalError(Exception):
    """Base of every error that is told to the user in plain lines, without a traceback."""

    exit_code = 70


@dataclass(frozen=True)
class Problem:
    """One mistake in a user's file: where, which rule, what was found, how to mend it."""

    path: str
    rule: str
    actual: object = None
    fix: str = ""

    def __str__(self) -> str:
        found = "" if self.actual is None else f", got {self.actual!r}"
        fix = f" {self.fix}" if self.fix else ""
        return f"{self.path} {self.rule}{found}.{fix}"


class ConfigError(MoeMedicalError, ValueError):
    """A file or command line that cannot be used; carries every problem found, not only the first."""

    exit_code = 64

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.source = source
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source} has {count}:", *(f"  {p}" for p in self.problems)]))


class DataError(MoeMedicalError, ValueError):
    """Data that is missing, unreadable, invalid or changed."""

    exit_code = 65


class CheckpointMissingError(MoeMedicalError):
    """`resume: must` was asked for and no valid checkpoint exists."""

    exit_code = 66


class StorageError(MoeMedicalError, OSError):
    """A disk or file system refused; the message names the last good step."""

    exit_code = 74


class PreemptedError(MoeMedicalError):
    """The run was told to stop, has saved, and can be resumed."""

    exit_code = 75


class PeerLostError(MoeMedicalError):
    """Another rank or node of the run is gone."""

    exit_code = 76


class SecurityRefusal(MoeMedicalError):
    """Something asked us to run or unpickle code that we do not trust."""

    exit_code = 77


class DivergedError(MoeMedicalError):
    """Gradients stay without finite numbers; the checkpoints from before are good."""

    exit_code = 79
