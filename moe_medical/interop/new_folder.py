"""A folder for other programs appears whole or not at all: built beside its place, synced, renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moe_medical.errors import ConfigError, Problem, StorageError

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("checksums.json", "adapter_config.json")


def check_new(out: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        ConfigError: It is a file, or a folder that is not empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError("--out", [Problem(str(out), "must be a folder that is not there yet")])
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError("--out", [Problem(str(out), "must be empty, so that nothing is overwritten")])


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft folder that becomes `out` at the end of the block; with an error nothing stays.

    Raises:
        ConfigError: `out` is taken.
        StorageError: The disk refused.
    """
    check_new(out)
    draft = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        yield draft
        _sync(draft)
        if out.is_dir():
            out.rmdir()  # empty, else the check had failed; a rename does not replace it everywhere
        draft.rename(out)
    except (ConfigError, StorageError):
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{out} could not be written ({error}). Free space or fix access.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def folder_names(tasks: Sequence[str]) -> list[str]:
    """The tasks, each usable as the name of one folder.

    Raises:
        ConfigError: One is not, or is given twice.
    """
    wrong = [task for task in tasks if Path(task).name != task or task == ".." or tasks.count(task) > 1]
    if wrong:
        rule = "must be names that a folder can have, each given once"
        raise ConfigError("--task", [Problem("task", rule, wrong)])
    return list(tasks)


def copy_beside_weights(base: Path, folder: Path) -> None:
    """What stands beside a base model's weights: config, index, tokenizer, template, licence."""
    chosen = {path for pattern in _BESIDE_WEIGHTS for path in base.glob(pattern) if path.is_file()}
    for path in sorted(chosen):
        if path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
