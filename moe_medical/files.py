"""How this program leaves files: whole or not at all, under the name that they are meant to have.

Decisions:
- What is written is built as a draft beside its place (`.NAME.tmp-*`), synced and renamed. A kill in the
  middle leaves a draft, never something that looks finished. Drafts of killed processes stay where they are.
- A folder with files in it cannot be replaced in one rename: the old one is moved aside (`.NAME.old-*`), and
  comes back where the second rename fails.
- Of two processes that publish the same folder the second to arrive discards its own.
- Whatever the disk refuses is a `StorageError` of one line, with the path and what to do.
- Text is UTF-8, whatever the locale.

Does not append (`tracking/sinks/jsonl.py` does, line by line) and does not check again what is published.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moe_medical.errors import StorageError

CACHE_VARIABLE = "MOE_MEDICAL_CACHE"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_LOG = logging.getLogger(__name__)


def default_cache() -> Path:
    """Root of derived files: $MOE_MEDICAL_CACHE, else `moe_medical` under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    platform = os.environ.get("XDG_CACHE_HOME")
    return (Path(platform) if platform else Path.home() / ".cache") / "moe_medical"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storing(path: Path, fix: str = "Free space or fix access.") -> Iterator[None]:
    """Turn what the disk refuses inside the block into one line about `path`.

    Raises:
        StorageError: an `OSError`, or safetensors' own error, which is how it tells of a full disk.
    """
    try:
        yield
    except StorageError:
        raise  # an OSError too, which has already been put into words
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"{path} cannot be written ({reason}). {fix}") from error


def write_file(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Write a file in one rename; its folder is made where it is missing.

    Args:
        path: Where; an older file in its place goes.
        content: Text is written as UTF-8.
        mode: Permissions; those of a new file of this process where None.

    Raises:
        StorageError: the disk refused, and an older file is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with storing(path):
        if path.is_char_device() or path.is_fifo():  # /dev/stdout: nothing to rename onto
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft_beside(path)
        try:
            draft.touch(mode=0o666 if mode is None else mode, exist_ok=False)
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # nothing is left of it once it is in place
        # Without this the rename itself could be lost with the power, and the older file come back.
        _sync(path.parent)


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """Write a JSON file in one rename.

    Raises:
        StorageError: the disk refused.
    """
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A draft folder that becomes `target` at the end of the block; with an error nothing of it stays.

    Args:
        target: Where; its parents are made. An empty folder may be there.
        replace: Whether a folder with files in it may be, which is then replaced.

    Raises:
        StorageError: the disk refused, or `target` holds files and must not be replaced.
    """
    with storing(target):
        draft = _draft_beside(target)
        try:
            draft.mkdir(parents=True)
            yield draft
            for path in [*draft.rglob("*"), draft]:
                _sync(path)
            _move_into_place(draft, target, replace)
            _sync(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def publish_folder(build: Callable[[Path], None], target: Path) -> Path:
    """Make a derived folder exist, built by `build` into an empty draft unless it is there already.

    No lock is taken: the work may be done twice, never wrongly.

    Args:
        build: Fills the folder it is given. Not called when `target` exists.
        target: The folder to publish; its parents are created.

    Returns:
        `target`, complete.

    Raises:
        StorageError: The disk or file system refused.
    """
    if target.is_dir():
        return target
    with storing(target, f"Free some space, or point {CACHE_VARIABLE} elsewhere."):
        draft = _draft_beside(target)
        try:
            draft.mkdir(parents=True)
            build(draft)
            for path in [*draft.rglob("*"), draft]:
                _sync(path)
            draft.rename(target)
        except OSError:
            # Renaming onto a folder with content is refused: another process was first.
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


@contextmanager
def claimed(folder: Path, claim: str) -> Iterator[None]:
    """Keep other processes out of a folder inside the block; one that is still empty then goes again.

    The kernel frees the lock when its owner ends, in whatever way.

    Args:
        folder: Made where it is missing.
        claim: Who has it, for the message that others get.

    Raises:
        StorageError: another process has the folder.
    """
    lock = folder / ".lock"
    with storing(lock):
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            raise StorageError(f"{folder} is in use by another run ({owner}). Use a new run.name.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise StorageError(f"{folder} cannot be locked ({error.strerror})") from None
            _LOG.warning("%s: no locks on this file system, so nothing keeps a second run out", folder)
        if os.fstat(file.fileno()).st_nlink == 0:  # its owner has just removed it
            raise StorageError(f"{folder} was in use by another run. Try again.")
        with storing(lock):
            file.truncate(0)
            file.write(f"{claim}\n")
            file.flush()
        try:
            yield
        finally:
            if list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Wait until no other process is inside such a block for `target`; no wait where there are no locks."""
    path = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:  # what is wrong with the disk is told by what follows
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that builds %s", target)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        yield
        # Who waits for it, and who makes it anew, will find what was built.
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _draft_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _move_into_place(draft: Path, target: Path, replace: bool) -> None:
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # not every file system renames onto an empty folder
    if not (replace and target.exists()):
        draft.rename(target)
        return
    aside = target.with_name(draft.name.replace(".tmp-", ".old-"))
    target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
