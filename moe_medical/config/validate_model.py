"""What a quantised base model cannot be combined with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moe_medical.config.deepspeed import zero_stage
from moe_medical.config.presets import PRESETS, resolve_adapters
from moe_medical.config.schema import RunConfig
from moe_medical.errors import Problem

_KEY = "model.quantization"


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """Whether the adapters and the layout work on the base as it is quantised."""
    kind = config.model.quantization
    if kind == "none":
        return
    if _stage(config) == 3:
        rule = "must be none under ZeRO-3, which keeps the base in parts of plain numbers"
        yield Problem(_KEY, rule, kind, "Use ZeRO-2: the quantised base is small.")
    if kind != "int8" and config.parallel.device == "cpu":
        yield Problem(_KEY, "must be none or int8 with parallel.device cpu: bitsandbytes needs a GPU", kind)
    if config.adapters.preset in PRESETS:
        adapters = resolve_adapters(config.adapters)
        if adapters.experts == "ffn":
            yield Problem(_KEY, "must be none with adapters.experts ffn, which copy the base and train", kind)
        if adapters.dora:
            yield Problem(
                _KEY, "must be none with adapters.dora, which needs the norms of whole weights", kind
            )


def _stage(config: RunConfig) -> int:
    """Of the DeepSpeed JSON; 0 where it cannot be read, which is told elsewhere."""
    try:
        return zero_stage(json.loads(Path(config.parallel.deepspeed).read_text()))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0
