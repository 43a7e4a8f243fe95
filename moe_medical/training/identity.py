"""What a resumed run must share with the run that saved; else its steps would be another run's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_medical.errors import DataError

_REMEDY = "Restore it or use a new run.name."


@dataclass(frozen=True)
class RunIdentity:
    """Saved in each checkpoint; JSON values only."""

    base_model: str
    base_revision: str | None
    seed: int
    global_batch: int
    mixture: dict[str, Any]
    """State of the mixture: sizes, weights, caps, seed."""
    fingerprints: dict[str, str]
    """File -> sha256 of the data."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Compare with a checkpoint's identity.

        Raises:
            DataError: naming the first thing that differs, a changed data file before all else.
        """
        for file, digest in self.fingerprints.items():
            if saved["fingerprints"].get(file, digest) != digest:
                raise DataError(f"{file} has changed since the checkpoint. {_REMEDY}")
        for key, what in (
            ("base_model", "model.name"),
            ("base_revision", "model.revision"),
            ("seed", "run.seed"),
            ("global_batch", "training.global_batch"),
        ):
            if saved[key] != getattr(self, key):
                raise DataError(
                    f"{what} was {saved[key]!r} in the checkpoint, is {getattr(self, key)!r}. {_REMEDY}"
                )
        if saved["mixture"] != self.mixture:
            raise DataError(f"the mixture (tasks, rows, weights or caps) is not the checkpoint's. {_REMEDY}")
