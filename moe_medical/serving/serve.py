"""`serve`: an OpenAI-compatible endpoint for the adapters of one base model, until it is told to stop."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_medical.errors import ConfigError, Problem
from moe_medical.serving.adapted import load_shared_base
from moe_medical.serving.batching import Batching, StaticBatching
from moe_medical.serving.continuous import ContinuousBatching

_LOG = logging.getLogger(__name__)
_HERE = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """Where and how adapters are served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one, which the log tells."""
    batching: Literal["together", "continuous"] = "together"
    batch_rows: int = 16
    queue: int = 64
    """Requests that may wait before the next is refused with 429."""
    max_tokens: int = 256
    """Of an answer, where the client does not say."""
    api_key_env: str | None = None
    """Environment variable with the key that clients must send."""
    adapter_root: Path | None = None
    """Folder of the adapters that may be loaded while serving; None allows no changes."""
    base: str | None = None
    quantization: str | None = None


def serve_adapters(adapters: Sequence[str], settings: ServeSettings, allow_changes: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; what was asked by then is still answered.

    Args:
        adapters: `FOLDER` or `NAME=FOLDER` of each; all of one base model.
        settings: Where and how.
        allow_changes: Whether clients may load adapters below `adapter_root`, and unload any.

    Raises:
        ConfigError: an adapter that cannot be used, two of one name, a port in use, or a missing key.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        fix = "pip install 'moe-medical[serve]'"
        raise ConfigError("serve", [Problem("serve", "needs fastapi and uvicorn", fix=fix)]) from None
    from moe_medical.serving.app import create_app
    from moe_medical.serving.service import Service

    _check_changes(settings.adapter_root, allow_changes)
    folders = _named_folders(adapters)
    key = _api_key(settings.api_key_env)
    # The port is taken before the slow loading, and whatever is wrong is told before it.
    with _listen(settings) as listener:
        base = load_shared_base(next(iter(folders.values())), settings.base, settings.quantization)
        kind = StaticBatching if settings.batching == "together" else ContinuousBatching
        batching: Batching = kind(settings.batch_rows, settings.queue)
        try:
            service = Service(base, folders, batching, settings.max_tokens, settings.adapter_root)
            # uvicorn sends itself SIGTERM again when it has drained; the end is then no failure.
            signal.signal(signal.SIGTERM, lambda *_: None)
            if settings.host not in _HERE and key is None:
                _LOG.warning("anyone who reaches %s may use this server: it asks for no key", settings.host)
            port = listener.getsockname()[1]
            _LOG.info("serving %s on http://%s:%d", ", ".join(service.models()), settings.host, port)
            app = create_app(service, key)
            config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            batching.close()


def _check_changes(root: Path | None, allowed: bool) -> None:
    """Both or neither: nobody shall open a folder by half a thought."""
    if allowed and (root is None or not root.is_dir()):
        rule = "must name the folder of the adapters that may be loaded"
        raise ConfigError("serve", [Problem("--adapter-root", rule, root and str(root))])
    if root is not None and not allowed:
        raise ConfigError("serve", [Problem("--adapter-root", "needs --allow-adapter-changes")])


def _named_folders(adapters: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER`, or `FOLDER`, whose own name is then the adapter's."""
    from moe_medical.serving.protocol import NAME_PATTERN  # with pydantic, which only servers need

    folders: dict[str, Path] = {}
    for text in adapters:
        found = re.fullmatch(f"({NAME_PATTERN})=(.+)", text)
        folder = Path(found[2] if found else text)
        name = found[1] if found else folder.resolve().name
        if name in folders:
            raise ConfigError("serve", [Problem("NAME", "must differ for each adapter", name)])
        folders[name] = folder
    return folders


def _api_key(variable: str | None) -> str | None:
    """From the environment, for a command line can be read by every user of the machine."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError("serve", [Problem("--api-key-env", "must name a variable that is set", variable)])
    return os.environ[variable]


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        return socket.create_server((settings.host, settings.port))
    except (OSError, OverflowError) as e:
        rule = f"must be free and this machine's ({getattr(e, 'strerror', None) or e})"
        address = f"{settings.host}:{settings.port}"
        raise ConfigError("serve", [Problem("--host, --port", rule, address)]) from None
