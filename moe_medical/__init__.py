"""MoLoRA training for medical LLMs. What a notebook needs is here by name, and imported when it is used.

    import moe_medical as mm
    context = mm.attach_adapters(model, mm.MoloraConfig(num_experts=4), seed=0)

`import moe_medical` takes no time: torch comes with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MoloraConfig": "config",
    "RunConfig": "config",
    "load_config": "config",
    "attach_adapters": "adapters.model",
    "adapter_parameters": "adapters.model",
    "load_adapter_state": "adapters.model",
    "load_adapter": "adapters.folder",
    "save_adapter": "adapters.folder",
    "BatchInputs": "adapters.routing",
    "read_metrics": "tracking.sinks",
    "Callback": "training.callback",
    "Trainer": "training.trainer",
    "start_distributed": "distributed.topology",
}
"""Public name -> the module below this one that has it."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_medical' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_medical.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
