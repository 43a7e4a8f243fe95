"""Where derived files live, and how a folder appears there whole or not at all.

Decisions: a folder is built beside its target under a name of its own and then renamed, so that a kill in
the middle leaves nothing that looks finished, and of two processes that build at once the second to arrive
discards its own. No lock is taken: the work may be done twice, never wrongly.
Does not check a published folder again, nor sweep away the drafts of killed processes (`.<name>-*`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from moe_medical.errors import MoeMedicalError, StorageError

CACHE_VARIABLE = "MOE_MEDICAL_CACHE"


def default_cache() -> Path:
    """The cache folder: $MOE_MEDICAL_CACHE, else `moe_medical` under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    platform = os.environ.get("XDG_CACHE_HOME")
    return (Path(platform) if platform else Path.home() / ".cache") / "moe_medical"


def publish_folder(build: Callable[[Path], None], target: Path) -> Path:
    """Makes `target` exist, built by `build` into an empty draft folder unless it is there already.

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
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    try:
        draft.mkdir(parents=True)
        build(draft)
        _publish(draft, target)
    except MoeMedicalError:
        raise
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        raise StorageError(
            f"{target} could not be built: {error}. Free some space, or point {CACHE_VARIABLE} elsewhere."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _publish(draft: Path, target: Path) -> None:
    try:
        draft.rename(target)
    except OSError:
        # Renaming onto a folder with content is refused: another process was first.
        if not target.is_dir():
            raise
